"""AdamW, clipping, skipping and the master copy against float64, and the loss scale."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain import _native
from pytrain.config.run import OptimizerSection
from pytrain.loss_scale import GROWTH_INTERVAL, LossScale
from pytrain.optimizer import AdamW
from pytrain.parallel import Groups
from pytrain.stage import Stage
from tests import reference, runs, spine
from tests.reference_cases import GPT2, LLAMA

SETTINGS = OptimizerSection(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3, clip=2.0)
"""Far from each other and from 0, so that one in the place of another shows."""


def stage_of(shape: reference.Shape = LLAMA, **types: str) -> Stage:
    policy = _native.Policy(**types)
    return Stage(_native.CpuDevice(), spine.model_config(shape), policy, batch=1, length=4)


def optimizer_of(stage: Stage, settings: OptimizerSection = SETTINGS) -> AdamW:
    return AdamW([stage], settings, Groups())


def random_gradients(shape: reference.Shape, seed: int, size: float = 1.0) -> dict[str, NDArray[np.float64]]:
    """Values that float32 can hold, by name."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    return {
        name: (size * random.standard_normal(dimensions)).astype(np.float32).astype(np.float64)
        for name, dimensions in reference.parameter_shapes(shape).items()
    }


def set_gradients(stage: Stage, gradients: dict[str, NDArray[np.float64]]) -> None:
    for name, gradient in gradients.items():
        stage.gradient(name)[...] = gradient


def memory(optimizer: AdamW) -> dict[str, bytes]:
    """Everything that an update may change, bit for bit."""
    kinds = {
        "weights": optimizer.states[0].stage.weights,
        "master": optimizer.states[0].master or optimizer.states[0].stage.weights,
        "m": optimizer.states[0].first,
        "v": optimizer.states[0].second,
    }
    return {
        f"{kind} {index}": buffer.array.tobytes()
        for kind, buffers in kinds.items()
        for index, buffer in enumerate(buffers)
    }


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(("size", "clips"), [(1.0, True), (0.01, False)])
def test_updates_against_float64(shape: reference.Shape, size: float, clips: bool) -> None:
    stage = stage_of(shape)
    weights = reference.visible_parameters(shape, 3)
    start = {name: value.copy() for name, value in weights.items()}
    stage.load_weights(weights)
    optimizer = optimizer_of(stage)
    state: dict[str, Any] = {}
    for update in range(5):
        gradients = random_gradients(shape, 10 + update, size)
        set_gradients(stage, gradients)
        rate = 0.01 * (1 + update)
        norm = runs.adamw(weights, gradients, state, rate=rate, beta1=0.8, beta2=0.9, eps=1e-3, decay=0.3, clip=2.0)
        found = optimizer.update(rate)
        assert (norm > SETTINGS.clip) == clips
        assert found.finite
        assert found.gradient_norm == pytest.approx(norm, rel=1e-6)
    assert optimizer.updates == 5
    for name, expected in weights.items():
        moved = np.linalg.norm(expected - start[name])
        assert np.linalg.norm(stage.parameter(name) - expected) < 1e-5 * moved, name


def test_no_clipping_at_zero() -> None:
    stage = stage_of()
    optimizer = optimizer_of(stage, OptimizerSection(clip=0.0))
    set_gradients(stage, random_gradients(LLAMA, 1, 100.0))
    assert optimizer.update(0.01).gradient_norm > 1000
    assert stage.scalars[3] == 1.0  # the clip factor


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["embed.tokens", "layer.1.norm2.weight", "head.weight"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, value: float) -> None:
    stage = stage_of()
    optimizer = optimizer_of(stage)
    optimizer.initialise(5)
    set_gradients(stage, random_gradients(LLAMA, 2))
    assert optimizer.update(0.01).finite
    before = memory(optimizer)
    stage.gradient(name).reshape(-1)[-1] = value
    found = optimizer.update(0.01)
    assert not found.finite
    assert not np.isfinite(found.gradient_norm)
    assert memory(optimizer) == before
    assert optimizer.updates == 1
    set_gradients(stage, random_gradients(LLAMA, 3))
    assert optimizer.update(0.01).finite
    assert optimizer.updates == 2


def test_a_power_of_two_loss_scale_changes_no_bit() -> None:
    found = []
    for scale in (1.0, 4096.0):
        stage = stage_of()
        optimizer = optimizer_of(stage)
        optimizer.initialise(5)
        for seed in (2, 3):
            gradients = random_gradients(LLAMA, seed)
            set_gradients(stage, {name: scale * value for name, value in gradients.items()})
            norm = optimizer.update(0.01, loss_scale=scale).gradient_norm
        found.append((norm, memory(optimizer)))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_small_updates_are_not_lost_in_the_master(dtype: str) -> None:
    """Each update is a tenth of what a 16-bit weight near 1 can show; forty of them must be seen."""
    plain, master = stage_of(), stage_of(weights=dtype)
    lost = stage_of(weights=dtype, master=dtype)
    optimizers = [optimizer_of(stage) for stage in (plain, master, lost)]
    assert [optimizer.states[0].has_master for optimizer in optimizers] == [False, True, False]
    for optimizer in optimizers:
        optimizer.initialise(5)
    first = lost.parameter("final_norm.weight").copy()
    gradients = random_gradients(LLAMA, 4)
    for optimizer in optimizers:
        set_gradients(optimizer.states[0].stage, gradients)
        for _ in range(40):
            optimizer.update({"bf16": 2.0**-12, "fp16": 2.0**-15}[dtype])
    for index, (wide, kept) in enumerate(zip(plain.weights, optimizers[1].states[0].master, strict=True)):
        np.testing.assert_array_equal(wide.array, kept.array)  # the same as in fp32, bit for bit
        rounded = np.empty_like(master.weights[index].array)
        master.device.convert(rounded, wide.array, dtype)
        np.testing.assert_array_equal(master.weights[index].array, rounded)
    assert np.count_nonzero(master.parameter("final_norm.weight") != first) > 0.9 * first.size
    np.testing.assert_array_equal(lost.parameter("final_norm.weight"), first)


def test_adopted_weights_become_the_master() -> None:
    stage = stage_of(weights="bf16")
    optimizer = optimizer_of(stage)
    stage.initialise(9)
    optimizer.adopt_weights()
    before = [buffer.array.copy() for buffer in stage.weights]
    optimizer.states[0].round_weights()
    for buffer, expected in zip(stage.weights, before, strict=True):
        np.testing.assert_array_equal(buffer.array, expected)


def test_the_loss_scale_halves_and_doubles() -> None:
    scale = LossScale(8.0, dynamic=True)
    scale.after(finite=False)
    assert (scale.value, scale.good_steps) == (4.0, 0)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.after(finite=True)
    assert scale.value == 4.0
    scale.after(finite=True)
    assert (scale.value, scale.good_steps) == (8.0, 0)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.after(finite=True)
    scale.after(finite=False)  # the count begins anew
    scale.after(finite=True)
    assert (scale.value, scale.good_steps) == (4.0, 1)


def test_the_loss_scale_stays_at_least_one() -> None:
    scale = LossScale(2.0, dynamic=True)
    for _ in range(3):
        scale.after(finite=False)
    assert scale.value == 1.0


def test_a_static_loss_scale_does_not_move() -> None:
    scale = LossScale(1.0, dynamic=False)
    for finite in (False, *[True] * GROWTH_INTERVAL):
        scale.after(finite)
    assert scale.value == 1.0
