"""The training step as a program: a list of actions per rank, which the engine interprets.

A single process is the one-stage program: forward and backward of each micro-batch in turn, then the update.
"""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an action does."""

    FORWARD = "F"
    BACKWARD = "B"  # input and weight gradients, op by op
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    UPDATE = "U"  # gradient norm, clipping, optimizer


@dataclass(frozen=True)
class Action:
    """One action on one stage; micro-batches are counted from 0 within the step (UPDATE has none)."""

    kind: Kind
    stage: int
    microbatch: int | None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{'' if self.microbatch is None else self.microbatch}"


Program = tuple[Action, ...]
_ENDS = (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)


def one_stage(micro_batches: int) -> Program:
    """The training program of a single stage: at most one micro-batch is in flight."""
    pairs = [
        Action(kind, 0, microbatch)
        for microbatch in range(micro_batches)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    ]
    return (*pairs, Action(Kind.UPDATE, 0, None))


def forward_only(micro_batches: int) -> Program:
    """The evaluation program of a single stage."""
    return tuple(Action(Kind.FORWARD, 0, microbatch) for microbatch in range(micro_batches))


def peak_in_flight(program: Program) -> int:
    """Most micro-batches between their forward and the end of their backward: the activation slots needed.

    A micro-batch that never comes back needs its slot for its forward alone.
    """
    come_back = {action.microbatch for action in program if action.kind in _ENDS}
    in_flight = peak = 0
    for action in program:
        in_flight += action.kind is Kind.FORWARD
        peak = max(peak, in_flight)
        forward_alone = action.kind is Kind.FORWARD and action.microbatch not in come_back
        in_flight -= action.kind in _ENDS or forward_alone
    return peak
