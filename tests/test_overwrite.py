"""The first micro-batch of a step overwrites gradients: the same bits as adding to zeros, whatever lay there."""

import numpy as np
import pytest

from pytrain import _native
from pytrain.stage import Stage
from tests import reference, spine
from tests.reference_cases import SHAPES


def two_steps(name: str, dtype: str, overwrite: bool, defer_weight: bool) -> list[dict[str, np.ndarray]]:
    """Gradients after one and after two micro-batches of each of two steps."""
    shape = SHAPES[name]
    parameters = reference.visible_parameters(shape, 41)
    stage = Stage(
        _native.CpuDevice(),
        spine.model_config(shape),
        spine.policy(dtype),
        batch=3,
        length=shape.context - 1,
        defer_weight=defer_weight,
    )
    for spec in stage.layout.tensors:
        values = np.ascontiguousarray(parameters[spec.name].astype(np.float32).reshape(-1))
        stage.device.convert(stage.parameter(spec.name).reshape(-1), values)
    seen = []
    for step in range(2):
        for bucket in stage.gradients:
            bucket.array[:] = np.nan if overwrite else 0.0
        if overwrite:
            stage.native.overwrite_gradients()
        for microbatch in range(2):
            batch = reference.random_batch(shape, 3, shape.context - 1, 50 + 2 * step + microbatch)
            _, gradients = spine.run_stage(stage, batch)
            seen.append(gradients)
    return seen


@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "llama", "llama tied"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("defer_weight", [False, True])
def test_first_microbatch_overwrites_and_others_add(name: str, dtype: str, defer_weight: bool) -> None:
    print("seeds 41, 50 to 53")
    added = two_steps(name, dtype, overwrite=False, defer_weight=defer_weight)
    written = two_steps(name, dtype, overwrite=True, defer_weight=defer_weight)
    for wanted, got in zip(added, written, strict=True):
        for tensor, gradient in wanted.items():
            assert np.isfinite(gradient).all()
            np.testing.assert_array_equal(got[tensor], gradient, err_msg=tensor)
    # Else none of this would see whether a second micro-batch adds.
    assert any((written[0][tensor] != written[1][tensor]).any() for tensor in written[0])
