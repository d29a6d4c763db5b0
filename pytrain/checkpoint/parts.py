"""What a save writes at once: parts of pieces, from their own memory or from a copy that training cannot change."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytrain.checkpoint.files import FileOperations, memory_of, naming
from pytrain.checkpoint.header import FileLayout
from pytrain.checkpoint.manifest import StoredPiece
from pytrain.checkpoint.pieces import ITEM_BYTES, Piece

PART_BYTES = 64 * 2**20  # a reader has to read and hash a part whole, so none is larger than this

Bytes = NDArray[np.uint8]


class Part(NamedTuple):
    """Consecutive bytes of one tensor, and where in its file they begin."""

    tensor: str
    begin: int
    data: Bytes


def parts_of(layout: FileLayout, pieces: Iterable[Piece]) -> Iterator[Part]:
    """The pieces of one file in parts of at most PART_BYTES; each piece's memory is asked for when it is its turn."""
    for piece in pieces:
        entry = piece.entry
        data = np.frombuffer(memory_of(piece.data), np.uint8) if piece.count else np.empty(0, np.uint8)
        offset = layout.begins[entry.tensor] + piece.first * ITEM_BYTES[entry.dtype]
        for first in range(0, data.size, PART_BYTES):
            yield Part(entry.tensor, offset + first, data[first : first + PART_BYTES])


class Snapshot:
    """Memory for copies of parts, so that they can be written while training changes the originals.

    Args:
        memory: uint8; no more than this is ever copied.
        copy: of arrays of equal size, to the first from the second; it may only start to.
        settle: returns when all copies that were started are done.
    """

    def __init__(
        self,
        memory: Bytes,
        copy: Callable[[NDArray[Any], NDArray[Any]], None] = np.copyto,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.parts: dict[str, list[Part]] = {}
        """The copies, by file."""
        self._memory = memory
        self._copy = copy
        self._settle = settle
        self._originals: list[Bytes] = []
        """Of copies that may not be done: a piece may have been made for this save alone."""
        self._used = 0

    def clear(self) -> None:
        """Forget the copies; nobody may be writing them any more."""
        self.parts = {}
        self._used = 0

    def settle(self) -> None:
        """Return when all copies are done: the originals may change now, and the copies be read."""
        self._settle()
        self._originals.clear()

    def take(self, file: str, part: Part) -> bool:
        """Copy a part, if it fits."""
        end = self._used + part.data.size
        if end > self._memory.size:
            return False
        copied = self._memory[self._used : end]
        self._copy(copied, part.data)
        self._originals.append(part.data)
        self.parts.setdefault(file, []).append(part._replace(data=copied))
        self._used = end
        return True


def write_parts(
    path: Path, parts: Iterable[Part], operations: FileOperations, wrote: Callable[[int], None]
) -> list[StoredPiece]:
    """Write parts into a file that is there, each hashed in memory, and wait until the file is on the disk.

    Args:
        path: of the file.
        parts: any, also none.
        operations: the file system.
        wrote: told of the bytes of each part when it is written.

    Raises:
        UserError: the file cannot be written.
    """
    stored = []
    with naming(path, "written"):
        descriptor = operations.open(path)
        try:
            for part in parts:
                memory = memory_of(part.data)
                digest = hashlib.sha256(memory).hexdigest()
                operations.write(descriptor, memory, part.begin)
                stored.append(StoredPiece(part.tensor, part.begin, part.begin + part.data.size, digest))
                wrote(part.data.size)
            operations.sync(descriptor)
        finally:
            operations.close(descriptor)
    return stored
