"""metrics.jsonl: what a line holds, and that a resumed run goes on where its checkpoint was."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytrain.errors import UserError
from pytrain.metrics import (
    Evaluation,
    MetricsWriter,
    Sample,
    StepMetrics,
    Throughput,
    as_json,
    read_metrics,
    resident_gigabytes,
)

STEP = StepMetrics(
    step=1,
    tokens=512,
    samples=8,
    global_batch=8,
    loss=5.5,
    lr=1e-3,
    grad_norm=0.25,
    loss_scale=1.0,
    skipped=False,
    step_s=0.5,
    tok_s=1024.0,
    tflops=0.125,
    mfu=None,
    hfu=None,
    mem_gb=1.5,
)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, steps: range, resumed_step: int = 0) -> None:
    with MetricsWriter(path, resumed_step) as writer:
        for step in steps:
            writer.write(replace(STEP, step=step))


def test_one_object_per_step_flushed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(STEP)
    (line,) = lines(path)  # read before the writer is closed
    assert set(line) == {
        *("step", "tokens", "samples", "global_batch", "loss", "lr", "grad_norm", "loss_scale", "skipped"),
        *("step_s", "tok_s", "tflops", "mfu", "hfu", "mem_gb"),
    }
    assert (line["loss"], line["mfu"], line["skipped"]) == (5.5, None, False)
    writer.close()


def test_evaluation_and_samples_stand_in_the_line_of_their_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(
            replace(
                STEP,
                heldout={"library": Evaluation(loss=2.0, perplexity=math.exp(2.0), bits_per_byte=1.25)},
                prompts=(Sample("def ", "日本語\n"),),
            )
        )
    (line,) = lines(path)
    assert line["heldout"] == {"library": {"loss": 2.0, "perplexity": math.exp(2.0), "bits_per_byte": 1.25}}
    assert line["prompts"] == [{"prompt": "def ", "text": "日本語\n"}]
    assert "日本語" in path.read_text(encoding="utf-8")


def test_what_is_not_finite_becomes_null() -> None:
    line = as_json(replace(STEP, loss=math.nan, grad_norm=math.inf, skipped=True))
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (None, None, True)
    json.dumps(line, allow_nan=False)


def test_a_resumed_run_cuts_off_later_steps(tmp_path: Path) -> None:
    path, straight = tmp_path / "resumed.jsonl", tmp_path / "straight.jsonl"
    write(path, range(1, 8))
    write(path, range(6, 11), resumed_step=5)
    write(straight, range(1, 11))
    assert path.read_bytes() == straight.read_bytes()


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(1, 3))
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_a_line_cut_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    path.write_bytes(path.read_bytes()[:-10])
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    write(path, range(6, 7), resumed_step=5)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("garbage", [b"step 3\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "3"}\n', b"\xff\n"])
def test_a_foreign_file_is_not_cut(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 3))
    content = path.read_bytes() + garbage
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"metrics.jsonl line 3 is not a JSON object with a \"step\""):
        MetricsWriter(path, 9)
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing/metrics\.jsonl cannot be written: No such file or directory$"):
        MetricsWriter(tmp_path / "missing" / "metrics.jsonl")


def test_rates_are_of_the_tokens_consumed() -> None:
    rates = Throughput(model_flops_per_token=10**9, hardware_flops_per_token=2 * 10**9, peak_flops=4e12, ranks=2)
    assert rates.rates(tokens=500, seconds=0.5) == {"tok_s": 1000.0, "tflops": 0.5, "mfu": 0.25, "hfu": 0.5}
    unknown = replace(rates, peak_flops=None).rates(tokens=500, seconds=0.5)
    assert (unknown["mfu"], unknown["hfu"]) == (None, None)


def test_resident_memory_grows_by_what_is_touched() -> None:
    before = resident_gigabytes()
    held = bytearray(b"x") * 200_000_000
    grown = resident_gigabytes() - before
    assert 0.15 < grown < 0.25, len(held)
