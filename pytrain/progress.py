"""What a person sees while it runs: one live line on a terminal, a line per step elsewhere."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import IO, TYPE_CHECKING, Protocol

from pytrain.metrics import StepMetrics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

REFRESH_SECONDS = 0.1
PLAIN_BYTES_SECONDS = 10.0
BAR_WIDTH = 20


class Progress(Protocol):
    """How training tells what it does. Only rank 0 has one that writes."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def note(self, text: str) -> None:
        """Something else worth a line: an evaluation, a checkpoint, a sample."""

    def close(self) -> None:
        """Nothing more will come."""


class NoProgress:
    """Shows nothing: for ranks that leave it to rank 0, and for measuring."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def note(self, text: str) -> None:
        """Something else happened."""

    def close(self) -> None:
        """Nothing more will come."""


class Remaining:
    """Time left, from the mean pace since the first step it saw: evaluations and checkpoints count in."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> timedelta | None:
        """Time left after `step`; None until two steps were seen."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, started = self._first
        seconds = (now - started) / (step - first_step) * (self._total_steps - step)
        return timedelta(seconds=round(seconds))


class PlainProgress:
    """Lines for a log, with the names that scripts made for Megatron-LM look for."""

    def __init__(
        self, total_steps: int, stream: IO[str], every: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Write to `stream` a line each `every` steps, and for the last; time, rates and loss are of all since the
        line before, as in Megatron-LM."""
        self._total_steps = total_steps
        self._stream = stream
        self._every = every
        self._remaining = Remaining(total_steps, clock)
        self._since: list[StepMetrics] = []

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""
        left = self._remaining.after(metrics.step)
        # Without what a line does not show, which may be long: samples and evaluations.
        self._since.append(replace(metrics, heldout={}, prompts=(), groups={}))
        if metrics.step % self._every == 0 or metrics.step == self._total_steps:
            skipped = sum(each.skipped for each in self._since)
            nan = sum(not math.isfinite(each.loss) for each in self._since)
            self._write(plain_line(mean_of(self._since), self._total_steps, skipped, nan, left, datetime.now()))
            self._since.clear()

    def note(self, text: str) -> None:
        """Write the text as it is."""
        self._write(text)

    def close(self) -> None:
        """Nothing to do: each line was flushed."""

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def mean_of(steps: Sequence[StepMetrics]) -> StepMetrics:
    """The last of `steps` (one at least) with the seconds per step, rates and loss of all of them together.

    The loss is the mean over those steps whose gradient was finite, since the weights of the others stayed as they
    are (the last one's where there is none). A rate is weighted by the seconds of its step: tokens per second are all
    tokens over all seconds. Evaluations, samples and checkpoints are in no step's seconds, so they are not in these
    either.
    """
    seconds = sum(step.step_s for step in steps)

    def weighted(rate: Callable[[StepMetrics], float | None]) -> float | None:
        products = [value * step.step_s for step in steps if (value := rate(step)) is not None]
        return sum(products) / seconds if len(products) == len(steps) else None

    losses = [step.loss for step in steps if not step.skipped] or [steps[-1].loss]
    return replace(
        steps[-1],
        loss=sum(losses) / len(losses),
        step_s=seconds / len(steps),
        tok_s=weighted(lambda step: step.tok_s) or 0.0,
        tflops=weighted(lambda step: step.tflops) or 0.0,
        mfu=weighted(lambda step: step.mfu),
        hfu=weighted(lambda step: step.hfu),
    )


def plain_line(
    metrics: StepMetrics, total_steps: int, skipped: int, nan: int, left: timedelta | None, now: datetime
) -> str:
    """One step as a line of a log; `skipped` and `nan` count such steps since the line before.

    `metrics` has the seconds, rates and loss to show, of this step or of all since the line before (`mean_of`).
    """
    fields = [
        f"iteration {metrics.step:8d}/{total_steps:8d}",
        f"consumed samples: {metrics.samples:12d}",
        f"consumed tokens: {metrics.tokens:14d}",
        f"elapsed time per iteration (ms): {metrics.step_s * 1000:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {metrics.tflops:.3f}",
        f"tokens per second: {metrics.tok_s:.1f}",
        f"learning rate: {metrics.lr:.6E}",
        f"global batch size: {metrics.global_batch:5d}",
        f"lm loss: {metrics.loss:.6E}",
        f"loss scale: {metrics.loss_scale:.1f}",
        f"grad norm: {metrics.grad_norm:.3f}",
        f"number of skipped iterations: {skipped:3d}",
        f"number of nan iterations: {nan:3d}",
        f"mfu: {percent(metrics.mfu)}",
        f"memory (GB): {metrics.mem_gb:.2f}",
        f"time left: {left if left is not None else 'n/a'}",
    ]
    return f" [{now:%Y-%m-%d %H:%M:%S.%f}] {' | '.join(fields)} |"


def percent(share: float | None) -> str:
    """A share of a peak for people; "n/a" where the peak is not known."""
    return "n/a" if share is None else f"{100 * share:.1f} %"


class LiveProgress:
    """One line of a terminal, drawn anew after a step but not more often than an eye can follow.

    Without a thread of its own: it draws when it is told of a step.
    """

    def __init__(self, total_steps: int, console: "Console", clock: Callable[[], float] = time.monotonic) -> None:
        """Draw on `console`."""
        from rich.live import Live

        self._total_steps = total_steps
        self._clock = clock
        self._remaining = Remaining(total_steps, clock)
        self._drawn = -math.inf
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""
        left = self._remaining.after(metrics.step)
        now = self._clock()
        if now - self._drawn >= REFRESH_SECONDS or metrics.step == self._total_steps:
            self._drawn = now
            self._live.update(self._row(metrics, left), refresh=True)

    def note(self, text: str) -> None:
        """Write the text above the live line."""
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._live.stop()

    def _row(self, metrics: StepMetrics, left: timedelta | None) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._live.console.width
        line = live_line(metrics, self._total_steps, left, width)
        row = Table.grid(padding=(0, 1))
        text = Text(line, no_wrap=True, overflow="ellipsis")
        if width > len(line) + BAR_WIDTH:
            row.add_row(ProgressBar(total=self._total_steps, completed=metrics.step, width=BAR_WIDTH), text)
        else:
            row.add_row(text)
        return row


def live_line(metrics: StepMetrics, total_steps: int, left: timedelta | None, width: int) -> str:
    """One step in a line of a terminal; in fewer words where `width` columns are too few for all."""
    step = f"{metrics.step}/{total_steps}"
    speed = f"{compact(metrics.tok_s)} tok/s"
    memory = f"{metrics.mem_gb:.2f} GB"
    time_left = "--:--" if left is None else f"{left}"
    full = "  ".join(
        [
            f"step {step}",
            f"loss {metrics.loss:.4f}",
            f"lr {metrics.lr:.2e}",
            f"grad norm {metrics.grad_norm:.3f}",
            speed,
            f"MFU {percent(metrics.mfu)}",
            memory,
            f"{time_left} left",
        ]
    )
    if len(full) <= width:
        return full
    narrow = [f"loss {metrics.loss:.3f}", f"lr {metrics.lr:.1e}", f"norm {metrics.grad_norm:.2f}", speed]
    return " ".join([step, *narrow, f"MFU {percent(metrics.mfu).replace(' ', '')}", memory, time_left])


def compact(number: float) -> str:
    """Three digits and a suffix: 12300 is 12.3k."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"


def make_progress(total_steps: int, stream: IO[str], every: int = 1) -> Progress:
    """Live where `stream` is a terminal, plain lines elsewhere (each `every` steps)."""
    if not stream.isatty():
        return PlainProgress(total_steps, stream, every)
    from rich.console import Console

    return LiveProgress(total_steps, Console(file=stream))


ByteProgress = Callable[[int, int, int | None, int | None], None]
"""Called with bytes done, bytes in all, and documents and tokens so far (None where they are not counted)."""


@contextlib.contextmanager
def byte_progress(title: str, stream: IO[str]) -> Iterator[ByteProgress]:
    """A bar with bytes and rate on a terminal, a line now and then elsewhere, for reading a lot of text."""
    if not stream.isatty():
        yield _plain_bytes(title, stream)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
    )
    with Progress(TextColumn(title), BarColumn(), *columns, console=Console(file=stream)) as bar:
        task = bar.add_task(title, total=None, counts="")

        def update(done: int, total: int, documents: int | None, tokens: int | None) -> None:
            counts = ", ".join(_counts(documents, tokens))
            bar.update(task, completed=done, total=total, counts=counts)

        yield update


def _counts(documents: int | None, tokens: int | None) -> list[str]:
    counted = (("documents", documents), ("tokens", tokens))
    return [f"{compact(number)} {name}" for name, number in counted if number is not None]


def _plain_bytes(title: str, stream: IO[str]) -> ByteProgress:
    started = written = time.monotonic()

    def update(done: int, total: int, documents: int | None, tokens: int | None) -> None:
        nonlocal written
        now = time.monotonic()
        if now - written < PLAIN_BYTES_SECONDS and done < total:
            return
        written = now
        rate = done / max(now - started, 1e-9)
        sizes = [f"{compact(done)}B of {compact(total)}B", f"{compact(rate)}B/s"]
        stream.write(f"{title}: {', '.join([*sizes, *_counts(documents, tokens)])}\n")
        stream.flush()

    return update
