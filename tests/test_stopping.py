"""Signals that save and stop, a killed run, and what goes on from there."""

import os
import platform
import signal
import subprocess
from pathlib import Path

import pytest

from pytrain.checkpoint import Checkpoint
from pytrain.errors import ExitCode
from pytrain.metrics import read_metrics
from pytrain.train import Trainer
from tests import runs
from tests.runs import Corpora, Quiet, configuration, quiet_train


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return runs.make_corpora(tmp_path_factory.mktemp("corpora") / "data")


def started(config_file: Path, *arguments: str) -> subprocess.Popen[str]:
    words, environment = runs.command("train", config_file, *arguments, OMP_NUM_THREADS="1")
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} is not in {''.join(seen)}")


def test_a_second_job_in_the_same_folder_is_refused(corpora: Corpora, tmp_path: Path) -> None:
    """With --resume auto it would remove what the first is writing, and both would write the same steps."""
    changes = {"learning_rate__schedule": "constant", "run__steps": 100_000}
    config = configuration(corpora, tmp_path / "run", **changes)
    with started(runs.write_toml(config, tmp_path / "run.toml")) as process:
        read_until(process, "iteration        3/")
        sentence = runs.refusal(config, "auto")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert sentence == (
        f"{tmp_path / 'run'} is in use by process {process.pid} on {platform.node()}; "
        "wait until it has ended, or choose another run.folder"
    )
    step = Checkpoint.open(tmp_path / "run").step
    changes["run__steps"] = step + 1
    # run.lock is still there, and nobody holds it
    quiet_train(configuration(corpora, tmp_path / "run", **changes), "auto")
    assert Checkpoint.open(tmp_path / "run").step == step + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_saves_and_stops(corpora: Corpora, tmp_path: Path, number: signal.Signals) -> None:
    changes = {"learning_rate__schedule": "constant", "run__steps": 100_000}
    config = configuration(corpora, tmp_path / "stopped", **changes)
    with started(runs.write_toml(config, tmp_path / "run.toml")) as process:
        read_until(process, "iteration        3/")
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED
    found = Checkpoint.open(tmp_path / "stopped")
    found.verify()
    step = found.step
    assert step >= 3
    assert f"stopped by {number.name} after step {step}; go on with --resume auto" in rest
    assert [line["step"] for line in read_metrics(tmp_path / "stopped" / "metrics.jsonl")][-1] == step
    changes["run__steps"] = step + 2
    quiet_train(configuration(corpora, tmp_path / "stopped", **changes), "auto")
    quiet_train(configuration(corpora, tmp_path / "undisturbed", **changes))
    runs.assert_same_checkpoint(tmp_path / "stopped", tmp_path / "undisturbed", step + 2)
    lines = runs.timeless_metrics(tmp_path / "undisturbed")
    assert runs.timeless_metrics(tmp_path / "stopped") == lines


def test_a_signal_after_the_last_look_does_not_lose_steps(corpora: Corpora, tmp_path: Path) -> None:
    """It comes while a checkpoint is written: too late for this step, so the next one is made and saved."""
    config = configuration(corpora, tmp_path / "run", checkpoint__every=2)
    with Trainer(config, progress=Quiet()) as trainer:
        save = trainer.save

        def interrupted_save(wait: bool = True) -> Path:
            os.kill(os.getpid(), signal.SIGTERM)
            return save(wait)

        trainer.save = interrupted_save  # type: ignore[method-assign]
        result = trainer.run()
    assert (result.step, result.stopped) == (3, "SIGTERM")
    assert Checkpoint.open(tmp_path / "run").step == 3


def test_the_handlers_come_back(corpora: Corpora, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    quiet_train(configuration(corpora, tmp_path / "run", run__steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_killed_run_goes_on_from_its_last_checkpoint(corpora: Corpora, tmp_path: Path) -> None:
    changes = {"learning_rate__schedule": "constant", "run__steps": 100_000, "checkpoint__every": 2}
    config = configuration(corpora, tmp_path / "killed", **changes)
    with started(runs.write_toml(config, tmp_path / "run.toml")) as process:
        read_until(process, "step-000004")
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    found = Checkpoint.open(tmp_path / "killed")
    found.verify()
    step = found.step
    assert step >= 4
    assert step % 2 == 0
    changes |= {"run__steps": step + 2}
    quiet_train(configuration(corpora, tmp_path / "killed", **changes), "auto")
    quiet_train(configuration(corpora, tmp_path / "undisturbed", **changes))
    runs.assert_same_checkpoint(tmp_path / "killed", tmp_path / "undisturbed", step + 2)
    lines = runs.timeless_metrics(tmp_path / "undisturbed")
    assert runs.timeless_metrics(tmp_path / "killed") == lines
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.partial"))
