"""Messages over MPI, and MPI's own collective operations as steps. Imports mpi4py."""

import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from mpi4py import MPI

from pytrain.collectives.wire import Array, Request, Steps, Wire, pieces_of

YIELDING = 1e-3
"""Seconds for which a waiting rank only yields: a small message is there by then."""
PAUSE = 50e-6
"""Seconds between two looks after that: who waits for a rank that computes must not take its core in turns."""


def _until(arrived: Callable[[], bool]) -> None:
    """Return when `arrived`, and give the core to the rank that is waited for.

    `time.sleep(0)` would not do: it takes as long as the timer slack, tens of microseconds, which is ten times
    what a small message takes.
    """
    if arrived():
        return
    patience = time.perf_counter() + YIELDING
    while not arrived():
        if time.perf_counter() < patience:
            os.sched_yield()
        else:
            time.sleep(PAUSE)


class MpiTransport:
    """Point-to-point messages of one communicator.

    Args:
        communicator: whose ranks are meant.
        spin: wait without giving the core away; right only where no more threads wait than there are cores.
    """

    def __init__(self, communicator: MPI.Intracomm, spin: bool) -> None:
        self.communicator = communicator
        self.spin = spin

    def send(self, data: Array, to: int, tag: int) -> Request:
        return self.communicator.Isend([data, MPI.BYTE], to, tag)

    def receive(self, data: Array, source: int, tag: int) -> Request:
        return self.communicator.Irecv([data, MPI.BYTE], source, tag)

    def wait_all(self, requests: list[Request]) -> None:
        if self.spin:
            MPI.Request.Waitall(requests)
            return
        _until(lambda: MPI.Request.Testall(requests))

    def wait_some(self, requests: list[Request]) -> None:
        if self.spin:
            MPI.Request.Waitsome(requests)
            return
        _until(lambda: MPI.Request.Testsome(requests) != [])  # None: there is nothing left to wait for

    def test_all(self, requests: list[Request]) -> bool:
        return MPI.Request.Testall(requests)


def _communicator(wire: Wire) -> MPI.Intracomm:
    assert isinstance(wire.transport, MpiTransport)
    return wire.transport.communicator


def _operation(wire: Wire) -> MPI.Op:
    return MPI.SUM if wire.operation == "sum" else MPI.MAX


def _parts(wire: Wire, array: Array) -> list[Array]:
    limit = wire.tools.limits.message_bytes
    if 0 < array.nbytes <= limit:
        return [array]
    step = max(1, limit // array.itemsize)
    return [array[first : first + step] for first in range(0, array.size, step)]


def mpi_all_reduce(wire: Wire, array: Array) -> Steps:
    """MPI's own, whose order of addition is its own affair. Its blocking call takes half as long for small arrays."""
    communicator, operation = _communicator(wire), _operation(wire)
    if wire.alone:
        for part in _parts(wire, array):
            communicator.Allreduce(MPI.IN_PLACE, part, operation)
        return
    yield [communicator.Iallreduce(MPI.IN_PLACE, part, operation) for part in _parts(wire, array)]


def mpi_reduce_scatter(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """MPI's own; for arrays beyond the largest message, one reduction for each part of each piece."""
    communicator, operation = _communicator(wire), _operation(wire)
    own = array[bounds[wire.index] : bounds[wire.index + 1]]
    if array.nbytes <= wire.tools.limits.message_bytes:
        counts = [last - first for first, last in pairwise(bounds)]
        result = wire.scratch(array.dtype, own.size)
        yield [communicator.Ireduce_scatter(array, result, counts, operation)]
        own[:] = result
        return
    requests = []
    for root, piece in enumerate(pieces_of(array, bounds)):
        for part in _parts(wire, piece):
            if root == wire.index:
                requests.append(communicator.Ireduce(MPI.IN_PLACE, part, operation, root))
            else:
                requests.append(communicator.Ireduce(part, None, operation, root))
    yield requests


def mpi_all_gather(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """MPI's own: it moves bytes and adds nothing. Beyond the largest message, one broadcast for each part."""
    communicator = _communicator(wire)
    if array.nbytes > wire.tools.limits.message_bytes:
        for root, piece in enumerate(pieces_of(array, bounds)):
            yield from mpi_broadcast(wire, piece, root)
        return
    counts = [(last - first) * array.itemsize for first, last in pairwise(bounds)]
    displacements = [first * array.itemsize for first in bounds[:-1]]
    yield [communicator.Iallgatherv(MPI.IN_PLACE, [array, counts, displacements, MPI.BYTE])]


def mpi_broadcast(wire: Wire, array: Array, root: int) -> Steps:
    """MPI's own."""
    communicator = _communicator(wire)
    yield [communicator.Ibcast([part, MPI.BYTE], root) for part in _parts(wire, array)]


def node_of(communicator: MPI.Intracomm) -> int:
    """The lowest rank of those that share this rank's memory: the same number on all ranks of a node."""
    shared = communicator.Split_type(MPI.COMM_TYPE_SHARED)
    local, world = shared.Get_group(), communicator.Get_group()
    lowest = int(MPI.Group.Translate_ranks(local, [0], world)[0])
    local.Free()
    world.Free()
    shared.Free()
    return lowest
