"""Random checkpoints, and several ranks in one process."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pytrain.checkpoint import FileOperations, TensorEntry, TensorPiece, save
from pytrain.errors import UserError

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]

ENTRIES = [
    TensorEntry("embed.weights", "embed.tokens", "fp32", (13, 7)),
    TensorEntry("layer_000.weights", "layer.0.norm1.weight", "fp32", (7,)),
    TensorEntry("layer_000.weights", "layer.0.attention.q.weight", "bf16", (5, 7)),
    TensorEntry("layer_000.weights", "layer.0.mlp.up.weight", "fp16", (11, 7)),
    TensorEntry("layer_000.optimizer", "layer.0.norm1.weight.m", "fp32", (7,)),
]
CONFIG_TEXT = '[model]\nfamily = "llama"\nlayers = 1\n'
STATE = {"samples": 640, "tokens": 163840, "tokenizer_sha256": "ab" * 32}


def random_storage(entry: TensorEntry, random: np.random.Generator) -> NDArray[Any]:
    """[elements]: float32 numbers, or any bits of a 16-bit type."""
    if entry.dtype == "fp32":
        return random.standard_normal(entry.elements).astype(np.float32)
    return random.integers(0, 2**16, entry.elements).astype(np.uint16)


def random_arrays(entries: list[TensorEntry], seed: int) -> Arrays:
    """Flat storage arrays by tensor name; the seed is printed."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    return {entry.tensor: random_storage(entry, random) for entry in entries}


def whole_pieces(entries: list[TensorEntry], arrays: Mapping[str, NDArray[Any]]) -> list[TensorPiece]:
    """Each tensor as one piece."""
    return [TensorPiece(*entry, 0, arrays[entry.tensor]) for entry in entries]


def empty_pieces(entries: list[TensorEntry]) -> list[TensorPiece]:
    """Pieces to read into, zero, one for each tensor."""
    return [
        TensorPiece(*entry, 0, np.zeros(entry.elements, np.float32 if entry.dtype == "fp32" else np.uint16))
        for entry in entries
    ]


def cut(piece: TensorPiece, cuts: list[int]) -> list[TensorPiece]:
    """A piece in parts, cut before these elements (sorted, of the piece)."""
    bounds = [0, *cuts, piece.count]
    return [TensorPiece(*piece.entry, piece.first + begin, piece.data[begin:end]) for begin, end in pairwise(bounds)]


class UnsyncedOperations(FileOperations):
    """Does not wait for the disk: tests save hundreds of times."""

    def sync(self, descriptor: int) -> None:
        """Nothing."""

    def sync_folder(self, path: Path) -> None:
        """Nothing."""


def save_random(run_folder: Path, step: int, seed: int) -> Arrays:
    """Save ENTRIES with random content and return it."""
    arrays = random_arrays(ENTRIES, seed)
    save(run_folder, step, whole_pieces(ENTRIES, arrays), STATE, CONFIG_TEXT, operations=UnsyncedOperations())
    return arrays


class ThreadGroup:
    """One rank of several threads; what travels is pickled, as it is between processes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[bytes]) -> None:
        self.rank = rank
        self.size = size
        self._barrier = barrier
        self._slots = slots

    def barrier(self) -> None:
        """Wait for all."""
        self._barrier.wait()

    def gather(self, value: T) -> list[T]:
        """All values on rank 0."""
        self._slots[self.rank] = pickle.dumps(value)
        self._barrier.wait()
        result = [pickle.loads(slot) for slot in self._slots] if self.rank == 0 else []
        self._barrier.wait()
        return result

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        if self.rank == 0:
            self._slots[0] = pickle.dumps(value)
        self._barrier.wait()
        result: T = pickle.loads(self._slots[0])
        self._barrier.wait()
        return result

    def on_root(self, call: Callable[[], T]) -> T:
        """What the call gives on rank 0; its `UserError` is everybody's."""
        outcome: T | UserError | None = None
        if self.rank == 0:
            try:
                outcome = call()
            except UserError as error:
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome  # type: ignore[return-value]


def run_ranks(size: int, function: Callable[[ThreadGroup], T]) -> list[T | Exception]:
    """Call the function on `size` ranks at a time; what each returned or raised."""
    barrier = threading.Barrier(size, timeout=20)  # a rank that never comes fails the test
    slots = [b""] * size

    def one(rank: int) -> T | Exception:
        try:
            return function(ThreadGroup(rank, size, barrier, slots))
        except UserError as error:  # all ranks raise it, and none waits for another
            return error
        except Exception as error:
            barrier.abort()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
