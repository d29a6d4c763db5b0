"""Receives that are posted ahead: into buffers that nobody uses, and in the order in which messages are sent."""

from collections import Counter

from pytrain.schedule import SCHEDULES, Action, Kind, Program, early_receives, lower, one_f_one_b, zero_bubble
from pytrain.schedule.actions import COMPUTE
from tests.schedule.grids import all_grids, build

RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)


def posted(program: Program) -> list[str]:
    """What is posted before which action."""
    return [
        f"{receive} before {program[place]}" for place, found in early_receives(program).items() for receive in found
    ]


def test_a_gradient_is_posted_before_the_forward_that_it_follows() -> None:
    lowered = lower(one_f_one_b(2, 3))
    # 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0WAIT_F0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2 ...
    assert posted(lowered.ranks[0]) == ["0RECV_B0 before 0F1", "0RECV_B1 before 0F2"]
    # 1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 ...: one slot, which the backward before still reads
    assert posted(lowered.ranks[1]) == []


def test_messages_arrive_beside_input_and_weight_gradients() -> None:
    first, second = lower(zero_bubble(2, 6)).ranks
    assert posted(first)[-1] == "0RECV_B5 before 0W4"
    assert posted(second) == ["1RECV_F1 before 1I0"]


def uses(program: Program, receive: Action) -> list[int]:
    """Indices of the actions that have to do with the buffer which a receive fills."""
    forward = receive.kind is Kind.RECV_FORWARD
    number = receive.slot if forward else receive.gradient
    return [
        index
        for index, action in enumerate(program)
        if action.stage == receive.stage and (action.slot if forward else action.gradient) == number
    ]


def assert_undisturbed(program: Program) -> int:
    """How many receives are posted ahead."""
    early = early_receives(program)
    place_of = {receive: place for place, found in early.items() for receive in found}
    assert len(place_of) == sum(map(len, early.values()))
    posts: dict[int | None, list[tuple[int, bool]]] = {}
    for index, receive in enumerate(program):
        if receive.kind not in RECEIVES:
            continue
        place = place_of.get(receive, index)
        posts.setdefault(receive.peer, []).append((place, receive not in place_of))  # those ahead come first
        if place < index:
            assert program[place].kind in COMPUTE
            assert sum(action.kind in COMPUTE for action in program[place:index]) == 1, "one action ahead"
            assert not [use for use in uses(program, receive) if place <= use < index]
    for order in posts.values():
        assert order == sorted(order), "messages of one sender are taken in another order"
    for found in early.values():
        assert found == sorted(found, key=program.index)
    return len(place_of)


def test_posting_ahead_disturbs_nothing() -> None:
    ahead: Counter[str] = Counter()
    for grid in all_grids():
        for program in lower(build(grid)).ranks:
            ahead[grid[0]] += assert_undisturbed(program)
    print(ahead)
    assert all(ahead[schedule] > 100 for schedule in SCHEDULES)
