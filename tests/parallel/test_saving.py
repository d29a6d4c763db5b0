"""Two ranks that save: one that cannot ends both in a sentence, and a resume on another grid keeps the samples."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from pytrain.checkpoint import Checkpoint
from pytrain.errors import ExitCode
from pytrain.metrics import StepMetrics, read_metrics
from tests import runs
from tests.parallel.launch import check_ranks, liveness, run_ranks
from tests.runs import Corpora, configuration, quiet_train

SOON = 30.0
"""Seconds for what takes two on an idle machine."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return runs.make_corpora(tmp_path_factory.mktemp("corpora") / "data")


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("mode", ["full", "raising"])
def test_a_rank_that_cannot_save_ends_all(corpora: Corpora, tmp_path: Path, mode: str, asynchronous: bool) -> None:
    config = configuration(
        corpora,
        tmp_path / "run",
        run__steps=100_000,
        learning_rate__schedule="constant",
        checkpoint__every=2,
        checkpoint__asynchronous=asynchronous,
        parallel__dp=2,
        parallel__zero=1,
    )
    file = runs.write_toml(config, tmp_path / "run.toml")
    with liveness(tmp_path) as (path, pipe):
        ended = run_ranks(2, "tests.parallel.saving_worker", mode, str(file), path, timeout=SOON)
        pipe.assert_all_gone(SOON)
    if mode == "full":
        assert ended.status == ExitCode.BAD_INPUT
        sentences = [line for line in ended.output.splitlines() if "No space left on device" in line]
        assert len(sentences) == 1
        assert re.fullmatch(
            r"error: /\S*/step-000004.partial/\S*.safetensors cannot be written: No space left on device; once that "
            r"is mended, --resume auto goes on from /\S*/checkpoints/step-000002",
            sentences[0],
        )
        assert "Traceback" not in ended.output
    else:
        assert ended.status == ExitCode.CRASHED
        assert ended.output.count("RuntimeError: deliberate") == 1
        assert "[dp1/2 pp0/1 tp0/1] RuntimeError: deliberate" in ended.output
    found = Checkpoint.open(tmp_path / "run")
    assert found.step == 2
    found.verify()
    last: Any = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert last <= 6, "the next save at the latest finds it"


@pytest.mark.parametrize(
    ("parallel", "snapshot_gb"), [({"dp": 2, "zero": 1}, 1.0), ({"dp": 2}, 1.0), ({"tp": 2}, 1.0), ({"pp": 2}, 2e-5)]
)
def test_the_dry_run_knows_the_snapshot(
    corpora: Corpora, tmp_path: Path, parallel: dict[str, int], snapshot_gb: float
) -> None:
    """To the byte in the first replica; without ZeRO the second one saves nothing."""
    config = configuration(
        corpora,
        tmp_path / "run",
        "gpt2",
        run__steps=2,
        precision__dtype="bf16",
        checkpoint__every=1,
        checkpoint__snapshot_gb=snapshot_gb,
        **{f"parallel__{key}": value for key, value in parallel.items()},
    )
    file = runs.write_toml(config, tmp_path / "run.toml")
    with liveness(tmp_path) as (path, _):
        output = check_ranks(2, "tests.parallel.saving_worker", "healthy", str(file), path)
    found = {line.split(":")[0]: line.split(": ")[1] for line in output.splitlines() if " planned " in line}
    assert len(found) == 2
    for label, sizes in found.items():
        held, planned = map(int, sizes.split(" planned "))
        assert 0 < planned <= snapshot_gb * 1e9
        if "dp1/" not in label:
            assert held == planned
        elif "zero" in parallel:
            assert abs(held - planned) <= 0.02 * planned  # where the padding between tensors lies
        else:
            assert held == 0
    Checkpoint.open(tmp_path / "run").verify()


def stop_after_2(metrics: StepMetrics) -> None:
    """Ask this process to save and stop."""
    if metrics.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_dp_keeps_samples_and_schedule(corpora: Corpora, tmp_path: Path) -> None:
    """From one replica to two and back: the losses, rates and samples of the undisturbed run."""
    changes: dict[str, Any] = {"evaluation__every": 0, "checkpoint__every": 0}
    # The schedule hangs on run.steps, which stays: two steps are done by stopping the run.
    quiet_train(configuration(corpora, tmp_path / "whole", **changes))
    quiet_train(configuration(corpora, tmp_path / "run", **changes), after_step=stop_after_2)
    both = configuration(corpora, tmp_path / "run", **changes, parallel__dp=2, parallel__zero=1)
    file = runs.write_toml(both, tmp_path / "2.toml")
    output = check_ranks(2, "pytrain", "train", str(file), "--resume", "auto", "--set", "checkpoint.every=2")
    note = "note: the grid was dp1 x pp1 x tp1 and is dp2 x pp1 x tp1 now, with the same samples"
    assert output.count(note) == 1
    step_4 = str(tmp_path / "run/checkpoints/step-000004")
    again = configuration(corpora, tmp_path / "back", **changes)
    progress = runs.Quiet()
    runs.train(again, step_4, progress)
    assert any("grid was dp2 x pp1 x tp1 and is dp1" in line for line in progress.lines)
    whole = read_metrics(tmp_path / "whole/metrics.jsonl")
    for folder, first in (("run", 1), ("back", 5)):
        lines = read_metrics(tmp_path / folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(first, 7))
        for ours, theirs in zip(lines, whole[first - 1 :], strict=True):
            for key in ("samples", "tokens", "lr", "global_batch"):
                assert ours[key] == theirs[key]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_a_dp_that_does_not_divide_is_refused_with_the_nearest(corpora: Corpora, tmp_path: Path) -> None:
    quiet_train(configuration(corpora, tmp_path / "run", run__steps=1))
    file = runs.write_toml(configuration(corpora, tmp_path / "run"), tmp_path / "run.toml")
    ended = run_ranks(3, "pytrain", "train", str(file), "--resume", "auto", "--set", "parallel.dp=3")
    assert ended.status == ExitCode.BAD_INPUT
    sentence = (
        "batch.global_batch (4) is not divisible by batch.micro_batch * parallel.dp (2 * 3); with this dp it may be "
        "6, and with this batch parallel.dp may be 2"
    )
    assert ended.output.count(sentence) == 1
    assert "Traceback" not in ended.output
