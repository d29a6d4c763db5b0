"""Schedules as written: who computes what in which order."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytrain.errors import UserError
from pytrain.schedule import (
    SCHEDULES,
    Kind,
    Programs,
    forward_only,
    forward_only_pipeline,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    one_stage,
    peak_in_flight,
    programs_of,
    zero_bubble,
)
from tests.schedule.grids import Grid, all_grids, build


def text(programs: Programs) -> list[str]:
    return [" ".join(map(str, program)) for program in programs.ranks]


def test_gpipe() -> None:
    assert text(gpipe(2, 2)) == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]


def test_one_f_one_b() -> None:
    assert text(one_f_one_b(3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_interleaved() -> None:
    assert text(interleaved_one_f_one_b(2, 2, 2)) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]


def test_zero_bubble() -> None:
    assert text(zero_bubble(2, 4)) == [
        "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0F3 0I2 0W2 0I3 0W3",
        "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3",
    ]


def test_evaluation_keeps_a_group_of_micro_batches_going_round() -> None:
    assert text(forward_only_pipeline(2, 3, 2)) == [
        "0F0 0F1 2F0 2F1 0F2 2F2",
        "1F0 1F1 3F0 3F1 1F2 3F2",
    ]


def test_one_process_is_the_pipeline_of_one_stage() -> None:
    for micro_batches in (1, 2, 7):
        assert one_stage(micro_batches)[:-1] == one_f_one_b(1, micro_batches).ranks[0]
        assert (forward_only(micro_batches),) == forward_only_pipeline(1, micro_batches).ranks


def test_interleaving_one_chunk_is_one_f_one_b() -> None:
    for ranks, micro_batches in ((1, 3), (3, 6), (4, 5)):
        assert interleaved_one_f_one_b(ranks, 1, micro_batches).ranks == one_f_one_b(ranks, micro_batches).ranks


@pytest.mark.parametrize("grid", list(all_grids())[::7], ids=str)
def test_every_rank_computes_its_stages_on_every_micro_batch(grid: Grid) -> None:
    schedule, ranks, micro_batches, chunks = grid
    programs = build(grid)
    assert (programs.stages, programs.micro_batches) == (ranks * chunks, micro_batches)
    kinds = {"forward-only": "F", "zero-bubble": "FIW"}.get(schedule, "FB")
    assert programs.training == (schedule != "forward-only")
    for rank, program in enumerate(programs.ranks):
        stages = [stage for stage in range(programs.stages) if programs.rank_of(stage) == rank]
        wanted = {f"{s}{kind}{m}" for s in stages for kind in kinds for m in range(micro_batches)}
        assert sorted(map(str, program)) == sorted(wanted)


@settings(deadline=None, max_examples=200)
@given(ranks=st.integers(1, 12), micro_batches=st.integers(1, 40))
def test_in_flight(ranks: int, micro_batches: int) -> None:
    assert [peak_in_flight(program) for program in gpipe(ranks, micro_batches).ranks] == [micro_batches] * ranks
    wanted = [min(ranks - rank, micro_batches) for rank in range(ranks)]
    assert [peak_in_flight(program) for program in one_f_one_b(ranks, micro_batches).ranks] == wanted
    # No rank keeps more than the fullest of 1F1B does.
    in_flight = [peak_in_flight(program) for program in zero_bubble(ranks, micro_batches).ranks]
    assert in_flight == [max(wanted)] * ranks


@settings(deadline=None, max_examples=100)
@given(ranks=st.integers(2, 8), chunks=st.integers(2, 5), rounds=st.integers(2, 4))
def test_interleaved_in_flight(ranks: int, chunks: int, rounds: int) -> None:
    programs = interleaved_one_f_one_b(ranks, chunks, rounds * ranks)
    for rank, program in enumerate(programs.ranks):
        peak = peak_in_flight(program)
        # In units of whole ranks: 1F1B's first rank keeps p, interleaving (p-1)/(v p) more (Megatron).
        assert peak == 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1
        assert Fraction(peak, chunks) <= ranks * (1 + Fraction(ranks - 1, ranks * chunks))


def test_names() -> None:
    assert [programs_of(schedule, 2, 3).schedule for schedule in SCHEDULES] == list(SCHEDULES)
    assert programs_of("interleaved", 2, 4, 3) == interleaved_one_f_one_b(2, 3, 4)
    assert all(action.kind is not Kind.UPDATE for action in programs_of("1f1b", 2, 2).ranks[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2), 'schedule must be one of gpipe, 1f1b, interleaved, zero-bubble, not "2f2b"'),
        (("1f1b", 0, 2), "the number of pipeline ranks must be at least 1, not 0"),
        (("gpipe", 2, 0), "the number of micro-batches must be at least 1, not 0"),
        (("zero-bubble", 2, -1), "the number of micro-batches must be at least 1, not -1"),
        (("interleaved", 2, 2, 0), "the number of chunks per rank must be at least 1, not 0"),
        (
            ("interleaved", 1, 2, 2),
            "2 chunks per rank need at least 2 pipeline ranks: a single one never waits",
        ),
        (("1f1b", 2, 2, 2), "schedule 1f1b has one chunk per rank, not 2; interleaved has several"),
    ],
)
def test_impossible_pipelines_are_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        programs_of(*arguments)
    assert str(caught.value) == message
