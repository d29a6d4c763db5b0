"""Makes the checkpoints of a version, once, when it is released; they are never made again.

    python -m tests.checkpoint.released.make

writes tests/checkpoint/released/VERSION/CASE: a tiny run's corpus, its checkpoint of step 3 and expected.json, what
it holds and how training goes on from it. Refuses where the version has its checkpoints already.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pytrain.checkpoint import Checkpoint
from pytrain.config import build
from pytrain.data.indexed import IndexedWriter
from pytrain.information import version
from pytrain.metrics import read_metrics
from pytrain.progress import NoProgress
from pytrain.train import Trainer
from tests import reference

HERE = Path(__file__).resolve().parent
VOCABULARY, LENGTH, SAVED, STEPS, SEED = 13, 8, 3, 5, 6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-fp32": ("fp32", {"family": "gpt2", "layers": 2, "hidden": 6, "heads": 2, "ffn": 10}),
    "llama-bf16": ("bf16", {"family": "llama", "layers": 2, "hidden": 8, "heads": 2, "kv_heads": 1, "ffn": 10}),
}
RECORD = {"hosts": ["host"], "cpu": "cpu", "commit": "unknown"}
"""In place of what a record says of the machine that made it."""


def digest(found: Checkpoint) -> str:
    """sha256 of all that the tensors of a checkpoint are: names, types, shapes and bytes."""
    text = hashlib.sha256()
    for name, entry in sorted(found.tensors().items()):
        text.update(f"{name} {entry.dtype} {entry.shape} ".encode())
        text.update(found.read(name).tobytes())
    return text.hexdigest()


def logits(found: Checkpoint) -> list[list[float]]:
    """[LENGTH, VOCABULARY]: of the float64 model of the tests with these weights, on one random sequence."""
    keys = ("family", "layers", "hidden", "heads", "kv_heads", "head_size", "ffn", "vocabulary", "context")
    model = dict(found.manifest.model)
    shape = reference.Shape(
        **{key: model[key] for key in keys},
        tied_head=model["tied_head"],
        norm_eps=model["norm_eps"],
        **({"rope_theta": model["rope_theta"]} if model["family"] == "llama" else {}),
    )
    weights = {
        name: found.read(name).astype(np.float64)
        for name, entry in found.tensors().items()
        if entry.file.endswith(".weights")
    }
    batch = reference.random_batch(shape, 1, LENGTH, SEED)
    rows: list[list[float]] = reference.model_logits(shape, weights, batch).reshape(LENGTH, -1).tolist()
    return rows


def write_tokenizer(path: Path) -> None:
    """A few hundred bytes that are loaded, and never asked to encode."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h"] * 4),
        model_writer=model,
        vocab_size=VOCABULARY - 1,
        model_type="char",
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def make(case: str, folder: Path) -> None:
    """One case, in a folder that is there; the working directory, so that no path of this machine is kept."""
    dtype, model = CASES[case]
    write_tokenizer(Path("tokenizer.model"))
    with IndexedWriter(Path("corpus"), VOCABULARY) as writer:
        for first, length in enumerate((40, 7, 90, 61)):  # something that is learnt within steps
            writer.add_document((first + 3 * np.arange(length)) % VOCABULARY)
        writer.close()
    config = build(
        {
            "run": {"folder": "run", "steps": STEPS},
            "model": {**model, "vocabulary": VOCABULARY, "context": 2 * LENGTH},
            "tokenizer": {"path": "tokenizer.model"},
            "data": {"train": ["corpus"], "sequence_length": LENGTH},
            "batch": {"micro_batch": 2, "global_batch": 4},
            "learning_rate": {"peak": 0.05},
            "precision": {"dtype": dtype},
        }
    )
    with Trainer(config, progress=NoProgress()) as trainer:
        trainer.record.update(RECORD)
        for _ in range(SAVED):
            trainer.step()
        saved = Checkpoint.open(trainer.save())
        trainer.run()
    lines = read_metrics(Path("run/metrics.jsonl"))
    expected = {
        "step": saved.step,
        "state": {key: value for key, value in saved.state.items() if key != "record"},
        "sha256": digest(saved),
        "logits": logits(saved),
        "losses": [line["loss"] for line in lines],
    }
    shutil.copytree(saved.folder, folder / saved.folder.name)
    for file in Path.cwd().glob("corpus.*"):
        shutil.copy(file, folder)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """All cases of this version."""
    target = HERE / version()
    target.mkdir()
    for case in CASES:
        (target / case).mkdir()
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            make(case, target / case)
            os.chdir(HERE)


if __name__ == "__main__":
    main()
