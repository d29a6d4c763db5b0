"""What saving asks of the file system and of the other processes, as two objects that tests can replace."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pytrain.errors import UserError

T = TypeVar("T")


class Group(Protocol):
    """The processes that save or load together."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def barrier(self) -> None:
        """Wait for all."""

    def gather(self, value: T) -> list[T]:
        """On rank 0 the values of all ranks, in their order; elsewhere an empty list."""

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""

    def on_root(self, call: Callable[[], T]) -> T:
        """What `call` gives on rank 0, where alone it is called; a `UserError` in it is raised on all ranks."""


class OneProcess:
    """A group of size 1."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather(self, value: T) -> list[T]:
        """The value alone."""
        return [value]

    def broadcast(self, value: T) -> T:
        """The value itself."""
        return value

    def on_root(self, call: Callable[[], T]) -> T:
        """What the call gives."""
        return call()


class FileOperations:
    """Everything that changes the disk while a checkpoint is saved or deleted. All raise OSError."""

    def make_folder(self, path: Path) -> None:
        """Create one folder."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Create a file that must not exist yet; gives a descriptor to write to."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def open(self, path: Path) -> int:
        """Open an existing file; gives a descriptor to write to."""
        return os.open(path, os.O_RDWR)

    def truncate(self, descriptor: int, size: int) -> None:
        """Set a file's size in bytes."""
        os.ftruncate(descriptor, size)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset` bytes from the start of the file."""
        rest = memoryview(data).cast("B")
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def sync(self, descriptor: int) -> None:
        """Wait until a file's content is on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Wait until a folder's list of names is on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a folder or file; a file at `target` is replaced."""
        source.rename(target)

    def remove_folder(self, path: Path) -> None:
        """Delete a folder with all it holds."""
        shutil.rmtree(path)


@contextmanager
def naming(path: Path, action: str) -> Iterator[None]:
    """Turn an OSError inside into a `UserError` that says what could not be done with which file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be {action}: {error.strerror or error}") from error


def write_file(operations: FileOperations, path: Path, content: bytes) -> None:
    """Create one small file and wait until it is on the disk."""
    with naming(path, "written"):
        descriptor = operations.create(path)
        try:
            operations.write(descriptor, content, 0)
            operations.sync(descriptor)
        finally:
            operations.close(descriptor)


def memory_of(array: Any) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return memoryview(array).cast("B")
