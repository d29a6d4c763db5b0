"""Operations on Python objects, which travel pickled: for setting up, saving and checking, not for steps."""

import pickle
from typing import Any

import numpy as np

from pytrain.collectives.algorithms import tree_broadcast
from pytrain.collectives.wire import Steps, Wire


def broadcast_object(wire: Wire, value: Any) -> Steps:
    """Returns the value that member 0 gave."""
    data = np.frombuffer(pickle.dumps(value), np.uint8) if wire.index == 0 else np.empty(0, np.uint8)
    length = np.array([data.size], np.int64)
    yield from tree_broadcast(wire, length, 0)
    if wire.index:
        data = np.empty(length[0], np.uint8)
    yield from tree_broadcast(wire, data, 0)
    return value if wire.index == 0 else pickle.loads(data.tobytes())


def gather_objects(wire: Wire, value: Any) -> Steps:
    """Returns on member 0 the values of all, in order; an empty list on the others."""
    if wire.index:
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        yield wire.send(np.array([data.size], np.int64), 0) + wire.send(data, 0)
        return []
    lengths = {source: np.empty(1, np.int64) for source in wire.others()}
    yield [request for source, length in lengths.items() for request in wire.receive(length, source)]
    pickles = {source: np.empty(length[0], np.uint8) for source, length in lengths.items()}
    yield [request for source, data in pickles.items() for request in wire.receive(data, source)]
    return [value, *(pickle.loads(data.tobytes()) for data in pickles.values())]


def barrier(wire: Wire) -> Steps:
    """Returns when all have come: in round r each tells the member 2^r further (dissemination)."""
    token, heard = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    distance = 1
    while distance < wire.size:
        following, preceding = (wire.index + distance) % wire.size, (wire.index - distance) % wire.size
        yield wire.send(token, following) + wire.receive(heard, preceding)
        distance *= 2
