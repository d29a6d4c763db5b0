"""The proof: it holds for every schedule on hundreds of grids, and its numbers are those of the papers."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytrain.schedule import (
    SCHEDULES,
    Action,
    Costs,
    Kind,
    Lowered,
    Program,
    Programs,
    Report,
    ScheduleError,
    check,
    forward_only_pipeline,
    interleaved_one_f_one_b,
    lower,
    one_f_one_b,
    zero_bubble,
)
from tests.schedule.grids import Grid, all_grids, build

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741
TIME = {F: 1, B: 2, I: 1, W: 1}


def ideal_makespan(programs: Programs) -> int:
    """The longest path through the programs where only data and the order on each rank matter."""
    place = {
        (action.kind, action.stage, action.microbatch): (rank, index)
        for rank, program in enumerate(programs.ranks)
        for index, action in enumerate(program)
    }

    def needs(action: Action) -> list[tuple[Kind, int, int | None]]:
        if action.kind is F:
            return [(F, action.stage - 1, action.microbatch)]
        return [(kind, action.stage + 1, action.microbatch) for kind in (B, I) if action.kind is not W]

    @cache
    def end(rank: int, index: int) -> int:
        action = programs.ranks[rank][index]
        starts = [end(*place[need]) for need in needs(action) if need in place]
        return max([end(rank, index - 1) if index else 0, *starts]) + TIME[action.kind]

    for index in range(max(map(len, programs.ranks))):  # in steps, for the recursion's depth
        for rank, program in enumerate(programs.ranks):
            if index < len(program):
                end(rank, index)
    return max(end(rank, len(program) - 1) for rank, program in enumerate(programs.ranks))


def exact_bubble(report: Report) -> Fraction:
    return (Fraction(report.makespan) - Fraction(report.work)) / Fraction(report.work)


@pytest.mark.parametrize("schedule", [*SCHEDULES, "forward-only"])
def test_hundreds_of_grids_are_proven_and_wait_no_longer_than_their_data(schedule: str) -> None:
    grids: list[Grid] = [grid for grid in all_grids() if grid[0] == schedule]
    assert len(grids) >= 60
    for grid in grids:
        programs = build(grid)
        for tied in (False, True):
            report = check(lower(programs, tied=tied))
            ideal = ideal_makespan(programs)
            # Larger groups than p make gradients queue, see `interleaved_one_f_one_b`.
            queue = 2 * max(grid[2] % grid[1] - 1, 0) if schedule == "interleaved" else 0
            assert ideal <= report.makespan <= ideal + queue, grid


def test_bubble() -> None:
    for schedule, ranks, micro_batches, chunks in all_grids():
        report = check(lower(build((schedule, ranks, micro_batches, chunks))))
        where = (schedule, ranks, micro_batches, chunks)
        if schedule in ("gpipe", "1f1b"):
            assert exact_bubble(report) == Fraction(ranks - 1, micro_batches), where
        elif schedule == "interleaved" and micro_batches % ranks == 0:
            assert exact_bubble(report) == Fraction(ranks - 1, chunks * micro_batches), where
        elif schedule == "zero-bubble" and micro_batches >= ranks:
            assert exact_bubble(report) == Fraction(ranks - 1, 3 * micro_batches), where
        if schedule == "zero-bubble" and ranks > 1:
            assert exact_bubble(report) < Fraction(ranks - 1, micro_batches), where


@settings(deadline=None, max_examples=60)
@given(ranks=st.integers(2, 10), chunks=st.integers(1, 5), rounds=st.integers(1, 4))
def test_bubble_of_random_interleaved_pipelines(ranks: int, chunks: int, rounds: int) -> None:
    report = check(lower(interleaved_one_f_one_b(ranks, chunks, ranks * rounds)))
    assert exact_bubble(report) == Fraction(ranks - 1, chunks * ranks * rounds)


@settings(deadline=None, max_examples=100)
@given(
    ranks=st.integers(2, 10),
    micro_batches=st.integers(1, 30),
    forward=st.integers(1, 5),
    backward_input=st.integers(1, 5),
    backward_weight=st.integers(1, 5),
    communication=st.integers(0, 3),
)
def test_any_cost_leaves_the_proof_standing(
    ranks: int,
    micro_batches: int,
    forward: int,
    backward_input: int,
    backward_weight: int,
    communication: int,
) -> None:
    whole = backward_input + backward_weight
    costs = Costs(forward, whole, backward_input, backward_weight, communication)
    plain = check(lower(one_f_one_b(ranks, micro_batches)), costs)
    split = check(lower(zero_bubble(ranks, micro_batches)), costs)
    assert plain.work == split.work == micro_batches * (forward + whole)
    # The first micro-batch goes down, the last comes back up, whatever else happens.
    assert plain.makespan >= ranks * (forward + whole) + 2 * (ranks - 1) * communication
    assert plain.peaks[0].forward_backward == split.peaks[0].forward_backward


@settings(deadline=None, max_examples=100)
@given(ranks=st.integers(1, 10), micro_batches=st.integers(1, 30))
def test_peaks(ranks: int, micro_batches: int) -> None:
    plain = check(lower(one_f_one_b(ranks, micro_batches))).peaks
    split = check(lower(zero_bubble(ranks, micro_batches))).peaks
    for rank in range(ranks):
        in_flight = min(ranks - rank, micro_batches)
        assert plain[rank].forward_backward == plain[rank].forward_weight == in_flight
        assert plain[rank].backward_weight == 0
        assert split[rank].forward_backward == in_flight
        assert split[rank].forward_weight == min(ranks, micro_batches)
        assert split[rank].backward_weight <= min(rank + 1, micro_batches)


def test_evaluation_keeps_one_micro_batch() -> None:
    for peaks in check(lower(forward_only_pipeline(3, 5))).peaks:
        assert (peaks.forward_backward, peaks.forward_weight, peaks.backward_weight) == (1, 1, 0)


def test_communication_counts_once_per_message_on_the_way() -> None:
    costs = Costs(communication=10)
    assert check(lower(one_f_one_b(3, 1)), costs).makespan == 3 * 3 + 4 * 10


def test_spans_are_in_order_and_do_not_overlap() -> None:
    report = check(lower(one_f_one_b(3, 4)))
    for spans in report.spans:
        assert [(span.end - span.start) for span in spans] == [TIME[span.action.kind] for span in spans]
        assert all(one.end <= other.start for one, other in pairwise(spans))


# --- what is refused ------------------------------------------------------------------------------------

GOOD = lower(one_f_one_b(2, 3), tied=True)
# rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0WAIT_F0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2 0TIED ...
# rank 1: 1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1RECV_F2 1F2 1WAIT_B0 1B2 1SEND_B2 1TIED ...


def at(lowered: Lowered, rank: int, name: str) -> int:
    return [str(action) for action in lowered.ranks[rank]].index(name)


def edited(lowered: Lowered, rank: int, program: Program) -> Lowered:
    ranks = list(lowered.ranks)
    ranks[rank] = program
    return replace(lowered, ranks=tuple(ranks))


def dropped(*names: str) -> Lowered:
    rank = int(names[0][0])
    assert set(names) <= set(map(str, GOOD.ranks[rank]))
    return edited(GOOD, rank, tuple(action for action in GOOD.ranks[rank] if str(action) not in names))


def doubled(name: str) -> Lowered:
    rank = int(name[0])
    place = at(GOOD, rank, name) + 1
    return edited(GOOD, rank, GOOD.ranks[rank][:place] + GOOD.ranks[rank][place - 1 :])


def moved(name: str, before: str) -> Lowered:
    rank = int(name[0])
    program = list(GOOD.ranks[rank])
    action = program.pop(at(GOOD, rank, name))
    program.insert([str(other) for other in program].index(before), action)
    return edited(GOOD, rank, tuple(program))


def changed(name: str, **fields: int | Kind | None) -> Lowered:
    rank = int(name[0])
    place = at(GOOD, rank, name)
    program = list(GOOD.ranks[rank])
    program[place] = replace(program[place], **fields)  # type: ignore[arg-type]
    return edited(GOOD, rank, tuple(program))


REFUSED = [
    (dropped("0B2"), "rank 0: 0TIED comes before 0B2 or 0W2"),
    (dropped("0F2"), "rank 0: 0SEND_F2 comes before 0F2"),
    (dropped("1RECV_F1"), "rank 1: 1F1 comes before 1RECV_F1"),
    (dropped("0SEND_F1"), "rank 0: 0WAIT_F1 comes before 0SEND_F1"),
    (dropped("0WAIT_F0"), "rank 0: 0F2 fills slot 0 before 0SEND_F0 was waited for"),
    (dropped("0WAIT_F2"), "rank 0: 0U comes before 0SEND_F2 was waited for"),
    (dropped("0TIED"), "rank 0: 0REDUCE comes before 0TIED"),
    (dropped("1REDUCE"), "rank 1: 1U comes before 1REDUCE"),
    (dropped("1U"), "rank 1: 1U is missing"),
    (dropped("0RECV_B0"), "rank 0: 0B0 comes before 0RECV_B0"),
    (dropped("0SEND_F2", "0WAIT_F2"), "rank 0: 0SEND_F2 is missing"),
    (dropped("1SEND_B2", "1WAIT_B2"), "rank 1: 1SEND_B2 is missing"),
    (doubled("0F1"), "rank 0: 0F1 comes twice"),
    (doubled("0WAIT_F0"), "rank 0: 0WAIT_F0 comes twice"),
    (doubled("0U"), "rank 0: 0U comes twice"),
    (moved("1B1", "1F1"), "rank 1: 1B1 comes before 1F1"),
    (moved("1RECV_F1", "1B0"), "rank 1: 1RECV_F1 fills slot 0, which micro-batch 0 still needs"),
    (moved("0U", "0WAIT_F2"), "rank 0: 0U comes before 0SEND_F2 was waited for"),
    (changed("0F1", slot=2), "rank 0: 0F1 has slot 2, but there are 2"),
    (changed("0F1", slot=None), "rank 0: 0F1 has slot None, but there are 2"),
    (changed("0SEND_F0", slot=1), "rank 0: 0SEND_F0 uses slot 1, which does not hold micro-batch 0"),
    (
        changed("0B0", gradient=None),
        "rank 0: 0B0 uses gradient buffer None, which does not hold micro-batch 0",
    ),
    (changed("0SEND_F0", peer=0), "rank 0: 0SEND_F0 names rank 0, but stage 1 is on 1"),
    (changed("0TIED", peer=0), "rank 0: 0TIED names rank 0, but stage 1 is on 1"),
    (changed("0WAIT_F0", peer=0), "rank 0: 0WAIT_F0 does not name the buffer and rank of 0SEND_F0"),
    (changed("0F0", stage=1), "rank 0: 1F0 is on a stage that rank 0 does not hold"),
    (changed("0F0", microbatch=3), "rank 0: 0F3 is not on one of 3 micro-batches"),
    (changed("0B0", kind=I), "rank 0: 0F2 fills slot 0, which micro-batch 0 still needs"),
    (changed("0B2", kind=I), "rank 0: 0TIED comes before 0B2 or 0W2"),
    (changed("1RECV_F0", kind=Kind.RECV_BACKWARD), "rank 1: 1RECV_B0 has no stage at its other end"),
    (
        moved("0SEND_F0", "0RECV_B0"),
        "rank 1: 1RECV_F0 would get 0SEND_F1, which rank 0 sends before 0SEND_F0",
    ),
    (changed("0TIED", kind=Kind.REDUCE), "rank 0: 0REDUCE comes before 0TIED"),
    (replace(GOOD, tied=False), "rank 0: 0TIED is on a stage without a tied embedding"),
    (replace(GOOD, micro_batches=4), "rank 0: 0TIED comes before 0B3 or 0W3"),
]


@pytest.mark.parametrize(("lowered", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_with_a_sentence(lowered: Lowered, message: str) -> None:
    check(GOOD)
    with pytest.raises(ScheduleError) as caught:
        check(lowered)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0F0 0W0 0I0 0REDUCE 0U", "rank 0: 0W0 comes before 0I0"),
        ("0F0 0I0 0B0 0REDUCE 0U", "rank 0: 0B0 goes backward a second time"),
        ("0F0 0B0 0I0 0REDUCE 0U", "rank 0: 0I0 goes backward a second time"),
        ("0F0 0I0 0REDUCE 0W0 0U", "rank 0: 0REDUCE comes before 0B0 or 0W0"),
        ("0F0 0I0 0W0 0U", "rank 0: 0U comes before 0REDUCE"),
        ("0F0 0I0 0W0 0U 0REDUCE", "rank 0: 0U comes before 0REDUCE"),
    ],
)
def test_split_backward_in_the_wrong_order(words: str, message: str) -> None:
    good = lower(zero_bubble(1, 1))
    actions = {str(action): action for action in good.ranks[0]}
    actions["0B0"] = replace(actions["0I0"], kind=B)
    with pytest.raises(ScheduleError) as caught:
        check(edited(good, 0, tuple(actions[word] for word in words.split())))
    assert str(caught.value) == message


def test_the_embedding_wants_its_weight_gradient_before_the_next_backward() -> None:
    good = lower(zero_bubble(2, 4))
    check(good)
    program = [action for action in good.ranks[0] if str(action) != "0W2"]
    place = [str(action) for action in program].index("0I3") + 1
    late = next(action for action in good.ranks[0] if str(action) == "0W2")
    with pytest.raises(ScheduleError) as caught:
        check(edited(good, 0, (*program[:place], late, *program[place:])))
    assert str(caught.value) == "rank 0: 0I3 overwrites what 0W2 needs for the embedding"


def test_deadlock_is_explained() -> None:
    lowered = lower(one_f_one_b(2, 1))
    first = lowered.ranks[0]
    send, receive, backward = first[1], first[2], first[3]
    stuck = edited(lowered, 0, (first[0], receive, send, backward, *first[4:]))
    with pytest.raises(ScheduleError) as caught:
        check(stuck)
    assert str(caught.value) == (
        "deadlock: rank 0 waits at 0RECV_B0 for rank 1 to reach 1SEND_B0; "
        "rank 1 waits at 1RECV_F0 for rank 0 to reach 0SEND_F0"
    )


def test_tied_gradients_too_soon_are_a_deadlock() -> None:
    lowered = lower(interleaved_one_f_one_b(2, 2, 1), tied=True)
    program = [action for action in lowered.ranks[1] if action.kind is not Kind.TIED]
    tied = next(action for action in lowered.ranks[1] if action.kind is Kind.TIED)
    place = [str(action) for action in program].index("3SEND_B0")
    stuck = edited(lowered, 1, (*program[: place + 1], tied, *program[place + 1 :]))
    with pytest.raises(ScheduleError) as caught:
        check(stuck)
    assert str(caught.value) == (
        "deadlock: rank 0 waits at 0RECV_B0 for rank 1 to reach 1SEND_B0; "
        "rank 1 waits at 3TIED for rank 0 to reach its own TIED"
    )
