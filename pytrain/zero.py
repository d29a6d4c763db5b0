"""Who holds which part of optimizer state, gradients and weights: ZeRO (arXiv 1910.02054), stages 0 to 3.

Every part of a bucket (see `pytrain.buckets`) is cut in as many shards as there are replicas, and a rank keeps its
shards of a bucket's parts one after the other. Stage 1 shards master and moments, stage 2 gradients too, stage 3 also
weights. What is a shard at rest is whole only around its use: `residency.py` lends the buffers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from pytrain.buckets import Part
from pytrain.native import native
from pytrain.parallel import Groups
from pytrain.partial_gradients import PartialSums
from pytrain.stage import Stage
from pytrain.wire_format import WireFormat, wire_elements

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Handle


class Run(NamedTuple):
    """A run of elements of one tensor that this rank updates."""

    spec: _native.TensorSpec
    bucket: int
    begin: int
    """First element, counted in this rank's part of the tensor."""
    end: int
    shard_begin: int
    """Where it begins in the buffers of the optimizer, which hold this rank's shard of the bucket."""

    @property
    def in_bucket(self) -> slice:
        """Its elements in a buffer laid out like the bucket."""
        return slice(self.spec.offset + self.begin, self.spec.offset + self.end)

    @property
    def in_shard(self) -> slice:
        """Its elements in a buffer laid out like this rank's shard of the bucket."""
        return slice(self.shard_begin, self.shard_begin + self.end - self.begin)


class StageState:
    """Master, moments and gradient reduction of one stage, and the shards that its ZeRO stage leaves it with.

    `master` is what is updated: the weights themselves where the storage types agree, else a copy of this
    rank's shard that the weights are rounded from. With one shard a shard is the whole bucket.
    """

    def __init__(self, stage: Stage, groups: Groups) -> None:
        self.stage, self.groups = stage, groups
        self.shards = stage.shards
        self.shard = groups.dp.rank if self.shards > 1 else 0
        layout, policy = stage.layout, stage.policy
        buckets = range(len(layout.buckets))
        self.shard_sizes = [layout.shard_elements(bucket, self.shards) for bucket in buckets]
        self.runs = [
            Run(layout.tensors[piece.tensor], bucket, piece.begin, piece.end, piece.shard_offset)
            for bucket in buckets
            for piece in layout.pieces(bucket, self.shard, self.shards, stage.part_elements)
        ]
        self.has_master = policy.master != policy.weights
        self.master = self._buffers(policy.master, "master") if self.has_master else []
        self.first = self._buffers("fp32", "optimizer")
        self.second = self._buffers("fp32", "optimizer")
        self.weight_shards = [] if stage.whole_weights else self._buffers(policy.weights, "weights")
        self.gradient_shards = [] if stage.whole_gradients else self._buffers(policy.gradients, "gradients")
        travel_as = policy.gradient_reduction if groups.dp.size > 1 else policy.gradients
        elements = wire_elements(layout, self.shards, stage.part_elements)
        self.wire = WireFormat(stage.device, policy.gradients, travel_as, elements)
        self._partial = PartialSums(stage, groups)
        self._after: defaultdict[int, list[Part]] = defaultdict(list)  # parts that are whole after an op's backward
        for part in reversed(stage.parts):
            self._after[part.op].append(part)
        self._reducing: list[Handle] = []
        self._reduced: set[int] = set()  # ops whose gradients are summed, or on their way
        self._arriving: defaultdict[int, list[Handle]] = defaultdict(list)  # by bucket, shards of its weights

    def _buffers(self, dtype: str, kind: str) -> list[_native.Buffer]:
        return [native().Buffer(self.stage.device, size, dtype, kind) for size in self.shard_sizes]

    def counts(self, run: Run) -> bool:
        """Whether this rank alone stands for the run: in the gradient norm and on disk."""
        return run.spec.owner and (self.shards > 1 or self.groups.dp.rank == 0)

    def weights_of(self, run: Run) -> NDArray[Any]:
        """Its weights, as they are stored."""
        if self.weight_shards:
            return self.weight_shards[run.bucket].array[run.in_shard]
        return self.stage.weights[run.bucket].array[run.in_bucket]

    def gradient_of(self, run: Run) -> NDArray[Any]:
        """Its gradient; summed over the replicas once the reduction is finished."""
        if self.gradient_shards:
            return self.gradient_shards[run.bucket].array[run.in_shard]
        return self.stage.gradients[run.bucket].array[run.in_bucket]

    def master_of(self, run: Run) -> NDArray[Any]:
        """What the update works on."""
        return self.master[run.bucket].array[run.in_shard] if self.has_master else self.weights_of(run)

    def parts_of(self, bucket: int) -> list[Part]:
        """The parts of a bucket, in the order of memory."""
        return [part for part in self.stage.parts if part.bucket == bucket]

    def whole_elements(self, bucket: int) -> int:
        """Of a buffer laid out like the bucket, padding included."""
        return self.shard_sizes[bucket] * self.shards

    def bounds(self, part: Part) -> list[int]:
        """Where the shards of a part begin, counted in the part, and where the last one ends."""
        size = (part.end - part.begin) // self.shards
        return [shard * size for shard in range(self.shards + 1)]

    def in_shard(self, part: Part) -> slice:
        """This rank's shard of a part in a buffer laid out like its shard of the bucket."""
        return slice(part.begin // self.shards, part.end // self.shards)

    def lies_in(self, run: Run, part: Part) -> bool:
        """Whether a run is of this rank's shard of a part."""
        shard = self.in_shard(part)
        return run.bucket == part.bucket and shard.start <= run.shard_begin < shard.stop

    def own_part(self, part: Part, whole: NDArray[Any]) -> NDArray[Any]:
        """This rank's shard of a part, padding included, of an array laid out like the bucket."""
        bounds = self.bounds(part)
        return whole[part.in_bucket][bounds[self.shard] : bounds[self.shard + 1]]

    def own_weights(self, part: Part) -> NDArray[Any]:
        """This rank's shard of the weights of a part."""
        if self.weight_shards:
            return self.weight_shards[part.bucket].array[self.in_shard(part)]
        return self.own_part(part, self.stage.weights[part.bucket].array)

    def initialise(self, seed: int) -> None:
        """Draw the initial weights into the master, and round the weights from it."""
        if not self.has_master and not self.weight_shards:
            self.stage.initialise(seed)
            return
        for run in self.runs:
            self.stage.draw(run.spec, seed, self.master_of(run), run.begin)
        self.round_weights()
        self.gather_weights()

    def round_weights(self) -> None:
        """Weights from the master, where they are two things."""
        for part in self.stage.parts if self.has_master else ():
            master = self.master[part.bucket].array[self.in_shard(part)]
            self.stage.device.convert(self.own_weights(part), master, self.stage.half)

    def adopt_weights(self) -> None:
        """Master from the weights, where a checkpoint had weights alone."""
        for part in self.stage.parts if self.has_master else ():
            master = self.master[part.bucket].array[self.in_shard(part)]
            self.stage.device.convert(master, self.own_weights(part), self.stage.half)

    def start_gather(self, part: Part, whole: NDArray[Any]) -> Handle:
        """All shards of a part, each from the rank that has it, in an array laid out like the bucket."""
        return self.groups.dp.start_all_gather(whole[part.in_bucket], self.bounds(part))

    @property
    def gathers(self) -> bool:
        """Whether weights stay whole in memory, but each of their shards is updated by one rank alone."""
        return self.shards > 1 and not self.weight_shards

    @property
    def arriving(self) -> bool:
        """Whether weights are on their way, and what is in their place of no use."""
        return bool(self._arriving)

    def renew(self, part: Part) -> None:
        """This rank's shard of a part was updated: begin to gather the others. `settle` waits for them."""
        handle = self.start_gather(part, self.stage.weights[part.bucket].array)
        self._arriving[part.bucket].append(handle)

    def settle(self, buckets: Iterable[int] | None = None) -> None:
        """Return when the weights of these buckets, by default of all, have arrived: before anybody reads them."""
        for bucket in tuple(self._arriving) if buckets is None else buckets:
            for handle in self._arriving.get(bucket, ()):
                handle.wait()
            self._arriving.pop(bucket, None)

    def gather_weights(self) -> None:
        """Every shard of the weights from the rank that has it, where whole weights stay in memory."""
        for part in self.stage.parts if self.gathers else ():
            self.renew(part)
        self.settle()

    # --- gradients -----------------------------------------------------------------------------------

    def start_gradients(self) -> None:
        """Before the first micro-batch of a step: it overwrites whole gradients, and shards start from zero."""
        if not self.gradient_shards:
            self.stage.native.overwrite_gradients()
        for buffer in self.gradient_shards:
            self.stage.device.fill(buffer.array, 0.0, self.stage.half)

    def ready_parts(self, op: int, buffer_of: Callable[[int], _native.Buffer]) -> Iterable[Part]:
        """Backward has done an op on gradients in `buffer_of(bucket)`: the parts that this makes whole.

        The gradients of which tensor-parallel ranks have parts are summed before they are given.
        """
        self._partial.start(op, buffer_of)
        for part in self._after.get(op, ()):
            self._partial.finish(part.bucket)
            yield part

    def start_reduction(self, ops: range) -> None:
        """Backward has done these ops: sum what is whole over the replicas; `finish_reduction` waits for it."""
        if self.gradient_shards:
            return  # shards are summed as the buckets come back from the passes
        gradients = self.stage.gradients
        for op in reversed(ops):
            if op in self._reduced:
                continue
            self._reduced.add(op)
            for part in self.ready_parts(op, gradients.__getitem__):
                if self.groups.dp.size > 1:
                    self._reducing.append(self.start_sum(part, gradients[part.bucket].array))

    def start_sum(self, part: Part, whole: NDArray[Any]) -> Handle:
        """Sum a part of an array laid out like its bucket over the replicas; with shards, this rank's alone."""
        dp, half, array = self.groups.dp, self.wire.half, whole[part.in_bucket]
        if self.shards == 1:
            everything = slice(0, array.size)
            return self.wire.start(
                array, everything, lambda array, passage: dp.start_all_reduce(array, half, passage=passage)
            )
        bounds = self.bounds(part)
        own = slice(bounds[self.shard], bounds[self.shard + 1])
        return self.wire.start(
            array, own, lambda array, passage: dp.start_reduce_scatter(array, bounds, half, passage=passage)
        )

    def reduce_all(self) -> None:
        """Start the reductions that have not begun."""
        self.start_reduction(range(self.stage.first_op, self.stage.last_op))

    def finish_reduction(self) -> None:
        """Return when every reduction of whole gradients is done."""
        self.reduce_all()
        for handle in self._reducing:
            handle.wait()
        self._reducing.clear()
        self._reduced.clear()
