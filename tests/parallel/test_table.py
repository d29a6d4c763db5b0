"""Which algorithm is taken, and tables on disk."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pytrain.collectives import Table, from_json, read_table
from pytrain.collectives.table import ALGORITHMS, Eligible, Measured, Range
from pytrain.errors import UserError

STRICT = Eligible(own=True, deterministic=True)
FREE = Eligible(own=False, deterministic=False)
TABLE = Table(
    (
        Measured(
            "all_reduce",
            4,
            1,
            False,
            (Range(1024, ("mpi", "exchange")), Range(math.inf, ("mpi", "ring", "direct"))),
        ),
        Measured("all_reduce", 16, 1, False, (Range(math.inf, ("halving_doubling",)),)),
        Measured("all_reduce", 4, 1, True, (Range(math.inf, ("ring", "direct")),)),
    ),
    "a machine",
)


@pytest.mark.parametrize(
    ("ranks", "size", "eligible", "name"),
    [
        (4, 1024, STRICT, "exchange"),
        (4, 1025, STRICT, "ring"),
        (4, 1, FREE, "mpi"),
        (4, 2**40, FREE, "mpi"),
        (4, 2**40, Eligible(own=False, deterministic=True), "ring"),
        (6, 1024, STRICT, "exchange"),  # nearer to 4 than to 16
        (12, 1024, STRICT, "halving_doubling"),
    ],
)
def test_the_fastest_that_is_allowed(ranks: int, size: int, eligible: Eligible, name: str) -> None:
    assert TABLE.choice("all_reduce", ranks, 1, False, eligible).of(size) == name


def test_halves_never_go_round_a_ring() -> None:
    assert TABLE.choice("all_reduce", 4, 1, True, FREE).of(100) == "direct"


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize(("ranks", "nodes"), [(2, 1), (8, 2), (64, 8), (64, 64)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("eligible", [STRICT, FREE])
def test_without_a_table_there_is_always_an_allowed_choice(
    kind: str, ranks: int, nodes: int, half: bool, eligible: Eligible
) -> None:
    choice = Table().choice(kind, ranks, nodes, half, eligible)
    for size in (0, 1, 4096, 65537, 2**33):
        name = choice.of(size)
        assert name in ALGORITHMS[kind]
        assert eligible.allows(name, kind, nodes, half)


def test_two_levels_only_where_there_are_two() -> None:
    assert Table().choice("all_reduce", 8, 2, False, STRICT).of(2**20) == "two_level"
    assert Table().choice("all_reduce", 8, 8, False, STRICT).of(2**20) != "two_level"


def test_a_table_survives_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "collectives.json"
    path.write_text(json.dumps(TABLE.as_json()), encoding="utf-8")
    assert read_table(path) == TABLE


def changed(*keys: Any, value: Any) -> dict[str, Any]:
    table = TABLE.as_json()
    place: Any = table
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return table


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "not a table of collectives"),
        (changed("format", value=2), "not a table of collectives of format 1"),
        (changed("measured", 0, "kind", value="all_to_all"), "all_to_all"),
        (changed("measured", 0, "ranges", 0, "fastest_first", value=["rinng"]), "no algorithm 'rinng'"),
        (changed("measured", 0, "ranges", 0, "up_to_bytes", value=None), "must rise"),
        (changed("measured", 0, "ranges", 1, "up_to_bytes", value=7), "must rise"),
        (changed("measured", 0, "ranks", value=1), "ranks 1"),
        (changed("measured", 0, "ranges", value=3), "broken"),
    ],
)
def test_a_broken_table_is_refused_by_name(value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        from_json(value, "runs/a/collectives.json")
    assert str(caught.value).startswith("runs/a/collectives.json")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        read_table(tmp_path / "bad.json")
