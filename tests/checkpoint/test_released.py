"""The checkpoints of every released version load for ever: tensors, state, and the next steps of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytrain.checkpoint import Checkpoint
from pytrain.config import load
from pytrain.metrics import read_metrics
from tests import runs
from tests.checkpoint.released.make import CASES, HERE, digest, logits

RELEASED = sorted(
    path.relative_to(HERE).as_posix() for path in HERE.glob("*/*") if (path / "expected.json").is_file()
)


def expected_of(name: str) -> Any:
    return json.loads((HERE / name / "expected.json").read_text(encoding="utf-8"))


def opened(name: str) -> Checkpoint:
    (folder,) = (HERE / name).glob("step-*")
    return Checkpoint.open(folder)


def test_the_first_version_is_there() -> None:
    assert {f"0.1.0/{case}" for case in CASES} <= set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_checkpoint_is_read(name: str) -> None:
    found, expected = opened(name), expected_of(name)
    found.verify()
    assert (found.step, {key: value for key, value in found.state.items() if key != "record"}) == (
        expected["step"],
        expected["state"],
    )
    assert digest(found) == expected["sha256"]
    np.testing.assert_allclose(logits(found), expected["logits"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RELEASED)
def test_training_goes_on_from_a_released_checkpoint(name: str, tmp_path: Path) -> None:
    """The first loss is that of the weights, the second one that of what the optimizer's state made of them."""
    found, expected = opened(name), expected_of(name)
    config = load(
        found.folder / "config.toml",
        [
            f'run.folder="{tmp_path / "run"}"',
            f'tokenizer.path="{found.folder / "tokenizer.model"}"',
            f'data.train=["{HERE / name / "corpus"}"]',
        ],
    )
    runs.train(config, str(found.folder), runs.Quiet())
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    # Another instruction set rounds otherwise; the two losses differ by thirty times as much at least.
    tolerance = 1e-5 if config.precision.dtype == "fp32" else 2e-3
    assert losses == pytest.approx(expected["losses"], rel=tolerance)
    assert len(losses) == config.run.steps - found.step == 2


def test_released_files_are_small_and_name_no_machine() -> None:
    for path in HERE.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert path.stat().st_size < 40_000, path
            if path.name in ("manifest.json", "config.toml", "expected.json"):
                assert "/tmp" not in path.read_text(encoding="utf-8")
