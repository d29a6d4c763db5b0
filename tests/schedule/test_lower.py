"""What lowering inserts, and that the result computes the right thing on stand-in data."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytrain.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Lowered,
    Programs,
    ScheduleError,
    forward_only_pipeline,
    lower,
    one_f_one_b,
    peak_in_flight,
    zero_bubble,
)
from pytrain.schedule.actions import COMPUTE
from tests.schedule.executor import Executor
from tests.schedule.grids import Grid, all_grids, build


def text(lowered: Lowered, rank: int) -> str:
    return " ".join(map(str, lowered.ranks[rank]))


def test_two_stages() -> None:
    lowered = lower(one_f_one_b(2, 3))
    assert text(lowered, 0) == (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0WAIT_F0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2 "
        "0REDUCE 0WAIT_F1 0WAIT_F2 0U"
    )
    assert text(lowered, 1) == (
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1RECV_F2 1F2 1WAIT_B0 1B2 1SEND_B2 "
        "1REDUCE 1WAIT_B1 1WAIT_B2 1U"
    )
    assert (lowered.slots, lowered.gradient_buffers) == ((2, 1), (1, 2))


def test_buffers_are_numbered_and_peers_named() -> None:
    lowered = lower(one_f_one_b(2, 3))
    assert lowered.ranks[0][6:9] == (
        Action(Kind.WAIT_SEND_FORWARD, 0, 0, slot=0, peer=1),
        Action(Kind.FORWARD, 0, 2, slot=0),
        Action(Kind.SEND_FORWARD, 0, 2, slot=0, peer=1),
    )
    assert lowered.ranks[1][6:8] == (
        Action(Kind.BACKWARD, 1, 1, slot=0, gradient=1),
        Action(Kind.SEND_BACKWARD, 1, 1, gradient=1, peer=0),
    )


def test_one_stage_needs_no_message() -> None:
    lowered = lower(one_f_one_b(1, 2), tied=True)
    assert text(lowered, 0) == "0F0 0B0 0F1 0B1 0REDUCE 0U"
    assert (lowered.slots, lowered.gradient_buffers) == ((1,), (0,))


def test_tied_gradients_are_added_before_they_are_reduced() -> None:
    lowered = lower(one_f_one_b(3, 1), tied=True)
    assert text(lowered, 0).endswith("0B0 0TIED 0REDUCE 0WAIT_F0 0U")
    assert text(lowered, 1).endswith("1B0 1SEND_B0 1REDUCE 1WAIT_F0 1WAIT_B0 1U")
    assert text(lowered, 2).endswith("2B0 2SEND_B0 2TIED 2REDUCE 2WAIT_B0 2U")


def test_split_backward_sends_before_its_weight_gradient() -> None:
    assert text(lower(zero_bubble(2, 1)), 1) == "1RECV_F0 1F0 1I0 1SEND_B0 1W0 1REDUCE 1WAIT_B0 1U"


def test_evaluation_reduces_and_updates_nothing() -> None:
    lowered = lower(forward_only_pipeline(2, 2), tied=True)
    assert text(lowered, 0) == "0F0 0SEND_F0 0WAIT_F0 0F1 0SEND_F1 0WAIT_F1"
    assert text(lowered, 1) == "1RECV_F0 1F0 1RECV_F1 1F1"
    assert (lowered.slots, lowered.gradient_buffers) == ((1, 1), (0, 0))


def test_a_message_that_is_needed_later_but_was_sent_sooner_is_received_sooner() -> None:
    def program(words: str) -> tuple[Action, ...]:
        return tuple(Action(Kind(word[1]), int(word[0]), int(word[2:])) for word in words.split())

    # Rank 0 makes 0F1 before 2B0, rank 1 needs them the other way round.
    ranks = (program("0F0 2F0 2B0 0F1 2F1 0B0 2B1 0B1"), program("1F0 3F0 3B0 1F1 1B0 3F1 3B1 1B1"))
    lowered = lower(Programs("handmade", ranks, 2, 2))
    assert "1RECV_B0 1RECV_F1 1F1 1SEND_F1 1B0" in text(lowered, 1)
    Executor(lowered, Random(1)).run()


@pytest.mark.parametrize("schedule", [*SCHEDULES, "forward-only"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_pipeline_computes_the_right_thing(schedule: str, tied: bool) -> None:
    grids: list[Grid] = [grid for grid in all_grids() if grid[0] == schedule]
    for number, grid in enumerate(grids):
        print(f"grid {grid}, seed {number}")
        programs = build(grid)
        lowered = lower(programs, tied=tied)
        done = Executor(lowered, Random(number)).run()
        assert set(done.values()) == {1}
        for before, after in zip(programs.ranks, lowered.ranks, strict=True):
            computed = [action for action in after if action.kind in COMPUTE]
            assert [replace(action, slot=None, gradient=None) for action in computed] == list(before)
        # A stage has as many slots as it has micro-batches in flight, and no more than two gradients.
        for stage, slots in enumerate(lowered.slots):
            program = lowered.ranks[lowered.rank_of(stage)]
            assert slots == peak_in_flight(tuple(action for action in program if action.stage == stage))
        assert max(lowered.gradient_buffers) <= 2


@settings(deadline=None, max_examples=100)
@given(
    schedule=st.sampled_from((*SCHEDULES, "forward-only")),
    ranks=st.integers(2, 7),
    micro_batches=st.integers(1, 20),
    chunks=st.integers(1, 4),
    tied=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_pipelines(schedule: str, ranks: int, micro_batches: int, chunks: int, tied: bool, seed: int) -> None:
    if schedule not in ("interleaved", "forward-only"):
        chunks = 1
    lowered = lower(build((schedule, ranks, micro_batches, chunks)), tied=tied)
    assert set(Executor(lowered, Random(seed)).run().values()) == {1}


def test_programs_that_cannot_be_lowered_are_refused() -> None:
    programs = one_f_one_b(2, 2)
    first, second = programs.ranks
    with pytest.raises(ScheduleError, match=r"^rank 0: stage 1 has no use for what 0F0 makes$"):
        lower(replace(programs, ranks=(first, second[1:])))
    swapped = (second[1], second[0], *second[2:])
    with pytest.raises(ScheduleError, match=r"^rank 1: 1B0 has no activations: its forward is not before it$"):
        lower(replace(programs, ranks=(first, swapped)))
