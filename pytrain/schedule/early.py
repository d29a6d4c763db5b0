"""Where a message may be waited for before it is needed, so that it arrives while something is computed."""

from collections import defaultdict

from pytrain.schedule.actions import COMPUTE, Action, Kind, Program

_RECEIVES = frozenset((Kind.RECV_FORWARD, Kind.RECV_BACKWARD))
_EVERYBODY = frozenset((Kind.TIED, Kind.UPDATE))


def early_receives(program: Program) -> dict[int, list[Action]]:
    """Receives to post one compute action ahead of where the program waits for them.

    What `check` proves stays true: a receive is posted no earlier than after the last action that has to do with its
    buffer, those of one sender in the order in which the program takes them, and a posted receive only lets sends
    complete sooner than in the proof.

    Args:
        program: of one rank, lowered; for training, as a stage that only evaluates shares its buffers.

    Returns:
        Index in the program -> receives to post right before the compute action there.
    """
    posts: dict[int, list[Action]] = defaultdict(list)
    earliest: dict[int | None, int] = defaultdict(int)  # by sender: where its next message may be posted
    for index, action in enumerate(program):
        if action.kind not in _RECEIVES:
            continue
        place = _before_one_compute(program, index, earliest[action.peer])
        if place is None:
            earliest[action.peer] = index + 1
        else:
            earliest[action.peer] = place
            posts[place].append(action)
    return dict(posts)


def _before_one_compute(program: Program, index: int, earliest: int) -> int | None:
    """The compute action before a receive, if nothing from there on has to do with its buffer."""
    receive = program[index]
    for place in range(index - 1, earliest - 1, -1):
        action = program[place]
        if action.kind in _EVERYBODY or _same_buffer(action, receive):
            return None
        if action.kind in COMPUTE:
            return place
    return None


def _same_buffer(action: Action, receive: Action) -> bool:
    if action.stage != receive.stage:
        return False
    if receive.kind is Kind.RECV_FORWARD:
        return action.slot == receive.slot
    return action.gradient == receive.gradient
