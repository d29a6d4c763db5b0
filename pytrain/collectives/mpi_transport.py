"""Messages over MPI, and MPI's own collective operations as steps. Imports mpi4py: only for groups of many."""

import time
from collections.abc import Callable, Sequence

from mpi4py import MPI

from pytrain.collectives.wire import Array, Request, Steps, Wire


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
        while not MPI.Request.Testall(requests):
            time.sleep(0)  # gives the core to the rank that we wait for

    def wait_some(self, requests: list[Request]) -> None:
        if self.spin:
            MPI.Request.Waitsome(requests)
            return
        while MPI.Request.Testsome(requests) == []:  # None: there is nothing left to wait for
            time.sleep(0)

    def test_all(self, requests: list[Request]) -> bool:
        return MPI.Request.Testall(requests)


def _communicator(wire: Wire) -> MPI.Intracomm:
    assert isinstance(wire.transport, MpiTransport)
    return wire.transport.communicator


def _parts(wire: Wire, array: Array) -> list[Array]:
    step = max(1, wire.tools.limits.message_bytes // array.itemsize)
    return [array[first : first + step] for first in range(0, array.size, step)]


def mpi_all_reduce(wire: Wire, array: Array) -> Steps:
    """MPI's own, whose order of addition is its own affair."""
    operation = MPI.SUM if wire.operation == "sum" else MPI.MAX
    communicator = _communicator(wire)
    yield [communicator.Iallreduce(MPI.IN_PLACE, part, operation) for part in _parts(wire, array)]


def mpi_reduce_scatter(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """MPI's own; pieces of any size, one message a member at a time."""
    operation = MPI.SUM if wire.operation == "sum" else MPI.MAX
    communicator = _communicator(wire)
    own = array[bounds[wire.index] : bounds[wire.index + 1]]
    for root in range(wire.size):
        piece = array[bounds[root] : bounds[root + 1]]
        for part, out in zip(_parts(wire, piece), _parts(wire, own), strict=False):
            pass
    counts = [bounds[i + 1] - bounds[i] for i in range(wire.size)]
    out = wire.scratch(array.dtype, own.size)
    yield [communicator.Ireduce_scatter(array, out, counts, operation)]
    own[:] = out


def mpi_all_gather(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """MPI's own: it moves bytes and adds nothing."""
    size = array.itemsize
    counts = [(bounds[i + 1] - bounds[i]) * size for i in range(wire.size)]
    displacements = [first * size for first in bounds[:-1]]
    receive = [array, counts, displacements, MPI.BYTE]
    yield [_communicator(wire).Iallgatherv(MPI.IN_PLACE, receive)]


def mpi_broadcast(wire: Wire, array: Array, root: int) -> Steps:
    """MPI's own."""
    communicator = _communicator(wire)
    yield [communicator.Ibcast([part, MPI.BYTE], root) for part in _parts(wire, array)]


def node_of_each_rank(communicator: MPI.Intracomm) -> Callable[[], int]:
    raise NotImplementedError
