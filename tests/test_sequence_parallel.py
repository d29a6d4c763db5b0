"""Slices that hold their rows of the residual stream alone: gradients, memory, and what is refused."""

import dataclasses

import numpy as np
import pytest

from pytrain import _native
from pytrain.parallel import Groups
from pytrain.partial_gradients import summing_group
from pytrain.stage import Stage, native_shape
from tests import reference, spine
from tests.reference_cases import GPT2
from tests.test_stage import UNEVEN, expected

SEQUENCES, LENGTH = 5, 7  # 35 rows, which 2, 3 and 4 ranks share unevenly


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", UNEVEN)
def test_slices_and_stages_make_the_whole(name: str, tp: int, recompute: str) -> None:
    shape = UNEVEN[name]
    want = expected(shape, 60 + tp, SEQUENCES, LENGTH)
    pieces = spine.Parallel(shape, want.parameters, want.batch, tp, (5,), recompute, sequence_parallel=True)
    assert pieces.forward() == pytest.approx(want.loss, rel=2e-6)
    pieces.backward()
    reference.assert_gradients_close(pieces.gradients(), want.gradients, 2e-5)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("name", UNEVEN)
def test_deferred_weight_gradients(name: str, tp: int, recompute: str) -> None:
    shape = UNEVEN[name]
    want = expected(shape, 70 + tp, SEQUENCES, LENGTH)
    pieces = spine.Parallel(shape, want.parameters, want.batch, tp, (5,), recompute, True, sequence_parallel=True)
    pieces.forward()
    pieces.backward()
    reference.assert_gradients_close(pieces.gradients(), want.gradients, 2e-5)


@pytest.mark.parametrize("edges", [(3,), (1, 7), (5, 9, 13)])
def test_a_stage_may_begin_at_any_norm(edges: tuple[int, ...]) -> None:
    shape = UNEVEN["gpt2"]
    want = expected(shape, 80, SEQUENCES, LENGTH)
    pieces = spine.Parallel(shape, want.parameters, want.batch, 3, edges, sequence_parallel=True)
    assert pieces.forward() == pytest.approx(want.loss, rel=2e-6)
    pieces.backward()
    reference.assert_gradients_close(pieces.gradients(), want.gradients, 2e-5)


def test_one_slice_has_nothing_to_split() -> None:
    shape = UNEVEN["gpt2"]
    want = expected(shape, 81)
    loss, gradients = spine.run_whole(shape, want.parameters, want.batch)
    same_loss, same = spine.run_whole(shape, want.parameters, want.batch, sequence_parallel=True)
    assert loss == same_loss
    for tensor, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, same[tensor], err_msg=tensor)


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_which_gradients_are_summed_over_slices(name: str, tp: int, sequence_parallel: bool) -> None:
    groups = Groups()
    stage = stage_of(name, 0, tp, sequence_parallel=sequence_parallel)
    for spec in stage.layout.tensors:
        group = summing_group(stage, spec, groups)
        replicated = (
            "norm" in spec.name
            or spec.name == "embed.positions"
            or spec.name.endswith(("attention.out.bias", "mlp.down.bias"))
        )
        if spec.sum_over_sharing:
            assert group is groups.sharing, spec.name
        else:
            assert group is (groups.tp if replicated and sequence_parallel and tp > 1 else None), spec.name


# --- memory ----------------------------------------------------------------------------------------------


def stage_of(name: str, rank: int, tp: int, **options: object) -> Stage:
    """All ops of a slice, 8 sequences of 12 tokens, which 2 and 4 ranks share evenly."""
    return Stage(
        _native.CpuDevice(),
        spine.model_config(UNEVEN[name]),
        spine.policy(),
        batch=8,
        length=12,
        tp_rank=rank,
        tp_size=tp,
        slots=3,
        **options,
    )


def sizes(stage: Stage) -> dict[str, int]:
    """Bytes of all copies, by name."""
    return {row["name"]: row["bytes"] * row["copies"] for row in stage.native.arena_table}


def is_stream(name: str) -> bool:
    """Whether a piece of the arena is of the residual stream or of a norm."""
    return ("norm" in name and name != "dnorm") or name.endswith(("output", ".dresidual"))


@pytest.mark.parametrize(("recompute", "defer"), [("none", 0), ("selective", 0), ("full", 0), ("none", 1)])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_norms_and_residuals_are_divided(name: str, tp: int, recompute: str, defer: int) -> None:
    """By name and byte: pieces of stream and norms are a tp-th, norm outputs are kept by nobody, the rest is same."""
    rows, hidden = 96, UNEVEN[name].hidden
    options = {"recompute": recompute, "defer_weight": bool(defer)}
    for rank in range(tp):
        before = sizes(stage_of(name, rank, tp, **options))
        after = sizes(stage_of(name, rank, tp, sequence_parallel=True, **options))
        outputs = {piece for piece in before if piece.endswith(".y")}
        assert outputs == set(before) - set(after)
        assert set(after) - set(before) == {"gathered"}
        assert after["gathered"] == rows * hidden * 4, "one for all layers and slots"
        divided = [piece for piece in after if is_stream(piece)]
        assert len([piece for piece in divided if piece.endswith(".x")]) >= 4
        for piece in after.keys() - {"gathered"}:
            assert after[piece] * (tp if is_stream(piece) else 1) == before[piece], piece


@pytest.mark.parametrize("tp", [2, 4])
def test_the_memory_that_is_taken_follows(tp: int) -> None:
    """What the device counts: two norms of three layers and the last, with input and statistics, for three slots.

    The last norm's output is kept for the head in each slot; what is gathered takes its place, and that of the one
    output that all other norms share, which is as large.
    """
    rows, hidden, norms, slots = 96, UNEVEN["gpt2"].hidden, 2 * 3 + 1, 3
    kept = {}
    for sequence_parallel in (False, True):
        stage = stage_of("gpt2", 1, tp, sequence_parallel=sequence_parallel)
        kept[sequence_parallel] = stage.device.bytes_in_use("activations")
        assert kept[sequence_parallel] == pytest.approx(stage.native.arena_bytes, abs=4096)
    stream, statistics = rows * hidden * 4, rows * 2 * 4
    saved = slots * (norms * (stream + statistics) * (tp - 1) // tp + stream)
    assert kept[False] - kept[True] == pytest.approx(saved, abs=64 * 4 * norms * slots)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_what_crosses_stages_is_a_part(tp: int) -> None:
    shape = UNEVEN["llama"]
    rows, edges = [], []
    for rank in range(tp):
        first, last = (
            Stage(
                _native.CpuDevice(),
                spine.model_config(shape),
                spine.policy(),
                batch=SEQUENCES,
                length=LENGTH,
                first_op=ops[0],
                last_op=ops[1],
                tp_rank=rank,
                tp_size=tp,
                sequence_parallel=True,
            )
            for ops in ((0, 5), (5, 4 * shape.layers + 4))
        )
        crossing = (first.native.output(0), last.native.input(0), first.native.dresidual, last.native.dresidual)
        assert len({array.shape for array in crossing}) == 1
        rows.append(crossing[0].shape[0])
        edges.append(first.native.stream_rows)
    assert sum(rows) == SEQUENCES * LENGTH
    assert max(rows) - min(rows) == 1, "35 rows do not divide"
    assert [edge[0] for edge in edges] == [0, *(edge[1] for edge in edges[:-1])]


# --- what is refused -------------------------------------------------------------------------------------


def test_fewer_tokens_than_ranks_are_refused() -> None:
    with pytest.raises(_native.Error, match="sequence parallelism of 3 ranks needs as many tokens in a micro-batch"):
        Stage(
            _native.CpuDevice(),
            spine.model_config(GPT2),
            spine.policy(),
            batch=1,
            length=2,
            tp_rank=0,
            tp_size=3,
            sequence_parallel=True,
        )


def test_backward_needs_what_was_gathered() -> None:
    """A forgotten gather is refused where the native side can see it."""
    shape = dataclasses.replace(GPT2, layers=1)
    want = expected(shape, 90, SEQUENCES, LENGTH)
    pieces = spine.Parallel(shape, want.parameters, want.batch, 2, (), sequence_parallel=True)
    pieces.forward()
    stage = pieces.stages[0][0].native
    head, mlp = 4 + 2, 4
    assert not stage.rebuild_gathered(0, head), "what the head's forward read is still there"
    assert stage.rebuild_gathered(0, mlp)
    with pytest.raises(_native.Error, match="head needs the output of final norm, which was not gathered"):
        stage.backward_input(0, head, head + 1)
    with pytest.raises(_native.Error, match="reads no norm output that has to be gathered"):
        stage.rebuild_gathered(0, mlp - 1)
    whole = spine.Parallel(shape, want.parameters, want.batch, 2, ())
    with pytest.raises(_native.Error, match="reads no norm output that has to be gathered"):
        whole.stages[0][0].native.rebuild_gathered(0, mlp)
    with pytest.raises(_native.Error, match="whole without sequence parallelism"):
        whole.stages[0][0].native.dresidual_rows(0, mlp)
    assert native_shape(spine.model_config(shape)).op_name(mlp).endswith("mlp")
