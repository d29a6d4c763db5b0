"""Steps of the engine against a plain float64 loop over the reference model."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain import _native
from pytrain.config.run import OptimizerSection
from pytrain.data.loader import Batch
from pytrain.engine import Engine
from pytrain.learning_rate import warmup
from pytrain.optimizer import AdamW
from pytrain.parallel import Groups
from pytrain.schedule import Action, Kind, forward_only, one_stage
from pytrain.stage import Stage
from tests import reference, runs, spine
from tests.reference_cases import GPT2, LLAMA

SHAPES = {"gpt2": GPT2, "llama": LLAMA, "llama tied": dataclasses.replace(LLAMA, tied_head=True)}
STEPS, MICRO_BATCHES, CLIP, RATE, WARMUP = 20, 3, 1.0, 3e-3, 8


def engine_of(shape: reference.Shape, sequences: int, length: int, settings: OptimizerSection) -> Engine:
    policy = spine.policy()
    stage = Stage(_native.CpuDevice(), spine.model_config(shape), policy, batch=sequences, length=length)
    return Engine({0: stage}, AdamW([stage], settings, Groups()), Groups())


def reference_step(
    shape: reference.Shape, weights: dict[str, NDArray[np.float64]], batches: list[reference.Batch]
) -> tuple[float, dict[str, NDArray[np.float64]]]:
    """Mean loss and its gradients over all targets of the micro-batches."""
    passes = [reference.model_forward(shape, weights, batch) for batch in batches]
    count = sum(each[1] for each in passes)
    gradients = [reference.model_backward(shape, weights, each[3], 1.0 / count) for each in passes]
    total = {name: sum(part[name] for part in gradients) for name in weights}
    return sum(each[0] for each in passes) / count, total  # type: ignore[return-value]


def compared(shape: reference.Shape, name: str) -> bool:
    """The key bias of learned positions has no gradient: Adam makes steps of its rounding errors."""
    return not (shape.family == "gpt2" and name.endswith("attention.k.bias"))


@pytest.mark.parametrize("name", SHAPES)
def test_twenty_steps_against_float64(name: str) -> None:
    shape, seed = SHAPES[name], 100
    print(f"seed {seed}")
    settings = OptimizerSection(clip=CLIP, weight_decay=0.1)
    engine = engine_of(shape, 2, 9, settings)
    weights = reference.visible_parameters(shape, seed)
    start = {key: value.copy() for key, value in weights.items()}
    engine.stages[0].load_weights(weights)
    state: dict[str, Any] = {}
    clipped = 0
    for step in range(1, STEPS + 1):
        batches = [reference.random_batch(shape, 2, 9, seed + MICRO_BATCHES * step + m) for m in range(3)]
        rate = warmup(step, RATE, WARMUP)
        loss, gradients = reference_step(shape, weights, batches)
        found = engine.run(
            one_stage(MICRO_BATCHES), [spine.native_batch(batch) for batch in batches], learning_rate=rate
        )
        if step == 1:
            assert found.loss == pytest.approx(loss, rel=1e-6)
            reference.assert_gradients_close(spine.gradients_of(engine.stages[0]), gradients, 1e-5)
        norm = runs.adamw(weights, gradients, state, rate=rate, clip=CLIP)
        clipped += norm > CLIP
        assert found.update is not None
        # Later steps feel the drift of the weights: 2.2e-5 was the most seen, on any instruction set.
        assert found.update.gradient_norm == pytest.approx(norm, rel=1e-5 if step == 1 else 7e-5)
        assert found.target_count == sum(int((batch.targets >= 0).sum()) for batch in batches)
    assert clipped > 0
    errors = {
        key: float(np.linalg.norm(engine.stages[0].parameter(key) - expected) / np.linalg.norm(expected - start[key]))
        for key, expected in weights.items()
        if compared(shape, key)
    }
    worst = max(errors, key=errors.__getitem__)
    print(f"largest difference: {errors[worst]:.3g} of the update, {worst}; {clipped} steps clipped")
    # An element whose gradient is all but zero moves by its rounding: 6.4e-5 was the most seen, 1e-5 otherwise.
    assert errors[worst] < 2e-4, worst


def slices(batch: reference.Batch, sequences: int) -> list[Batch]:
    """The batch in micro-batches of `sequences` sequences."""
    rows = sequences * batch.length
    return [
        spine.native_batch(reference.Batch(*(array[first : first + rows] for array in batch[:4]), batch.length))
        for first in range(0, len(batch.tokens), rows)
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_the_split_into_micro_batches_does_not_matter(name: str) -> None:
    shape, seed = SHAPES[name], 200
    print(f"seed {seed}")
    batch = reference.random_batch(shape, 8, 11, seed)
    targets = batch.targets.copy()
    targets[: 11 + 5] = -1  # the first two sequences count for far less than the others
    batch = batch._replace(targets=targets)
    results = []
    for sequences in (8, 2, 1):
        engine = engine_of(shape, sequences, 11, OptimizerSection())
        engine.stages[0].load_weights(reference.visible_parameters(shape, seed))
        parts = slices(batch, sequences)
        assert len(parts) == 8 // sequences
        found = engine.run(one_stage(len(parts)), parts, learning_rate=0.0)
        results.append((found.loss, found.target_count, spine.gradients_of(engine.stages[0])))
    whole = results[0]
    for loss, count, gradients in results[1:]:
        assert count == whole[1] == int((targets >= 0).sum())
        assert loss == pytest.approx(whole[0], rel=1e-6)
        reference.assert_gradients_close(gradients, whole[2], 1e-5)


def test_input_and_weight_gradients_apart_are_the_same_bits() -> None:
    """Both with two micro-batches in flight."""
    results = []
    batch = reference.random_batch(LLAMA, 4, 7, 9)
    expected = reference_step(LLAMA, reference.visible_parameters(LLAMA, 9), [batch])[1]
    parts = slices(batch, 2)
    for kinds in ([Kind.BACKWARD], [Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT]):
        policy, model = spine.policy(), spine.model_config(LLAMA)
        defer = len(kinds) == 2
        stage = Stage(_native.CpuDevice(), model, policy, batch=2, length=7, slots=2, defer_weight=defer)
        engine = Engine({0: stage}, AdamW([stage], OptimizerSection(), Groups()), Groups())
        stage.load_weights(reference.visible_parameters(LLAMA, 9))
        forwards = [Action(Kind.FORWARD, 0, m) for m in range(2)]
        backwards = [Action(kind, 0, m) for m in range(2) for kind in kinds]
        found = engine.run((*forwards, *backwards, Action(Kind.UPDATE, 0, None)), parts, learning_rate=0.1)
        results.append((found.loss, [buffer.array.tobytes() for buffer in stage.weights]))
        reference.assert_gradients_close(spine.gradients_of(stage), expected, 1e-5)
    assert results[0] == results[1]


@pytest.mark.parametrize("name", SHAPES)
def test_evaluation_leaves_the_model_alone(name: str) -> None:
    shape, seed = SHAPES[name], 300
    print(f"seed {seed}")
    engine = engine_of(shape, 2, 9, OptimizerSection())
    weights = reference.visible_parameters(shape, seed)
    engine.stages[0].load_weights(weights)
    batches = [reference.random_batch(shape, 2, 9, seed + m) for m in range(3)]
    parts = [spine.native_batch(batch) for batch in batches]
    engine.run(one_stage(3), parts, learning_rate=0.0)
    gradients = [buffer.array.tobytes() for buffer in engine.stages[0].gradients]
    found = engine.run(forward_only(3), parts)
    assert found.update is None
    assert found.loss == pytest.approx(reference_step(shape, weights, batches)[0], rel=3e-7)
    assert [buffer.array.tobytes() for buffer in engine.stages[0].gradients] == gradients
    for key, value in weights.items():
        np.testing.assert_array_equal(engine.stages[0].parameter(key), value.astype(np.float32), err_msg=key)
    assert engine.optimizer is not None
    assert engine.optimizer.updates == 1


def test_a_batch_without_targets_has_no_loss() -> None:
    engine = engine_of(LLAMA, 1, 5, OptimizerSection())
    engine.stages[0].load_weights(reference.visible_parameters(LLAMA, 1))
    batch = reference.random_batch(LLAMA, 1, 5, 1)
    empty = spine.native_batch(batch._replace(targets=np.full_like(batch.targets, -1)))
    found = engine.run(one_stage(1), [empty], learning_rate=0.1)
    assert np.isnan(found.loss)
    assert found.update is not None
    assert (found.target_count, found.update.gradient_norm) == (0, 0.0)


def test_time_in_native_calls_is_part_of_the_step() -> None:
    engine = engine_of(LLAMA, 1, 5, OptimizerSection())
    batch = spine.native_batch(reference.random_batch(LLAMA, 1, 5, 1))
    once = engine.run(one_stage(1), [batch]).native_seconds
    assert once > 0
    assert engine.run(forward_only(1), [batch]).native_seconds > 0
