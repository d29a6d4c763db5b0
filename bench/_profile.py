"""Time inside native calls of a step, by op: the trainer runs as it is, its native objects are stood in for.

`watch(stages, ...)` puts a stand-in before each stage's native object and device for as long as it is open. A call
passes through and is timed; with `split` a range of ops is run one op at a time, input and weight gradients apart,
which is what the range does inside. The rest of the step's time is Python's, or waiting for other ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pytrain.errors import UserError

if TYPE_CHECKING:
    from pytrain.stage import Stage

DEVICE_NAMES = {
    "fill": "zero_gradients",
    "sum_squares": "gradient_norm",
    "sum_squares_each": "gradient_norm",
    "adamw_each": "adamw",
    "finish_norm": "gradient_norm",
}
"""What the optimizer's device calls are for; others go by their own name."""
DIGITS = "0123456789"
"""The norms of a layer are norm1 and norm2; both are norms."""
RANGES = ("forward", "backward", "backward_input", "backward_weight", "recompute")


class Span(NamedTuple):
    """One native call, or one op of it."""

    name: str
    begin: float
    """Seconds of `time.perf_counter`."""
    end: float
    detail: str
    """Which op of the model, for instance "layer 3 mlp"."""


class Recorder:
    """The native calls of a step.

    Args:
        split: run ranges of ops one op at a time.
    """

    def __init__(self, split: bool) -> None:
        self.split = split
        self.spans: list[Span] = []
        self.calls = 0
        """Native calls; a range that was split counts as the calls it became."""

    def timed(self, name: str, detail: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call and remember how long it took."""
        self.calls += 1
        begin = time.perf_counter()
        try:
            return call(*arguments, **keywords)
        finally:
            self.spans.append(Span(name, begin, time.perf_counter(), detail))

    @property
    def seconds(self) -> float:
        """In all native calls together; they do not overlap."""
        return sum(span.end - span.begin for span in self.spans)

    def by_name(self) -> dict[str, float]:
        """Seconds of each name, the longest first."""
        total: dict[str, float] = {}
        for span in self.spans:
            total[span.name] = total.get(span.name, 0.0) + span.end - span.begin
        return dict(sorted(total.items(), key=lambda entry: -entry[1]))


class _Device:
    """Stands before a device: every method is timed under what it is for."""

    def __init__(self, device: Any, recorder: Recorder) -> None:
        self._device, self._recorder = device, recorder

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._device, name)
        if not callable(found):
            return found
        label, timed = DEVICE_NAMES.get(name, name), self._recorder.timed

        def call(*arguments: Any, **keywords: Any) -> Any:
            return timed(label, name, found, *arguments, **keywords)

        setattr(self, name, call)
        return call


class _Native:
    """Stands before a native stage: ranges of ops are timed, everything else passes."""

    def __init__(self, stage: Stage, recorder: Recorder) -> None:
        self._native, self._recorder = stage.native, recorder
        self._names = {op: stage.shape.op_name(op) for op in range(stage.first_op, stage.last_op)}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._native, name)
        if name in RANGES:

            def call(slot: int, begin: int, end: int, *rest: Any) -> None:
                self._range(name, slot, begin, end, *rest)

            setattr(self, name, call)
            return call
        return found

    def _range(self, name: str, slot: int, begin: int, end: int, *rest: Any) -> None:
        timed = self._recorder.timed
        if not self._recorder.split:
            timed(name, f"ops {begin} to {end}", getattr(self._native, name), slot, begin, end, *rest)
            return
        ops = range(begin, end) if name in ("forward", "recompute") else reversed(range(begin, end))
        parts = ("backward_input", "backward_weight") if name == "backward" else (name,)
        for op in ops:
            for part in parts:
                detail = self._names[op]
                label = f"{detail.split()[-1].rstrip(DIGITS)}.{part}"
                timed(label, detail, getattr(self._native, part), slot, op, op + 1, *rest)


@contextmanager
def watch(stages: Iterable[Stage], recorder: Recorder) -> Iterator[Recorder]:
    """Record the native calls of these stages, and of what works on them, inside the `with` block."""
    kept = [(stage, stage.native, stage.device) for stage in stages]
    try:
        for stage, _, device in kept:
            stage.native = cast(Any, _Native(stage, recorder))
            stage.device = cast(Any, _Device(device, recorder))
        yield recorder
    finally:
        for stage, native, device in kept:
            stage.native, stage.device = native, device


def write_trace(path: Path, spans: Iterable[Span], seconds: float) -> None:
    """The spans of a step of so many seconds that began at 0, as a Chrome trace, which ui.perfetto.dev opens.

    Raises:
        UserError: the file cannot be written.
    """
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "step"}},
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": 2, "args": {"name": "native calls"}},
        {"name": "step", "cat": "step", "ph": "X", "ts": 0.0, "dur": 1e6 * seconds, "pid": 1, "tid": 1},
    ]
    events += [
        {
            "name": span.name,
            "cat": span.name.split(".")[0],
            "ph": "X",
            "ts": 1e6 * span.begin,
            "dur": 1e6 * (span.end - span.begin),
            "pid": 1,
            "tid": 2,
            "args": {"op": span.detail},
        }
        for span in spans
    ]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
