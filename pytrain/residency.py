"""Whole buckets on loan: what ZeRO-2 and ZeRO-3 keep as shards is whole only while a pass needs it.

Weights (ZeRO-3) are gathered into one of two buffers: while a layer is computed, the next one arrives in the other.
Gradients (ZeRO-2 and 3) of a bucket are opened before the ops that add to them, and closed after: its parts travel
as they become whole, and this rank's shard of each is added to what it keeps. Per step of m micro-batches and n
replicas a rank sends (n-1)/n of the gradients m times, and with ZeRO-3 (n-1)/n of the weights up to 2 m times. What
was gathered last stays until its buffer is wanted, so that a backward pass which follows its forward finds the last
layer there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from pytrain.buckets import Part
from pytrain.native import native
from pytrain.stage import Segment
from pytrain.zero import StageState

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Handle

WEIGHT_BUFFERS = 2  # the layer that is computed, and the one that arrives
GRADIENT_BUFFERS = 2  # the bucket that is filled, and the one that travels
ALIGNMENT = 32  # elements: what the layout gives groups of tensors, so that no bucket in a buffer is worse off

Extent = tuple["_native.Layout", Sequence[Segment], int]
"""Of one stage: its layout, its segments, and into how many shards its buckets are cut."""


def weight_buffers(stages: Iterable[Extent]) -> list[int]:
    """Elements of each buffer that a rank with these stages gathers weights in (ZeRO-3)."""
    largest = max(_extent(layout, segment, shards)[1] for layout, segments, shards in stages for segment in segments)
    return [largest] * WEIGHT_BUFFERS


def gradient_buffers(stages: Iterable[Extent]) -> list[int]:
    """Elements of each buffer that a rank with these stages fills with gradients (ZeRO-2 and 3).

    A head that is tied to the embedding of its own stage adds to that bucket first and the embedding last: the
    last buffer is then the embedding's, and what is in it does not travel between.
    """
    others: list[int] = [1]
    tied: list[int] = []
    for layout, segments, shards in stages:
        held = _tied_bucket(segments)
        for bucket in range(len(layout.buckets)):
            elements = layout.shard_elements(bucket, shards) * shards
            (tied if bucket == held else others).append(elements)
    return [max(others)] * GRADIENT_BUFFERS + tied


def _extent(layout: _native.Layout, segment: Segment, shards: int) -> tuple[list[int], int]:
    """Where each bucket of a segment begins in a buffer, and how many elements they take together."""
    begins, end = [], 0
    for bucket in segment.reads:
        begins.append(end)
        end += -(-layout.shard_elements(bucket, shards) * shards // ALIGNMENT) * ALIGNMENT
    return begins, end


def _tied_bucket(segments: Sequence[Segment]) -> int | None:
    """The bucket that a segment adds to beside its own: that of the tied embedding."""
    return next((bucket for segment in segments for bucket in segment.reads if bucket != segment.bucket), None)


class _WeightBuffer:
    """Room for the weights of one segment, and what is in it."""

    def __init__(self, buffer: _native.Buffer) -> None:
        self.buffer = buffer
        self.key: tuple[StageState, int] | None = None
        self.arriving: list[Handle] = []
        self.held = False

    def wait(self) -> None:
        for handle in self.arriving:
            handle.wait()
        self.arriving.clear()


class GatheredWeights:
    """ZeRO-3: the weights of the segment that is computed and of the one after it, for all stages of a rank."""

    def __init__(self, states: Sequence[StageState]) -> None:
        stage = states[0].stage
        sizes = weight_buffers(_extents(states))
        self._buffers = [
            _WeightBuffer(native().Buffer(stage.device, size, stage.policy.weights, "weights")) for size in sizes
        ]

    def hold(self, state: StageState, segment: Segment, following: Segment | None) -> None:
        """Return when the segment's weights are there, bound; those of `following` are on their way then."""
        place = self._fetch(state, segment)
        place.wait()
        place.held = True
        for bucket, array in self._arrays(state, segment, place):
            state.stage.native.bind_weights(bucket, array.ctypes.data)
        if following is not None:
            self._fetch(state, following)

    def release(self, state: StageState, segment: Segment) -> None:
        """The buffer may be used again; until then a `hold` of the same segment costs nothing."""
        for bucket in segment.reads:
            state.stage.native.bind_weights(bucket, 0)
        self._place_of(state, segment).held = False

    def forget(self) -> None:
        """The weights have changed: nothing that was gathered is worth anything."""
        for place in self._buffers:
            place.wait()
            place.key = None

    def _place_of(self, state: StageState, segment: Segment) -> _WeightBuffer:
        return next(place for place in self._buffers if place.key == (state, segment.bucket))

    def _fetch(self, state: StageState, segment: Segment) -> _WeightBuffer:
        """The buffer that holds the segment or soon will; the one that was fetched longest ago gives way."""
        key = (state, segment.bucket)
        for place in self._buffers:
            if place.key == key:
                return place
        place = next(place for place in self._buffers if not place.held)
        self._buffers.remove(place)
        self._buffers.append(place)
        place.wait()
        place.key = key
        for bucket, array in self._arrays(state, segment, place):
            for part in state.parts_of(bucket):
                state.own_part(part, array)[:] = state.own_weights(part)
                place.arriving.append(state.start_gather(part, array))
        return place

    @staticmethod
    def _arrays(state: StageState, segment: Segment, place: _WeightBuffer) -> Iterator[tuple[int, NDArray[Any]]]:
        begins, _ = _extent(state.stage.layout, segment, state.shards)
        for bucket, begin in zip(segment.reads, begins, strict=True):
            yield bucket, place.buffer.array[begin : begin + state.whole_elements(bucket)]


class _Travelling(NamedTuple):
    state: StageState
    part: Part
    buffer: _native.Buffer
    handle: Handle


class CollectedGradients:
    """ZeRO-2 and 3: gradients of the bucket that is filled, and of one that travels, for all stages of a rank."""

    def __init__(self, states: Sequence[StageState]) -> None:
        stage = states[0].stage
        buffers = [
            native().Buffer(stage.device, size, stage.policy.gradients, "gradients")
            for size in gradient_buffers(_extents(states))
        ]
        self._free = buffers[:GRADIENT_BUFFERS]
        self._tied = buffers[GRADIENT_BUFFERS:]
        self._open: dict[tuple[StageState, int], _native.Buffer] = {}
        self._travelling: deque[_Travelling] = deque()

    def open(self, state: StageState, segment: Segment) -> None:
        """Bind zeroed gradients for the buckets that the segment adds to, unless they are there."""
        for bucket in segment.reads:
            if (state, bucket) in self._open:
                continue
            of_tied = bucket == _tied_bucket(state.stage.segments)
            free = self._tied if of_tied else self._free
            while not free:
                self._settle()
            buffer = free.pop(0)
            elements = state.whole_elements(bucket)
            state.stage.device.fill(buffer.array[:elements], 0.0, state.stage.half)
            state.stage.native.bind_gradients(bucket, buffer.address)
            self._open[state, bucket] = buffer

    def close(self, state: StageState, bucket: int, ops: range) -> None:
        """All that these ops add to the bucket in this micro-batch is there: send on its way what is whole."""
        buffer = self._open[state, bucket]
        for op in reversed(ops):
            for part in state.ready_parts(op, lambda _: buffer):
                handle = state.start_sum(part, buffer.array)
                self._travelling.append(_Travelling(state, part, buffer, handle))
                if part.first:
                    state.stage.native.bind_gradients(bucket, 0)
                    del self._open[state, bucket]

    def finish(self) -> None:
        """Return when every shard has all of its gradients."""
        while self._travelling:
            self._settle()

    def _settle(self) -> None:
        """Wait for what was sent first, and add this rank's shard of it: in the order of the program."""
        state, part, buffer, handle = self._travelling.popleft()
        handle.wait()
        sums = state.gradient_shards[part.bucket].array[state.in_shard(part)]
        state.stage.device.add(sums, state.own_part(part, buffer.array), state.stage.half)
        if part.first:  # what was sent before it has been taken out of the buffer, too
            (self._tied if part.bucket == _tied_bucket(state.stage.segments) else self._free).append(buffer)


class Loans:
    """What the passes of one stage borrow; with neither of both, whole weights that they have to wait for."""

    def __init__(
        self, state: StageState, weights: GatheredWeights | None, gradients: CollectedGradients | None
    ) -> None:
        self._state, self._weights, self._gradients = state, weights, gradients

    @contextmanager
    def segment(self, segment: Segment, following: Segment | None, fills: bool) -> Iterator[None]:
        """Its weights are there inside the block, and its gradients too if the ops add to them (`fills`)."""
        self._state.settle(segment.reads)
        if fills and self._gradients is not None:
            self._gradients.open(self._state, segment)
        if self._weights is not None:
            self._weights.hold(self._state, segment, following)
        yield
        if self._weights is not None:
            self._weights.release(self._state, segment)

    def close(self, bucket: int, ops: range) -> None:
        """The bucket has all gradients of these ops of this micro-batch."""
        if self._gradients is not None:
            self._gradients.close(self._state, bucket, ops)
        self.poll()

    @property
    def arriving(self) -> bool:
        """Whether some of the stage's whole weights are still on their way."""
        return self._state.arriving

    def poll(self) -> None:
        """Move on what travels."""
        self._state.groups.world.poll()


def _extents(states: Sequence[StageState]) -> list[Extent]:
    return [(state.stage.layout, state.stage.segments, state.shards) for state in states]
