"""A range of ops on one rank with the parameters it works on, in native memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytrain.buckets import parts_of
from pytrain.native import native

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.config import ModelConfig
    from pytrain.config.run import PrecisionSection
    from pytrain.data.loader import Batch

Array = NDArray[np.generic]


class Scalar(IntEnum):
    """Where each number of a step is in `Stage.scalars`; the device works on them (native/device.h)."""

    LOSS_SUM = 0
    TARGET_COUNT = 1
    GRADIENT_NORM = 2
    CLIP_FACTOR = 3
    FINITE = 4
    GRADIENT_SCALE = 5


class Segment(NamedTuple):
    """Consecutive ops of a stage whose parameters lie in one bucket."""

    bucket: int
    first_op: int
    last_op: int
    """The one after its last."""
    reads: tuple[int, ...]
    """Buckets whose weights they use: their own, then that of an embedding which the head is tied to."""


def segments_of(shape: _native.Shape, layout: _native.Layout, first_op: int, last_op: int) -> tuple[Segment, ...]:
    """The segments of ops [first_op, last_op), in the order of the ops."""
    layers = (shape.op_count - 4) // 4
    names = [*(f"layer_{layer:03d}" for layer in range(layers)), "head"]
    numbers = {bucket.name: index for index, bucket in enumerate(layout.buckets)}
    tied = layout.find("embed.tokens")
    edges = sorted({first_op, *(op for op in range(1, last_op, 4) if first_op < op <= 4 * layers + 1), last_op})
    segments = []
    for begin, end in pairwise(edges):
        name = "embed" if begin == 0 else names[min((begin - 1) // 4, layers)]
        reads = [numbers[name]]
        if name == "head" and layout.find("head.weight") < 0 and tied >= 0:
            reads.append(layout.tensors[tied].bucket)
        segments.append(Segment(numbers[name], begin, end, tuple(dict.fromkeys(reads))))
    return tuple(segments)


def native_shape(model: ModelConfig) -> _native.Shape:
    """The native description of a model."""
    gpt2 = model.family == "gpt2"
    shape: _native.Shape = native().Shape(
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_size=model.head_size,
        ffn=model.ffn,
        vocabulary=model.vocabulary,
        context=model.context,
        norm="layernorm" if gpt2 else "rmsnorm",
        bias=gpt2,
        learned_positions=gpt2,
        gated=not gpt2,
        tied_head=model.tied_head,
        norm_eps=model.norm_eps,
        rope_frequencies=[] if gpt2 else rope_frequencies(model),
    )
    return shape


def rope_frequencies(model: ModelConfig) -> list[float]:
    """Radians per position of each of the head_size/2 rotated pairs (RoFormer, arXiv 2104.09864).

    With `rope_scaling` they are stretched as Llama 3.1 does: slow pairs by `factor`, fast ones not at all,
    those between by something between.
    """
    half = model.head_size // 2
    frequencies = [model.rope_theta ** (-pair / half) for pair in range(half)]
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    original = scaling.original_max_position_embeddings
    stretched = []
    for frequency in frequencies:
        turns = original * frequency / (2 * math.pi)  # in the context of the earlier training
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        stretched.append((1 - kept) * frequency / scaling.factor + kept * frequency)
    return stretched


def native_policy(precision: PrecisionSection) -> _native.Policy:
    """The storage type of each kind of tensor."""
    policy: _native.Policy = native().Policy(
        weights=precision.dtype,
        activations=precision.dtype,
        gradients=precision.gradients,
        gradient_reduction=precision.gradient_reduction,
        master=precision.master,
    )
    return policy


def half_of(policy: _native.Policy) -> str:
    """The 16-bit type of a policy ("bf16" if it has none): what uint16 arrays of a stage hold."""
    return "fp16" if "fp16" in (policy.weights, policy.gradients, policy.master) else "bf16"


def tensor_key(name: str) -> int:
    """The key that the random numbers of a tensor hang on: the same in every version and on every grid."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


class Stage:
    """Ops [first_op, last_op) of a model on one tensor-parallel rank, with weights and maybe gradients.

    Parameters are addressed by name; arrays are views of native memory: float32, or uint16 that holds bf16 or
    fp16 bits. With all ops and one rank this is the whole model.

    Args:
        device: where everything lives.
        model: the whole model, of which this is a part.
        policy: storage type of each kind of tensor.
        batch: sequences per micro-batch.
        length: tokens per sequence.
        recompute: "none", "selective" or "full": what backward computes again instead of reading it.
        first_op: of this stage; ops are counted from the embedding on.
        last_op: the one after its last; None for all that follow.
        tp_rank: which tensor-parallel slice.
        tp_size: how many slices there are.
        sequence_parallel: whether slices hold their rows of the residual stream instead of all.
        slots: micro-batches that may be between forward and backward at once.
        shards: of equal size that each bucket is cut in; buffers are padded to a multiple of it.
        part_elements: of a bucket, at most, that travel at once; 0 for whole buckets.
        whole_weights: False leaves it to the caller to bind weights before ops that need them.
        whole_gradients: the same of gradients.
        training: False keeps no gradients and no activations, and only evaluates.
        defer_weight: keep what `backward_weight` needs until it is called.
        reuse_activations: each layer's gradients take the place of activations that backward is done with; for
            steps of one micro-batch, whose gradients nobody needs once the next forward begins.

    Raises:
        pytrain._native.Error: sizes that do not fit each other; the message names them.
    """

    def __init__(
        self,
        device: _native.Device,
        model: ModelConfig,
        policy: _native.Policy,
        *,
        batch: int,
        length: int,
        recompute: str = "none",
        first_op: int = 0,
        last_op: int | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
        sequence_parallel: bool = False,
        slots: int = 1,
        shards: int = 1,
        part_elements: int = 0,
        whole_weights: bool = True,
        whole_gradients: bool = True,
        training: bool = True,
        defer_weight: bool = False,
        reuse_activations: bool = False,
    ) -> None:
        self.device = device
        self.model = model
        self.policy = policy
        self.half = half_of(policy)
        self.shape = native_shape(model)
        self.first_op = first_op
        self.last_op = self.shape.op_count if last_op is None else last_op
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.shards, self.recompute = shards, recompute
        self.whole_weights, self.whole_gradients = whole_weights, whole_gradients
        self.native: _native.Stage = native().Stage(
            device,
            self.shape,
            policy,
            first_op=self.first_op,
            last_op=self.last_op,
            batch=batch,
            length=length,
            recompute=[recompute] * model.layers,
            tp_rank=tp_rank,
            tp_size=tp_size,
            slots=slots,
            training=training,
            defer_weight=defer_weight,
            sequence_parallel=sequence_parallel,
            gradient_shards=shards if reuse_activations else 0,
        )
        self.layout: _native.Layout = self.native.layout
        self.segments = segments_of(self.shape, self.layout, self.first_op, self.last_op)
        self.part_elements = part_elements
        self.parts = parts_of(self.layout, shards, part_elements)
        self._bind_buffers(training)

    def _bind_buffers(self, training: bool) -> None:
        """Take weights and gradients, where the stage holds them whole, and let the ops know."""
        layout, policy, take = self.layout, self.policy, native().Buffer
        buckets = range(len(layout.buckets))
        sizes = [layout.shard_elements(bucket, self.shards) * self.shards for bucket in buckets]
        self.weights: list[_native.Buffer] = [
            take(self.device, size, policy.weights, "weights") for size in sizes if self.whole_weights
        ]
        self.gradients: list[_native.Buffer] = [
            self.native.gradient_buffer(index) or take(self.device, size, policy.gradients, "gradients")
            for index, size in enumerate(sizes)
            if training and self.whole_gradients
        ]
        for index, buffer in enumerate(self.weights):
            self.native.bind_weights(index, buffer.address)
        for index, buffer in enumerate(self.gradients):
            self.native.bind_gradients(index, buffer.address)

    @property
    def scalars(self) -> NDArray[np.float64]:
        """(6,), the numbers of the step: see `Scalar`. A view; writing changes what the device reads."""
        return self.native.scalars

    def parameters(self) -> Iterator[tuple[_native.TensorSpec, Array]]:
        """Every tensor held whole with its elements (spec.elements,), in the order of the table."""
        for spec in self.layout.tensors:
            yield spec, self.slice_of(self.weights[spec.bucket], spec)

    @staticmethod
    def slice_of(buffer: _native.Buffer, spec: _native.TensorSpec) -> Array:
        """(spec.elements,): those of a tensor in a buffer laid out like its bucket."""
        return buffer.array[spec.offset : spec.offset + spec.elements]

    def parameter(self, name: str) -> Array:
        """This rank's part of a weight, in its local shape; writing changes the model.

        Raises:
            KeyError: no such tensor in this stage.
        """
        return self._whole(self.weights, "weights", name)

    def gradient(self, name: str) -> Array:
        """The accumulated gradient of a weight, in its local shape; KeyError as for `parameter`."""
        return self._whole(self.gradients, "gradients", name)

    def _whole(self, buffers: list[_native.Buffer], what: str, name: str) -> Array:
        index = self.layout.find(name)
        if index < 0:
            raise KeyError(f"this stage has no tensor {name}")
        if not buffers:
            raise KeyError(f"this stage keeps no whole {what}, so not those of {name}")
        spec = self.layout.tensors[index]
        return self.slice_of(buffers[spec.bucket], spec).reshape(spec.local_shape)

    def initialise(self, seed: int) -> None:
        """Draw the initial weights; each element hangs on the seed, the tensor's name and its global index."""
        for spec, array in self.parameters():
            self.draw(spec, seed, array, 0)

    def draw(self, spec: _native.TensorSpec, seed: int, target: Array, begin: int) -> None:
        """Draw initial weights into `target`: those of a tensor from element `begin` of this rank's part on."""
        kind = spec.initialisation
        if kind in ("ones", "zeros"):
            self.device.fill(target, 1.0 if kind == "ones" else 0.0, self.half)
            return
        deviation = self.model.init_std
        if kind == "residual":
            deviation /= math.sqrt(2 * self.model.layers)
        first = spec.first_element + begin
        self.device.fill_normal(target, seed, tensor_key(spec.name), first, deviation, self.half)

    def load_batch(self, slot: int, batch: Batch) -> None:
        """Copy a micro-batch into the stage's own memory."""
        self.native.tokens(slot)[:] = batch.tokens
        self.native.targets(slot)[:] = batch.targets
        self.native.positions(slot)[:] = batch.positions
        self.native.document_starts(slot)[:] = batch.document_starts

    def forward(self, slot: int, pass_: str = "train") -> None:
        """All ops of this stage; `pass_` is "train", or "evaluate" where no backward will follow."""
        self.native.forward(slot, self.first_op, self.last_op, pass_)

    def backward(self, slot: int) -> None:
        """All ops of this stage, each weight gradient straight after its input gradient."""
        self.native.backward(slot, self.first_op, self.last_op)

    def load_weights(self, values: Mapping[str, NDArray[np.floating]]) -> None:
        """Set every weight from whole (global) arrays by name; fp32 storage only. For tests and import."""
        for spec in self.layout.tensors:
            whole = np.asarray(values[spec.name], np.float32)
            self.parameter(spec.name)[...] = whole[slice(*spec.rows)]
