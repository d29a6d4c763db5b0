"""Sequence parallelism over real ranks: what `test_grids.py` leaves out. `programs/sequence.py` holds the checks."""

import json
from pathlib import Path

from tests.parallel.launch import check_ranks
from tests.parallel.test_grids import case_of, judge


def test_traffic_replicas_and_sixteen_bits() -> None:
    """Traffic is that of the formula; replicated tensors have the same bits after 50 clipped steps; bf16 agrees."""
    assert "all agree" in check_ranks(4, "tests.parallel.programs.sequence")


def test_three_slices(tmp_path: Path) -> None:
    """An odd number of slices, of 11 rows."""
    cases = [
        case_of((1, 1, 3), "gpt2", 0, "1f1b", "none", True),
        case_of((1, 1, 3), "llama", 0, "1f1b", "full", True),
        case_of((1, 1, 3), "llama tied", 0, "1f1b", "selective", True),
        case_of((1, 1, 3), "llama shared key head", 0, "1f1b", "none", True),
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    check_ranks(3, "tests.parallel.grid_worker", str(tmp_path / "cases.json"), str(tmp_path / "results.json"))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [result["case"] for result in results] == cases
    for result in results:
        judge(result)
