"""Runs a lowered pipeline on stand-in data, independently of `pytrain.schedule.check`.

Ranks take turns at random. Messages have no tags; a send hands over a reference, which is read only when the
receive is reached, so that a buffer filled too soon shows as wrong data.
"""

from collections import Counter, defaultdict, deque
from random import Random
from typing import Any

from pytrain.schedule import Action, Kind, Lowered

Value = tuple[Any, ...]


class WrongError(Exception):
    """Wrong data, a buffer that is not there, or ranks that wait for ever."""


class Executor:
    """`run` gives back how often each (kind, stage, micro-batch) was done."""

    def __init__(self, lowered: Lowered, random: Random) -> None:
        self.lowered, self.random = lowered, random
        self.last = lowered.stages - 1
        self.inputs: dict[tuple[int, int], Value] = {}
        self.outputs: dict[tuple[int, int], Value] = {}
        self.gradients: dict[tuple[int, int], Value] = {}
        self.channels: dict[tuple[int, int], deque[tuple[dict[tuple[int, int], Value], Any, Action]]] = defaultdict(
            deque
        )
        self.received: set[Action] = set()
        self.added: dict[int, Counter[int]] = defaultdict(Counter)
        self.arrived: dict[Kind, set[int]] = defaultdict(set)
        self.done: Counter[tuple[Kind, int, int | None]] = Counter()

    def run(self) -> Counter[tuple[Kind, int, int | None]]:
        places = [0] * len(self.lowered.ranks)
        while True:
            open_ranks = [rank for rank, place in enumerate(places) if place < len(self.lowered.ranks[rank])]
            if not open_ranks:
                break
            self.random.shuffle(open_ranks)
            for rank in open_ranks:
                action = self.lowered.ranks[rank][places[rank]]
                if self.act(rank, action):
                    self.done[action.kind, action.stage, action.microbatch] += 1
                    places[rank] += 1
                    break
            else:
                raise WrongError(f"deadlock at {places}")
        if any(self.channels.values()):
            raise WrongError("a message was never received")
        return self.done

    def act(self, rank: int, action: Action) -> bool:
        """False if the action has to wait."""
        kind = action.kind
        slot, gradient = (action.stage, action.slot or 0), (action.stage, action.gradient or 0)
        if kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            buffers, key = (self.outputs, slot) if kind is Kind.SEND_FORWARD else (self.gradients, gradient)
            assert action.peer is not None
            self.channels[rank, action.peer].append((buffers, key, action))
        elif kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
            assert action.peer is not None
            if not self.channels[action.peer, rank]:
                return False
            buffers, key, send = self.channels[action.peer, rank].popleft()
            self.received.add(send)
            if kind is Kind.RECV_FORWARD:
                self.inputs[slot] = buffers[key]
            else:
                self.gradients[gradient] = buffers[key]
        elif kind in (Kind.WAIT_SEND_FORWARD, Kind.WAIT_SEND_BACKWARD):
            send_kind = Kind.SEND_FORWARD if kind is Kind.WAIT_SEND_FORWARD else Kind.SEND_BACKWARD
            return any(
                (send.kind, send.stage, send.microbatch) == (send_kind, action.stage, action.microbatch)
                for send in self.received
            )
        elif kind in (Kind.TIED, Kind.UPDATE):
            self.arrived[kind].add(rank)
            return len(self.arrived[kind]) == (2 if kind is Kind.TIED else len(self.lowered.ranks))
        elif kind is Kind.REDUCE:
            if self.added[action.stage] != Counter(range(self.lowered.micro_batches)):
                raise WrongError(f"{action} before every gradient was added")
        else:
            self.compute(action, slot, gradient)
        return True

    def compute(self, action: Action, slot: tuple[int, int], gradient: tuple[int, int]) -> None:
        stage, microbatch = action.stage, action.microbatch
        assert microbatch is not None
        if action.kind is Kind.FORWARD:
            if stage > 0:
                self.expect(action, self.inputs.get(slot), ("activation", stage - 1, microbatch))
            self.outputs[slot] = ("activation", stage, microbatch)
            return
        # Backward reads what forward left in the slot.
        self.expect(action, self.outputs.get(slot), ("activation", stage, microbatch))
        if stage > 0:
            self.expect(action, self.inputs.get(slot), ("activation", stage - 1, microbatch))
        if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            if stage < self.last:
                self.expect(action, self.gradients.get(gradient), ("gradient", stage + 1, microbatch))
            if self.last:
                self.gradients[gradient] = ("gradient", stage, microbatch)
        if action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
            self.added[stage][microbatch] += 1

    def expect(self, action: Action, found: Value | None, wanted: Value) -> None:
        if found != wanted:
            raise WrongError(f"{action} finds {found} instead of {wanted}")
