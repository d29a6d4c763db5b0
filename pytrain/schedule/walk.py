"""One rank's half of the proof: what it does, it does once, in order, and on buffers that are free."""

from collections.abc import Callable

from pytrain.schedule.actions import Action, Kind, Lowered, ScheduleError

_WAITS_FOR = {Kind.WAIT_SEND_FORWARD: Kind.SEND_FORWARD, Kind.WAIT_SEND_BACKWARD: Kind.SEND_BACKWARD}
_NO_MICROBATCH = (Kind.TIED, Kind.REDUCE, Kind.UPDATE)


def walk(lowered: Lowered, rank: int) -> None:
    """Follow one rank's program through the states of its buffers.

    Raises:
        ScheduleError: an action that is not possible where it stands, comes twice, or is missing.
    """
    walker = _Walker(lowered, rank)
    for action in lowered.ranks[rank]:
        walker.step(action)
    walker.finish()


class _Buffers:
    """Who owns each numbered buffer of one kind, and which send still reads from it."""

    def __init__(self, name: str, sizes: tuple[int, ...]) -> None:
        self.name, self.sizes = name, sizes
        self.owner: dict[tuple[int, int], int | None] = {}
        self.sending: dict[tuple[int, int], Action] = {}

    def take(self, action: Action, number: int | None) -> str | None:
        """Give a buffer to the action's micro-batch; says why that is not possible, if so."""
        if number is None or not 0 <= number < self.sizes[action.stage]:
            return f"has {self.name} {number}, but there are {self.sizes[action.stage]}"
        key = (action.stage, number)
        if key in self.owner:
            return f"fills {self.name} {number}, which micro-batch {self.owner[key]} still needs"
        if key in self.sending:
            return f"fills {self.name} {number} before {self.sending[key]} was waited for"
        self.owner[key] = action.microbatch
        return None

    def holds(self, action: Action, number: int | None) -> str | None:
        """Says why the buffer is not that of the action's micro-batch, if so."""
        if number is not None and self.owner.get((action.stage, number), -1) == action.microbatch:
            return None
        return f"uses {self.name} {number}, which does not hold micro-batch {action.microbatch}"

    def release(self, action: Action, number: int | None) -> None:
        assert number is not None
        del self.owner[action.stage, number]


class _Walker:
    def __init__(self, lowered: Lowered, rank: int) -> None:
        self.lowered, self.rank = lowered, rank
        self.last = lowered.stages - 1
        self.training = lowered.training
        self.own = range(rank, lowered.stages, len(lowered.ranks))
        self.tied = [
            stage for stage in self.own if lowered.tied and self.training and self.last and stage in (0, self.last)
        ]
        self.slots = _Buffers("slot", lowered.slots)
        self.gradients = _Buffers("gradient buffer", lowered.gradient_buffers)
        self.done: set[tuple[Kind, int, int | None]] = set()
        self.pending: dict[tuple[Kind, int, int | None], Action] = {}
        self.embedding: int | None = None
        """Micro-batch whose W has still to read the gradient of the embedding's output, of which there is one."""
        self.rules: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.SEND_FORWARD: self._send_forward,
            Kind.RECV_FORWARD: self._receive_forward,
            Kind.SEND_BACKWARD: self._send_backward,
            Kind.RECV_BACKWARD: self._receive_backward,
            Kind.WAIT_SEND_FORWARD: self._wait,
            Kind.WAIT_SEND_BACKWARD: self._wait,
            Kind.TIED: self._tied,
            Kind.REDUCE: self._reduce,
            Kind.UPDATE: self._update,
        }

    def step(self, action: Action) -> None:
        key = (action.kind, action.stage, action.microbatch)
        self._require(action, action.stage in self.own, f"is on a stage that rank {self.rank} does not hold")
        counted = action.microbatch is not None and 0 <= action.microbatch < self.lowered.micro_batches
        counted = action.microbatch is None if action.kind in _NO_MICROBATCH else counted
        self._require(action, counted, f"is not on one of {self.lowered.micro_batches} micro-batches")
        self._require(action, key not in self.done, "comes twice")
        self._require(action, (Kind.UPDATE, self.rank, None) not in self.done, "comes after the update")
        self.rules[action.kind](action)
        self.done.add(key)

    def finish(self) -> None:
        """Nothing may be missing."""
        for stage in self.own:
            for microbatch in range(self.lowered.micro_batches):
                for kind in self._expected(stage, microbatch):
                    self._present(kind, stage, microbatch)
            if self.training:
                self._present(Kind.REDUCE, stage, None)
        for stage in self.tied:
            self._present(Kind.TIED, stage, None)
        for send in self.pending.values():
            raise ScheduleError(f"rank {self.rank}: {send} is never waited for")
        if self.training:
            self._present(Kind.UPDATE, self.rank, None)

    def _expected(self, stage: int, microbatch: int) -> list[Kind]:
        expected = [Kind.FORWARD]
        if stage > 0:
            expected.append(Kind.RECV_FORWARD)
        if stage < self.last:
            expected.append(Kind.SEND_FORWARD)
        if not self.training:
            return expected
        if (Kind.BACKWARD_INPUT, stage, microbatch) in self.done:
            expected.append(Kind.BACKWARD_WEIGHT)
        else:
            expected.append(Kind.BACKWARD)
        if stage < self.last:
            expected.append(Kind.RECV_BACKWARD)
        if stage > 0:
            expected.append(Kind.SEND_BACKWARD)
        return expected

    def _present(self, kind: Kind, stage: int, microbatch: int | None) -> None:
        if (kind, stage, microbatch) not in self.done:
            raise ScheduleError(f"rank {self.rank}: {Action(kind, stage, microbatch)} is missing")

    def _require(self, action: Action, condition: bool, otherwise: str) -> None:
        if not condition:
            raise ScheduleError(f"rank {self.rank}: {action} {otherwise}")

    def _allow(self, action: Action, objection: str | None) -> None:
        self._require(action, objection is None, str(objection))

    def _follows(self, action: Action, *kinds: Kind) -> None:
        """One of these must have been done on the action's stage and micro-batch."""
        self._comes_after(action, kinds, action.stage, action.microbatch)

    def _comes_after(self, action: Action, kinds: tuple[Kind, ...], stage: int, microbatch: int | None) -> None:
        earlier = [(kind, stage, microbatch) for kind in kinds]
        names = " or ".join(str(Action(*key)) for key in earlier)
        self._require(action, any(key in self.done for key in earlier), f"comes before {names}")

    def _peer(self, action: Action, stage: int) -> None:
        """The other end must be the rank that holds this stage."""
        self._require(action, 0 <= stage <= self.last, "has no stage at its other end")
        peer = self.lowered.rank_of(stage)
        self._require(action, action.peer == peer, f"names rank {action.peer}, but stage {stage} is on {peer}")

    def _forward(self, action: Action) -> None:
        if action.stage > 0:
            self._follows(action, Kind.RECV_FORWARD)
            self._allow(action, self.slots.holds(action, action.slot))
        else:
            self._allow(action, self.slots.take(action, action.slot))
        if not self.training and action.stage == self.last:
            self.slots.release(action, action.slot)

    def _backward(self, action: Action) -> None:
        whole = action.kind is Kind.BACKWARD
        other = Kind.BACKWARD_INPUT if whole else Kind.BACKWARD
        twice = (other, action.stage, action.microbatch) in self.done
        self._require(action, not twice, "goes backward a second time")
        self._follows(action, Kind.FORWARD)
        self._allow(action, self.slots.holds(action, action.slot))
        if action.stage < self.last:
            self._follows(action, Kind.RECV_BACKWARD)
            self._allow(action, self.gradients.holds(action, action.gradient))
        elif self.last:
            self._allow(action, self.gradients.take(action, action.gradient))
        if action.stage == 0:
            late = Action(Kind.BACKWARD_WEIGHT, 0, self.embedding)
            self._require(action, self.embedding is None, f"overwrites what {late} needs for the embedding")
            self.embedding = None if whole else action.microbatch
        if action.stage == 0 and self.last:
            self.gradients.release(action, action.gradient)
        if whole:
            self.slots.release(action, action.slot)

    def _backward_weight(self, action: Action) -> None:
        self._follows(action, Kind.BACKWARD_INPUT)
        if action.stage == 0 and action.microbatch == self.embedding:
            self.embedding = None
        self._allow(action, self.slots.holds(action, action.slot))
        self.slots.release(action, action.slot)

    def _receive_forward(self, action: Action) -> None:
        self._peer(action, action.stage - 1)
        self._allow(action, self.slots.take(action, action.slot))

    def _receive_backward(self, action: Action) -> None:
        self._peer(action, action.stage + 1)
        self._allow(action, self.gradients.take(action, action.gradient))

    def _send_forward(self, action: Action) -> None:
        self._peer(action, action.stage + 1)
        self._follows(action, Kind.FORWARD)
        self._allow(action, self.slots.holds(action, action.slot))
        if not self.training:
            self.slots.release(action, action.slot)
        self._post(action, self.slots, action.slot)

    def _send_backward(self, action: Action) -> None:
        self._peer(action, action.stage - 1)
        self._follows(action, Kind.BACKWARD, Kind.BACKWARD_INPUT)
        self._allow(action, self.gradients.holds(action, action.gradient))
        self.gradients.release(action, action.gradient)
        self._post(action, self.gradients, action.gradient)

    def _post(self, send: Action, buffers: _Buffers, number: int | None) -> None:
        assert number is not None
        buffers.sending[send.stage, number] = send
        self.pending[send.kind, send.stage, send.microbatch] = send

    def _wait(self, action: Action) -> None:
        send = self.pending.pop((_WAITS_FOR[action.kind], action.stage, action.microbatch), None)
        if send is None:
            missing = Action(_WAITS_FOR[action.kind], action.stage, action.microbatch)
            raise ScheduleError(f"rank {self.rank}: {action} comes before {missing}")
        same = (action.slot, action.gradient, action.peer) == (send.slot, send.gradient, send.peer)
        self._require(action, same, f"does not name the buffer and rank of {send}")
        buffers, number = (
            (self.slots, send.slot) if send.kind is Kind.SEND_FORWARD else (self.gradients, send.gradient)
        )
        assert number is not None
        del buffers.sending[send.stage, number]

    def _whole(self, action: Action) -> None:
        """Every weight gradient of the stage must have been added."""
        for microbatch in range(self.lowered.micro_batches):
            self._comes_after(action, (Kind.BACKWARD, Kind.BACKWARD_WEIGHT), action.stage, microbatch)

    def _tied(self, action: Action) -> None:
        self._require(action, action.stage in self.tied, "is on a stage without a tied embedding")
        self._peer(action, self.last - action.stage)
        self._whole(action)

    def _reduce(self, action: Action) -> None:
        self._require(action, self.training, "has no gradients to reduce")
        self._whole(action)
        if action.stage in self.tied:
            self._follows(action, Kind.TIED)

    def _update(self, action: Action) -> None:
        self._require(action, self.training, "has no gradients to use")
        for stage in self.own:
            self._comes_after(action, (Kind.REDUCE,), stage, None)
        for send in self.pending.values():
            self._require(action, False, f"comes before {send} was waited for")
