"""Builds native stages from the reference model's shapes and weights, whole or in pieces, for tests."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pytrain import _native
from pytrain.config import ModelConfig, build_model
from pytrain.data.loader import Batch
from pytrain.stage import Scalar, Stage
from tests import reference


def model_config(shape: reference.Shape) -> ModelConfig:
    """The configuration of a reference shape."""
    fields = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = {"rope_type": "llama3", **fields["rope_scaling"]}
    fields = {name: value for name, value in fields.items() if value is not None}
    if shape.family == "gpt2":
        fields.pop("rope_theta", None)
    return build_model(fields, "test")


def native_batch(batch: reference.Batch) -> Batch:
    """A reference batch in the loader's form."""
    arrays = [np.ascontiguousarray(array, np.int32) for array in batch[:4]]
    nothing = np.empty(0, np.int64)
    return Batch(*arrays, nothing, nothing.astype(np.int32))


def policy(dtype: str = "fp32") -> _native.Policy:
    """Storage types: gradients and master stay fp32."""
    return _native.Policy(weights=dtype, activations=dtype)


def gradients_of(stage: Stage) -> dict[str, NDArray[np.float64]]:
    """Every gradient by name."""
    return {spec.name: stage.gradient(spec.name).astype(np.float64) for spec in stage.layout.tensors}


def run_whole(
    shape: reference.Shape,
    parameters: dict[str, NDArray[np.float64]],
    batch: reference.Batch,
    *,
    isa: str | None = None,
    threads: int | None = None,
    recompute: str = "none",
    **options: object,
) -> tuple[float, dict[str, NDArray[np.float64]]]:
    """Mean loss and gradients of the mean loss, from one native stage in fp32."""
    device = _native.CpuDevice(isa=isa, threads=threads)
    sequences = len(batch.tokens) // batch.length
    stage = Stage(
        device,
        model_config(shape),
        policy(),
        batch=sequences,
        length=batch.length,
        recompute=recompute,
        **options,
    )
    stage.load_weights(parameters)
    return run_stage(stage, batch)


def run_stage(stage: Stage, batch: reference.Batch) -> tuple[float, dict[str, NDArray[np.float64]]]:
    """Mean loss and gradients of the mean loss of one micro-batch, from a stage with all ops."""
    count = int(np.count_nonzero(batch.targets >= 0))
    stage.scalars[:] = 0
    stage.scalars[Scalar.GRADIENT_SCALE] = 1.0 / count
    stage.load_batch(0, native_batch(batch))
    stage.forward(0)
    stage.backward(0)
    return float(stage.scalars[Scalar.LOSS_SUM] / count), gradients_of(stage)


class Parallel:
    """tp slices of pipeline stages in one process: the test itself does what happens at the cuts.

    Args:
        shape, parameters: of the whole model.
        batch: one micro-batch.
        tp: tensor-parallel ranks.
        edges: ops at which the pipeline is cut, without 0 and the end.
        recompute: policy of every layer.
        defer_weight: all weight gradients of a stage come after all its input gradients.
        sequence_parallel: slices hold their rows of the stream; what others hold is NaN until it is gathered.
    """

    def __init__(
        self,
        shape: reference.Shape,
        parameters: dict[str, NDArray[np.float64]],
        batch: reference.Batch,
        tp: int,
        edges: tuple[int, ...],
        recompute: str = "none",
        defer_weight: bool = False,
        sequence_parallel: bool = False,
    ) -> None:
        self.shape, self.batch, self.tp, self.recompute = shape, batch, tp, recompute
        self.defer_weight, self.sequence_parallel = defer_weight, sequence_parallel
        self.device = _native.CpuDevice()
        bounds = (0, *edges, 4 * shape.layers + 4)
        self.stages = [
            [
                Stage(
                    self.device,
                    model_config(shape),
                    policy(),
                    batch=len(batch.tokens) // batch.length,
                    length=batch.length,
                    recompute=recompute,
                    first_op=first,
                    last_op=last,
                    tp_rank=rank,
                    tp_size=tp,
                    defer_weight=defer_weight,
                    sequence_parallel=sequence_parallel,
                )
                for rank in range(tp)
            ]
            for first, last in pairwise(bounds)
        ]
        self.count = int(np.count_nonzero(batch.targets >= 0))
        for slices in self.stages:
            for stage in slices:
                stage.load_weights(parameters)
                stage.load_batch(0, native_batch(batch))
                stage.scalars[:] = 0
                stage.scalars[Scalar.GRADIENT_SCALE] = 1.0 / self.count

    def _sum(self, slices: list[Stage], name: str) -> None:
        if self.tp == 1:
            return
        total = sum(getattr(stage.native, name) for stage in slices)
        for stage in slices:
            array = getattr(stage.native, name)
            own = slice(*stage.native.stream_rows)
            array[...] = np.nan if self.sequence_parallel else total
            array[own] = total[own]

    def _gather(self, slices: list[Stage], arrays: list[NDArray[np.float32]]) -> None:
        own = [slice(*stage.native.stream_rows) for stage in slices]
        whole = np.concatenate([array[rows] for array, rows in zip(arrays, own, strict=True)])
        assert len(whole) == len(self.batch.tokens)
        for array in arrays:
            array[...] = whole

    def _gather_norm(self, slices: list[Stage], op: int) -> None:
        rebuilt = [stage.native.rebuild_gathered(0, op) for stage in slices]
        assert len(set(rebuilt)) == 1
        if rebuilt[0]:
            self._gather(slices, [stage.native.gathered for stage in slices])

    def forward(self) -> float:
        """Mean loss."""
        for index, slices in enumerate(self.stages):
            if index:
                for stage, before in zip(slices, self.stages[index - 1], strict=True):
                    stage.native.input(0)[...] = before.native.output(0)
            for op in range(slices[0].first_op, slices[0].last_op):
                self._forward_op(slices, op)
            for stage in slices:
                stage.native.finish_forward(0)
        return float(self.stages[-1][0].scalars[Scalar.LOSS_SUM] / self.count)

    def _kind(self, op: int) -> str:
        return self.stages[0][0].shape.op_name(op).split()[-1]

    def _forward_op(self, slices: list[Stage], op: int) -> None:
        for stage in slices:
            stage.native.forward(0, op, op + 1)
        if self._kind(op) in ("embed", "attention", "mlp"):
            self._sum(slices, "partial")
        if self._kind(op).startswith("norm") and self.sequence_parallel:
            self._gather(slices, [stage.native.gathered for stage in slices])
        if self._kind(op) == "head":
            for rank, source in enumerate(slices):
                for stage in slices:
                    stage.native.statistics(0)[rank] = source.native.statistics(0)[rank]

    def backward(self) -> None:
        """All gradients, from the last stage to the first."""
        for index in reversed(range(len(self.stages))):
            slices = self.stages[index]
            if index + 1 < len(self.stages):
                for stage, after in zip(slices, self.stages[index + 1], strict=True):
                    stage.native.dresidual[...] = after.native.dresidual
            for op in reversed(range(slices[0].first_op, slices[0].last_op)):
                self._backward_op(slices, op)
            for op in reversed(range(slices[0].first_op, slices[0].last_op) if self.defer_weight else ()):
                self._backward_weight_op(slices, op, late=True)

    def _backward_op(self, slices: list[Stage], op: int) -> None:
        kind = self._kind(op)
        if self.recompute == "full" and self.tp > 1 and kind == "mlp":
            for again in range(op - 3, op + 1):
                for stage in slices:
                    stage.native.recompute(0, again, again + 1)
                if self._kind(again) == "attention":
                    self._sum(slices, "partial")
                if self._kind(again).startswith("norm") and self.sequence_parallel:
                    self._gather(slices, [stage.native.gathered for stage in slices])
        if self.sequence_parallel and kind == "head":
            self._gather_norm(slices, op)
        if self.sequence_parallel and kind in ("attention", "mlp"):
            self._gather(slices, [stage.native.dresidual_rows(0, op) for stage in slices])
        for stage in slices:
            stage.native.backward_input(0, op, op + 1)
        if not self.defer_weight:
            self._backward_weight_op(slices, op, late=False)
        if kind in ("attention", "mlp", "head"):
            self._sum(slices, "dnorm")

    def _backward_weight_op(self, slices: list[Stage], op: int, late: bool) -> None:
        kind = self._kind(op)
        if self.sequence_parallel and kind in ("embed", "attention", "mlp"):
            self._gather(slices, [stage.native.dresidual_rows(0, op, late) for stage in slices])
        if self.sequence_parallel and kind in ("attention", "mlp"):
            self._gather_norm(slices, op)
        for stage in slices:
            stage.native.backward_weight(0, op, op + 1)
            if self.sequence_parallel and kind in ("attention", "mlp"):
                first, last = stage.native.stream_rows
                rows = stage.native.dresidual_rows(0, op, late)
                rows[:first] = rows[last:] = np.nan

    def gradients(self) -> dict[str, NDArray[np.float64]]:
        """Gathered over slices and stages; every rule of the layout table is used."""
        whole: dict[str, NDArray[np.float64]] = {}
        for slices in self.stages:
            for rank, stage in enumerate(slices):
                for spec in stage.layout.tensors:
                    local = stage.gradient(spec.name).astype(np.float64)
                    into = whole.setdefault(spec.name, np.zeros(spec.shape))
                    if self.sequence_parallel and spec.partial_with_sequence_parallel:
                        into += local
                    elif spec.replicated:
                        same = slices[0].gradient(spec.name)
                        np.testing.assert_array_equal(stage.gradient(spec.name), same, err_msg=spec.name)
                        if rank == 0:
                            into += local
                    else:
                        into[slice(*spec.rows)] += local
        return whole
