"""Coordinates of ranks, and the ops of their pipeline stages."""

from itertools import pairwise, product

import pytest

from pytrain.errors import UserError
from pytrain.grid import Grid

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
    stages = [Grid(pp=pp, tp=2, rank=2 * stage).stage_ops(layers) for stage in range(pp)]
    assert stages[0][0] == 0
    assert stages[-1][1] == 4 * layers + 4
    assert all(before[1] == after[0] for before, after in pairwise(stages))
    edges = [first for first, _ in stages[1:]]
    assert all(edge % 4 == 1 for edge in edges), "a layer begins with its first norm"
    sizes = [b - a for a, b in pairwise([0, *((edge - 1) // 4 for edge in edges), layers])]
    assert sum(sizes) == layers
    assert max(sizes) - min(sizes) <= 1


def test_a_stage_needs_a_layer() -> None:
    with pytest.raises(UserError, match=r"parallel\.pp \(3\) is more than model\.layers \(2\)"):
        Grid(pp=3).stage_ops(2)
