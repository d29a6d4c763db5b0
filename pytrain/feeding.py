"""Who opens the data, which samples a replica takes, and how other stages learn where documents begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pytrain.collectives import SharedError
from pytrain.data.loader import Batch

if TYPE_CHECKING:
    from pytrain.parallel import Groups

Source = Callable[[int, int], Batch]
"""(first sample or window, count) -> batch."""


T = TypeVar("T")


def open_data(groups: Groups, call: Callable[[], T]) -> T | None:
    """What `call` opens on the ranks that need tokens; None on the others. All ranks call this together.

    Raises:
        SharedError: on all ranks, what the readers refused together.
    """
    opened, refusal = None, None
    if groups.grid.needs_tokens:
        try:
            opened = call()
        except SharedError as error:
            refusal = error

    def refuse() -> None:
        if refusal is not None:
            raise refusal

    groups.world.on_root(refuse)  # its rank 0 is a reader
    return opened


def replica_batches(
    source: Source | None, groups: Groups, first: int, count: int, sequences: int, length: int
) -> list[Batch]:
    """The micro-batches of this rank's replica: `count` of `sequences` each, from sample `first` of all on.

    Micro-batch m of replica r starts at sample first + (m * dp + r) * sequences, so that a global batch holds
    the same samples on every grid.

    Args:
        source: None on a stage in the middle of the pipeline, which gets positions and document starts from
            the first stage; tokens are none of its business.
        groups: of this rank.
        first, count, sequences, length: see above; `length` is tokens per sequence.
    """
    batches: list[Batch] = []
    places = np.zeros((count, 2, sequences * length), np.int32)
    if source is not None:
        grid = groups.grid
        starts = [first + (micro * grid.dp + grid.dp_rank) * sequences for micro in range(count)]
        batches = [source(start, sequences) for start in starts]
    if groups.pp.size > 2:
        for place, batch in zip(places, batches, strict=False):
            place[0], place[1] = batch.positions, batch.document_starts
        groups.pp.broadcast_array(places)
    return batches or [_unseen(positions, starts) for positions, starts in places]


def _unseen(positions: np.ndarray, document_starts: np.ndarray) -> Batch:
    """A batch for a stage that sees neither tokens nor targets."""
    rows = len(positions)
    nothing = np.empty(0, np.int64)
    return Batch(
        tokens=np.zeros(rows, np.int32),
        targets=np.full(rows, -1, np.int32),
        positions=positions,
        document_starts=document_starts,
        sample_ids=nothing,
        corpus_ids=nothing.astype(np.int32),
    )
