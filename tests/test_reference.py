"""The float64 reference against finite differences, and its own promises.

Finite differences tie each backward to its own forward; test_reference_torch.py ties the forwards to what the
field means by these names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from tests import reference
from tests import reference_ops as ops
from tests.reference import Batch
from tests.reference_cases import GPT2, LLAMA3_SCALING, OPERATIONS, SHAPES, case_seed, op_case
from tests.reference_ops import Array


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_gradients_are_finite_differences(name: str) -> None:
    seed = case_seed(name)
    case = op_case(name, seed)
    dy = np.random.default_rng(seed + 1).standard_normal(case.forward(*case.inputs).shape)
    for index, gradient in enumerate(case.backward(dy, *case.inputs)):
        assert gradient.shape == case.inputs[index].shape

        def objective(value: Array, index: int = index) -> float:
            inputs = [*case.inputs[:index], value, *case.inputs[index + 1 :]]
            return float((case.forward(*inputs) * dy).sum())

        differences = np.zeros_like(gradient)
        for entry in np.ndindex(gradient.shape):
            differences[entry] = central_difference(objective, case.inputs[index], unit_at(gradient, entry))
        np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8, err_msg=f"input {index}")


def unit_at(like: Array, entry: tuple[int, ...]) -> Array:
    """Zeros but for a one at `entry`."""
    direction = np.zeros_like(like)
    direction[entry] = 1.0
    return direction


def central_difference(objective: Callable[[Array], float], value: Array, direction: Array) -> float:
    """Slope of the objective along the direction; 1e-5 balances the cubic term with float64's rounding."""
    step = 1e-5 * direction
    return float((objective(value + step) - objective(value - step)) / 2e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_model_gradients_are_finite_differences(name: str) -> None:
    shape, seed = SHAPES[name], case_seed(name)
    random = np.random.default_rng(seed)
    parameters = reference.visible_parameters(shape, seed)
    batch = reference.random_batch(shape, 2, 9, seed)
    scale = 0.7
    gradients = reference.model_backward(
        shape, parameters, reference.model_forward(shape, parameters, batch)[3], scale
    )
    assert {key: value.shape for key, value in gradients.items()} == reference.parameter_shapes(shape)
    typical = ops.global_norm(gradients) / math.sqrt(len(gradients))
    for key, gradient in gradients.items():

        def objective(value: Array, key: str = key) -> float:
            return scale * reference.model_forward(shape, parameters | {key: value}, batch)[0]

        largest = np.unravel_index(int(np.abs(gradient).argmax()), gradient.shape)
        entries = [tuple(int(i) for i in largest)]
        entries += [tuple(int(random.integers(size)) for size in gradient.shape) for _ in range(2)]
        directions = [unit_at(gradient, entry) for entry in entries]
        everywhere = random.standard_normal(gradient.shape)  # one slope that every entry has a part in
        directions.append(everywhere / np.linalg.norm(everywhere))
        for direction in directions:
            expected = central_difference(objective, parameters[key], direction)
            got = float((gradient * direction).sum())
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-7 * typical), key


def test_no_token_sees_another_document_or_the_future() -> None:
    seed = case_seed("documents")
    shape = SHAPES["llama"]
    parameters = reference.visible_parameters(shape, seed)
    batch = reference.random_batch(shape, 2, 12, seed)
    logits = reference.model_logits(shape, parameters, batch)
    sequence = np.arange(batch.tokens.size) // batch.length
    document = sequence * batch.length + batch.document_starts
    assert len(set(document)) > 3
    for row in range(batch.tokens.size):
        tokens = batch.tokens.copy()
        tokens[row] = (tokens[row] + 1) % shape.vocabulary
        changed = reference.model_logits(shape, parameters, batch._replace(tokens=tokens))
        differing = np.flatnonzero((changed != logits).any(axis=1))
        expected = np.flatnonzero((document == document[row]) & (np.arange(batch.tokens.size) >= row))
        np.testing.assert_array_equal(differing, expected)


def test_a_document_in_a_sequence_equals_the_document_alone() -> None:
    seed = case_seed("alone")
    for name in ("gpt2", "llama"):
        shape = SHAPES[name]
        parameters = reference.visible_parameters(shape, seed)
        batch = reference.random_batch(shape, 1, 12, seed)
        logits = reference.model_logits(shape, parameters, batch)
        start = int(batch.document_starts[-1])
        assert start > 0
        alone = Batch(
            batch.tokens[start:],
            batch.targets[start:],
            batch.positions[start:],
            np.zeros_like(batch.document_starts[start:]),
            batch.length - start,
        )
        np.testing.assert_allclose(
            logits[start:], reference.model_logits(shape, parameters, alone), rtol=1e-12, atol=1e-12
        )


def test_rope_is_a_complex_rotation() -> None:
    seed = case_seed("rope")
    x = np.random.default_rng(seed).standard_normal((5, 2 * 6))
    positions = np.array([0, 1, 7, 3, 100], np.int32)
    turned = ops.rope_forward(x, positions, ops.rope_frequencies(6, 500.0))
    angle = positions[:, None] * np.array([1.0, 500.0 ** (-1 / 3), 500.0 ** (-2 / 3)])
    for head in (slice(0, 6), slice(6, 12)):
        product = (x[:, head][:, :3] + 1j * x[:, head][:, 3:]) * np.exp(1j * angle)
        expected = np.concatenate([product.real, product.imag], axis=1)
        np.testing.assert_allclose(turned[:, head], expected, rtol=1e-12, atol=1e-12)


def test_rope_refuses_an_odd_head_size() -> None:
    with pytest.raises(ValueError, match="even head size, not 5"):
        ops.rope_frequencies(5, 10000.0)


def test_rope_scaling_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain = ops.rope_frequencies(64, 10000.0)
    scaled = ops.rope_frequencies(64, 10000.0, LLAMA3_SCALING)
    wavelength = 2.0 * math.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 160 / 4], plain[wavelength < 160 / 4])
    np.testing.assert_allclose(scaled[wavelength > 160], plain[wavelength > 160] / 8.0, rtol=1e-15)
    between = (wavelength > 160 / 4) & (wavelength < 160)
    smooth = (160 / wavelength[between] - 1.0) / (4.0 - 1.0)
    blended = (1.0 - smooth) * plain[between] / 8.0 + smooth * plain[between]
    np.testing.assert_allclose(scaled[between], blended, rtol=1e-14)
    assert between.sum() > 2


@pytest.mark.parametrize("name", SHAPES)
def test_visible_parameters_make_mistakes_visible(name: str) -> None:
    for length in (12, 64):
        shape = dataclasses.replace(SHAPES[name], context=length)
        seed = case_seed(name)
        parameters = reference.visible_parameters(shape, seed)
        assert {key: value.shape for key, value in parameters.items()} == reference.parameter_shapes(shape)
        for documents in (False, True):
            batch = reference.random_batch(shape, 4, length, seed, documents)
            entropy = reference.attention_entropy(shape, parameters, batch)
            # Many causal rows see few keys: the fair measure is a uniform row over as many keys.
            uniform = np.log(batch.positions + 1.0).mean()
            assert (entropy < 0.7 * math.log(length)).all()
            assert (entropy < 0.75 * uniform).all(), (entropy, uniform)
            assert (entropy > 0.1 * uniform).all(), (entropy, uniform)
            assert reference.model_logits(shape, parameters, batch).std() >= 1.0
        for key, value in parameters.items():
            np.testing.assert_array_equal(value, value.astype(np.float32))
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            assert np.abs(value - centre).max() > 0.05, key


def test_attention_entropy_of_equal_keys_is_the_logarithm_of_their_number() -> None:
    shape, seed = SHAPES["llama"], case_seed("entropy")
    parameters = reference.visible_parameters(shape, seed)
    for layer in range(shape.layers):
        parameters[f"layer.{layer}.attention.k.weight"] *= 0.0
    batch = reference.random_batch(shape, 2, 12, seed, documents=False)
    expected = np.log(np.arange(1, 13)).mean()
    np.testing.assert_allclose(reference.attention_entropy(shape, parameters, batch), expected, rtol=1e-12)


def test_random_batch_has_documents_and_ignored_targets() -> None:
    seed = case_seed("batch")
    batch = reference.random_batch(GPT2, 3, 12, seed)
    for array in batch[:4]:
        assert array.dtype == np.int32
        assert array.shape == (36,)
        assert array.flags.c_contiguous
    index = np.tile(np.arange(12), 3)
    np.testing.assert_array_equal(batch.positions + batch.document_starts, index)
    assert (batch.targets == -1).any()
    assert (batch.targets >= 0).any()
    assert len(set(batch.document_starts)) > 1
    whole = reference.random_batch(GPT2, 3, 12, seed, documents=False)
    assert not whole.document_starts.any()
    np.testing.assert_array_equal(whole.positions, index)
    with pytest.raises(ValueError, match="length 13 is more than the context 12"):
        reference.random_batch(GPT2, 1, 13, seed)


def test_assert_gradients_close_names_the_worst_tensor() -> None:
    shape, seed = SHAPES["gpt2"], case_seed("close")
    parameters = reference.visible_parameters(shape, seed)
    batch = reference.random_batch(shape, 2, 9, seed)
    exact = reference.model_backward(shape, parameters, reference.model_forward(shape, parameters, batch)[3])
    assert reference.assert_gradients_close(exact, exact, 1e-5) == 0.0
    worse = exact | {"layer.1.mlp.up.bias": exact["layer.1.mlp.up.bias"] * 1.001}
    assert reference.gradient_error(worse, exact)["layer.1.mlp.up.bias"] == pytest.approx(1e-3)
    with pytest.raises(AssertionError, match=r"layer\.1\.mlp\.up\.bias: error 0\.001 "):
        reference.assert_gradients_close(worse, exact, 1e-5)
    with pytest.raises(AssertionError, match=r"layer\.0\.norm1\.bias: error nan"):
        reference.assert_gradients_close(exact | {"layer.0.norm1.bias": np.full(24, np.nan)}, exact, 1.0)
    with pytest.raises(AssertionError, match=r"different parameters: final_norm\.bias"):
        reference.gradient_error({key: exact[key] for key in exact if key != "final_norm.bias"}, exact)
    with pytest.raises(AssertionError, match=r"final_norm\.bias: \(1,\), expected \(24,\)"):
        reference.gradient_error(exact | {"final_norm.bias": np.zeros(1)}, exact)


def test_the_key_bias_is_compared_absolutely() -> None:
    shape, seed = SHAPES["gpt2"], case_seed("key bias")
    parameters = reference.visible_parameters(shape, seed)
    batch = reference.random_batch(shape, 2, 9, seed)
    exact = reference.model_backward(shape, parameters, reference.model_forward(shape, parameters, batch)[3])
    name = "layer.0.attention.k.bias"
    typical = ops.global_norm(exact) / math.sqrt(len(exact))
    assert np.linalg.norm(exact[name]) < 1e-12 * typical
    noise = np.full(24, 1e-6 * typical / math.sqrt(24))  # float32's rounding
    assert reference.gradient_error(exact | {name: exact[name] + noise}, exact)[name] == pytest.approx(1e-6)
    with pytest.raises(AssertionError, match=name):
        reference.assert_gradients_close(exact | {name: exact["layer.0.attention.q.bias"]}, exact, 1e-5)


def test_clipping_scales_to_the_limit_and_leaves_small_gradients() -> None:
    gradients = {"a": np.array([3.0, 0.0]), "b": np.array([[-4.0]])}
    clipped, norm = ops.clip_gradients(gradients, 2.0)
    assert norm == 5.0
    assert ops.global_norm(clipped) == pytest.approx(2.0)
    np.testing.assert_allclose(clipped["b"], [[-1.6]])
    kept, _ = ops.clip_gradients(gradients, 6.0)
    np.testing.assert_array_equal(kept["a"], gradients["a"])


def test_adamw_of_a_constant_gradient_moves_by_the_learning_rate() -> None:
    """With bias correction both moments of a constant gradient are exact, so each step moves by its sign."""
    parameter, first, second = np.array([2.0, -3.0]), np.zeros(2), np.zeros(2)
    gradient = np.array([0.5, -8.0])
    for step in range(1, 4):
        expected = parameter * (1.0 - 0.01 * 0.3) - 0.01 * gradient / (np.abs(gradient) + 0.25)
        parameter, first, second = ops.adamw(parameter, gradient, first, second, step, 0.01, (0.9, 0.99), 0.25, 0.3)
        np.testing.assert_allclose(parameter, expected, rtol=1e-13)


def test_known_values() -> None:
    assert ops.gelu_forward(np.array(1.0)) == pytest.approx(0.8411919906082768, rel=1e-14)
    loss_sum, count = ops.cross_entropy_forward(np.zeros((3, 4)), np.array([1, -1, 3], np.int32))
    assert count == 2
    assert loss_sum == pytest.approx(2.0 * math.log(4.0), rel=1e-14)
