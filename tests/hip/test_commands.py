"""Commands about a run whose device is a GPU."""

import re
from pathlib import Path
from typing import Any

import pytest

from pytrain import _native
from pytrain.cli import run
from tests import runs

SHIM: Any = _native.hip_shim  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the HIP device."""
    path = tmp_path_factory.mktemp("commands")
    corpora = runs.make_corpora(path / "corpora")
    runs.quiet_train(runs.configuration(corpora, path / "run", run__steps=2, run__device="hip"))
    return path / "run"


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that ends well, and that it used the GPU where it should."""
    assert run(arguments) == 0
    return capsys.readouterr().out


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", str(folder), "--prompt", "abc", "--tokens", "12", "--temperature", "0")
    before = SHIM.counts()["launches"]
    on_cpu = output(capsys, *words, "--device", "cpu")
    assert SHIM.counts()["launches"] == before
    on_gpu = output(capsys, *words)
    assert SHIM.counts()["launches"] > before
    assert on_gpu == on_cpu != ""


def test_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = str(folder.parent / "corpora" / "heldout")
    words = ("evaluate", str(folder), "--batches", "2", "--corpus", corpus)
    before = SHIM.counts()["launches"]
    on_cpu = output(capsys, *words, "--device", "cpu")
    assert SHIM.counts()["launches"] == before
    on_gpu = output(capsys, *words)
    assert SHIM.counts()["launches"] > before
    numbers = [[float(number) for number in re.findall(r"\d+\.\d+", text)] for text in (on_cpu, on_gpu)]
    assert numbers[0]
    assert numbers[1] == pytest.approx(numbers[0], rel=2e-3)  # as printed


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_no_gpu_is_one_sentence_and_exit_status_2(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    SHIM.set_devices(0)
    more = {
        "train": ("--set", f"run.folder={folder.parent / 'other'}"),
        "generate": ("--prompt", "abc"),
        "evaluate": ("--corpus", str(folder.parent / "corpora" / "heldout")),
    }[command]
    assert run([command, str(folder), *more]) == 2
    printed = capsys.readouterr().err
    assert "no AMD GPU is visible to this process" in printed
    assert "Traceback" not in printed


def test_the_dry_run_does_not_take_the_cpu_for_the_gpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "train", str(folder), "--dry-run")
    assert "time:        n/a: give the peak of the GPU as run.peak_tflops" in text
    text = output(capsys, "train", str(folder), "--dry-run", "--set", "run.peak_tflops=191.5")
    assert "191.500 TFLOP/s (configured)" in text
