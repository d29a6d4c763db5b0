"""Starts ranks for tests, under whichever mpiexec is there: beside this Python, else on the path."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from pytrain import launch
from pytrain.collectives import Group, Settings
from pytrain.errors import UserError
from pytrain.launch import find_mpiexec

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 120.0
"""Seconds that a job may take on a busy machine before the test kills it."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    status: int
    output: str
    """Standard output and standard error of all ranks together."""


@cache
def mpiexec() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The command without its number of ranks, and the environment that lets it start many as root."""
    try:
        command, settings = find_mpiexec()
    except UserError as error:
        pytest.skip(str(error))
    return tuple(command), tuple(settings.items())


def run_ranks(ranks: int, module: str, *arguments: str, timeout: float = LONGEST, threads: int | None = 1) -> Ended:
    """Run `python -m MODULE ARGUMENTS` on so many ranks, each with so many threads (None: of its own choice).

    A job that takes longer is killed, and fails the test with what it printed so far.
    """
    command, settings = mpiexec()
    environment = {**os.environ, **dict(settings), "OMP_NUM_THREADS": str(threads)}
    if threads is None:
        del environment["OMP_NUM_THREADS"]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [*command, "-n", str(ranks), sys.executable, "-X", "faulthandler", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{module} on {ranks} ranks was not done after {timeout} s; it printed:\n{output}")
    print(output)
    return Ended(process.returncode, output)


def check_ranks(ranks: int, module: str, *arguments: str, timeout: float = LONGEST) -> str:
    """As `run_ranks`, for a job that must end well; gives its output back."""
    ended = run_ranks(ranks, module, *arguments, timeout=timeout)
    assert ended.status == 0, f"status {ended.status}; the job printed:\n{ended.output}"
    return ended.output


def run_worker(main: Callable[[Group], None], settings: Settings) -> None:
    """In a rank: run `main` on the group of all ranks; an exception in one ends all of them, with its traceback.

    The group is made without the launch of a run, which warns and refuses what tests may do.
    """
    from mpi4py import MPI

    from pytrain.collectives.mpi_group import world_group

    try:
        world = world_group(settings, MPI.COMM_WORLD)
        main(world)
        world.close()
    except BaseException as error:
        launch._Ranks(MPI.COMM_WORLD).abort(error)


@contextmanager
def liveness(folder: Path) -> Iterator[tuple[str, LivePipe]]:
    """A named pipe that every rank holds open for writing (`hold`): it tells when the last one is gone."""
    path = folder / "alive"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield str(path), LivePipe(reader)
    finally:
        os.close(reader)


@dataclass(frozen=True)
class LivePipe:
    """The test's end of the pipe."""

    reader: int

    def assert_all_gone(self, timeout: float) -> None:
        """Every rank wrote once, and none holds its end any more within `timeout` seconds."""
        poll = select.poll()
        poll.register(self.reader, select.POLLHUP)
        assert poll.poll(timeout * 1000), f"ranks still live {timeout} s after the end of the job"
        assert os.read(self.reader, 4096), "no rank ever held the pipe: the test would prove nothing"


def hold(path: str) -> int:
    """In a rank: hold the pipe until this process ends."""
    writer = os.open(path, os.O_WRONLY)
    os.write(writer, b".")
    return writer
