"""Training with products in chains of fp16 multiply-adds, on an A64FX."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytrain.metrics import read_metrics
from tests.arm.machine import Machine
from tests.runs import configuration, make_corpora, write_toml


def test_a_run_and_its_continuation_without_chains(arm: Machine, tmp_path: Path) -> None:
    corpora = make_corpora(tmp_path / "corpora")

    def toml(name: str, folder: str, **changes: object) -> Path:
        settings = {
            "precision__dtype": "fp16",
            "checkpoint__every": 3,
            "learning_rate__schedule": "constant",
            **changes,
        }
        return write_toml(configuration(corpora, tmp_path / folder, "gpt2", **settings), tmp_path / f"{name}.toml")

    def losses(folder: str) -> list[float]:
        return [x["loss"] for x in read_metrics(tmp_path / folder / "metrics.jsonl") if "loss" in x]

    chains = toml("chained", "chained", run__steps=3, precision__fp16_sums="chains")
    continued = toml("continued", "chained", run__steps=6)
    printed = arm.train("a64fx", toml("plain", "plain", run__steps=6), chains, f"{continued} --resume auto")
    plain, chained = losses("plain"), losses("chained")
    assert len(chained) == 6
    assert chained == pytest.approx(plain, rel=1e-3)
    assert chained[:3] != plain[:3], "the chains were not taken"
    # The first note is of the record that the chained run wrote.
    assert printed.count("note: blocking was") == 1
    (note,) = [line for line in printed.splitlines() if "note: blocking was" in line]
    assert "fp16 in chains of 64 and blocks of 512" in note
