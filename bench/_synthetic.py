"""A run on random tokens, for measuring: the product's own trainer needs a corpus and a tokenizer."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pytrain.config import RunConfig, build
from pytrain.data.indexed import IndexedWriter
from pytrain.presets import PRESETS, find_preset

SEED = 1


def write_corpus(prefix: Path, vocabulary: int, tokens: int) -> None:
    """Random tokens as one document."""
    random = np.random.default_rng(SEED)
    with IndexedWriter(prefix, vocabulary) as writer:
        writer.add_document(random.integers(0, vocabulary, tokens))
        writer.close()


def write_tokenizer(path: Path) -> None:
    """The smallest tokenizer that the trainer accepts: it is loaded, and never asked to encode."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h"] * 4),
        model_writer=model,
        vocab_size=12,
        model_type="char",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def synthetic_run(
    folder: Path,
    model: str | Mapping[str, object],
    *,
    batch: int,
    length: int,
    steps: int,
    global_batch: int | None = None,
    dtype: str = "fp32",
    recompute: str = "none",
) -> RunConfig:
    """The configuration of a run of a preset (by name) or model (its keys), with its files in `folder`."""
    keys = {"preset": model} if isinstance(model, str) else dict(model)
    if isinstance(model, str):
        find_preset(model)
    vocabulary = int(str((dict(PRESETS[model].model) if isinstance(model, str) else keys)["vocabulary"]))
    write_corpus(folder / "random", vocabulary, (batch * 64 + 1) * length)
    write_tokenizer(folder / "tokenizer.model")
    run: dict[str, object] = {"folder": str(folder / "run"), "steps": steps}
    return build(
        {
            "run": run,
            "model": keys,
            "tokenizer": {"path": str(folder / "tokenizer.model")},
            "data": {"train": [str(folder / "random")], "sequence_length": length},
            "batch": {"micro_batch": batch, "global_batch": global_batch or batch},
            "learning_rate": {"peak": 1e-4},
            "precision": {"dtype": dtype},
            "recompute": {"policy": recompute},
        },
        "the benchmark's configuration",
    )
