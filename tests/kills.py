"""Kills a run again and again, at seeded random points of named phases, until it is through."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pytrain.checkpoint import Checkpoint, newest_checkpoint
from pytrain.config import RunConfig
from tests import runs
from tests.parallel.launch import ROOT, mpiexec

LONGEST = 120.0
"""Seconds that a session may take on a busy machine."""
SOON = 30.0
"""Seconds in which all ranks must be gone after one was killed; it takes less than one on an idle machine."""
EVERY = 2
"""Steps between two saves."""
NEVER: dict[str, Any] = {"rank": 0, "phase": "", "count": 0, "wait": False, "checkpoint": {}}


def killed_run(corpora: runs.Corpora, folder: Path, ranks: int, steps: int) -> RunConfig:
    """A run with everything in it that a kill may come to."""
    return runs.configuration(
        corpora,
        folder,
        run__steps=steps,
        learning_rate__schedule="constant",
        checkpoint__every=EVERY,
        checkpoint__keep_last=2,
        evaluation__every=EVERY,
        evaluation__batches=2,
        parallel__dp=ranks,
        parallel__zero=1 if ranks > 1 else 0,
    )


@dataclass(frozen=True)
class Session:
    """How one process (or job) of the run ended."""

    phase: str | None
    """Where the rank that told of its point was at the kill; None where nobody was killed."""
    counts: list[dict[str, int]]
    """By rank, where it came to its end: how often it came to each phase."""


class Run:
    """One run, started as often as it takes."""

    def __init__(self, config: RunConfig, scratch: Path) -> None:
        self.config, self._scratch = config, scratch
        self._ranks = config.parallel.dp
        scratch.mkdir()
        self._file = runs.write_toml(config, scratch / "run.toml")
        self._number = 0

    def session(self, spec: dict[str, Any], delay: float = 0.0, other: bool = False) -> Session:
        """Start it, and kill one rank `delay` seconds after the point of the spec (`other`: not the one there).

        Checks that nobody lives on, and that the newest checkpoint is whole.
        """
        folder = self._scratch / f"session-{self._number}"
        self._number += 1
        folder.mkdir()
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        os.mkfifo(folder / "pipe")
        reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        log = folder / "log"
        try:
            with log.open("wb") as output:
                process = self._start(folder, output)
            told = self._wait(process, reader, log)
            if told is None:
                assert process.wait(LONGEST) == 0, log.read_text(encoding="utf-8")
                assert not spec["phase"], f"the run came to its end before {spec}"
                found = [folder / f"counts-{rank}.json" for rank in range(self._ranks)]
                return Session(None, [json.loads(file.read_text(encoding="utf-8")) for file in found])
            rank, pid = map(int, told.split())
            time.sleep(delay)
            self._kill(folder, self._other(folder, rank) if other else pid)
            hung_up = select.poll()
            hung_up.register(reader, select.POLLHUP)
            assert hung_up.poll(SOON * 1000), f"ranks still live {SOON} s after the kill"
            assert process.wait(SOON) != 0
            # A thread that waits for its death stands where it was to be, whatever the other one does meanwhile.
            phase = spec["phase"] if spec["wait"] else (folder / f"phase-{rank}").read_bytes().decode().strip()
        finally:
            os.close(reader)
        if newest_checkpoint(self.config.run.folder) is not None:
            Checkpoint.open(self.config.run.folder).verify()
        return Session(phase, [])

    def _start(self, folder: Path, output: Any) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "tests.kill_worker", str(self._file), str(folder), str(folder / "spec.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        if self._ranks > 1:
            command, settings = mpiexec()
            words = [*command, "-n", str(self._ranks), *words]
            environment |= dict(settings)
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], reader: int, log: Path) -> str | None:
        """What the pipe says, or None once the run has come to its end."""
        end = time.monotonic() + LONGEST
        while time.monotonic() < end:
            ready, _, _ = select.select([reader], [], [], 0.05)
            line = os.read(reader, 64) if ready else b""
            if line:
                return line.decode()
            if process.poll() is not None:
                return None
            if ready:  # no writer yet, or none any more
                time.sleep(0.01)
        process.kill()
        raise AssertionError(f"nothing happened for {LONGEST} s: {log.read_text(encoding='utf-8')}")

    def _other(self, folder: Path, rank: int) -> int:
        """The process of another rank, which may be about to start."""
        file = folder / f"pid-{(rank + 1) % self._ranks}"
        end = time.monotonic() + SOON
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return int(file.read_text(encoding="utf-8"))

    @staticmethod
    def _kill(folder: Path, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            raise AssertionError(f"the run ended before it was killed: {(folder / 'log').read_text()}") from None


def kill_until_through(
    corpora: runs.Corpora, scratch: Path, ranks: int, phases: Sequence[str], random: np.random.Generator
) -> Counter[str]:
    """One kill per entry of `phases`, then to the end; the result must be that of an undisturbed run.

    Where it kills is drawn: the rank, the how-manyth time that it comes to the phase, how the checkpoints are written
    and, but for the first of a phase, whether it stands still there or is killed a moment later, wherever it is by
    then. Gives the phases in which ranks died.
    """
    steps = 6 * EVERY + 3 * EVERY * len(phases)
    whole = Run(killed_run(corpora, scratch / "whole", ranks, steps), scratch / "whole.sessions")
    counts = whole.session(NEVER).counts
    parts = Run(killed_run(corpora, scratch / "parts", ranks, steps), scratch / "parts.sessions")
    parts.session(spec_of("save: prepare", 0, 1, True, random))  # a first death, before there is anything
    died: Counter[str] = Counter()
    asked: set[str] = set()
    newest = 0
    for phase in phases:
        comes = [rank for rank in range(ranks) if counts[rank].get(phase)] or list(range(ranks))
        rank = int(random.choice(comes))
        # As often as a session of two saves comes there; a resume is not in the undisturbed run.
        often = max(counts[rank].get(phase, 2) * 2 * EVERY // steps, 1)
        wait = phase not in asked or bool(random.random() < 0.5)
        asked.add(phase)
        spec = spec_of(phase, rank, int(random.integers(often)) + 1, wait, random)
        other = ranks > 1 and wait and bool(random.random() < 0.3)
        found = parts.session(spec, float(random.random()) * 0.01, other)
        assert found.phase is not None
        died[found.phase] += 1
        before, newest = newest, newest_step(parts.config)
        assert newest >= before, f"the checkpoint of step {before} is gone"
        print(f"{spec['phase']} x {spec['count']} on rank {rank}: died in {found.phase}, newest step {newest}")
    parts.session(NEVER)
    runs.assert_same_checkpoint(scratch / "whole", scratch / "parts", steps)
    print(
        *(f"{name}: weights and optimizer {sha256_of(scratch / name, steps)}" for name in ("whole", "parts")),
        sep="\n",
    )
    assert metrics_of(scratch / "whole") == metrics_of(scratch / "parts")
    kept = [sorted(path.name for path in (scratch / name / "checkpoints").iterdir()) for name in ("whole", "parts")]
    assert kept[0] == kept[1]
    return died


def spec_of(phase: str, rank: int, count: int, wait: bool, random: np.random.Generator) -> dict[str, Any]:
    """A kill, in a session that writes its checkpoints in one of three ways."""
    settings = ({"asynchronous": False}, {"snapshot_gb": 1.0}, {"snapshot_gb": 6e-5})[int(random.integers(3))]
    return {"rank": rank, "phase": phase, "count": count, "wait": wait, "checkpoint": settings}


def sha256_of(folder: Path, step: int) -> str:
    """Of all tensors of a checkpoint."""
    return hashlib.sha256(b"".join(runs.tensor_bytes(folder, step).values())).hexdigest()


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run without times, of which there are more with several ranks."""
    return [{key: value for key, value in line.items() if key != "groups"} for line in runs.timeless_metrics(folder)]


def newest_step(config: RunConfig) -> int:
    """Of the newest checkpoint; 0 without one."""
    folder = newest_checkpoint(config.run.folder)
    return 0 if folder is None else Checkpoint.open(folder).step
