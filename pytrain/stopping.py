"""SIGTERM and SIGUSR1 ask a run to save and stop at the end of the step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopRequest:
    """Which signal came, if one did."""

    name: str | None = None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note the signals while the block runs; the handlers that were there before come back after it."""
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
