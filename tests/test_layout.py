"""The parameter table: tensor-parallel slices and ZeRO pieces cover the model exactly once."""

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from pytrain import _native
from pytrain.config import model_preset, parameter_count
from pytrain.presets import PRESETS
from pytrain.stage import native_shape, tensor_key
from tests import reference, spine
from tests.reference_cases import GPT2, LLAMA

SHAPES = {
    "gpt2": dataclasses.replace(GPT2, hidden=35, heads=7, kv_heads=7, head_size=5, ffn=41, vocabulary=23),
    "gpt2 untied": dataclasses.replace(GPT2, tied_head=False),
    "llama": dataclasses.replace(LLAMA, heads=10, kv_heads=5, head_size=4, ffn=33, vocabulary=37),
    "llama tied": dataclasses.replace(LLAMA, heads=6, kv_heads=2, ffn=19, tied_head=True),
    "llama one key head": dataclasses.replace(LLAMA, heads=7, kv_heads=1, head_size=6),
}
CASES = [
    (name, tp) for name, shape in SHAPES.items() for tp in (1, 2, 3, 5, 6, 7) if tp <= shape.heads
]  # tp = 3, 5, 6, 7 share key heads in some


def native(shape: reference.Shape) -> Any:
    return native_shape(spine.model_config(shape))


def layouts(shape: reference.Shape, tp: int) -> list[Any]:
    """The table of each rank."""
    whole = native(shape)
    return [_native.Layout(whole, 0, whole.op_count, rank, tp) for rank in range(tp)]


def by_tensor(ranks: list[Any]) -> dict[str, list[Any]]:
    """Of each tensor the row of every rank, in rank order."""
    found: dict[str, list[Any]] = defaultdict(list)
    for layout in ranks:
        for spec in layout.tensors:
            found[spec.name].append(spec)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_names_shapes_and_order_are_the_references(name: str) -> None:
    shape = SHAPES[name]
    expected = reference.parameter_shapes(shape)
    for layout in layouts(shape, 3):
        assert {spec.name: spec.shape for spec in layout.tensors} == expected
    buckets = [bucket.name for bucket in layouts(shape, 1)[0].buckets]
    assert buckets == ["embed", *(f"layer_{layer:03d}" for layer in range(shape.layers)), "head"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("frontier")])
def test_the_table_holds_every_parameter(preset: str) -> None:
    model = model_preset(preset)
    shape = native_shape(model)
    table = _native.Layout(shape, 0, shape.op_count).tensors
    assert sum(spec.elements for spec in table) == parameter_count(model)


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_slices_cover_each_row_once(name: str, tp: int) -> None:
    for tensor, specs in by_tensor(layouts(SHAPES[name], tp)).items():
        owners = np.zeros(specs[0].shape[0], int)
        holders = np.zeros(specs[0].shape[0], int)
        for rank, spec in enumerate(specs):
            first, last = spec.rows
            holders[first:last] += 1
            owners[first:last] += spec.owner
            assert spec.sharing_ranks[0] <= rank < spec.sharing_ranks[1]
            for other in range(*spec.sharing_ranks):
                assert specs[other].rows == spec.rows, tensor
            width = 1 if len(spec.shape) == 1 else spec.shape[1]
            assert spec.local_shape == (last - first, *spec.shape[1:])
            assert (spec.elements, spec.first_element) == ((last - first) * width, first * width)
        assert (owners == 1).all(), f"{tensor}: each row is written and counted once"
        if specs[0].replicated:
            assert (holders == tp).all()
            assert all(spec.sharing_ranks == (0, tp) for spec in specs)
        for spec in specs:
            sharing = spec.sharing_ranks[1] - spec.sharing_ranks[0]
            assert (holders[slice(*spec.rows)] == sharing).all(), tensor
            assert spec.sum_over_sharing == (sharing > 1 and not spec.replicated), tensor


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_what_is_replicated(name: str, tp: int) -> None:
    for tensor, specs in by_tensor(layouts(SHAPES[name], tp)).items():
        whole = (
            "norm" in tensor
            or tensor == "embed.positions"
            or tensor.endswith(("attention.out.bias", "mlp.down.bias"))
        )
        for spec in specs:
            assert spec.replicated == whole, tensor
            assert spec.partial_with_sequence_parallel == whole, tensor


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_heads_are_cut_at_their_groups(name: str, tp: int) -> None:
    shape = SHAPES[name]
    group = shape.heads // shape.kv_heads
    parts = [_native.head_range(native(shape), rank, tp) for rank in range(tp)]
    assert [head for heads, _, _ in parts for head in range(*heads)] == list(range(shape.heads))
    for rank, (heads, kv_heads, sharing) in enumerate(parts):
        assert heads[0] < heads[1], "every rank has a head"
        assert {head // group for head in range(*heads)} == set(range(*kv_heads)), "and the keys it attends to"
        assert [r for r, part in enumerate(parts) if part[1] == kv_heads] == list(range(*sharing))
        specs = {spec.name: spec for spec in layouts(shape, tp)[rank].tensors}
        for tensor, held in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("out", heads)):
            spec = specs[f"layer.1.attention.{tensor}.weight"]
            assert spec.rows == tuple(shape.head_size * edge for edge in held)
            assert spec.sum_over_sharing == (tensor in "kv" and sharing[1] - sharing[0] > 1)


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_what_is_multiplied_together_lies_together(name: str, tp: int) -> None:
    groups = [["attention.q.weight", "attention.k.weight", "attention.v.weight"]]
    if SHAPES[name].family == "gpt2":
        groups.append(["attention.q.bias", "attention.k.bias", "attention.v.bias"])
    else:
        groups.append(["mlp.gate.weight", "mlp.up.weight"])
    for layout in layouts(SHAPES[name], tp):
        specs = {spec.name: spec for spec in layout.tensors}
        for group in groups:
            end = specs[f"layer.0.{group[0]}"].offset
            for tensor in group:
                spec = specs[f"layer.0.{tensor}"]
                assert spec.offset == end, tensor
                end += spec.elements


@pytest.mark.parametrize(("name", "tp"), CASES)
@pytest.mark.parametrize("shards", [1, 2, 3, 8, 61])
def test_shards_cover_each_element_once(name: str, tp: int, shards: int) -> None:
    layout = layouts(SHAPES[name], tp)[-1]
    seen = [np.zeros(spec.elements, int) for spec in layout.tensors]
    for index, bucket in enumerate(layout.buckets):
        size = layout.shard_elements(index, shards)
        assert (size - 1) * shards < bucket.elements <= size * shards
        for shard in range(shards):
            pieces = layout.pieces(index, shard, shards)
            assert len({piece.tensor for piece in pieces}) == len(pieces), "one piece of a tensor per shard"
            for piece in pieces:
                spec = layout.tensors[piece.tensor]
                assert spec.bucket == index
                assert shard * size + piece.shard_offset == spec.offset + piece.begin
                assert 0 <= piece.shard_offset < piece.shard_offset + piece.end - piece.begin <= size
                seen[piece.tensor][piece.begin : piece.end] += 1
    for spec, count in zip(layout.tensors, seen, strict=True):
        assert (count == 1).all(), spec.name


@pytest.mark.parametrize(("name", "tp"), CASES)
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [1, 300, 1000, 10**9])
def test_parts_cover_each_element_once(name: str, tp: int, shards: int, limit: int) -> None:
    """As few as hold at most `limit` elements; every shard of every part is there once, one after the other."""
    layout = layouts(SHAPES[name], tp)[-1]
    least = 32 * shards  # of a part: a group of elements for every shard
    seen = [np.zeros(spec.elements, int) for spec in layout.tensors]
    for index in range(len(layout.buckets)):
        size = layout.shard_elements(index, shards)
        edges = layout.parts(index, shards, limit)
        assert (edges[0], edges[-1]) == (0, size * shards)
        sizes = np.diff(edges)
        assert 0 < sizes.min() <= sizes.max() <= max(limit, least)
        assert not (sizes % shards).any()
        assert not (np.array(edges[:-1]) % least).any()
        assert len(sizes) == 1 or limit < size * shards
        assert len(sizes) <= -(-size * shards // max(least, limit - limit % least))
        for shard in range(shards):
            held = np.zeros(size, int)
            for piece in layout.pieces(index, shard, shards, limit):
                spec = layout.tensors[piece.tensor]
                seen[piece.tensor][piece.begin : piece.end] += 1
                held[piece.shard_offset : piece.shard_offset + piece.end - piece.begin] += 1
                for element in (piece.begin, piece.end - 1):  # where it lies in the bucket says where in the shard
                    place = spec.offset + element
                    part = int(np.searchsorted(edges, place, "right")) - 1
                    own, inside = divmod(place - edges[part], sizes[part] // shards)
                    assert own == shard
                    assert piece.shard_offset + element - piece.begin == edges[part] // shards + inside
            assert held.max(initial=0) <= 1
        if shards == 1:
            assert layout.pieces(index, 0, 1, limit)[0].end == layout.pieces(index, 0, 1)[0].end
    for spec, count in zip(layout.tensors, seen, strict=True):
        assert (count == 1).all(), spec.name


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_know_their_op(name: str) -> None:
    """A tied head's matrix is the embedding's, where backward ends."""
    shape = SHAPES[name]
    whole = native(shape)
    for first, last in ((0, whole.op_count), (0, 7), (7, whole.op_count)):
        for spec in _native.Layout(whole, first, last).tensors:
            words = spec.name.split(".")
            op = {"embed": 0, "final_norm": 4 * shape.layers + 1, "head": 4 * shape.layers + 2}.get(words[0])
            if spec.tied_copy:
                op = 4 * shape.layers + 2
            if op is None:
                op = 1 + 4 * int(words[1]) + ("norm1", "attention", "norm2", "mlp").index(words[2])
            assert spec.op == op, spec.name


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_tensors_do_not_overlap(name: str, tp: int) -> None:
    for layout in layouts(SHAPES[name], tp):
        used = [np.zeros(bucket.elements, int) for bucket in layout.buckets]
        for spec in layout.tensors:
            assert 0 <= spec.offset <= spec.offset + spec.elements <= len(used[spec.bucket])
            used[spec.bucket][spec.offset : spec.offset + spec.elements] += 1
        assert max(count.max() for count in used) == 1


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("edge", [1, 3, 5, 9])
def test_two_stages_hold_the_whole(name: str, edge: int) -> None:
    shape = native(SHAPES[name])
    first = _native.Layout(shape, 0, edge).tensors
    second = _native.Layout(shape, edge, shape.op_count).tensors
    together = [spec.name for spec in [*first, *second] if spec.owner]
    whole = [spec.name for spec in _native.Layout(shape, 0, shape.op_count).tensors]
    assert together == whole
    copies = [spec.name for spec in second if spec.tied_copy]
    assert copies == (["embed.tokens"] if SHAPES[name].tied_head else [])
    assert all(spec.owner != spec.tied_copy for spec in [*first, *second])


@pytest.mark.parametrize("name", SHAPES)
def test_decay_and_beginnings(name: str) -> None:
    for spec in layouts(SHAPES[name], 1)[0].tensors:
        assert spec.decay == (len(spec.shape) == 2), spec.name
        if len(spec.shape) == 1:
            assert spec.initialisation == ("zeros" if spec.name.endswith("bias") else "ones"), spec.name
        else:
            residual = spec.name.endswith(("attention.out.weight", "mlp.down.weight"))
            assert spec.initialisation == ("residual" if residual else "normal"), spec.name


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(_native.Error, match=r"tp = 8 leaves ranks without an attention head: model\.heads is 7"):
        layouts(SHAPES["llama one key head"], 8)
    with pytest.raises(_native.Error, match="rank 2 is outside tp = 2"):
        _native.Layout(native(GPT2), 0, 12, 2, 2)
    with pytest.raises(_native.Error, match=r"ops 4\.\.99 is outside the model's 12"):
        _native.Layout(native(GPT2), 4, 99)


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_the_first_weights_are_the_same_on_every_grid(tp: int) -> None:
    """Philox is keyed by seed, name and global element: slices of tp ranks are slices of the whole."""
    from pytrain.stage import Stage

    model = spine.model_config(SHAPES["llama"])
    whole = Stage(_native.CpuDevice(), model, spine.policy(), batch=1, length=4)
    whole.initialise(77)
    for rank in range(tp):
        part = Stage(_native.CpuDevice(), model, spine.policy(), batch=1, length=4, tp_rank=rank, tp_size=tp)
        part.initialise(77)
        for spec in part.layout.tensors:
            np.testing.assert_array_equal(
                part.parameter(spec.name), whole.parameter(spec.name)[slice(*spec.rows)], err_msg=spec.name
            )
    values = whole.parameter("embed.tokens")
    assert float(values.std()) == pytest.approx(0.02, rel=0.1)
    residual = whole.parameter("layer.0.mlp.down.weight")
    assert float(residual.std()) == pytest.approx(0.02 / np.sqrt(2 * model.layers), rel=0.1)


def test_keys_of_tensors_stay_what_they_are() -> None:
    """They are part of what a seed means: a change would start every run from other weights."""
    assert tensor_key("embed.tokens") == 2895030691178351852
