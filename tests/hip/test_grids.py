"""Grids of ranks that compute on the HIP device train as one process on the CPU does."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import check_ranks

CASES: list[dict[str, Any]] = [
    {"shape": "gpt2", "dp": 2, "zero": 2},
    {"shape": "llama", "dp": 2, "zero": 3},
    {
        "shape": "llama",
        "dp": 2,
        "zero": 3,
        "bucket_mb": 0.0005,
        "gradient_reduction": "bf16",
    },  # parts wait for buffers
    {"shape": "llama", "tp": 2, "sequence_parallel": True, "recompute": "full"},
    {"shape": "llama tied", "pp": 2, "schedule": "zero-bubble"},
]


DIRECT: dict[str, Any] = {"shape": "llama", "tp": 2, "sequence_parallel": True}

THREADED: dict[str, dict[str, Any]] = {
    "staged": {"shape": "llama", "dp": 2, "zero": 1},
    "direct": {"shape": "llama", "dp": 2, "zero": 1, "gradient_reduction": "bf16", "bucket_mb": 0.0005},
}
"""Sums beside computation, which a thread moves on: copies, messages and additions of its own beside the kernels."""


def _train(folder: Path, cases: list[dict[str, Any]], how: str, progress: str = "test") -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(
        json.dumps([case | {"device": "hip", "steps": 2} for case in cases]), encoding="utf-8"
    )
    files = (str(folder / "cases.json"), str(folder / "results.json"))
    check_ranks(2, "tests.parallel.grid_worker", *files, how, progress)
    results: list[dict[str, Any]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert len(results) == len(cases)
    for result in results:
        case = result["case"]
        half = case.get("gradient_reduction") == "bf16"
        assert result["replicas"] == 1, result
        assert result["loss"] <= 2e-6, result
        assert result["evaluated"] <= (2e-3 if half else 2e-5), result
        assert result["gradient"] <= (2**-8 if half else 2e-5), result
        assert result["gradient"] > 1e-4 or not half, result
        assert result["drift"] <= (1e-1 if half else 1e-2), result
        assert result["same_losses"], case
        assert result["executed"], case
        assert result["progress"] == progress
        assert result["memory"] or how == "direct", result["bytes"]
    return results


def test_two_ranks_through_pinned_memory(tmp_path: Path) -> None:
    """What ranks send is copied by the communication queue, which the host waits for before MPI gets the copy.

    All pinned memory is what `--dry-run` says, for each rank.
    """
    _train(tmp_path, CASES, "staged")


def test_two_ranks_with_the_addresses_of_the_device(tmp_path: Path) -> None:
    """As for a GPU-aware MPI, with sums added by the device: the shim's memory is memory to any MPI."""
    _train(tmp_path, [DIRECT], "direct")


@pytest.mark.parametrize("how", THREADED)
def test_a_thread_moves_messages_on(tmp_path: Path, how: str) -> None:
    _train(tmp_path, [THREADED[how]], how, "thread")
