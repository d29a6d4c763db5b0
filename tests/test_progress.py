"""What is shown during training, on a terminal and elsewhere."""

import io
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from rich.console import Console

from pytrain.progress import (
    LiveProgress,
    PlainProgress,
    Remaining,
    byte_progress,
    compact,
    live_line,
    make_progress,
    plain_line,
)
from tests.test_metrics import STEP


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticks(*times: float) -> Iterator[float]:
    return iter(times)


def test_plain_lines_have_the_names_that_scripts_look_for() -> None:
    metrics = replace(STEP, step=5, samples=40, tokens=2560, mfu=0.4125)
    line = plain_line(metrics, 100, 1, 0, timedelta(seconds=90), datetime(2026, 11, 24, 12))
    assert line.startswith(
        " [2026-11-24 12:00:00.000000] iteration        5/     100 | consumed samples:           40 |"
    )
    fields = dict(part.split(":", 1) for part in line.split(" | ")[1:])
    values = {name.strip(): value.strip(" |") for name, value in fields.items()}
    assert values == {
        "consumed samples": "40",
        "consumed tokens": "2560",
        "elapsed time per iteration (ms)": "500.0",
        "throughput per GPU (TFLOP/s/GPU)": "0.125",
        "tokens per second": "1024.0",
        "learning rate": "1.000000E-03",
        "global batch size": "8",
        "lm loss": "5.500000E+00",
        "loss scale": "1.0",
        "grad norm": "0.250",
        "number of skipped iterations": "1",
        "number of nan iterations": "0",
        "mfu": "41.2 %",
        "memory (GB)": "1.50",
        "time left": "0:01:30",
    }


def test_plain_progress_skips_lines_but_not_what_they_count() -> None:
    stream = io.StringIO()
    progress = make_progress(7, stream, every=3)
    assert isinstance(progress, PlainProgress)
    for step in range(1, 8):
        progress.step(replace(STEP, step=step, skipped=step == 2, loss=math.nan if step == 4 else 1.0))
    progress.note("saved step 7")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [re.findall(r"iteration +(\d+)/", line) for line in lines] == [["3"], ["6"], ["7"], []]
    assert [re.findall(r"(?:skipped|nan) iterations: +(\d+)", line) for line in lines[:3]] == [
        ["1", "0"],
        ["0", "1"],
        ["0", "0"],
    ]
    assert lines[3] == "saved step 7"
    assert "\x1b" not in stream.getvalue()


def test_time_and_rates_of_a_line_are_of_all_steps_since_the_line_before() -> None:
    stream = io.StringIO()
    progress = PlainProgress(5, stream, every=2)
    seconds = [1.0, 4.0, 2.0, 2.0, 0.5]
    tokens = [100, 100, 300, 100, 50]
    for step, (took, count) in enumerate(zip(seconds, tokens, strict=True), start=1):
        rate = count / took
        progress.step(replace(STEP, step=step, step_s=took, tok_s=rate, tflops=rate / 100, mfu=rate / 1000))
    shown = [
        re.findall(r"(?:iteration \(ms\)|GPU\)|tokens per second|mfu): ([\d.]+)", line)
        for line in stream.getvalue().splitlines()
    ]
    assert shown == [
        ["2500.0", "0.400", "40.0", "4.0"],  # 200 tokens in 5 s
        ["2000.0", "1.000", "100.0", "10.0"],  # 400 in 4 s, and nothing of the line before
        ["500.0", "1.000", "100.0", "10.0"],
    ]


def test_the_loss_of_a_line_is_the_mean_since_the_line_before() -> None:
    """As Megatron-LM prints it: of the steps that changed the weights."""
    stream = io.StringIO()
    progress = PlainProgress(9, stream, every=4)
    for step, loss in enumerate((8.0, 6.0, math.inf, 4.0, math.nan, math.nan, math.nan, math.nan, 2.0), start=1):
        progress.step(replace(STEP, step=step, loss=loss, skipped=not math.isfinite(loss)))
    assert re.findall(r"lm loss: (\S+)", stream.getvalue()) == ["6.000000E+00", "NAN", "2.000000E+00"]


def test_an_unknown_peak_stays_unknown_over_several_steps() -> None:
    stream = io.StringIO()
    progress = PlainProgress(2, stream, every=2)
    for step in (1, 2):
        progress.step(replace(STEP, step=step, mfu=None))
    assert "mfu: n/a" in stream.getvalue()


def test_time_left_is_from_the_mean_pace() -> None:
    clock = ticks(100.0, 102.0, 108.0)
    remaining = Remaining(20, lambda: next(clock))
    assert remaining.after(11) is None
    assert remaining.after(12) == timedelta(seconds=16)
    assert remaining.after(15) == timedelta(seconds=10)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_live_line_shows_everything_in_the_width_there_is(width: int) -> None:
    metrics = replace(STEP, step=1234, loss=3.14159, lr=5.96e-4, grad_norm=0.512, tok_s=12345.0, mfu=0.4125)
    line = live_line(metrics, 20000, timedelta(hours=2, minutes=3, seconds=4), width)
    assert len(line) <= max(width, 84)
    for shown in (
        "1234/20000",
        "3.14",
        "6.0e-04" if width < 120 else "5.96e-04",
        "0.51",
        "12.3k",
        "41.2",
        "1.50 GB",
    ):
        assert shown in line
    assert "2:03:04" in line


def test_live_progress_draws_and_lets_notes_through() -> None:
    stream = Terminal()
    clock = ticks(0.0, 0.0, 0.01, 0.01, 5.0, 5.0)
    progress = LiveProgress(3, Console(file=stream, force_terminal=True, width=160), lambda: next(clock))
    progress.step(replace(STEP, step=1, loss=1.25))
    progress.step(replace(STEP, step=2, loss=2.25, skipped=True))
    progress.note("saved [bold]step-2[/bold]")
    progress.step(replace(STEP, step=3, loss=3.25))
    progress.close()
    shown = stream.getvalue()
    assert "step 1/3" in shown
    assert "loss 2.2500" not in shown  # a hundredth of a second after the first: not drawn
    assert "step 3/3" in shown
    assert "saved [bold]step-2[/bold]" in shown  # text is text, never markup


def test_a_terminal_gets_the_live_line() -> None:
    progress = make_progress(3, Terminal())
    assert isinstance(progress, LiveProgress)
    progress.close()


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (12345, "12.3k"), (5e6, "5M"), (1.5e12, "1.5T")]
)
def test_compact(number: float, text: str) -> None:
    assert compact(number) == text


def test_byte_progress() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        with byte_progress("prepare", stream) as update:
            update(500, 1000, 1, 50)
            update(1000, 1000, 2, 12345)
    assert re.fullmatch(r"prepare: 1kB of 1kB, [\d.]+[kMGT]?B/s, 2 documents, 12.3k tokens\n", plain.getvalue())
    assert "2 documents, 12.3k tokens" in terminal.getvalue()
    with byte_progress("read", plain) as update:
        update(1000, 1000, None, None)
    assert plain.getvalue().endswith("B/s\n")
