"""What a stage keeps from forward to backward, and gradients that lie where activations were."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pytrain import _native, estimate
from pytrain.rank import Plan
from pytrain.stage import Stage, native_shape
from pytrain.train import Trainer
from tests import reference, runs, spine
from tests.reference_cases import GPT2, LLAMA

DEEP = {
    "gpt2": dataclasses.replace(GPT2, layers=4, context=80),
    "llama": dataclasses.replace(LLAMA, layers=4, context=80, tied_head=False),
    "llama tied": dataclasses.replace(LLAMA, layers=4, context=80, tied_head=True),
}
LENGTHS = {"few tokens": 1, "many tokens": 70}
"""Tokens of each of three sequences: layers' gradients are larger than their activations, or smaller."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> runs.Corpora:
    return runs.make_corpora(tmp_path_factory.mktemp("corpora") / "data")


def stage_of(name: str, length: int = 70, dtype: str = "fp32", **options: object) -> Stage:
    """A whole model of three sequences."""
    return Stage(
        _native.CpuDevice(),
        spine.model_config(DEEP[name]),
        spine.policy(dtype),
        batch=3,
        length=length,
        **options,
    )


def in_arena(stage: Stage) -> dict[str, tuple[int, int]]:
    """First and last address of the gradients that lie in the arena, by bucket, in the order of the buckets."""
    found = {}
    for bucket, buffer in zip(stage.layout.buckets, stage.gradients, strict=True):
        if buffer.kind == "activations":
            found[bucket.name] = (buffer.address, buffer.address + buffer.array.nbytes)
    return found


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("preset", ["gpt2-124m", "llama-110m"])
def test_a_layer_keeps_what_takes_a_product_to_make(preset: str, defer: bool) -> None:
    """By byte: stream before each norm and its statistics, q k v, attention's output and statistics, and up."""
    from pytrain.config import model_preset

    model, rows, slots = model_preset(preset), 1024, 2
    bytes_of = {}
    for layers in (3, 4):
        shape = native_shape(model.model_copy(update={"layers": layers}))
        _, table = _native.plan_arena(
            shape,
            spine.policy(),
            first_op=0,
            last_op=shape.op_count,
            batch=4,
            length=rows // 4,
            recompute=["none"] * layers,
            slots=slots,
            defer_weight=defer,
        )
        bytes_of[layers] = sum(row["bytes"] * row["copies"] for row in table)
    width = (model.heads + 2 * model.kv_heads) * model.head_size
    up = (1 if model.family == "gpt2" else 2) * model.ffn
    floats = 2 * model.hidden + 4 + width + model.heads * model.head_size + model.heads + up
    if defer:  # gradients of both first products, and of the stream after both second ones
        floats += width + up + 2 * model.hidden
    assert bytes_of[4] - bytes_of[3] == slots * rows * 4 * floats


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", DEEP)
def test_gradients_where_activations_were_are_the_same(name: str, recompute: str, length: int) -> None:
    """To the bit, twice over, with an evaluation between that writes its logits over what the first step left."""
    shape = DEEP[name]
    parameters = reference.visible_parameters(shape, 5)
    batch = reference.random_batch(shape, 3, length, 6)
    apart, within = (stage_of(name, length, recompute=recompute, reuse_activations=reuse) for reuse in (False, True))
    for stage in (apart, within):
        stage.load_weights(parameters)
    assert within.native.arena_bytes < apart.native.arena_bytes + sum(
        buffer.array.nbytes for buffer in apart.gradients
    ) - sum(buffer.array.nbytes for buffer in within.gradients if buffer.kind == "gradients")
    want_loss, want = spine.run_stage(apart, batch)
    for _ in range(2):
        within.native.overwrite_gradients()
        loss, found = spine.run_stage(within, batch)
        assert loss == want_loss
        for tensor, gradient in want.items():
            np.testing.assert_array_equal(found[tensor], gradient, err_msg=tensor)
        within.forward(0, "evaluate")


@pytest.mark.parametrize("name", DEEP)
def test_who_lies_in_the_arena(name: str) -> None:
    """Layers, and an embedding that the head has no part in: later ops higher, none over another."""
    stage = stage_of(name, reuse_activations=True)
    found = in_arena(stage)
    layers = [f"layer_{layer:03d}" for layer in range(4)]
    assert list(found) == (["embed", *layers] if name == "llama" else layers)
    for (_, end), (begin, _) in pairwise(found.values()):
        assert end <= begin
    assert all(buffer.kind == "gradients" for buffer in stage_of(name).gradients)


@pytest.mark.parametrize(("length", "layers_decide"), [(1, True), (70, False)])
def test_the_arena_is_no_larger_than_it_must_be(length: int, layers_decide: bool) -> None:
    """Gradients of all layers stand on the activations of the first, or that of the last on those of all."""
    stage = stage_of("gpt2", length, reuse_activations=True)
    gradients = [end - begin for begin, end in in_arena(stage).values()]
    rows = stage.native.arena_table
    layers = [sum(row["bytes"] for row in rows if row["name"].startswith(f"layer.{layer}.")) for layer in range(4)]
    assert (gradients[0] > layers[0]) == layers_decide
    extra = next(row["bytes"] for row in rows if row["lifetime"] == "update")
    logits = stage.native.head_chunk * stage.model.vocabulary * 4
    needed = [sum(gradients[layer:]) - sum(layers[layer + 1 :]) for layer in range(4)]
    assert extra == pytest.approx(max(*needed, logits), abs=64 * 15 * 4)  # pieces begin at cache lines


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_dry_run_knows_it(corpora: runs.Corpora, tmp_path: Path, family: str, dtype: str) -> None:
    """Steps of one micro-batch: planned is held, and less than the same run in two micro-batches of that size."""
    totals = {}
    for micro_batches in (1, 2):
        config = runs.configuration(
            corpora,
            tmp_path / f"run {micro_batches}",
            family,
            precision__dtype=dtype,
            batch__micro_batch=4,
            batch__global_batch=4 * micro_batches,
        )
        memory = estimate.largest_rank(config)
        assert sum(memory.by_lifetime.values()) <= memory.by_kind["activations"]
        assert ("update" in memory.by_lifetime) == (micro_batches == 1)
        with Trainer(config, progress=runs.Quiet()) as trainer:
            trainer.step()
            held = {kind: trainer.device.bytes_in_use(kind) for kind in memory.by_kind}
        assert held == memory.by_kind
        totals[micro_batches] = memory.total
    assert totals[1] < totals[2]


@pytest.mark.parametrize(
    ("keys", "reuses"),
    [
        ({}, False),
        ({"batch__micro_batch": 4}, True),
        ({"batch__micro_batch": 2, "parallel__dp": 2}, True),
        ({"batch__micro_batch": 2, "parallel__dp": 2, "parallel__zero": 1}, True),
        ({"batch__micro_batch": 2, "parallel__dp": 2, "parallel__zero": 2}, False),
        ({"batch__micro_batch": 4, "parallel__pp": 2}, True),
        ({"batch__micro_batch": 4, "parallel__pp": 2, "parallel__schedule": "zero-bubble"}, False),
    ],
)
def test_who_reuses(corpora: runs.Corpora, tmp_path: Path, keys: dict[str, object], reuses: bool) -> None:
    """Steps of one micro-batch, where gradients are whole and come at once."""
    config = runs.configuration(corpora, tmp_path / "run", "gpt2", batch__global_batch=4, **keys)
    plan = Plan(config)
    stages = [stage for pp_rank in range(config.parallel.pp) for stage in plan.stages_of(pp_rank, 0)]
    assert [stage.reuse_activations for stage in stages] == [reuses] * len(stages)


def test_what_cannot_reuse_is_refused() -> None:
    for options in ({"defer_weight": True}, {"training": False}):
        with pytest.raises(_native.Error, match="gradients can follow activations only in training"):
            stage_of("gpt2", reuse_activations=True, **options)
