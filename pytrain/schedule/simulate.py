"""When each action of a lowered pipeline would run, and whether all of them ever do; no MPI involved."""

from dataclasses import dataclass

from pytrain.schedule.actions import COMPUTE, Action, Kind, Lowered, ScheduleError

_MATCHING_SEND = {Kind.RECV_FORWARD: (Kind.SEND_FORWARD, -1), Kind.RECV_BACKWARD: (Kind.SEND_BACKWARD, +1)}
_SENDS = {Kind.WAIT_SEND_FORWARD: Kind.SEND_FORWARD, Kind.WAIT_SEND_BACKWARD: Kind.SEND_BACKWARD}

Message = tuple[Kind, int, int | None]
"""The SEND that it is: kind, stage, micro-batch."""


@dataclass(frozen=True)
class Costs:
    """Time per action, in any unit, the same for every stage; reductions and the update take none."""

    forward: float = 1
    backward: float = 2
    backward_input: float = 1
    backward_weight: float = 1
    communication: float = 0
    """From the moment both ranks have reached a message until it has arrived."""

    def of(self, kind: Kind) -> float:
        """Time of a compute action."""
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.backward_weight,
        }[kind]


@dataclass(frozen=True)
class Span:
    """When a compute action runs, in the unit of the costs."""

    action: Action
    start: float
    end: float


def expected_send(receive: Action) -> Message:
    """The message that a RECV takes."""
    kind, step = _MATCHING_SEND[receive.kind]
    return kind, receive.stage + step, receive.microbatch


def simulate(lowered: Lowered, costs: Costs) -> tuple[tuple[Span, ...], ...]:
    """Run all ranks side by side, with sends that complete only when they are received.

    Returns:
        per rank, the spans of its compute actions in their order.

    Raises:
        ScheduleError: a deadlock; the sentence says where each rank stands and what it waits for.
    """
    simulation = _Simulation(lowered, costs)
    while simulation.advance():
        pass
    blocked = simulation.blocked()
    if blocked:
        raise ScheduleError("deadlock: " + "; ".join(blocked))
    return tuple(tuple(spans) for spans in simulation.spans)


class _Simulation:
    """Each rank's place in its program and its clock. The outcome does not depend on who is advanced first:
    an action that can run stays able to, whatever the others do."""

    def __init__(self, lowered: Lowered, costs: Costs) -> None:
        self.lowered, self.costs = lowered, costs
        ranks = len(lowered.ranks)
        self.next = [0] * ranks
        self.clock: list[float] = [0] * ranks
        self.spans: list[list[Span]] = [[] for _ in range(ranks)]
        self.posted: dict[Message, float] = {}
        self.completed: dict[Message, float] = {}
        self.arrived: dict[Kind, dict[int, float]] = {Kind.TIED: {}, Kind.UPDATE: {}}

    def advance(self) -> bool:
        """Take every rank as far as it gets; says whether any moved."""
        moved = False
        for rank, program in enumerate(self.lowered.ranks):
            while self.next[rank] < len(program) and self._run(rank, program[self.next[rank]]):
                self.next[rank] += 1
                moved = True
        return moved

    def blocked(self) -> list[str]:
        """Where the ranks that have not ended stand."""
        return [
            f"rank {rank} waits at {program[place]} for {self._missing(rank, program[place])}"
            for rank, (program, place) in enumerate(zip(self.lowered.ranks, self.next, strict=True))
            if place < len(program)
        ]

    def _run(self, rank: int, action: Action) -> bool:
        """Run an action if it does not have to wait."""
        kind, clock = action.kind, self.clock[rank]
        if kind in COMPUTE:
            self.clock[rank] += self.costs.of(kind)
            self.spans[rank].append(Span(action, clock, self.clock[rank]))
        elif kind in _SENDS.values():
            self.posted[kind, action.stage, action.microbatch] = clock
        elif kind in _MATCHING_SEND:
            message = expected_send(action)
            if message not in self.posted:
                return False
            self.clock[rank] = max(clock, self.posted[message]) + self.costs.communication
            self.completed[message] = self.clock[rank]
        elif kind in _SENDS:
            message = (_SENDS[kind], action.stage, action.microbatch)
            if message not in self.completed:
                return False
            self.clock[rank] = max(clock, self.completed[message])
        elif kind in self.arrived:
            arrived = self.arrived[kind]
            arrived[rank] = clock
            if len(arrived) < self._members(kind):
                return False
            self.clock[rank] = max(arrived.values())
        return True

    def _members(self, kind: Kind) -> int:
        return 2 if kind is Kind.TIED else len(self.lowered.ranks)

    def _missing(self, rank: int, action: Action) -> str:
        if action.kind in _MATCHING_SEND:
            kind, stage, microbatch = expected_send(action)
            return f"rank {self.lowered.rank_of(stage)} to reach {Action(kind, stage, microbatch)}"
        if action.kind in _SENDS:
            return f"rank {action.peer} to receive it"
        if action.kind is Kind.TIED:
            return f"rank {action.peer} to reach its own TIED"
        others = sorted(set(range(len(self.lowered.ranks))) - set(self.arrived[action.kind]))
        return "the update of " + ", ".join(f"rank {other}" for other in others if other != rank)
