"""The emulated Arm machine that setup.sh made: its Python for a CPU, and what it is asked to run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import shlex, sys
from pytrain.cli import run
sys.exit(max(run(["train", *shlex.split(words)]) for words in sys.argv[1:]))
"""
"""Several runs in one process, each an argument: under emulation half of a short run is the start of Python."""
LONGEST = 240.0
"""Seconds that one command may take on a busy machine before it is killed."""


@dataclass(frozen=True)
class Machine:
    """The folder that setup.sh was given."""

    folder: Path

    def python(self, cpu: str) -> Path:
        """The Python that runs on this CPU: sve128 to sve2048, a64fx, neoverse-n1 or neon-bf16."""
        return self.folder / "bin" / f"python-{cpu}"

    def module(self) -> Path:
        """The compiled `pytrain._native`."""
        (module,) = (self.folder / "native" / "pytrain").glob("_native*.so")
        return module

    def train(self, cpu: str, *runs: str | Path) -> str:
        """What `pytrain train RUN` prints for each, one after another in one process; RUN may have options."""
        return self.run(cpu, "-c", TRAIN, *runs)

    def run(self, cpu: str, *arguments: str | Path, ranks: int = 1, settings: Mapping[str, str] | None = None) -> str:
        """What `python ARGUMENTS` prints on that CPU, with one thread; a failure fails the test with it."""
        words = [str(self.python(cpu)), *map(str, arguments)]
        if ranks > 1:
            words = [str(self.folder / "bin" / "mpiexec"), "-n", str(ranks), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(settings or {})}
        done = subprocess.run(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST,
            check=False,
        )
        assert done.returncode == 0, f"exit status {done.returncode} on {cpu}: {done.stdout}"
        return done.stdout
