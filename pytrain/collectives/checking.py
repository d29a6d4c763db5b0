"""Comparing operations before they begin: under `check = "each"`."""

import numpy as np

from pytrain.collectives.journal import CollectiveMismatchError
from pytrain.collectives.wire import Array, Steps, Wire

RECORD = 192  # bytes of an operation's description


def _record(text: str) -> Array:
    return np.frombuffer(text.encode()[:RECORD].ljust(RECORD, b"\0"), np.uint8)


def _text(record: Array) -> str:
    return record.tobytes().rstrip(b"\0").decode(errors="replace")


def compare(wire: Wire, group: str, ranks: tuple[int, ...], text: str, steps: Steps) -> Steps:
    """Tell all members what this one is about to do, hear the same of them, and only then do it.

    Args:
        wire: of kind "check", with the operation's tag.
        group: its name.
        ranks: of its members in the world.
        text: the operation.
        steps: what follows.

    Raises:
        CollectiveMismatchError: on all members alike.
    """
    own = _record(text)
    heard = [own if member == wire.index else np.empty_like(own) for member in range(wire.size)]
    requests = []
    for other in wire.others():
        requests += wire.receive(heard[other], other) + wire.send(own, other)
    yield requests
    if any(not np.array_equal(own, record) for record in heard):
        told = "; ".join(f"rank {rank}: {_text(record)}" for rank, record in zip(ranks, heard, strict=True))
        raise CollectiveMismatchError(f"the members of group {group} are at different operations: {told}")
    return (yield from steps)


def send_checked(wire: Wire, array: Array, to: int, text: str, payload: Wire) -> Steps:
    """A message behind its description."""
    yield wire.send(_record(text), to) + payload.send(array, to)


def receive_checked(wire: Wire, array: Array, source: int, text: str, payload: Wire, group: str, rank: int) -> Steps:
    """The other end: receives only what it expects.

    Raises:
        CollectiveMismatchError: the sender, `rank` in the world, describes another message.
    """
    record = np.empty(RECORD, np.uint8)
    yield wire.receive(record, source)
    if _text(record) != text:
        raise CollectiveMismatchError(
            f"group {group}: this rank waits for {text}, but rank {rank} sends {_text(record)}"
        )
    yield payload.receive(array, source)
