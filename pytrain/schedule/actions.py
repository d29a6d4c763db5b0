"""What a step is made of: actions, a program of them per rank, and what they mean.

Computation:
    F, B, I, W  forward; backward as a whole; backward split into input and weight gradients.

Communication, inserted by `lower`:
    SEND  posts and never blocks. It completes only once the other rank reaches the matching RECV
          (rendezvous: nothing is buffered in between), and its buffer stays untouched until then.
    RECV  blocks until the message is there. Messages carry no tags: between two ranks they arrive in the
          order in which they were sent.
    WAIT  blocks until the SEND of the same stage and micro-batch has completed.
    TIED  blocks until both ranks with a copy of a tied embedding have added each other's gradient of it.
    REDUCE  every gradient of the stage is whole from here on, and its buckets may be reduced over the
          data-parallel group. It does not block; UPDATE waits for it.
    UPDATE  a barrier over all ranks (the gradient norm needs them all), then the optimizer.
"""

from dataclasses import dataclass, field
from enum import Enum


class ScheduleError(ValueError):
    """A program that cannot be run; the message is a sentence that names the rank and the action."""


class Kind(Enum):
    """What an action does."""

    FORWARD = "F"
    BACKWARD = "B"  # input and weight gradients, op by op
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_FORWARD = "SEND_F"  # the activation that leaves this stage, to the next
    RECV_FORWARD = "RECV_F"  # the activation that enters this stage, from the one before
    SEND_BACKWARD = "SEND_B"  # the gradient of what entered this stage, to the one before
    RECV_BACKWARD = "RECV_B"  # the gradient of what left this stage, from the next
    WAIT_SEND_FORWARD = "WAIT_F"
    WAIT_SEND_BACKWARD = "WAIT_B"
    TIED = "TIED"
    REDUCE = "REDUCE"
    UPDATE = "U"  # gradient norm, clipping, optimizer


COMPUTE = frozenset((Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT))
INPUT_GRADIENT = frozenset((Kind.BACKWARD, Kind.BACKWARD_INPUT))
WEIGHT_GRADIENT = frozenset((Kind.BACKWARD, Kind.BACKWARD_WEIGHT))


@dataclass(frozen=True)
class Action:
    """One action on one stage.

    Stages are virtual ones, counted over the whole pipeline: rank r of p holds stages r, r + p, r + 2p, ...
    An UPDATE names the first stage of its rank.
    """

    kind: Kind
    stage: int
    microbatch: int | None
    """Counted from 0 within the step; None for TIED, REDUCE and UPDATE."""
    slot: int | None = None
    """Set of activations of the stage: those that F fills and B, I and W read, the one that RECV_FORWARD
    fills, the one that SEND_FORWARD sends (and its WAIT lets go). None before `lower`."""
    gradient: int | None = None
    """Buffer for the gradient of one activation: RECV_BACKWARD fills it, B or I turns the gradient of what
    left the stage into that of what entered it, SEND_BACKWARD sends it. The last stage's B or I only fills
    it, the first's only reads it. None before `lower`."""
    peer: int | None = None
    """The other rank of a SEND, RECV, WAIT or TIED. None before `lower`."""

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{'' if self.microbatch is None else self.microbatch}"


Program = tuple[Action, ...]


@dataclass(frozen=True)
class Programs:
    """What every rank of a pipeline computes, in its order; communication is not in it yet."""

    schedule: str
    ranks: tuple[Program, ...]
    """One program per pipeline rank."""
    chunks_per_rank: int
    micro_batches: int

    @property
    def stages(self) -> int:
        """Virtual stages of the whole pipeline."""
        return len(self.ranks) * self.chunks_per_rank

    def rank_of(self, stage: int) -> int:
        """The rank that holds a virtual stage."""
        return stage % len(self.ranks)

    @property
    def training(self) -> bool:
        """Whether anything goes backward."""
        return any(action.kind in INPUT_GRADIENT for program in self.ranks for action in program)


@dataclass(frozen=True)
class Lowered(Programs):
    """Programs that the engine can run: with communication, and every buffer numbered."""

    tied: bool = False
    """Whether first and last stage each hold the embedding and must agree on its gradient."""
    slots: tuple[int, ...] = field(default=())
    """Per virtual stage: how many sets of activations it needs."""
    gradient_buffers: tuple[int, ...] = field(default=())
    """Per virtual stage: how many buffers (rows, hidden) for gradients that come, go or are on their way."""


def peak_in_flight(program: Program) -> int:
    """Most micro-batches between their forward and the end of their backward, over the stages of a rank.

    A micro-batch that never comes back needs its slot for its forward alone.
    """
    come_back = {(action.stage, action.microbatch) for action in program if action.kind in WEIGHT_GRADIENT}
    in_flight = peak = 0
    for action in program:
        in_flight += action.kind is Kind.FORWARD
        peak = max(peak, in_flight)
        comes_back = (action.stage, action.microbatch) in come_back
        in_flight -= action.kind in WEIGHT_GRADIENT or (action.kind is Kind.FORWARD and not comes_back)
    return peak
