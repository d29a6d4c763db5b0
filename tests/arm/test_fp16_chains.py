"""Training with products in chains of fp16 multiply-adds, on an A64FX."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytrain.metrics import read_metrics
from tests.arm.machine import Machine
from tests.runs import configuration, make_corpora, write_toml


def test_a_run_and_its_continuation_without_chains(arm: Machine, tmp_path: Path) -> None:
    corpora = make_corpora(tmp_path / "corpora")

    def train(name: str, folder: str, resume: str = "none", **changes: object) -> tuple[str, list[float]]:
        toml = tmp_path / f"{name}.toml"
        settings = {
            "precision__dtype": "fp16",
            "checkpoint__every": 3,
            "learning_rate__schedule": "constant",
            **changes,
        }
        write_toml(configuration(corpora, tmp_path / folder, "gpt2", **settings), toml)
        printed = arm.run("a64fx", "-m", "pytrain", "train", toml, "--resume", resume)
        return printed, [x["loss"] for x in read_metrics(tmp_path / folder / "metrics.jsonl") if "loss" in x]

    _, plain = train("plain", "plain", run__steps=6)
    _, chained = train("chained", "chained", run__steps=3, precision__fp16_sums="chains")
    assert len(chained) == 3
    assert chained == pytest.approx(plain[:3], rel=1e-3)
    assert chained != plain[:3], "the chains were not taken"
    record = json.loads((tmp_path / "chained" / "record.json").read_text(encoding="utf-8"))
    assert record["native"]["blocking"].endswith(", fp16 in chains of 64 and blocks of 512")
    printed, continued = train("continued", "chained", "auto", run__steps=6)
    assert "note: blocking was" in printed
    assert continued == pytest.approx(plain, rel=1e-3)
