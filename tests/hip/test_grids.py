"""Grids of ranks that compute on the HIP device train as one process on the CPU does."""

import json
from pathlib import Path
from typing import Any

from tests.parallel.launch import check_ranks

CASES: list[dict[str, Any]] = [
    {"shape": "gpt2", "dp": 2, "zero": 2},
    {"shape": "llama", "dp": 2, "zero": 3},
    {"shape": "llama", "tp": 2, "sequence_parallel": True, "recompute": "full"},
    {"shape": "llama tied", "pp": 2, "schedule": "zero-bubble"},
]


def test_two_ranks(tmp_path: Path) -> None:
    """What ranks send lies in managed memory, which the host reads and writes between the device's calls."""
    (tmp_path / "cases.json").write_text(
        json.dumps([case | {"device": "hip", "steps": 2} for case in CASES]), encoding="utf-8"
    )
    check_ranks(2, "tests.parallel.grid_worker", str(tmp_path / "cases.json"), str(tmp_path / "results.json"))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results) == len(CASES)
    for result in results:
        case = result["case"]
        assert result["replicas"] == 1, result
        assert result["loss"] <= 2e-6, case
        assert result["evaluated"] <= 2e-5, case
        assert result["gradient"] <= 2e-5, result
        assert result["drift"] <= 1e-2, result
        assert result["same_losses"], case
        assert result["executed"], case
