"""FLOPs per token against a count over the tensors, and against the formulas of papers."""

import dataclasses
import math

import pytest

from pytrain.config import model_preset
from pytrain.flops import forward_flops, hardware_flops, model_flops, utilization
from tests.reference import Shape, parameter_shapes


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-7b", "llama-tiny", "frontier-175b"])
def test_products_are_two_operations_for_each_weight(name: str) -> None:
    model = model_preset(name)
    shape = Shape(**{field.name: getattr(model, field.name) for field in dataclasses.fields(Shape)})
    weights = sum(
        math.prod(tensor)
        for tensor_name, tensor in parameter_shapes(shape).items()
        if len(tensor) == 2 and tensor_name.startswith("layer.")
    )
    forward = forward_flops(model, 128)
    assert forward.projections + forward.mlp == 2 * weights
    assert forward.head == 2 * model.vocabulary * model.hidden


def test_causal_attention_is_half_of_what_a_square_would_take() -> None:
    model, length = model_preset("llama-tiny"), 64
    exact = sum(2 * 2 * (row + 1) * model.heads * model.head_size for row in range(length)) * model.layers / length
    # the diagonal, one part in `length`, is what halving forgets
    assert forward_flops(model, length).attention == pytest.approx(exact, rel=1.01 / length)
    assert forward_flops(model, length).attention < exact


@pytest.mark.parametrize("name", ["frontier-22b", "frontier-1t", "fugaku-13b"])
def test_the_formula_of_frontier_and_fugaku(name: str) -> None:
    """24 c L h^2 (1 + s/(6h) + V/(4 c L h)), where attention is not halved: s/(12h) here."""
    model, length = model_preset(name), 2048
    layers, hidden = model.layers, model.hidden
    for flops, c in ((model_flops(model, length), 3), (hardware_flops(model, length, "full"), 4)):
        head = 6 * hidden * model.vocabulary  # 24 c L h^2 * V/(4 c L h)
        assert flops == pytest.approx(24 * c * layers * hidden**2 * (1 + length / (12 * hidden)) + head, rel=1e-12)


def test_recomputation_counts_in_hardware_flops_only() -> None:
    model, length = model_preset("gpt2-124m"), 1024
    forward = forward_flops(model, length)
    assert hardware_flops(model, length, "none") == model_flops(model, length)
    assert hardware_flops(model, length, "selective") - model_flops(model, length) == forward.attention
    assert hardware_flops(model, length, "full") - model_flops(model, length) == forward.layers


def test_an_unknown_peak_gives_no_utilization() -> None:
    assert utilization(5e11, None) is None
    assert utilization(5e11, 1e12) == 0.5
