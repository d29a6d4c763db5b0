"""Collective operations over messages between two: each is a generator of steps, in place, on flat arrays.

A generator yields the messages that must be complete before it goes on, so the same code serves blocking and
non-blocking operations, and runs in tests without MPI. Sizes are known on all sides: an empty piece sends
nothing. All reductions add every piece in one order, at one member, and then hand the result out: all members
get the same bits. Bytes are those that one member of n sends for an array of N bytes.
"""

from collections.abc import Sequence

from pytrain.collectives.wire import Array, Steps, Wire, even_bounds, pieces_of


def exchange(wire: Wire, array: Array) -> Steps:
    """All-reduce in one round, added in the order of members: (n - 1) N bytes. For what is only latency."""
    parts: list[Array] = []
    requests = []
    for source in wire.others():
        part = wire.scratch(array.dtype, array.size)
        requests += wire.receive(part, source)
        parts.append(part)
    for to in wire.others():
        requests += wire.send(array, to)
    yield requests
    wire.merge_in_order(array, parts[: wire.index], parts[wire.index :])


def direct_reduce_scatter(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """Each member gets its piece from all others and adds in the order of members: N (n - 1)/n bytes."""
    pieces = pieces_of(array, bounds)
    own = pieces[wire.index]
    blocks = wire.blocks(own.size, own.itemsize)
    incoming = {source: wire.scratch(array.dtype, own.size) for source in wire.others()}
    receives = [
        [request for source, part in incoming.items() for request in wire.receive(part[block], source)]
        for block in blocks
    ]
    outgoing = [  # not all to the same member at the same time
        (to, pieces[to][block])
        for to in ((wire.index + distance) % wire.size for distance in range(1, wire.size))
        for block in wire.blocks(pieces[to].size, own.itemsize)
    ]
    wire.fetch([*(part for _, part in outgoing), *(own[block] for block in blocks)])
    sends = []
    for to, part in outgoing:
        yield from wire.ready(part)
        sends += wire.send(part, to)
    for block, requests in zip(blocks, receives, strict=True):
        yield requests
        yield from wire.ready(own[block])
        parts = [part[block] for part in incoming.values()]
        wire.merge_in_order(own[block], parts[: wire.index], parts[wire.index :])
    yield sends


def direct_all_gather(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """Each member sends its piece to all others: N (n - 1)/n bytes, in one round."""
    pieces = pieces_of(array, bounds)
    requests = []
    for source in wire.others():
        requests += wire.receive(pieces[source], source)
    for distance in range(1, wire.size):
        requests += wire.send(pieces[wire.index], (wire.index + distance) % wire.size)
    yield requests


def direct(wire: Wire, array: Array) -> Steps:
    """All-reduce: pieces exchanged directly, then gathered: 2 N (n - 1)/n bytes."""
    bounds = even_bounds(array.size, wire.size)
    yield from direct_reduce_scatter(wire, array, bounds)
    yield from direct_all_gather(wire, array, bounds)


def ring_reduce_scatter(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """Pieces go round and grow: N (n - 1)/n bytes to one neighbour.

    Piece i is added in the order i + 1, ..., n - 1, 0, ..., i. A block is passed on as soon as it
    is added, while the next one is on its way.
    """
    if wire.size == 1:
        return  # the neighbour would be this member itself
    pieces = pieces_of(array, bounds)
    following, preceding = (wire.index + 1) % wire.size, (wire.index - 1) % wire.size
    scratch = wire.scratch(array.dtype, max(piece.size for piece in pieces))
    order = [pieces[(wire.index - step) % wire.size] for step in range(1, wire.size + 1)]
    wire.fetch(piece[block] for piece in order for block in wire.blocks(piece.size, array.itemsize))
    first = pieces[preceding]
    sends = []
    for block in wire.blocks(first.size, array.itemsize):
        yield from wire.ready(first[block])
        sends += wire.send(first[block], following)
    for step in range(2, wire.size + 1):
        piece = pieces[(wire.index - step) % wire.size]
        incoming = scratch[: piece.size]
        blocks = wire.blocks(piece.size, array.itemsize)
        receives = [wire.receive(incoming[block], preceding) for block in blocks]
        for block, requests in zip(blocks, receives, strict=True):
            yield requests
            yield from wire.ready(piece[block])
            wire.merge(piece[block], incoming[block])
            if step < wire.size:
                sends += wire.send(piece[block], following)
    yield sends


def ring_all_gather(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """Whole pieces go round: N (n - 1)/n bytes to one neighbour."""
    pieces = pieces_of(array, bounds)
    following, preceding = (wire.index + 1) % wire.size, (wire.index - 1) % wire.size
    for step in range(wire.size - 1):
        outgoing = wire.send(pieces[(wire.index - step) % wire.size], following)
        yield wire.receive(pieces[(wire.index - step - 1) % wire.size], preceding) + outgoing


def ring(wire: Wire, array: Array) -> Steps:
    """All-reduce: reduce-scatter and all-gather round the ring: 2 N (n - 1)/n bytes to one neighbour."""
    bounds = even_bounds(array.size, wire.size)
    yield from ring_reduce_scatter(wire, array, bounds)
    yield from ring_all_gather(wire, array, bounds)


def halving_doubling(wire: Wire, array: Array) -> Steps:
    """All-reduce in 2 log2 n rounds (Rabenseifner): 2 N (n - 1)/n bytes where n is a power of two.

    Else the members beyond the largest power of two lend their array to a partner first, N bytes, and get the
    result from it last.
    """
    core = 1 << (wire.size.bit_length() - 1)
    if wire.index >= core:
        yield wire.send(array, wire.index - core)
        yield wire.receive(array, wire.index - core)
        return
    guest = wire.index + core if wire.index + core < wire.size else None
    if guest is not None:
        lent = wire.scratch(array.dtype, array.size)
        yield wire.receive(lent, guest)
        wire.merge(array, lent)
    yield from _halve_and_double(wire, array, even_bounds(array.size, core))
    if guest is not None:
        yield wire.send(array, guest)


def _halve_and_double(wire: Wire, array: Array, bounds: Sequence[int]) -> Steps:
    """Among the first len(bounds) - 1 members: halves are exchanged and added, then gathered back."""
    core = len(bounds) - 1
    low, high = 0, core  # pieces that this member still adds
    scratch = wire.scratch(array.dtype, array.size - array.size // 2)
    distance = core // 2
    while distance:
        middle = low + distance
        upper = bool(wire.index & distance)
        kept = (middle, high) if upper else (low, middle)
        given = (low, middle) if upper else (middle, high)
        mine = array[bounds[kept[0]] : bounds[kept[1]]]
        theirs = array[bounds[given[0]] : bounds[given[1]]]
        partner = wire.index ^ distance
        blocks = wire.blocks(mine.size, array.itemsize)
        receives = [wire.receive(scratch[block], partner) for block in blocks]
        sends = [
            request
            for block in wire.blocks(theirs.size, array.itemsize)
            for request in wire.send(theirs[block], partner)
        ]
        for block, requests in zip(blocks, receives, strict=True):
            yield requests
            wire.merge(mine[block], scratch[block])
        yield sends
        low, high = kept
        distance //= 2
    distance = 1
    while distance < core:
        start = wire.index & ~(distance - 1)  # pieces [start, start + distance) are whole here
        other = start ^ distance
        mine = array[bounds[start] : bounds[start + distance]]
        theirs = array[bounds[other] : bounds[other + distance]]
        partner = wire.index ^ distance
        yield wire.receive(theirs, partner) + wire.send(mine, partner)
        distance *= 2


def two_level(wire: Wire, array: Array, nodes: Sequence[int]) -> Steps:
    """All-reduce that sends each byte between nodes once: reduce-scatter within the node, `direct` between
    those who hold the same piece on each node, all-gather within the node. 16-bit: one rounding a level.

    Nodes may hold different numbers of members: those beyond the smallest number hold no piece.

    Args:
        wire: the operation.
        array: flat.
        nodes: node of each member.
    """
    homes: dict[int, list[int]] = {}
    for member, node in enumerate(nodes):
        homes.setdefault(node, []).append(member)
    local = homes[nodes[wire.index]]
    holders = min(map(len, homes.values()))
    home = wire.subset(local)
    bounds = even_bounds(array.size, holders) + [array.size] * (len(local) - holders)
    yield from direct_reduce_scatter(home, array, bounds)
    if home.index < holders:
        peers = wire.subset(sorted(members[home.index] for members in homes.values()))
        yield from direct(peers, array[bounds[home.index] : bounds[home.index + 1]])
    yield from direct_all_gather(home, array, bounds)


def tree_broadcast(wire: Wire, array: Array, root: int) -> Steps:
    """From `root` to all in log2 n rounds: the members that have it double."""
    relative = (wire.index - root) % wire.size
    distance = 1
    while distance <= relative:
        distance *= 2
    if relative:  # the highest bit of the relative index says from whom
        yield wire.receive(array, (wire.index - distance // 2) % wire.size)
    sends = []
    while relative + distance < wire.size:
        sends += wire.send(array, (wire.index + distance) % wire.size)
        distance *= 2
    yield sends
