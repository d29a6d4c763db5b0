"""Small models of both families: their shapes, random weights, and checkpoints that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from pytrain.checkpoint import Checkpoint, TensorPiece, save
from pytrain.checkpoint.parameters import weight_entries
from pytrain.checkpoint.pieces import storage_dtype
from pytrain.config import ModelConfig, build_model
from tests.checkpoint_cases import UnsyncedOperations

Table = dict[str, Any]

SCALING: Table = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA: Table = {
    "family": "llama", "layers": 2, "hidden": 24, "heads": 6, "kv_heads": 2, "head_size": 10, "ffn": 28,
    "vocabulary": 37, "context": 64, "rope_theta": 500000.0, "norm_eps": 1e-6,
}  # fmt: skip
GPT2: Table = {
    "family": "gpt2",
    "layers": 2,
    "hidden": 24,
    "heads": 3,
    "ffn": 40,
    "vocabulary": 37,
    "context": 19,
}
MODELS: dict[str, Table] = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tied_head": True},
    "llama, scaled": LLAMA | {"rope_scaling": SCALING, "head_size": 4},
    "gpt2": GPT2,
    "gpt2, untied": GPT2 | {"tied_head": False},
}


def model(name: str) -> ModelConfig:
    """One of MODELS."""
    return build_model(MODELS[name])


def random_weights(shape: ModelConfig, dtype: str, seed: int) -> dict[str, NDArray[Any]]:
    """Storage arrays in their global shapes; the seed is printed."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    weights = {}
    for entry in weight_entries(shape, dtype):
        bits = random.integers(0, 2**16, entry.shape).astype(np.uint16)
        weights[entry.tensor] = bits if dtype != "fp32" else random.standard_normal(entry.shape).astype(np.float32)
    return weights


def save_weights(
    run_folder: Path,
    shape: ModelConfig,
    dtype: str,
    weights: dict[str, NDArray[Any]],
    extra_files: dict[str, Path] | None = None,
) -> Checkpoint:
    """A checkpoint of these weights, under a configuration that holds the model alone."""
    pieces = [
        TensorPiece(*entry, 0, np.ascontiguousarray(weights[entry.tensor], storage_dtype(dtype)).ravel())
        for entry in weight_entries(shape, dtype)
    ]
    config = tomli_w.dumps({"model": shape.model_dump(exclude_none=True)})
    save(run_folder, 3, pieces, {}, config, extra_files, operations=UnsyncedOperations())
    return Checkpoint.open(run_folder)
