"""Bytes on the wire of a whole training step: in every group exactly what the textbook asks for, and no more.

With n members and an array of N bytes, all members of a group together send at least

    all-reduce       2 (n - 1) N    each member 2 (n - 1)/n N
    reduce-scatter     (n - 1) N    each member   (n - 1)/n N
    all-gather         (n - 1) N    each member   (n - 1)/n N
    broadcast          (n - 1) N
    message                    N

(Patarasuk and Yuan 2009 for the first three). Sums of up to 4 KiB go to everybody at once, n (n - 1) N bytes: there
latency counts. The formulas below take sizes of tensors from what each rank holds, and sizes of activations from the
batch alone.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from pytrain.config import parameter_count
from tests.parallel.launch import check_ranks
from tests.parallel.wire_worker import GLOBAL_BATCH, LENGTH, MICRO_BATCH, MODEL, run_config

SMALL = 4096
DOUBLE, INT, FLOAT = 8, 4, 4
ROWS = MICRO_BATCH * LENGTH
STATISTICS = 3  # of a row in each vocabulary slice: maximum, sum of exponentials, logit of the target
CASES: list[dict[str, Any]] = [
    {"dp": 2},
    {"dp": 4},
    {"dp": 4, "zero": 1},
    {"dp": 4, "zero": 1, "dtype": "bf16"},
    {"dp": 2, "dtype": "bf16"},
    {"dp": 2, "zero": 2},
    {"dp": 4, "zero": 3},
    {"dp": 2, "zero": 3, "dtype": "bf16"},
    {"tp": 2},
    {"tp": 2, "sequence_parallel": True},
    {"tp": 4, "sequence_parallel": True, "dtype": "bf16"},
    {"tp": 4, "model": {"kv_heads": 2, "family": "llama", "ffn": 100}},
    {"tp": 2, "recompute": "full"},
    {"tp": 2, "dtype": "bf16"},
    {"pp": 2},
    {"pp": 4, "schedule": "zero-bubble"},
    {"pp": 2, "schedule": "interleaved", "chunks": 2, "model": {"tied_head": True}},
    {"pp": 2, "dtype": "bf16"},
    {"dp": 2, "tp": 2, "zero": 1},
    {"dp": 4, "bucket_mb": 0.05},
    {"dp": 4, "zero": 1, "bucket_mb": 0.05},
    {"dp": 2, "tp": 2, "zero": 2, "sequence_parallel": True, "bucket_mb": 0.03},
    {"dp": 2, "zero": 3, "dtype": "bf16", "bucket_mb": 0.02},
    {"dp": 2, "pp": 2, "bucket_mb": 0.05, "model": {"tied_head": True}},
    {"dp": 2, "pp": 2, "model": {"tied_head": True}},
    {"pp": 2, "tp": 2, "schedule": "zero-bubble", "model": {"tied_head": True}},
]


def once(_bucket: int, _buckets: int, _micro_batches: int) -> int:
    return 1


def each(_bucket: int, _buckets: int, micro_batches: int) -> int:
    return micro_batches


def around_its_use(bucket: int, buckets: int, micro_batches: int) -> int:
    """Forward and backward, but for the two that are still there where the pass turns round."""
    kept = micro_batches * (bucket >= buckets - 2) + (micro_batches - 1) * (bucket < 2)
    return 2 * micro_batches - kept


# By ZeRO stage, what travels of each bucket: kind of operation, and how often in a step. Sums are of gradients, what
# is gathered is weights.
DATA_PARALLEL = {
    0: [("all_reduce", once)],
    1: [("reduce_scatter", once), ("all_gather", once)],
    2: [("reduce_scatter", each), ("all_gather", once)],
    3: [("reduce_scatter", each), ("all_gather", around_its_use)],
}
# By sequence parallelism, how often the stream of a micro-batch travels: for each layer, the embedding, and the head.
# (Megatron-LM, arXiv 1909.08053; with sequence parallelism arXiv 2205.05198, which gathers each norm again in
# backward, except the head's, which backward begins with.)
TENSOR_PARALLEL = {
    False: {"all_reduce": (4, 1, 1)},
    True: {"reduce_scatter": (4, 1, 1), "all_gather": (6, 1, 1)},
}


def all_reduce(n: int, size: int) -> int:
    return n * (n - 1) * size if size <= SMALL else 2 * (n - 1) * size


def scattered(n: int, size: int) -> int:
    return (n - 1) * size


TOTAL = {"all_reduce": all_reduce, "reduce_scatter": scattered, "all_gather": scattered, "broadcast": scattered}
Sent = Iterator[tuple[str, int]]
"""(kind, bytes of all members together)."""


class Case:
    """A case, the sizes that follow from it, and what a group's members must have sent."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.zero, self.recompute = case.get("zero", 0), case.get("recompute", "none")
        self.sequence_parallel = case.get("sequence_parallel", False)
        self.dp, self.pp, self.tp = (case.get(axis, 1) for axis in ("dp", "pp", "tp"))
        self.stages = self.pp * case.get("chunks", 1)
        self.micro_batches = GLOBAL_BATCH // MICRO_BATCH // self.dp
        self.item = 2 if case.get("dtype") == "bf16" else 4
        self.stream = ROWS * MODEL["hidden"] * self.item
        """Bytes of the residual stream of a micro-batch."""

    def expected(self, name: str, members: list[dict[str, Any]]) -> dict[str, int]:
        """By kind of operation, what all members of a group send in a step."""
        total: Counter[str] = Counter()
        for kind, size in getattr(self, f"_{name}")(len(members), members):
            total[kind] += size
        return {kind: size for kind, size in total.items() if size}

    def _dp(self, n: int, members: list[dict[str, Any]]) -> Sent:
        """Every bucket, and the number of targets."""
        for kind, times in DATA_PARALLEL[self.zero]:
            for stage in members[0]["buckets"]:
                for bucket, elements in enumerate(stage):
                    yield kind, times(bucket, len(stage), self.micro_batches) * TOTAL[kind](n, elements * self.item)
        yield "all_reduce", all_reduce(n, DOUBLE)

    def _tp(self, n: int, members: list[dict[str, Any]]) -> Sent:
        """The stream at every cut, and the statistics of the head; then gradients of which each saw some rows."""
        for stage, layers in zip(members[0]["stages"], members[0]["layers"], strict=True):
            first, last = stage == 0, stage == self.stages - 1
            for kind, (layer, embedding, head) in TENSOR_PARALLEL[self.sequence_parallel].items():
                times = layers * (layer + (self.recompute == "full")) + first * embedding + last * head
                yield kind, self.micro_batches * times * TOTAL[kind](n, self.stream)
            if last:
                yield "all_gather", self.micro_batches * scattered(n, n * ROWS * STATISTICS * FLOAT)
        times = self.micro_batches if self.zero >= 2 else 1  # before what is summed becomes shards
        for elements in members[0]["by rows"] if self.sequence_parallel else []:
            yield "all_reduce", times * all_reduce(n, elements * self.item)

    def _pp(self, n: int, _members: list[dict[str, Any]]) -> Sent:
        """An activation and its gradient across every boundary; positions and document starts for the middle."""
        yield "send", 2 * (self.stages - 1) * self.micro_batches * self.stream
        if n > 2:
            yield "broadcast", scattered(n, self.micro_batches * 2 * ROWS * INT)

    def _sharing(self, n: int, members: list[dict[str, Any]]) -> Sent:
        """Gradients of the KV heads that several slices hold."""
        for elements in members[0]["shared"]:
            yield "all_reduce", all_reduce(n, elements * self.item)

    def _tied(self, n: int, members: list[dict[str, Any]]) -> Sent:
        """The gradient of the embedding that is also the head."""
        (elements,) = members[0]["embedding"]
        yield "all_reduce", all_reduce(n, elements * self.item)

    def _world(self, n: int, members: list[dict[str, Any]]) -> Sent:
        """Loss and count, and the gradient norm; then every history to rank 0, and its verdict to all."""
        yield "all_reduce", all_reduce(n, 2 * DOUBLE) + all_reduce(n, DOUBLE)
        length = DOUBLE
        yield "check", sum(length + member["history"] for member in members[1:])
        yield "check", (n - 1) * (length + len(pickle.dumps([])))


def by_group(ranks: list[dict[str, Any]]) -> dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]]:
    """The members of each group, in order, each with what it sent there under "bytes"."""
    groups: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = defaultdict(list)
    for rank in ranks:
        for name, (members, sent) in rank["sent"].items():
            groups[name, tuple(members)].append(rank | {"bytes": sent})
    return groups


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("wire")
    (folder / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    check_ranks(4, "tests.parallel.wire_worker", str(folder / "cases.json"), str(folder / "results.json"))
    found: list[list[dict[str, Any]]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: json.dumps(CASES[number]))
def test_a_step_sends_what_the_textbook_asks_for(results: list[list[dict[str, Any]]], number: int) -> None:
    case, ranks = Case(CASES[number]), results[number]
    groups = by_group(ranks)
    axes = {"dp": case.dp, "pp": case.pp, "tp": case.tp}
    assert {name for name in axes if axes[name] > 1} <= {name for name, _ in groups}
    for (name, numbers), members in groups.items():
        assert len(members) == len(numbers)
        sent: Counter[str] = Counter()
        for member in members:
            sent.update(member["bytes"])
        print(name, numbers, dict(sent))
        assert {kind: size for kind, size in sent.items() if size} == case.expected(name, members), (name, numbers)
        if name in ("dp", "tp"):  # and nobody sends more than its share, but for pieces that are not quite equal
            share = sum(sent.values()) / len(members)
            assert max(sum(member["bytes"].values()) for member in members) <= 1.01 * share


@pytest.mark.parametrize("number", [n for n, case in enumerate(CASES) if case.get("dp", 1) > 1])
def test_buckets_are_summed_with_the_last_micro_batch(results: list[list[dict[str, Any]]], number: int) -> None:
    """While its backward pass goes on, and no sooner: until then each replica adds up its own micro-batches.

    Where gradients live as shards a bucket is summed with every micro-batch. A tied one waits for its other half.
    """
    case = Case(CASES[number])
    last = case.micro_batches - 1
    for rank in results[number]:
        sums = [(size, when) for kind, size, when in rank["replicas"] if kind != "all_gather" and size > DOUBLE]
        buckets = [[elements * case.item for elements in parts] for stage in rank["parts"] for parts in stage]
        tied = buckets[0 if 0 in rank["stages"] else -1] if case.pp > 1 else []
        moments = range(case.micro_batches) if case.zero >= 2 else [last]
        expected = [(size, when) for parts in buckets for size in parts for when in moments]
        for size in tied:
            expected[expected.index((size, last))] = (size, -1)
        if limit := CASES[number].get("bucket_mb"):
            assert max(max(parts) for parts in buckets) <= 1e6 * limit < max(sum(parts) for parts in buckets)
        assert sorted((size, -1 if when is None else when) for size, when in sums) == sorted(expected)


def test_what_ranks_hold_is_the_model_once(results: list[list[dict[str, Any]]]) -> None:
    """The sizes that the formulas start from: the buckets of one rank are all parameters."""
    for case, ranks in zip(CASES, results, strict=True):
        parameters = parameter_count(run_config(case).model)
        if set(case) == {"dp"}:
            assert sum(ranks[0]["buckets"][0]) == parameters
        elif set(case) >= {"dp", "zero"} and "tp" not in case:
            assert parameters <= sum(ranks[0]["buckets"][0]) < parameters + 6 * case["dp"], "shards are padded"


def test_sixteen_bits_halve_what_grows_with_model_and_batch(results: list[list[dict[str, Any]]]) -> None:
    """All but the number of targets, in full precision, and the statistics of the head."""
    for case in ({"dp": 2}, {"tp": 2}, {"pp": 2}):
        name = next(iter(case))
        full, half = (
            sum(sum(rank["sent"][name][1].values()) for rank in results[CASES.index(one)])
            for one in (case, {**case, "dtype": "bf16"})
        )
        micro_batches = GLOBAL_BATCH // MICRO_BATCH
        unchanged = {
            "dp": all_reduce(2, DOUBLE),
            "tp": micro_batches * scattered(2, 2 * ROWS * STATISTICS * FLOAT),
            "pp": 0,
        }[name]
        assert full - unchanged == 2 * (half - unchanged)
