"""From compute-only programs to ones that can run: messages, buffers, reductions and the update."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pytrain.schedule.actions import (
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Action,
    Kind,
    Lowered,
    Program,
    Programs,
    ScheduleError,
)

_WAIT = {
    Kind.SEND_FORWARD: Kind.WAIT_SEND_FORWARD,
    Kind.SEND_BACKWARD: Kind.WAIT_SEND_BACKWARD,
}


def lower(programs: Programs, *, tied: bool = False) -> Lowered:
    """Insert communication and number the buffers.

    Receives stand right before the action that needs them, or earlier where messages overtake each other:
    two ranks that are each other's both neighbours exchange activations and gradients over one channel, and
    each must be taken out in the order it was put in. That cannot block longer than the receive that comes
    later, only the buffer is filled sooner. A send is waited for before its buffer is filled again, or at
    the end.

    A stage has as many slots as micro-batches are in flight in it at most (counted from the receive on). It
    has two buffers for gradients that it sends, so that one can leave while the next is computed.

    Args:
        programs: from `pytrain.schedule.programs`.
        tied: whether the head uses the embedding. The gradients of first and last stage are then added at
            the end, where no rank is needed by another any more, and these two stages are reduced after it.

    Raises:
        ScheduleError: a message that nobody needs, or a backward that comes before its forward.
    """
    receives = _place_receives(programs)
    ranks = [_RankLowering(programs, rank, tied) for rank in range(len(programs.ranks))]
    lowered = tuple(tuple(one.run(receives[rank])) for rank, one in enumerate(ranks))
    stages = range(programs.stages)
    return Lowered(
        programs.schedule,
        lowered,
        programs.chunks_per_rank,
        programs.micro_batches,
        tied=tied,
        slots=tuple(ranks[programs.rank_of(stage)].slots[stage].size for stage in stages),
        gradient_buffers=tuple(ranks[programs.rank_of(stage)].gradients[stage].size for stage in stages),
    )


def _sends_after(action: Action, stages: int) -> bool:
    """Whether what a compute action makes goes to another stage."""
    if action.kind is Kind.FORWARD:
        return action.stage < stages - 1
    return action.kind in INPUT_GRADIENT and action.stage > 0


def _receives_before(action: Action, stages: int) -> bool:
    """Whether a compute action needs what another stage makes."""
    if action.kind is Kind.FORWARD:
        return action.stage > 0
    return action.kind in INPUT_GRADIENT and action.stage < stages - 1


def _place_receives(programs: Programs) -> list[dict[int, list[Action]]]:
    """Per rank: index in its program -> receives right before it, in order."""
    consumers = {
        (action.kind is Kind.FORWARD, action.stage, action.microbatch): index
        for program in programs.ranks
        for index, action in enumerate(program)
        if _receives_before(action, programs.stages)
    }
    places: list[dict[int, list[Action]]] = [defaultdict(list) for _ in programs.ranks]
    for sender, program in enumerate(programs.ranks):
        channels: dict[int, list[tuple[int, Action]]] = defaultdict(list)
        for action in program:
            if not _sends_after(action, programs.stages):
                continue
            forward = action.kind is Kind.FORWARD
            stage = action.stage + (1 if forward else -1)
            if (forward, stage, action.microbatch) not in consumers:
                raise ScheduleError(f"rank {sender}: stage {stage} has no use for what {action} makes")
            kind = Kind.RECV_FORWARD if forward else Kind.RECV_BACKWARD
            receive = Action(kind, stage, action.microbatch, peer=sender)
            place = consumers[forward, stage, action.microbatch]
            channels[programs.rank_of(stage)].append((place, receive))
        for receiver, messages in channels.items():
            earliest = len(programs.ranks[receiver])
            placed = []
            for place, receive in reversed(messages):
                earliest = min(earliest, place)
                placed.append((earliest, receive))
            for place, receive in reversed(placed):
                places[receiver][place].append(receive)
    return places


@dataclass
class _Pool:
    """Numbered buffers of one kind; a new one is made only where none can be had."""

    reserve: int
    """So many are made before a send is waited for."""
    size: int = 0
    free: list[int] = field(default_factory=list)
    leaving: list[tuple[int, Action]] = field(default_factory=list)
    """Done with but for a send, oldest first."""

    def take(self) -> tuple[int, Action | None]:
        """A buffer, and the send that has to complete before it is filled."""
        if self.free:
            self.free.sort()
            return self.free.pop(0), None
        if self.leaving and self.size >= self.reserve:
            return self.leaving.pop(0)
        self.size += 1
        return self.size - 1, None

    def release(self, number: int, send: Action | None) -> None:
        if send is None:
            self.free.append(number)
        else:
            self.leaving.append((number, send))


class _RankLowering:
    """Walks the program of one rank and yields it lowered."""

    def __init__(self, programs: Programs, rank: int, tied: bool) -> None:
        self.programs, self.rank = programs, rank
        self.training = programs.training
        last = programs.stages - 1
        own = range(rank, programs.stages, len(programs.ranks))
        self.slots = {stage: _Pool(reserve=1) for stage in own}
        self.gradients = {stage: _Pool(reserve=2 if stage else 1) for stage in own}
        self.tied = [stage for stage in own if stage in (0, last)] if tied and self.training and last else []
        self.slot_of: dict[tuple[int, int | None], int] = {}
        self.gradient_of: dict[tuple[int, int | None], int] = {}
        self.forward_sends: dict[tuple[int, int | None], Action] = {}

    def run(self, receives: dict[int, list[Action]]) -> Iterator[Action]:
        program = self.programs.ranks[self.rank]
        reduce_after = _last_weight_gradients(program)
        for index, action in enumerate(program):
            for receive in receives[index]:
                yield from self._receive(receive)
            yield from self._compute(action)
            if index in reduce_after and action.stage not in self.tied:
                yield Action(Kind.REDUCE, action.stage, None)
        for stage in self.tied:
            other = self.programs.rank_of(self.programs.stages - 1 - stage)
            yield Action(Kind.TIED, stage, None, peer=other)
            yield Action(Kind.REDUCE, stage, None)
        for pool in (*self.slots.values(), *self.gradients.values()):
            for _, send in pool.leaving:
                yield replace(send, kind=_WAIT[send.kind])
        if self.training:
            yield Action(Kind.UPDATE, self.rank, None)

    def _receive(self, receive: Action) -> Iterator[Action]:
        key = (receive.stage, receive.microbatch)
        if receive.kind is Kind.RECV_FORWARD:
            yield from self._take(self.slots, self.slot_of, key)
            yield replace(receive, slot=self.slot_of[key])
        else:
            yield from self._take(self.gradients, self.gradient_of, key)
            yield replace(receive, gradient=self.gradient_of[key])

    def _compute(self, action: Action) -> Iterator[Action]:
        key = (action.stage, action.microbatch)
        sends = _sends_after(action, self.programs.stages)
        if action.kind is Kind.FORWARD and action.stage == 0:
            yield from self._take(self.slots, self.slot_of, key)
        if key not in self.slot_of:
            raise ScheduleError(f"rank {self.rank}: {action} has no activations: its forward is not before it")
        # The last stage's gradient begins in it; with one stage alone none crosses a boundary.
        if action.kind in INPUT_GRADIENT and sends and key not in self.gradient_of:
            yield from self._take(self.gradients, self.gradient_of, key)
        gradient = self.gradient_of.get(key) if action.kind in INPUT_GRADIENT else None
        yield replace(action, slot=self.slot_of[key], gradient=gradient)
        if sends:
            yield self._send(action)
        if action.kind in WEIGHT_GRADIENT or not self.training:
            self.slots[action.stage].release(self.slot_of.pop(key), self.forward_sends.pop(key, None))
        if action.kind in INPUT_GRADIENT and action.stage == 0 and gradient is not None:
            self.gradients[0].release(self.gradient_of.pop(key), None)

    def _send(self, action: Action) -> Action:
        key = (action.stage, action.microbatch)
        if action.kind is Kind.FORWARD:
            peer = self.programs.rank_of(action.stage + 1)
            send = Action(Kind.SEND_FORWARD, *key, slot=self.slot_of[key], peer=peer)
            self.forward_sends[key] = send
            return send
        peer = self.programs.rank_of(action.stage - 1)
        send = Action(Kind.SEND_BACKWARD, *key, gradient=self.gradient_of[key], peer=peer)
        self.gradients[action.stage].release(self.gradient_of.pop(key), send)
        return send

    def _take(
        self,
        pools: dict[int, _Pool],
        numbers: dict[tuple[int, int | None], int],
        key: tuple[int, int | None],
    ) -> Iterator[Action]:
        """Give (stage, micro-batch) a buffer; yields the wait that this needs, if any."""
        numbers[key], send = pools[key[0]].take()
        if send is not None:
            yield replace(send, kind=_WAIT[send.kind])


def _last_weight_gradients(program: Program) -> set[int]:
    """Where in the program the gradients of a stage become whole."""
    last = {action.stage: index for index, action in enumerate(program) if action.kind in WEIGHT_GRADIENT}
    return set(last.values())
