"""Resident memory falls by what the planned arena says, where activations are most of it."""

from pathlib import Path
from typing import Any

import pytest

from pytrain import estimate
from pytrain.errors import ExitCode
from pytrain.metrics import read_metrics
from tests import runs

POLICIES = ("none", "selective", "full")
SHAPE = {"layers": 12, "hidden": 256, "heads": 4, "vocabulary": runs.VOCABULARY, "context": 512}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", **SHAPE},
    "llama": {"family": "llama", "ffn": 688, "kv_heads": 2, **SHAPE},
}


@pytest.mark.parametrize("family", MODELS)
def test_resident_memory_falls_by_what_the_arena_predicts(tmp_path: Path, family: str) -> None:
    """Each policy in a process of its own; what else is resident (weights, libraries) is the same for all."""
    corpora = runs.make_corpora(tmp_path / "data")
    planned, resident = {}, {}
    for policy in POLICIES:
        config = runs.configuration(
            corpora,
            tmp_path / policy,
            family,
            run__steps=2,
            data__sequence_length=512,
            data__heldout=[],
            batch__micro_batch=4,
            batch__global_batch=4,
            recompute__policy=policy,
            **{f"model__{key}": value for key, value in MODELS[family].items()},
        )
        planned[policy] = estimate.largest_rank(config).by_kind["activations"]
        done = runs.run_command("train", runs.write_toml(config, tmp_path / f"{policy}.toml"))
        assert done.returncode == ExitCode.OK, done.stderr
        line: Any = read_metrics(tmp_path / policy / "metrics.jsonl")[-1]
        resident[policy] = line["mem_gb"] * 1e9
        sizes = f"arena {planned[policy] / 1e6:.1f} MB, resident {resident[policy] / 1e6:.1f} MB"
        print(f"{family} {policy}: {sizes}")
    for policy in POLICIES[1:]:
        predicted = planned["none"] - planned[policy]
        fallen = resident["none"] - resident[policy]
        print(f"{policy}: predicted {predicted / 1e6:.1f} MB, fallen {fallen / 1e6:.1f} MB")
        assert predicted > (20e6 if policy == "selective" else 50e6)
        assert abs(fallen - predicted) <= 0.02 * predicted
