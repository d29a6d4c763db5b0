"""Who holds which part of optimizer state, gradients and weights: ZeRO (arXiv 1910.02054), stages 0 to 3.

Every bucket is cut in as many shards as there are replicas. Stage 1 shards master and moments, stage 2 gradients
too, stage 3 also weights. What is a shard at rest is whole only around its use: `residency.py` lends the buffers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

from pytrain.native import native
from pytrain.parallel import Groups
from pytrain.partial_gradients import sum_partial
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
            for piece in layout.pieces(bucket, self.shard, self.shards)
        ]
        self.has_master = policy.master != policy.weights
        self.master = self._buffers(policy.master, "master") if self.has_master else []
        self.first = self._buffers("fp32", "optimizer")
        self.second = self._buffers("fp32", "optimizer")
        self.weight_shards = [] if stage.whole_weights else self._buffers(policy.weights, "weights")
        self.gradient_shards = [] if stage.whole_gradients else self._buffers(policy.gradients, "gradients")
        travel_as = policy.gradient_reduction if groups.dp.size > 1 else policy.gradients
        self.wire = WireFormat(stage.device, policy.gradients, travel_as, wire_elements(layout, self.shards))
        self._reducing: list[Handle] = []
        self._reduced: set[int] = set()

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

    def own_part(self, bucket: int, whole: NDArray[Any]) -> NDArray[Any]:
        """This rank's shard of an array laid out like the bucket, padding included."""
        size = self.shard_sizes[bucket]
        return whole[self.shard * size : (self.shard + 1) * size]

    def bounds(self, bucket: int) -> list[int]:
        """Where the shards of a bucket begin, and where the last one ends."""
        size = self.shard_sizes[bucket]
        return [shard * size for shard in range(self.shards + 1)]

    def own_weights(self, bucket: int) -> NDArray[Any]:
        """This rank's shard of the weights of a bucket."""
        if self.weight_shards:
            return self.weight_shards[bucket].array
        return self.own_part(bucket, self.stage.weights[bucket].array)

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
        for bucket, master in enumerate(self.master):
            self.stage.device.convert(self.own_weights(bucket), master.array, self.stage.half)

    def adopt_weights(self) -> None:
        """Master from the weights, where a checkpoint had weights alone."""
        for bucket, master in enumerate(self.master):
            self.stage.device.convert(master.array, self.own_weights(bucket), self.stage.half)

    def gather_weights(self) -> None:
        """Every shard of the weights from the rank that updates it, where whole weights stay in memory."""
        if self.shards > 1 and not self.weight_shards:
            handles = [
                self.groups.dp.start_all_gather(buffer.array, self.bounds(bucket))
                for bucket, buffer in enumerate(self.stage.weights)
            ]
            for handle in handles:
                handle.wait()

    # --- gradients -----------------------------------------------------------------------------------

    def start_gradients(self) -> None:
        """Before the first micro-batch of a step: it overwrites whole gradients, and shards start from zero."""
        if not self.gradient_shards:
            self.stage.native.overwrite_gradients()
        for buffer in self.gradient_shards:
            self.stage.device.fill(buffer.array, 0.0, self.stage.half)

    def start_reduction(self, bucket: int) -> None:
        """Sum the gradients of a bucket over the data-parallel group; `finish_reduction` waits for it."""
        if self.gradient_shards or bucket in self._reduced:
            return  # shards are summed as the buckets come back from the passes
        self._reduced.add(bucket)
        gradients = self.stage.gradients[bucket]
        sum_partial(self.stage, bucket, gradients, self.groups)
        if self.groups.dp.size > 1:
            self._reducing.append(self.start_sum(bucket, gradients.array))

    def start_sum(self, bucket: int, whole: NDArray[Any]) -> Handle:
        """Sum an array laid out like the bucket over the replicas; with several shards, this rank's alone."""
        dp, half = self.groups.dp, self.wire.half
        if self.shards == 1:
            return self.wire.start(whole, slice(0, whole.size), lambda array: dp.start_all_reduce(array, half))
        bounds = self.bounds(bucket)
        part = slice(bounds[self.shard], bounds[self.shard + 1])
        return self.wire.start(whole, part, lambda array: dp.start_reduce_scatter(array, bounds, half))

    def reduce_all(self) -> None:
        """Start the buckets whose reduction has not begun."""
        for bucket in range(len(self.shard_sizes)):
            self.start_reduction(bucket)

    def finish_reduction(self) -> None:
        """Return when every reduction of whole gradients is done."""
        self.reduce_all()
        for handle in self._reducing:
            handle.wait()
        self._reducing.clear()
        self._reduced.clear()
