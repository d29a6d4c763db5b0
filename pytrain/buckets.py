"""Buckets of data parallelism: the parts in which a layer's gradients are summed and its weights gathered.

The layout's buckets are whole layers, each a flat range of memory. What travels at once is a part of one, of at most
`parallel.bucket_mb`: sums begin before the layer's backward is done, and what they pass through is no larger than a
part. Backward makes gradients from the last op to the first, so the last part of a layer comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from pytrain.checkpoint.pieces import ITEM_BYTES

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.config import RunConfig


class Part(NamedTuple):
    """What travels at once: elements [begin, end) of a bucket, as many equal shards as ZeRO makes of it."""

    bucket: int
    begin: int
    end: int
    """Counts the padding of the last part."""
    op: int
    """Backward goes from the last op to the first; when it has done this one, the part's gradients are there."""

    @property
    def in_bucket(self) -> slice:
        """Its elements in an array laid out like the bucket."""
        return slice(self.begin, self.end)

    @property
    def first(self) -> bool:
        """Whether it begins the bucket: backward makes it last."""
        return self.begin == 0


def parts_of(layout: _native.Layout, shards: int, limit: int) -> tuple[Part, ...]:
    """The parts of all buckets, in the order of memory.

    Args:
        layout: of a stage.
        shards: that each part is cut in.
        limit: elements of a part, at most (but for a few that every shard has at least); 0 leaves buckets whole.
    """
    parts = []
    for bucket in range(len(layout.buckets)):
        tensors = [spec for spec in layout.tensors if spec.bucket == bucket]
        for begin, end in pairwise(layout.parts(bucket, shards, limit)):
            inside = (spec.op for spec in tensors if spec.offset < end and begin < spec.offset + spec.elements)
            parts.append(Part(bucket, begin, end, min(inside)))
    return tuple(parts)


def largest_part(layout: _native.Layout, shards: int, limit: int) -> int:
    """Elements of the largest part of a stage, padding included."""
    return max(part.end - part.begin for part in parts_of(layout, shards, limit))


def part_elements(config: RunConfig) -> int:
    """Elements that a part has at most in this run."""
    return max(1, int(config.parallel.bucket_mb * 1e6 / ITEM_BYTES[config.precision.gradient_reduction]))


def chunks(elements: int, limit: int) -> Iterator[slice]:
    """An array of so many elements in runs of at most `limit`; 0 leaves it whole."""
    step = limit or max(1, elements)
    return (slice(first, min(first + step, elements)) for first in range(0, elements, step))
