"""One start of MPI, many checks: every operation of groups of all sizes that the ranks allow.

mpiexec -n 4 python -m tests.parallel.programs.collectives SEED
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from pytrain.collectives import CollectiveMismatchError, Group, Limits, Settings, SharedError
from pytrain.collectives.mpi_group import MpiGroup, world_group
from pytrain.collectives.table import ALGORITHMS
from pytrain.errors import UserError
from pytrain.grid import Grid, rank_map

SIZES = (0, 1, 5, 1001)
SMALL = Limits(message_bytes=400, block_bytes=600)


class PointToPoint(MPI.Intracomm):
    """A communicator that fails on every reduction and gather, and on MPI's other collectives."""


def _forbid(name: str) -> None:
    def forbidden(self: PointToPoint, *arguments: Any, **options: Any) -> None:
        raise AssertionError(f"collectives = own called MPI's {name}")

    setattr(PointToPoint, name, forbidden)


COLLECTIVES = ("reduce", "gather", "scatter", "bcast", "alltoall", "scan", "barrier")
for method in dir(MPI.Intracomm):
    if any(part in method.lower() for part in COLLECTIVES):
        _forbid(method)


def given(group: Group, size: int, dtype: Any, seed: int) -> list[Any]:
    """The arrays of all members, the same on every rank: each takes its own."""
    random = np.random.default_rng((seed, size, group.size))
    scale = 10.0 ** random.integers(-3, 4, size)
    return [(random.standard_normal(size) * scale).astype(dtype) for _ in range(group.size)]


def assert_same_everywhere(group: Group, array: Any) -> None:
    copies = group.gather(array.tobytes())
    assert all(copy == array.tobytes() for copy in copies)


def assert_close(found: Any, arrays: Sequence[Any], tolerance: float) -> None:
    exact = np.sum([array.astype(np.float64) for array in arrays], axis=0)
    scale = np.sum([np.abs(array.astype(np.float64)) for array in arrays], axis=0)
    assert np.all(np.abs(found - exact) <= tolerance * scale)


def check_all_reduce(group: Group, seed: int, allowed: Sequence[str]) -> None:
    for algorithm in (None, *allowed):
        for size in SIZES:
            for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-14)):
                arrays = given(group, size, dtype, seed)
                mine = arrays[group.rank].copy()
                group.all_reduce(mine, algorithm=algorithm)
                assert_close(mine, arrays, tolerance)
                if algorithm != "mpi":
                    assert_same_everywhere(group, mine)
        arrays = given(group, 7, np.float32, seed)
        mine = arrays[group.rank].copy()
        group.all_reduce(mine, operation="max", algorithm=algorithm)
        np.testing.assert_array_equal(mine, np.max(arrays, axis=0))


def check_halves(group: Group, seed: int) -> None:
    for half, dtype in (("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)):
        arrays = given(group, 1001, dtype, seed)
        total = arrays[0].astype(np.float32)
        for array in arrays[1:]:
            total = total + array.astype(np.float32)
        wanted = total.astype(dtype).view(np.uint16)
        for algorithm in (None, "exchange", "direct"):
            mine = arrays[group.rank].view(np.uint16).copy()
            group.all_reduce(mine, half, algorithm=algorithm)
            np.testing.assert_array_equal(mine, wanted)
        mine = arrays[group.rank].view(np.uint16).copy()
        group.reduce_scatter(mine, half=half)
        group.all_gather(mine)
        np.testing.assert_array_equal(mine, wanted)
        with pytest.raises(ValueError, match="not allowed"):
            group.all_reduce(mine, half, algorithm="ring")


def check_pieces(group: Group, seed: int, kinds: dict[str, Sequence[str]]) -> None:
    random = np.random.default_rng(seed)
    for size in SIZES:
        bounds = [0, *sorted(int(cut) for cut in random.integers(0, size + 1, group.size - 1)), size]
        piece = slice(bounds[group.rank], bounds[group.rank + 1])
        arrays = given(group, size, np.float32, seed)
        for algorithm in (None, *kinds["reduce_scatter"]):
            mine = arrays[group.rank].copy()
            group.reduce_scatter(mine, bounds, algorithm=algorithm)
            assert_close(mine[piece], [array[piece] for array in arrays], 1e-6)
        for algorithm in (None, *kinds["all_gather"]):
            whole = np.arange(size, dtype=np.int64)
            mine = np.full_like(whole, -1)
            mine[piece] = whole[piece]
            group.all_gather(mine, bounds, algorithm=algorithm)
            np.testing.assert_array_equal(mine, whole)
        for algorithm in (None, *kinds["broadcast"]):
            for root in range(group.size):
                mine = np.full((size, 2), group.rank)
                group.broadcast_array(mine, root, algorithm)
                assert np.all(mine == root)


def check_messages(group: Group) -> None:
    following, preceding = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for size in SIZES:
        outgoing, incoming = np.full(size, group.rank, np.float32), np.empty(size, np.float32)
        sending = group.start_send(outgoing, following)
        group.receive(incoming, preceding)
        sending.wait()
        assert np.all(incoming == preceding)
    # by tag, in another order than sent
    sends = [group.start_send(np.array([tag], np.int32), following, tag) for tag in range(3)]
    for tag in (2, 0, 1):
        found = np.empty(1, np.int32)
        group.receive(found, preceding, tag)
        assert found[0] == tag
    for send in sends:
        send.wait()


def check_overlap(group: Group, seed: int) -> None:
    """Many operations under way, waited for in another order on each rank, polled in between."""
    sizes = (3, 1001, 64, 0, 500)
    sets = [given(group, size, np.float64, seed) for size in sizes]
    mine = [arrays[group.rank].copy() for arrays in sets]
    handles = [group.start_all_reduce(array) for array in mine]
    group.poll()
    order = np.random.default_rng((seed, group.rank)).permutation(len(handles))
    for index in order:
        handles[index].wait()
        assert handles[index].test()
    for arrays, array in zip(sets, mine, strict=True):
        assert_close(array, arrays, 1e-14)
        assert_same_everywhere(group, array)


def check_objects(group: Group) -> None:
    assert group.broadcast({"from": group.rank, "much": "x" * 5000})["from"] == 0
    assert group.gather(("rank", group.rank)) == (
        [("rank", rank) for rank in range(group.size)] if group.rank == 0 else []
    )
    group.barrier()
    calls: list[int] = []
    assert group.on_root(lambda: calls.append(1) or "read") == "read"  # type: ignore[func-returns-value]
    assert len(calls) == (group.rank == 0)

    def refuse() -> None:
        raise UserError("run.toml is not there")

    with pytest.raises(SharedError, match=r"run\.toml is not there"):
        group.on_root(refuse)


def check_counters(group: Group) -> None:
    """Bytes on the wire are the least that any algorithm can send."""
    size, n = 840, group.size
    for algorithm, dtype, half in (("ring", np.float32, None), ("direct", np.uint16, "bf16")):
        array = np.zeros(size, dtype)
        group.counters.reset()
        group.all_reduce(array, half, algorithm=algorithm)
        assert group.counters.bytes_sent == {"all_reduce": 2 * array.nbytes * (n - 1) // n}
        assert group.counters.payload_bytes == {"all_reduce": array.nbytes}
        group.counters.reset()
        group.reduce_scatter(array, half=half)
        group.all_gather(array)
        least = array.nbytes * (n - 1) // n
        assert group.counters.bytes_sent == {"reduce_scatter": least, "all_gather": least}
    group.counters.reset()
    group.all_reduce(np.zeros(10**5))
    assert group.counters.waited_seconds > 0
    assert group.counters.hidden_seconds <= group.counters.open_seconds


def check_sequences(group: Group) -> None:
    """A member that did something else is named on all of them."""
    group.check_sequence()
    mpi = group
    assert isinstance(mpi, MpiGroup)
    last = group.size - 1
    if group.rank == last:
        mpi._history.collective.add("all_reduce of another size")
    with pytest.raises(CollectiveMismatchError, match=rf"rank {group.ranks[last]} .*another size"):
        group.check_sequence()
    if group.rank != last:
        mpi._history.collective.add("all_reduce of another size")
    group.check_sequence()


def check_each(world: MpiGroup, seed: int) -> None:
    """Under check = each differing operations are refused on all members before anything is lost."""
    group = world_group(Settings(check="each"), world.communicator)
    check_all_reduce(group, seed, ["ring"])
    check_messages(group)
    array = np.zeros(8 if group.rank else 9)
    with pytest.raises(CollectiveMismatchError, match=r"rank 0: .*float64 x 9.*rank 1: .*float64 x 8"):
        group.all_reduce(array)
    if group.rank == 0:
        group.start_send(np.zeros(3, np.float32), 1).test()
    elif group.rank == 1:
        with pytest.raises(CollectiveMismatchError, match=r"waits for .*float32 x 2, but rank 0 sends .*x 3"):
            group.receive(np.zeros(2, np.float32), 0)
        rest = np.empty(3, np.float32)  # the payload that was refused: nothing may be left over
        group.transport.wait_all([group.transport.receive(rest, 0, 0)])


def check_grids(world: Group, seed: int) -> None:
    """One start of MPI runs many grids in turn, each with its groups."""
    n = world.size
    shapes = [(dp, pp, tp) for dp in range(1, n + 1) for pp in range(1, n + 1) for tp in range(1, n + 1)]
    for dp, pp, tp in shapes:
        if dp * pp * tp != n:
            continue
        placed = world.subgroup("placed", rank_map(dp, pp, tp, "pp-tp-dp"))
        grid = Grid(dp, pp, tp, placed.rank)
        for name in ("tp", "pp", "dp", "embedding"):
            ranks: list[int] = getattr(grid, f"{name}_group")()
            group = placed.subgroup(name, ranks)
            array = np.array([float(placed.rank), 1.0])
            group.all_reduce(array)
            assert array.tolist() == [float(sum(ranks)), float(len(ranks))]
            if name == "tp":
                assert group.size == 1 or group.ranks == tuple(placed.ranks[rank] for rank in ranks)
            group.close()
        placed.close()


def two_nodes(world: MpiGroup, seed: int) -> None:
    """Ranks told to be on two nodes: the two-level algorithm, also in 16 bits."""
    nodes = [0] * (world.size - world.size // 2) + [1] * (world.size // 2)
    group = world_group(Settings(), world.communicator, nodes)
    for algorithm in (None, "two_level"):
        arrays = given(group, 100_003, np.float32, seed)
        mine = arrays[group.rank].copy()
        group.all_reduce(mine, algorithm=algorithm)
        assert_close(mine, arrays, 1e-6)
        assert_same_everywhere(group, mine)
    halves = np.full(77, 0x3F80, np.uint16)  # ones
    group.all_reduce(halves, "bf16", algorithm="two_level")
    assert np.all(halves.view(ml_dtypes.bfloat16).astype(np.float32) == group.size)
    group.close()


def check_no_overlap(group: MpiGroup) -> None:
    """What was started is done; but a message must stay under way, or two ranks that both send would hang."""
    array = np.full(100_000, float(group.rank))
    starts = {
        "all_reduce": lambda: group.start_all_reduce(array),
        "reduce_scatter": lambda: group.start_reduce_scatter(array),
        "all_gather": lambda: group.start_all_gather(array),
        "broadcast": lambda: group.start_broadcast_array(array),
    }
    for kind, start in starts.items():
        group.counters.reset()
        assert start().test(), kind
        assert group.counters.operations == {kind: 1}
        assert group.counters.waited_seconds == group.counters.open_seconds > 0.0
    following, preceding = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    message = np.full(2**22, group.rank)  # far beyond what MPI would keep for the receiver
    heard = np.empty_like(message)
    sending = group.start_send(message, following)
    group.receive(heard, preceding)
    sending.wait()
    assert np.all(heard == preceding)


def check_settings(communicator: MPI.Intracomm, settings: Settings, seed: int) -> MpiGroup:
    """All operations under some settings."""
    group = world_group(settings, communicator)
    kinds = {
        kind: [name for name in names if settings.eligible.allows(name, kind, 1, False)]
        for kind, names in ALGORITHMS.items()
    }
    assert ("mpi" in kinds["all_reduce"]) is not settings.deterministic
    assert ("mpi" in kinds["all_gather"]) is not settings.own
    check_all_reduce(group, seed, kinds["all_reduce"])
    check_halves(group, seed)
    check_pieces(group, seed, kinds)
    check_messages(group)
    check_overlap(group, seed)
    check_objects(group)
    return group


def main(seed: int) -> None:
    communicator = MPI.COMM_WORLD
    own = check_settings(PointToPoint(communicator), Settings(own=True, limits=SMALL), seed)
    assert isinstance(own.communicator, PointToPoint)
    with pytest.raises(ValueError, match="not allowed"):
        own.all_gather(np.zeros(4), algorithm="mpi")
    check_grids(own, seed)
    free = check_settings(communicator, Settings(deterministic=False, progress="thread", limits=SMALL), seed)
    free.process.progress.close()
    alternating = world_group(Settings(overlap=False), communicator)
    check_no_overlap(alternating)
    plain = world_group(Settings(), communicator)
    check_counters(plain)
    check_sequences(plain)
    check_each(plain, seed)
    two_nodes(plain, seed)
    for group in (own, free, alternating, plain):
        group.close()
    if communicator.Get_rank() == 0:
        print("all agree")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
