"""Coordinates of ranks, and the ops of their pipeline stages."""

from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import pytest

from pytrain.errors import UserError
from pytrain.grid import Grid, rank_map, read_rank_map, stage_layers, stage_ops

GRIDS = [(1, 1, 1), (2, 3, 4), (1, 2, 8), (5, 1, 3), (3, 4, 1)]


@pytest.mark.parametrize(("dp", "pp", "tp"), GRIDS)
def test_each_coordinate_belongs_to_one_rank(dp: int, pp: int, tp: int) -> None:
    ranks = [Grid(dp, pp, tp, rank) for rank in range(dp * pp * tp)]
    # product runs through its last argument fastest: so must the ranks through tp, then pp, then dp
    assert [(grid.dp_rank, grid.pp_rank, grid.tp_rank) for grid in ranks] == list(
        product(range(dp), range(pp), range(tp))
    )
    assert {grid.size for grid in ranks} == {len(ranks)}


def test_the_label_says_where() -> None:
    assert Grid(2, 3, 4, rank=23).label == "dp1/2 pp2/3 tp3/4"
    assert Grid(2, 3, 4, rank=6).label == "dp0/2 pp1/3 tp2/4"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 1, 1), "a grid of dp 0 x pp 1 x tp 1 has no ranks"),
        ((2, -1, -2), "a grid of dp 2 x pp -1 x tp -2 has no ranks"),
        ((2, 1, 2, 4), "rank 4 is outside the grid of 4 ranks"),
        ((2, 1, 2, -1), "rank -1 is outside the grid of 4 ranks"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Grid(*arguments)


@pytest.mark.parametrize(("layers", "pp"), [(1, 1), (7, 3), (8, 8), (12, 5)])
def test_stages_cut_the_ops_between_layers(layers: int, pp: int) -> None:
    counts = stage_layers(layers, pp)
    stages = [stage_ops(counts, stage) for stage in range(pp)]
    assert stages[0][0] == 0
    assert stages[-1][1] == 4 * layers + 4
    assert all(before[1] == after[0] for before, after in pairwise(stages))
    edges = [first for first, _ in stages[1:]]
    assert all(edge % 4 == 1 for edge in edges), "a layer begins with its first norm"
    sizes = [b - a for a, b in pairwise([0, *((edge - 1) // 4 for edge in edges), layers])]
    assert tuple(sizes) == counts
    assert sum(sizes) == layers
    assert max(sizes) - min(sizes) <= 1


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as so many that are at least 1."""
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield first, *rest


@pytest.mark.parametrize(
    ("layers", "pp", "chunks", "head"),
    [
        (12, 2, 1, 5.4),
        (6, 2, 2, 1.8),
        (6, 2, 1, 1.8),
        (9, 4, 1, 0.3),
        (9, 3, 2, 2.5),
        (8, 4, 2, 7.0),
        (10, 4, 1, 30.0),
    ],
)
def test_no_other_cut_has_a_faster_slowest_rank(layers: int, pp: int, chunks: int, head: float) -> None:
    def slowest(counts: tuple[int, ...]) -> float:
        return max(sum(counts[rank::pp]) + (head if rank == pp - 1 else 0.0) for rank in range(pp))

    counts = stage_layers(layers, pp, chunks, head)
    every = list(compositions(layers, pp * chunks))
    assert counts in every
    assert slowest(counts) == min(map(slowest, every))


def test_the_head_takes_the_place_of_layers() -> None:
    assert stage_layers(12, 2, 1, 5.4) == (9, 3)
    assert stage_layers(6, 2, 1, 1.8) == (4, 2)
    assert stage_layers(6, 2, 2, 1.8) == (2, 1, 2, 1)


def test_a_stage_needs_a_layer() -> None:
    with pytest.raises(UserError, match=r"parallel\.chunks is 3, more than model\.layers \(2\)"):
        stage_layers(2, 3)


def test_groups_are_the_ranks_that_differ_in_one_coordinate() -> None:
    dp, pp, tp = 2, 3, 4
    grids = [Grid(dp, pp, tp, rank) for rank in range(dp * pp * tp)]
    for own in grids:
        for group, axis in ((own.tp_group(), "tp"), (own.pp_group(), "pp"), (own.dp_group(), "dp")):
            others = {f"{other}_rank" for other in ("dp", "pp", "tp") if other != axis}
            assert group == [grid.rank for grid in grids if all(getattr(grid, o) == getattr(own, o) for o in others)]


def test_the_ends_of_a_pipeline_share_an_embedding() -> None:
    assert [Grid(2, 3, 2, rank).embedding_group() for rank in range(6)] == [
        *([0, 4], [1, 5], [2], [3], [0, 4], [1, 5]),
    ]
    assert Grid(2, 1, 2, 3).embedding_group() == [3]
    assert Grid(1, 2, 1, 1).embedding_group() == [0, 1]


def test_the_order_of_the_axes_places_the_ranks() -> None:
    assert rank_map(2, 3, 4) == list(range(24))
    # replicas fastest: place (d, p, t) is taken by rank p * 8 + t * 2 + d
    places = rank_map(2, 3, 4, "pp-tp-dp")
    assert [places[Grid(2, 3, 4, place).rank] for place in range(24)] == [
        p * 8 + t * 2 + d for d, p, t in product(range(2), range(3), range(4))
    ]
    for order in ("dp-pp", "dp-pp-xp", "dp-pp-tp-tp", ""):
        with pytest.raises(UserError, match="must name dp, pp and tp once each"):
            rank_map(2, 3, 4, order)


def test_a_file_places_the_ranks(tmp_path: Path) -> None:
    path = tmp_path / "ranks.txt"
    rows = [(d, p, t) for t in range(2) for p in range(2) for d in range(2)]
    path.write_text("# dp pp tp\n\n" + "\n".join(f"{d} {p} {t}  # here" for d, p, t in rows) + "\n")
    assert read_rank_map(path, 2, 2, 2) == rank_map(2, 2, 2, "tp-pp-dp")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0 0 0\n", "places 1 ranks, but the grid 2 x 1 x 1 has 2"),
        ("0 0 0\n0 0 0\n", "ranks 0 and 1 are both at 0 0 0"),
        ("0 0 0\n2 0 0\n", "rank 1 is at 2 0 0, outside the grid of 2 x 1 x 1"),
        ("0 0 0\n1 0\n", "rank 1 needs three numbers, dp pp tp, not '1 0'"),
        ("0 0 0\n1 0 -1\n", "rank 1 needs three numbers"),
    ],
)
def test_a_file_that_does_not_place_them_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "ranks.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        read_rank_map(path, 2, 1, 1)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_rank_map(tmp_path / "none.txt", 2, 1, 1)
