"""What is compared runs in a process of its own, so that its peak memory is its own, and does steps when told to.

A request is a line of JSON on the worker's standard input, an answer one on its standard output; what else it prints
goes to standard error. Requests are `{"do": "steps", "count": N}`, `{"do": "profile"}` and `{"do": "close"}`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

from pytrain.errors import UserError

STATUS = Path("/proc/self/status")


class Steps(Protocol):
    """What a worker can do."""

    def steps(self, count: int) -> dict[str, Any]:
        """Do `count` steps: `seconds` and `loss` of each, and the process's `peak_rss_bytes` after them."""

    def profile(self) -> dict[str, Any]:
        """One step more, taken apart: `ops`, seconds of each, and `python_share`."""


def peak_rss_bytes() -> int:
    """The most memory that this process had resident since it began (not since its parent's fork) (Linux)."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_over_output() -> IO[str]:
    """Standard output for answers alone: whatever else is printed to it from now on goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def answer(steps: Steps, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what one request asks for."""
    return steps.steps(int(request["count"])) if request["do"] == "steps" else steps.profile()


def serve(steps: Steps, answers: IO[str]) -> None:
    """Answer the requests on standard input until it ends or one says so."""
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "close":
            return
        print(json.dumps(answer(steps, request)), file=answers, flush=True)


class WorkerError(Exception):
    """The process ended, or said something else than an answer: what it printed last."""


class Worker:
    """A worker as its owner sees it.

    Args:
        command: to start it.
        environment: variables beside those of this process.
        hidden: variables that it does not inherit.

    Raises:
        WorkerError: it ends before it is ready, or before it answers.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], hidden: Sequence[str] = ()) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in hidden}
        self._errors = TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in close)
        self._last_words = ""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**inherited, **environment},
        )

    def wait_ready(self) -> None:
        """Return when it can do steps."""
        self._receive()

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **values}), file=self._process.stdin, flush=True)
        except OSError:
            raise self._ended() from None
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._ended()
        return found

    def _ended(self) -> WorkerError:
        self.close()
        return WorkerError(self._last_words)

    def close(self) -> None:
        """End it; twice is as good as once."""
        if self._process.poll() is None:
            self._process.communicate(json.dumps({"do": "close"}) + "\n")
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        if not self._errors.closed:
            self._errors.seek(0)
            lines = [line for line in self._errors.read().splitlines() if line.strip()]
            self._last_words = lines[-1] if lines else f"it ended with status {self._process.returncode}"
            self._errors.close()


def run(work: Callable[[dict[str, Any]], None]) -> None:
    """The main program of a worker: `python -m MODULE SPEC`, where SPEC is its task as JSON."""
    try:
        work(json.loads(sys.argv[1]))
    except UserError as error:
        sys.exit(str(error))  # its owner says it
