"""The whole model, whole and in pieces, against the float64 reference."""

import dataclasses

import numpy as np
import pytest

from pytrain import _native
from pytrain.stage import Scalar, Stage, native_shape
from tests import reference, spine
from tests.reference_cases import GPT2, LLAMA, SHAPES

ISAS = _native.information()["isas_available"]
UNEVEN = {
    # 5 kv groups and 37 tokens do not divide by 2 or 3; 3 layers
    "gpt2": dataclasses.replace(GPT2, layers=3, hidden=40, heads=5, kv_heads=5, head_size=8, ffn=51, vocabulary=37),
    "llama": dataclasses.replace(
        LLAMA, layers=3, hidden=28, heads=10, kv_heads=5, head_size=4, ffn=33, vocabulary=37
    ),
    "llama tied": dataclasses.replace(LLAMA, layers=3, heads=6, kv_heads=3, vocabulary=37, tied_head=True),
    "llama shared key head": dataclasses.replace(LLAMA, layers=3, heads=7, kv_heads=1, head_size=6),
}


@dataclasses.dataclass(frozen=True)
class Expected:
    parameters: dict[str, np.ndarray]
    batch: reference.Batch
    loss: float
    gradients: dict[str, np.ndarray]


def expected(shape: reference.Shape, seed: int, sequences: int = 3, length: int | None = None) -> Expected:
    print(f"seed {seed}")
    parameters = reference.visible_parameters(shape, seed)
    batch = reference.random_batch(shape, sequences, length or shape.context - 1, seed + 1)
    loss_sum, count, _, cache = reference.model_forward(shape, parameters, batch)
    gradients = reference.model_backward(shape, parameters, cache, 1.0 / count)
    return Expected(parameters, batch, loss_sum / count, gradients)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_every_gradient(name: str, isa: str) -> None:
    want = expected(SHAPES[name], 11)
    loss, gradients = spine.run_whole(SHAPES[name], want.parameters, want.batch, isa=isa)
    assert loss == pytest.approx(want.loss, rel=3e-7)
    reference.assert_gradients_close(gradients, want.gradients, 1e-5)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 144, 200, 37])
def test_head_sizes(head_size: int) -> None:
    base = GPT2 if head_size % 2 else LLAMA
    shape = dataclasses.replace(base, layers=1, heads=2, kv_heads=2 if head_size % 2 else 1, head_size=head_size)
    want = expected(shape, head_size)
    loss, gradients = spine.run_whole(shape, want.parameters, want.batch)
    assert loss == pytest.approx(want.loss, rel=3e-7)
    reference.assert_gradients_close(gradients, want.gradients, 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_several_tiles_of_everything(name: str) -> None:
    shape = dataclasses.replace(
        SHAPES[name],
        layers=1,
        hidden=72,
        heads=4,
        kv_heads=2,
        head_size=20,
        ffn=150,
        vocabulary=300,
        context=140,
    )
    want = expected(shape, 5, sequences=2)
    loss, gradients = spine.run_whole(shape, want.parameters, want.batch)
    assert loss == pytest.approx(want.loss, rel=3e-7)
    reference.assert_gradients_close(gradients, want.gradients, 1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(name: str, recompute: str) -> None:
    want = expected(SHAPES[name], 12)
    loss, gradients = spine.run_whole(SHAPES[name], want.parameters, want.batch)
    again, recomputed = spine.run_whole(SHAPES[name], want.parameters, want.batch, recompute=recompute)
    assert loss == again
    for tensor, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, recomputed[tensor], err_msg=tensor)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_threads_change_no_bit(name: str) -> None:
    want = expected(SHAPES[name], 13)
    loss, gradients = spine.run_whole(SHAPES[name], want.parameters, want.batch, threads=1)
    for threads in (2, 3):
        other, threaded = spine.run_whole(SHAPES[name], want.parameters, want.batch, threads=threads)
        assert loss == other
        for tensor, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, threaded[tensor], err_msg=tensor)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_head_chunks_agree(name: str) -> None:
    """Logits of 5 rows at a time give what those of all rows give."""
    shape = SHAPES[name]
    want = expected(shape, 14)
    length = want.batch.length
    stage = Stage(_native.CpuDevice(), spine.model_config(shape), spine.policy(), batch=3, length=length)
    stage.load_weights(want.parameters)
    stage.native = _native.Stage(
        stage.device,
        stage.shape,
        stage.policy,
        first_op=0,
        last_op=stage.shape.op_count,
        batch=3,
        length=length,
        recompute=["none"] * shape.layers,
        head_chunk=5,
    )
    for bucket, (weights, gradients) in enumerate(zip(stage.weights, stage.gradients, strict=True)):
        stage.native.bind_weights(bucket, weights.address)
        stage.native.bind_gradients(bucket, gradients.address)
    assert 3 * length % 5 != 0  # the last chunk is smaller
    assert stage.native.head_chunk == 5
    loss, found = spine.run_stage(stage, want.batch)
    assert loss == pytest.approx(want.loss, rel=3e-7)
    reference.assert_gradients_close(found, want.gradients, 1e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("name", UNEVEN)
def test_slices_and_stages_make_the_whole(name: str, tp: int, recompute: str) -> None:
    shape = UNEVEN[name]
    want = expected(shape, 20 + tp)
    pieces = spine.Parallel(shape, want.parameters, want.batch, tp, (5,), recompute)
    assert pieces.forward() == pytest.approx(want.loss, rel=2e-6)
    pieces.backward()
    reference.assert_gradients_close(pieces.gradients(), want.gradients, 2e-5)


@pytest.mark.parametrize("edges", [(3,), (1, 7), (5, 9, 13)])
def test_a_stage_may_begin_at_any_norm(edges: tuple[int, ...]) -> None:
    shape = UNEVEN["gpt2"]
    want = expected(shape, 30)
    pieces = spine.Parallel(shape, want.parameters, want.batch, 2, edges)
    assert pieces.forward() == pytest.approx(want.loss, rel=2e-6)
    pieces.backward()
    reference.assert_gradients_close(pieces.gradients(), want.gradients, 2e-5)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_deferred_weight_gradients(name: str, recompute: str) -> None:
    shape = UNEVEN[name]
    want = expected(shape, 40)
    pieces = spine.Parallel(shape, want.parameters, want.batch, 2, (5,), recompute, defer_weight=True)
    pieces.forward()
    pieces.backward()
    reference.assert_gradients_close(pieces.gradients(), want.gradients, 2e-5)


def test_weight_gradients_that_come_late_need_room() -> None:
    with pytest.raises(_native.Error, match="full recompute needs each weight gradient straight after"):
        spine.Parallel(
            GPT2,
            reference.visible_parameters(GPT2, 1),
            reference.random_batch(GPT2, 1, 4, 1),
            1,
            (),
            "full",
            True,
        )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_evaluation_gives_the_training_loss(name: str) -> None:
    shape = SHAPES[name]
    want = expected(shape, 15)
    stage = Stage(
        _native.CpuDevice(),
        spine.model_config(shape),
        spine.policy(),
        batch=3,
        length=want.batch.length,
        training=False,
    )
    stage.load_weights(want.parameters)
    stage.scalars[:] = 0
    stage.load_batch(0, spine.native_batch(want.batch))
    stage.forward(0, "evaluate")
    count = int(np.count_nonzero(want.batch.targets >= 0))
    assert stage.scalars[Scalar.TARGET_COUNT] == count
    assert stage.scalars[Scalar.LOSS_SUM] / count == pytest.approx(want.loss, rel=3e-7)
    with pytest.raises(_native.Error, match="evaluation only"):
        stage.forward(0, "train")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sixteen_bit_storage(name: str, dtype: str) -> None:
    """Weights and activations stored in 16 bits; the reference keeps the same rounded weights in float64."""
    shape = SHAPES[name]
    want = expected(shape, 16)
    stage = Stage(
        _native.CpuDevice(), spine.model_config(shape), spine.policy(dtype), batch=3, length=want.batch.length
    )
    rounded = {}
    for spec in stage.layout.tensors:
        value = want.parameters[spec.name].astype(np.float32)
        flat = stage.parameter(spec.name).reshape(-1)
        stage.device.convert(flat, np.ascontiguousarray(value.reshape(-1)), dtype)
        back = np.empty(flat.size, np.float32)
        stage.device.convert(back, flat, dtype)
        rounded[spec.name] = back.reshape(value.shape).astype(np.float64)
    loss_sum, count, _, cache = reference.model_forward(shape, rounded, want.batch)
    gradients = reference.model_backward(shape, rounded, cache, 1.0 / count)
    stage.scalars[:] = 0
    stage.scalars[Scalar.GRADIENT_SCALE] = 1.0 / count
    stage.load_batch(0, spine.native_batch(want.batch))
    stage.forward(0)
    stage.backward(0)
    bits = {"bf16": 8, "fp16": 11}[dtype]
    assert stage.scalars[Scalar.LOSS_SUM] == pytest.approx(loss_sum, rel=4 * 2.0**-bits)
    ours = spine.gradients_of(stage)
    # Rounding errors of many elements are independent: a tensor's stays near one rounding per layer and op.
    for tensor, gradient in gradients.items():
        if tensor.endswith("attention.k.bias"):
            continue  # zero in exact arithmetic
        error = np.linalg.norm(ours[tensor] - gradient) / np.linalg.norm(gradient)
        assert error < 25 * 2.0**-bits, tensor


@pytest.mark.parametrize(("dtype", "rows"), [("fp32", 600), ("bf16", 1200), ("fp16", 600)])
def test_logits_never_exist_whole(dtype: str, rows: int) -> None:
    """As many rows at a time as 128 MiB hold, 256 with bf16 activations, in chunks of one size."""
    shape = dataclasses.replace(GPT2, vocabulary=50_000, context=600)
    total, table = _native.plan_arena(
        native_shape(spine.model_config(shape)),
        spine.policy(dtype),
        first_op=0,
        last_op=4 * shape.layers + 4,
        batch=4,
        length=600,
        recompute=["none"] * shape.layers,
    )
    assert total < 4 * 600 * 50_000 * 4
    assert {row["bytes"] for row in table if row["name"].startswith("logits")} == {rows * 50_000 * 4}


@pytest.mark.parametrize("preset", ["gpt2-124m", "llama-110m"])
@pytest.mark.parametrize(("policy", "share"), [("selective", 0.93), ("full", 0.27)])
def test_recomputation_saves_memory(preset: str, policy: str, share: float) -> None:
    from pytrain.config import model_preset

    shape = native_shape(model_preset(preset))
    sizes = {
        name: _native.plan_arena(
            shape,
            spine.policy(),
            first_op=0,
            last_op=shape.op_count,
            batch=4,
            length=1024,
            recompute=[name] * 12,
            head_chunk=256,
        )[0]
        for name in ("none", policy)
    }
    assert sizes[policy] <= share * sizes["none"]
