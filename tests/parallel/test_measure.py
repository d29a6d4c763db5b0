"""What is measured becomes a table; the commands that measure run."""

import math
from pathlib import Path

import pytest

from pytrain.collectives import read_table
from pytrain.collectives.measure import Timing, report, sizes_up_to, table_of
from pytrain.collectives.table import Eligible, Range
from tests.parallel.launch import check_ranks, run_ranks

FREE = Eligible(own=False, deterministic=False)


def timings(seconds: dict[int, dict[str, float]]) -> list[Timing]:
    return [
        Timing("all_reduce", False, 4, 1, size, name, value)
        for size, row in seconds.items()
        for name, value in row.items()
    ]


def test_the_fastest_wins_up_to_half_way_to_the_next_size() -> None:
    measured = timings(
        {
            1024: {"exchange": 1.0, "ring": 3.0, "mpi": 2.0},
            4096: {"exchange": 2.0, "ring": 3.0, "mpi": 2.5},
            65536: {"exchange": 9.0, "ring": 3.0, "mpi": 4.0},
        }
    )
    table = table_of(measured, "here")
    (entry,) = table.measured
    assert entry.ranges == (  # the first two sizes agree: one range
        Range(16384, ("exchange", "mpi", "ring")),
        Range(math.inf, ("ring", "mpi", "exchange")),
    )
    choice = table.choice("all_reduce", 4, 1, False, FREE)
    assert [choice.of(size) for size in (0, 16384, 16385, 10**12)] == ["exchange", "exchange", "ring", "ring"]
    assert "all_reduce, 4 ranks on 1 nodes, 64 KiB: ring 3000000, mpi 4000000, exchange" in report(measured)


def test_sizes_grow_by_four() -> None:
    assert sizes_up_to(1) == [1024, 4096, 16384, 65536, 262144, 1048576]


def test_the_ring_tells_of_every_link() -> None:
    output = check_ranks(3, "pytrain", "info", "--ring")
    assert "the token went round 3 ranks" in output
    for rank in range(3):
        assert f"to rank {(rank + 1) % 3}: " in next(
            line for line in output.splitlines() if line.startswith(f"rank {rank} on ")
        )


def test_a_measured_table_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "collectives.json"
    output = check_ranks(3, "pytrain", "info", "--collectives", "--out", str(path), "--largest", "1")
    assert f"wrote {path}" in output
    shapes = {(entry.kind, entry.ranks, entry.half) for entry in read_table(path).measured}
    assert {("all_reduce", 2, False), ("all_reduce", 3, True), ("broadcast", 3, False)} <= shapes


@pytest.mark.parametrize("option", ["--ring", "--collectives"])
def test_one_rank_is_not_enough(option: str) -> None:
    ended = run_ranks(1, "pytrain", "info", option)
    assert ended.status == 2
    assert "are about several ranks" in ended.output


def test_a_table_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "table.json"
    ended = run_ranks(2, "pytrain", "info", "--collectives", "--out", str(path))
    assert ended.status == 2
    assert ended.output.count(f"error: {path} cannot be written") == 1


def test_the_benchmark_compares() -> None:
    output = check_ranks(2, "bench.collectives", "--largest", "1", "--rounds", "1")
    assert output.count("best own") == 6
    assert "fp32 4,194,304, bf16 2,097,152" in output
