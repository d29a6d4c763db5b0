"""The model of native/model over the HIP device, from tokens to updated weights, beside the CPU device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytrain import _native
from pytrain.config.run import OptimizerSection
from pytrain.optimizer import AdamW
from pytrain.parallel import Groups
from pytrain.stage import Scalar, Stage
from tests import reference, runs, spine
from tests.reference_cases import GPT2, LLAMA, SHAPES

WIDE = dataclasses.replace(LLAMA, hidden=136, heads=2, kv_heads=1, head_size=80, ffn=200, vocabulary=150, context=70)
MODELS = {"gpt2": GPT2, "llama": LLAMA, "gpt2 odd head": SHAPES["gpt2 odd head"], "llama, several tiles": WIDE}
SETTINGS = OptimizerSection(clip=0.5)


def trained(
    device: _native.Device, shape: reference.Shape, dtype: str, recompute: str = "none", steps: int = 1
) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """Loss of the last step, its gradients, the weights after it, and the gradient's norm."""
    parameters = reference.visible_parameters(shape, 3)
    batch = reference.random_batch(shape, 2, shape.context - 1, 4)
    stage = Stage(
        device, spine.model_config(shape), spine.policy(dtype), batch=2, length=batch.length, recompute=recompute
    )
    optimizer = AdamW([stage], SETTINGS, Groups())
    for spec in stage.layout.tensors:
        whole = np.asarray(parameters[spec.name], np.float32)[slice(*spec.rows)]
        if dtype == "fp32":
            stage.parameter(spec.name)[...] = whole
        else:
            device.convert(stage.parameter(spec.name), np.ascontiguousarray(whole), dtype)
    optimizer.adopt_weights()
    for _ in range(steps):
        stage.native.overwrite_gradients()
        loss, gradients = spine.run_stage(stage, batch)
        result = optimizer.update(1e-3)
        assert result.finite
    masters = optimizer.states[0].master or stage.weights
    weights = {
        spec.name: stage.slice_of(masters[spec.bucket], spec).astype(np.float64) for spec in stage.layout.tensors
    }
    return loss, gradients, weights, float(stage.scalars[Scalar.GRADIENT_NORM])


@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_fp32(device: _native.Device, name: str) -> None:
    """The same tolerances as between the CPU device and the float64 reference."""
    shape = MODELS[name]
    loss, gradients, weights, norm = trained(device, shape, "fp32")
    wanted_loss, wanted, wanted_weights, wanted_norm = trained(_native.CpuDevice(), shape, "fp32")
    assert loss == pytest.approx(wanted_loss, rel=3e-7)
    assert norm == pytest.approx(wanted_norm, rel=3e-6)
    reference.assert_gradients_close(gradients, wanted, 1e-5)
    for tensor, weight in weights.items():
        if not tensor.endswith("attention.k.bias"):  # its gradient is zero but for rounding, which Adam enlarges
            update = 1e-3 * np.sqrt(weight.size)  # Adam's first step is the learning rate, up or down
            assert np.linalg.norm(weight - wanted_weights[tensor]) <= 3e-3 * update, tensor


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "llama, several tiles"])
def test_a_step_in_16_bits(device: _native.Device, name: str, dtype: str) -> None:
    shape = MODELS[name]
    loss, gradients, _, norm = trained(device, shape, dtype)
    wanted_loss, wanted, _, wanted_norm = trained(_native.CpuDevice(), shape, dtype)
    tolerance = 4e-2 if dtype == "bf16" else 6e-3
    assert loss == pytest.approx(wanted_loss, rel=tolerance / 10)
    assert norm == pytest.approx(wanted_norm, rel=tolerance)
    for tensor, gradient in gradients.items():
        error = np.linalg.norm(gradient - wanted[tensor]) / max(np.linalg.norm(wanted[tensor]), 0.03 * wanted_norm)
        assert error <= tolerance, (tensor, error)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(device: _native.Device, recompute: str) -> None:
    loss, gradients, weights, _ = trained(device, LLAMA, "fp32")
    again, recomputed, reweighted, _ = trained(device, LLAMA, "fp32", recompute)
    assert loss == again
    for tensor, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, recomputed[tensor], err_msg=tensor)
        np.testing.assert_array_equal(weights[tensor], reweighted[tensor], err_msg=tensor)


def test_several_steps_stay_together(device: _native.Device) -> None:
    loss, _, _, _ = trained(device, GPT2, "fp32", steps=4)
    wanted, _, _, _ = trained(_native.CpuDevice(), GPT2, "fp32", steps=4)
    assert loss == pytest.approx(wanted, rel=1e-6)


def test_a_run_of_the_trainer(tmp_path: Path) -> None:
    """`device = "hip"` in the configuration: data, steps, evaluation, samples and checkpoints, as on the CPU."""
    corpora = runs.make_corpora(tmp_path / "corpora")
    losses: dict[str, list[float]] = {}
    samples: dict[str, list[Any]] = {}
    for device in ("cpu", "hip"):
        config = runs.configuration(
            corpora,
            tmp_path / device,
            run__steps=3,
            run__device=device,
            evaluation__every=2,
            evaluation__batches=1,
            checkpoint__every=1,
            checkpoint__keep_last=3,
            sample__every=1,
            sample__prompts=["abc"],
            sample__tokens=8,
        )
        assert config.checkpoint.asynchronous
        runs.quiet_train(config)
        lines = runs.timeless_metrics(tmp_path / device)
        losses[device] = [value for line in lines for key, value in line.items() if "loss" in key and value]
        samples[device] = [line["prompts"] for line in lines if line.get("prompts")]
    assert len(losses["cpu"]) >= 3
    assert losses["hip"] == pytest.approx(losses["cpu"], rel=2e-6)
    assert len(samples["cpu"]) == 3
    assert samples["hip"] == samples["cpu"]


def test_buffers_are_offered_to_a_gpu_aware_mpi(device: _native.Device) -> None:
    buffer = _native.Buffer(device, 10, "bf16", "gradients")
    interface: dict[str, Any] = buffer.__cuda_array_interface__
    assert interface["shape"] == (10,)
    assert interface["data"] == (buffer.address, False)
    assert (interface["typestr"], interface["version"], interface["strides"]) == ("<u2", 3, None)


def test_no_gpu_is_a_sentence() -> None:
    shim: Any = _native.hip_shim  # type: ignore[attr-defined]
    shim.set_devices(0)
    with pytest.raises(_native.Error, match="no AMD GPU is visible to this process"):
        _native.hip_device(0)
    shim.set_devices(2)
    assert _native.hip_device(1).name == "hip"
    with pytest.raises(_native.Error, match="there is no GPU 2: 2 visible"):
        _native.hip_device(2)
