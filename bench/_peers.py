"""Who takes part in `bench.step`, and how each is started: with the same threads on the same cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ._record import NOT_INSTALLED, installed
from ._worker import Worker

if TYPE_CHECKING:
    from pytrain.config import RunConfig

HIDDEN = ("OPENBLAS_CORETYPE",)
"""A forced kernel would handicap whoever uses that library."""
TUNED_MALLOC = MappingProxyType(
    {
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
    }
)
"""glibc gives freed activations back to the kernel after every step, and gets them zeroed; this keeps them."""


OPENBLAS_SPIN = "20"
"""Its idle threads look for work for 2^20 cycles; by default for 2^26 and, with yields, some 0.2 s, on our cores."""


@dataclass(frozen=True)
class Peer:
    """PyTorch in one of the ways in which it is run."""

    name: str
    compiled: bool
    environment: Mapping[str, str]

    def missing(self, config: RunConfig) -> str | None:
        """Why it cannot take part; None if it can."""
        if installed("torch") == NOT_INSTALLED:
            return "PyTorch is not installed"
        if config.precision.dtype == "fp16":
            return "PyTorch is compared in fp32 and bf16 alone"
        if config.parallel.dp * config.parallel.pp * config.parallel.tp > 1:
            return "PyTorch is compared with one process alone"
        return None


PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch_eager", False, {}),
        Peer("torch_compile", True, {}),
        Peer("torch_eager_malloc", False, TUNED_MALLOC),
        Peer("torch_compile_malloc", True, TUNED_MALLOC),
    )
}


def chosen_peers(names: Sequence[str]) -> list[Peer]:
    """The peers of these names; "torch" is eager and compiled with the malloc that everybody has."""
    wanted = [part for name in names for part in (("torch_eager", "torch_compile") if name == "torch" else (name,))]
    return [PEERS[name] for name in dict.fromkeys(wanted)]


def pinned_threads(threads: int | None) -> int:
    """Threads to compute with; this process and all that it starts stay on as many cores, the first of the mask."""
    cores = sorted(os.sched_getaffinity(0))
    if threads is None:
        from pytrain.native import native

        default: int = native().CpuDevice().threads
        return default
    if threads < len(cores):
        os.sched_setaffinity(0, cores[:threads])
    return threads


def in_fresh_environment(module: str, words: Sequence[str], threads: int) -> bool:
    """Run a benchmark again where NumPy's library was started with other threads, or with a forced kernel.

    OpenBLAS reads its variables when NumPy is imported, which it is here already. So that its threads leave the cores
    to whoever is next, they are to sleep sooner; between calls of its own they are awake all the same.

    Args:
        module: as `python -m` names it.
        words: its command line.
        threads: that libraries are to compute with.

    Returns:
        Whether it ran; False where this process's environment will do.

    Raises:
        SystemExit: it failed, with its status.
    """
    count = str(threads)
    wanted = {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "OPENBLAS_THREAD_TIMEOUT": OPENBLAS_SPIN}
    forced = [name for name in HIDDEN if name in os.environ]
    if not forced and all(os.environ.get(name) == value for name, value in wanted.items()):
        return False
    if forced:
        print(f"{', '.join(forced)} is left out: a forced kernel is no peer", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in forced} | wanted
    finished = subprocess.run([sys.executable, "-m", module, *words], env=environment)
    if finished.returncode:
        raise SystemExit(finished.returncode)
    return True


def start_trainer(config: RunConfig, toml: Path, threads: int) -> Worker:
    """The product's trainer on the ranks that its configuration asks for, which share the threads."""
    ranks = config.parallel.dp * config.parallel.pp * config.parallel.tp
    command = [sys.executable, "-m", f"{__package__}._trainer", json.dumps({"config": str(toml)})]
    environment = {"OMP_NUM_THREADS": str(max(1, threads // ranks))}
    if ranks > 1:
        from pytrain.launch import find_mpiexec

        mpiexec, settings = find_mpiexec()
        command, environment = [*mpiexec, "-n", str(ranks), *command], environment | settings
    return Worker(command, environment, HIDDEN)


def start_peer(peer: Peer, config: RunConfig, threads: int) -> Worker:
    """PyTorch on the same shape."""
    spec = {
        "model": config.model.model_dump(mode="json"),
        "batch": config.batch.micro_batch,
        "length": config.data.sequence_length,
        "accumulate": config.micro_batches,
        "dtype": config.precision.dtype,
        "compile": peer.compiled,
        "threads": threads,
    }
    command = [sys.executable, "-m", f"{__package__}._torch", json.dumps(spec)]
    return Worker(command, {"OMP_NUM_THREADS": str(threads), **peer.environment}, HIDDEN)
