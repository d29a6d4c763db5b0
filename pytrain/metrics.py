"""What is known about each step, and `metrics.jsonl`: one JSON object per step."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from pytrain.errors import UserError
from pytrain.flops import utilization


@dataclass(frozen=True)
class Evaluation:
    """Result on one held-out corpus."""

    loss: float
    """Mean over tokens, in nats."""
    perplexity: float
    bits_per_byte: float | None
    """Per UTF-8 byte of the text, which compares across tokenizers; None where the bytes are not known."""

    @property
    def sentence(self) -> str:
        """All of it in words."""
        bits = "n/a" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"
        return f"loss {self.loss:.4f} nats/token, perplexity {self.perplexity:.2f}, bits per byte {bits}"


@dataclass(frozen=True)
class Sample:
    """Text that the model wrote."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Traffic:
    """What rank 0 did in one of its groups during a step."""

    waited_s: float
    """Seconds in which it stood still for others."""
    hidden_s: float
    """Seconds of exchanges that ran beside computation."""
    bytes_sent: int
    """By our own algorithms."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint took, on rank 0."""

    step: int
    """Whose checkpoint it is."""
    blocked_s: float
    """Seconds in which training stood still for it."""
    background_s: float
    """Seconds in which it was written while training went on."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.jsonl`; a value that is not finite is written as null."""

    step: int
    """From 1."""
    tokens: int
    """Consumed since the start of the run, this step included."""
    samples: int
    """Sequences consumed since the start of the run, this step included."""
    global_batch: int
    """Sequences of this step."""
    loss: float
    """Mean over the step's tokens, in nats."""
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    loss_scale: float
    skipped: bool
    """The gradient was not finite and the weights were left as they are."""
    step_s: float
    """Seconds of this step."""
    tok_s: float
    """Tokens consumed per second of this step."""
    tflops: float
    """Model TFLOP/s per rank."""
    mfu: float | None
    """Model FLOPs over peak, 0 to 1; None where the peak is not known."""
    hfu: float | None
    """The same with recomputation counted."""
    mem_gb: float
    """Resident memory of this process, in 10^9 bytes."""
    heldout: Mapping[str, Evaluation] = field(default_factory=dict)
    """By name of the corpus; empty where the step did not evaluate."""
    prompts: tuple[Sample, ...] = ()
    groups: Mapping[str, Traffic] = field(default_factory=dict)
    """By group (world, tp, pp, dp); empty in one process."""
    saved: Saved | None = None
    """The checkpoint that became whole since the step before, if one did."""


@dataclass(frozen=True)
class Throughput:
    """Turns tokens and seconds into rates, for one kind of step."""

    model_flops_per_token: int
    hardware_flops_per_token: int
    peak_flops: float | None
    """Of all ranks together, per second; None where it is not known."""
    ranks: int = 1

    def rates(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """The fields tok_s, tflops, mfu and hfu of a step that consumed `tokens` tokens in `seconds`.

        `tokens` is what the step really consumed, counted by the caller, not what the configuration asks for.
        """
        tokens_per_second = tokens / seconds
        model = self.model_flops_per_token * tokens_per_second
        return {
            "tok_s": tokens_per_second,
            "tflops": model / self.ranks / 1e12,
            "mfu": utilization(model, self.peak_flops),
            "hfu": utilization(self.hardware_flops_per_token * tokens_per_second, self.peak_flops),
        }


def resident_gigabytes() -> float:
    """Resident memory of this process in 10^9 bytes (Linux)."""
    statm = os.open("/proc/self/statm", os.O_RDONLY)  # once a step: without what a text file costs
    try:
        pages = int(os.read(statm, 128).split()[1])
    finally:
        os.close(statm)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


class MetricsWriter:
    """Appends steps to a JSONL file, each line flushed, so that a killed run loses no finished step."""

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        """Open `path`; lines after step `resumed_step` are cut off, as is a last line that was not finished.

        Raises:
            UserError: the file cannot be written, or has a line that is not a step's.
        """
        try:
            if path.exists():
                os.truncate(path, _length_up_to(path, resumed_step))
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, metrics: StepMetrics) -> None:
        """Append one step."""
        self._file.write(json.dumps(as_json(metrics), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing is lost without, since every line is flushed."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def as_json(metrics: StepMetrics) -> dict[str, object]:
    """The object of one line: non-finite numbers as None; what a step does not have is left out."""
    values = dict(vars(metrics))
    values["heldout"] = {name: asdict(found) for name, found in metrics.heldout.items()}
    values["prompts"] = [asdict(sample) for sample in metrics.prompts]
    values["groups"] = {name: asdict(traffic) for name, traffic in metrics.groups.items()}
    values["saved"] = None if metrics.saved is None else asdict(metrics.saved)
    for name in ("heldout", "prompts", "groups", "saved"):
        if not values[name]:
            del values[name]
    cleaned = _finite(values)
    assert isinstance(cleaned, dict)
    return cleaned


def _finite(value: object) -> object:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def read_metrics(path: Path) -> list[dict[str, object]]:
    """All finished lines of a metrics file, as dictionaries.

    Raises:
        UserError: a line is not a step's.
    """
    with path.open("rb") as file:
        return [_parsed(path, number, line) for number, line in enumerate(file, 1) if line.endswith(b"\n")]


def _length_up_to(path: Path, step: int) -> int:
    """Bytes of the lines whose step is at most `step`."""
    length = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            found = _parsed(path, number, line)["step"]
            assert isinstance(found, int)
            if found > step:
                break
            length += len(line)
    return length


def _parsed(path: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise UserError(f'{path} line {number} is not a JSON object with a "step"; move the file away to go on')
    return values
