"""Proof, without MPI, that a lowered pipeline can be run, and what it costs in time and memory."""

from collections import defaultdict
from dataclasses import dataclass

from pytrain.schedule.actions import (
    COMPUTE,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Kind,
    Lowered,
    Program,
    ScheduleError,
)
from pytrain.schedule.simulate import Costs, Span, expected_send, simulate
from pytrain.schedule.walk import walk


@dataclass(frozen=True)
class Peaks:
    """Most micro-batches of a rank (summed over its stages) that keep something at once, by lifetime.

    With a B as a whole the output gradients live within it alone, and its `backward_weight` counts none.
    """

    forward_backward: int
    """From F to B or I."""
    forward_weight: int
    """From F to B or W."""
    backward_weight: int
    """From I to W."""


@dataclass(frozen=True)
class Report:
    """What `check` found out; times are in the unit of the costs."""

    spans: tuple[tuple[Span, ...], ...]
    """Per rank: when each compute action runs."""
    makespan: float
    """From the first action to the end of the last."""
    work: float
    """Time that the busiest rank computes."""
    peaks: tuple[Peaks, ...]
    """Per rank."""

    @property
    def bubble(self) -> float:
        """Time that the busiest rank waits, as a share of the time it computes."""
        return (self.makespan - self.work) / self.work


DEFAULT_COSTS = Costs()


def check(lowered: Lowered, costs: Costs = DEFAULT_COSTS) -> Report:
    """Prove that the ranks do everything once, in a possible order, on buffers that are free.

    Proven are: every forward and backward of every stage and micro-batch happens once and in order; every
    message is sent, received and waited for once, and in the same order at both ends; no buffer is filled
    while it is in use or a send from it is under way; reductions come after the last gradient, the update
    after everything; and no rank waits for ever, even though sends complete only when they are received.

    Args:
        lowered: from `lower`.
        costs: times by which the report is made; the proof does not depend on them.

    Raises:
        ScheduleError: any of it does not hold; the sentence names rank, action and what is missing.
    """
    for rank in range(len(lowered.ranks)):
        walk(lowered, rank)
    _check_channels(lowered)
    spans = simulate(lowered, costs)
    return Report(
        spans=spans,
        makespan=max(span.end for rank in spans for span in rank),
        work=max(sum(costs.of(span.action.kind) for span in rank) for rank in spans),
        peaks=tuple(_peaks(program, lowered.training) for program in lowered.ranks),
    )


def _check_channels(lowered: Lowered) -> None:
    """Messages between two ranks carry no tag: the order is all that tells them apart."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, program in enumerate(lowered.ranks):
        for action in program:
            if action.peer is None:
                continue
            if action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
                sent[rank, action.peer].append(action)
            elif action.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
                received[action.peer, rank].append(action)
    for (sender, receiver), receives in received.items():
        # `walk` has seen to it that nothing is missing at either end.
        for send, receive in zip(sent[sender, receiver], receives, strict=True):
            if (send.kind, send.stage, send.microbatch) != expected_send(receive):
                raise ScheduleError(
                    f"rank {receiver}: {receive} would get {send}, which rank {sender} sends before "
                    f"{Action(*expected_send(receive))}"
                )


def _peaks(program: Program, training: bool) -> Peaks:
    forward_backward = forward_weight = backward_weight = 0
    peaks = Peaks(0, 0, 0)
    for action in program:
        if action.kind not in COMPUTE:
            continue
        forward = action.kind is Kind.FORWARD
        forward_backward += forward
        forward_weight += forward
        backward_weight += action.kind is Kind.BACKWARD_INPUT
        peaks = Peaks(
            max(peaks.forward_backward, forward_backward),
            max(peaks.forward_weight, forward_weight),
            max(peaks.backward_weight, backward_weight),
        )
        forward_backward -= action.kind in INPUT_GRADIENT or not training
        forward_weight -= action.kind in WEIGHT_GRADIENT or not training
        backward_weight -= action.kind is Kind.BACKWARD_WEIGHT
    return peaks
