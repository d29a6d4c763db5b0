"""A run on random tokens, for measuring: the product's own trainer needs a corpus and a tokenizer."""

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pytrain.config import RunConfig, build
from pytrain.data.indexed import IndexedWriter
from pytrain.presets import find_preset

SEED = 1
MODELS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "gpt2-14m": {
            **{"family": "gpt2", "layers": 6, "hidden": 384, "heads": 6},
            **{"vocabulary": 8192, "context": 1024},
        },
        "gpt2-2x128": {
            **{"family": "gpt2", "layers": 2, "hidden": 128, "heads": 4},
            **{"vocabulary": 1024, "context": 1024},
        },
    }
)
"""Shapes that are measured and that nobody trains: a small model, and one whose steps are mostly overhead."""


def model_keys(name: str) -> Mapping[str, object]:
    """The keys of a model: one of MODELS, or a preset's.

    Raises:
        UserError: there is none of that name.
    """
    return MODELS[name] if name in MODELS else find_preset(name).model


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
    tp: int = 1,
) -> RunConfig:
    """The configuration of a run of a model (by name, or its keys), with its files in `folder`."""
    keys = dict(model_keys(model) if isinstance(model, str) else model)
    if length > int(str(keys["context"])):
        keys["context"] = length  # learned positions need a row for each
    vocabulary = int(str(keys["vocabulary"]))
    write_corpus(folder / "random", vocabulary, (batch * 64 + 1) * length)
    write_tokenizer(folder / "tokenizer.model")
    return build(
        {
            "run": {"folder": str(folder / "run"), "steps": steps},
            "model": keys,
            "tokenizer": {"path": str(folder / "tokenizer.model")},
            "data": {"train": [str(folder / "random")], "sequence_length": length},
            "batch": {"micro_batch": batch, "global_batch": global_batch or batch},
            "learning_rate": {"peak": 1e-4},
            "precision": {"dtype": dtype},
            "recompute": {"policy": recompute},
            "parallel": {"tp": tp},
        },
        "the benchmark's configuration",
    )
