"""Tiny runs for tests: tokenizer and corpora made from random words, and configurations that use them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from pytrain.checkpoint import TensorPiece, save
from pytrain.checkpoint.parameters import weight_entries
from pytrain.config import ModelConfig, RunConfig, build, resolved_toml
from pytrain.data.corpus import prepare
from pytrain.data.tokenizer import train_sentencepiece
from pytrain.errors import UserError
from pytrain.metrics import StepMetrics, read_metrics
from pytrain.train import TrainResult, train

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 320
LENGTH = 32
TIMES = ("step_s", "tok_s", "tflops", "mfu", "hfu", "mem_gb", "saved")
"""The fields of a metrics line that say how fast it went: all others must repeat."""
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "layers": 2, "hidden": 24, "heads": 3},
    "llama": {"family": "llama", "layers": 2, "hidden": 24, "heads": 4, "kv_heads": 2, "ffn": 40},
}


@dataclass(frozen=True)
class Corpora:
    """A folder with tokenizer.model, two training corpora and a held-out one."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    def text(self, name: str) -> Path:
        """The JSONL that the corpus of this name was made of."""
        return self.folder / f"{name}.jsonl"


def random_documents(count: int, seed: int) -> list[str]:
    """Sentences of words that follow one another in a habit, so that there is something to learn."""
    random = np.random.default_rng(seed)
    words = ["naïve", "語", "💡", *("".join(random.choice(list("abcdefgh"), 4)) for _ in range(40))]
    documents = []
    for _ in range(count):
        word, written = int(random.integers(len(words))), []
        for _ in range(int(random.integers(5, 60))):
            word = int(random.integers(len(words))) if random.random() < 0.3 else (5 * word + 3) % len(words)
            written.append(words[word])
        documents.append(" ".join(written) + ".\n")
    return documents


def make_corpora(folder: Path) -> Corpora:
    """Write texts, tokenizer and corpora "train", "more" and "heldout" into a new folder."""
    corpora = Corpora(folder)
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate({"train": 60, "more": 20, "heldout": 12}.items()):
        lines = (json.dumps({"text": text}) + "\n" for text in random_documents(count, seed))
        corpora.text(name).write_text("".join(lines), encoding="utf-8")
    train_sentencepiece([corpora.text("train")], corpora.tokenizer, VOCABULARY - 9, "bpe")
    for name in ("train", "more", "heldout"):
        prepare([corpora.text(name)], folder / name, corpora.tokenizer)
    return corpora


def tables(corpora: Corpora, folder: Path, family: str = "llama") -> dict[str, dict[str, Any]]:
    """What a run.toml would hold: six steps of two micro-batches of two sequences, with clipping."""
    return {
        "run": {"folder": str(folder), "steps": 6},
        "model": MODELS[family] | {"vocabulary": VOCABULARY, "context": 2 * LENGTH},
        "tokenizer": {"path": str(corpora.tokenizer)},
        "data": {
            "train": [str(corpora.folder / "train")],
            "heldout": [str(corpora.folder / "heldout")],
            "sequence_length": LENGTH,
        },
        "batch": {"micro_batch": 2, "global_batch": 4},
        "learning_rate": {"peak": 1e-2},
        "optimizer": {"clip": 0.5},
    }


def configuration(corpora: Corpora, folder: Path, family: str = "llama", **changes: Any) -> RunConfig:
    """A run; `changes` are keys with "__" for the dot: run__steps=3."""
    values = tables(corpora, folder, family)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    values["learning_rate"]["warmup_steps"] = min(2, values["run"]["steps"])
    return build(values, "test")


def write_toml(config: RunConfig, path: Path) -> Path:
    """The configuration as a file for the command line."""
    path.write_text(resolved_toml(config), encoding="utf-8")
    return path


class Quiet:
    """A progress display that keeps its lines; `after_step` is called with each step's metrics."""

    def __init__(self, after_step: Any = None) -> None:
        self.lines: list[str] = []
        self._after_step = after_step

    def step(self, metrics: StepMetrics) -> None:
        if self._after_step is not None:
            self._after_step(metrics)

    def note(self, line: str) -> None:
        self.lines.append(line)

    def close(self) -> None:
        pass


def quiet_train(config: RunConfig, resume: str = "none", after_step: Any = None) -> TrainResult:
    """Train without a display."""
    return train(config, resume, Quiet(after_step))


def tensor_bytes(folder: Path, step: int) -> dict[str, bytes]:
    """The safetensors files of a checkpoint: weights, moments and master, bit for bit."""
    files = sorted((folder / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def assert_same_checkpoint(one: Path, other: Path, step: int) -> None:
    """Both run folders hold the same bits at this step; the differing files are named."""
    ours, theirs = tensor_bytes(one, step), tensor_bytes(other, step)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def timeless_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the fields that say how fast it went."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def command(*arguments: str | Path, **environment: str) -> list[Any]:
    """[words, environment] of `python -m pytrain ARGUMENTS` in a new process that runs this checkout."""
    words = [sys.executable, "-m", "pytrain", *map(str, arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return [words, {**os.environ, "PYTHONPATH": path, **environment}]


def run_command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m pytrain ARGUMENTS` to its end."""
    words, variables = command(*arguments, **environment)
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120, check=False)


def refusal(config: RunConfig, resume: str = "none") -> str:
    """The sentence with which the run is refused."""
    try:
        quiet_train(config, resume)
    except UserError as error:
        return str(error)
    raise AssertionError("the run was not refused")


def save_model(
    run_folder: Path, model: ModelConfig, weights: Mapping[str, NDArray[Any]], tokenizer: Path | None = None
) -> Path:
    """A run folder with one fp32 checkpoint of these weights, whole tensors by name; returns the folder."""
    pieces = [
        TensorPiece(*entry, 0, weights[entry.tensor].astype(np.float32).reshape(-1))
        for entry in weight_entries(model, "fp32")
    ]
    text = tomli_w.dumps({"model": model.model_dump(exclude_none=True)})
    save(run_folder, 1, pieces, {}, text, {} if tokenizer is None else {"tokenizer.model": tokenizer})
    return run_folder


def adamw(
    weights: dict[str, NDArray[np.float64]],
    gradients: dict[str, NDArray[np.float64]],
    state: dict[str, Any],
    *,
    rate: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    decay: float = 0.1,
    clip: float = 1.0,
) -> float:
    """One AdamW update in float64, in place; returns the gradient norm. `state` begins as {}."""
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    factor = min(1.0, clip / norm) if clip else 1.0
    state["count"] = count = state.get("count", 0) + 1
    for name, gradient in gradients.items():
        first, second = state.get(name, (np.zeros_like(gradient), np.zeros_like(gradient)))
        first = beta1 * first + (1 - beta1) * factor * gradient
        second = beta2 * second + (1 - beta2) * (factor * gradient) ** 2
        state[name] = first, second
        step = first / (1 - beta1**count) / (np.sqrt(second / (1 - beta2**count)) + eps)
        if gradient.ndim == 2:
            step = step + decay * weights[name]
        weights[name] -= rate * step
    return norm
