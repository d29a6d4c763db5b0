"""Saving: each process writes its pieces of global tensors, rank 0 the rest; a whole folder is renamed.

`start_save` copies what there is room for and writes the rest; while training goes on, a thread writes the copy;
`Saving.finish` waits for it, writes the manifest and gives the folder its name. `save` is both, without a thread.
"""

import hashlib
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pytrain.checkpoint import manifest as manifests
from pytrain.checkpoint.files import FileOperations, Group, OneProcess, naming, write_file
from pytrain.checkpoint.header import SUFFIX, FileLayout, layout_files
from pytrain.checkpoint.manifest import Copy, Manifest, StoredFile, StoredPiece
from pytrain.checkpoint.parts import Part, Snapshot, parts_of, write_parts
from pytrain.checkpoint.pieces import Piece, TensorEntry
from pytrain.checkpoint.store import PARTIAL, REPLACED, checkpoints_folder, clean, naming_newest, step_name
from pytrain.errors import UserError

CONFIG = "config.toml"
LOOK_SECONDS = 1.0  # between two looks whether a thread that is waited for still writes

Files = dict[str, FileLayout]


class _Task(NamedTuple):
    """What goes to one file of the partial folder: parts of a tensor file, which is synced, or a small whole file."""

    file: str
    content: Iterable[Part] | bytes


class _AbandonedError(Exception):
    """The thread is to leave its work."""


def save(
    run_folder: str | Path,
    step: int,
    pieces: Sequence[Piece],
    state: Mapping[str, Any],
    config_text: str,
    extra_files: Mapping[str, Path] | None = None,
    group: Group | None = None,
    operations: FileOperations | None = None,
) -> Path:
    """Write RUN/checkpoints/step-N; all processes of the group call this together.

    Nothing else may write checkpoints of this run meanwhile. A crash at any moment leaves the checkpoints
    before it as they are, and a folder that the next `save` removes. A checkpoint of the same step is
    replaced.

    Args:
        run_folder: made if it is not there.
        step: optimizer steps done.
        pieces: this process's; those of all processes cover each tensor exactly once.
        state: anything that JSON can hold: samples consumed, hashes, versions. Rank 0's counts, as do all
        below.
        config_text: the resolved configuration, TOML.
        extra_files: name in the checkpoint -> file to copy there (the tokenizer).
        group: the processes that save; None for this one alone.
        operations: the file system, for tests that break it.

    Returns:
        The folder of the checkpoint, on all ranks.

    Raises:
        UserError: a file cannot be written or copied.
        ValueError: the pieces do not cover each tensor exactly once.
    """
    return start_save(run_folder, step, pieces, state, config_text, extra_files, group, operations).finish()


def start_save(
    run_folder: str | Path,
    step: int,
    pieces: Sequence[Piece],
    state: Mapping[str, Any],
    config_text: str,
    extra_files: Mapping[str, Path] | None = None,
    group: Group | None = None,
    operations: FileOperations | None = None,
    snapshot: Snapshot | None = None,
    moved: Callable[[], None] = lambda: None,
) -> "Saving":
    """As `save`, up to where the pieces may be changed again: `Saving.finish` does the rest.

    What the snapshot has room for is copied and then written by a thread; all else is written before this
    returns.

    Args:
        snapshot: this process's; it belongs to the save until that is finished or abandoned. None: no thread.
        moved: called, never from the thread, when something more was written: a sign of life.

    Raises:
        UserError: the folder cannot be made, or a small file cannot be read. A piece that cannot be written
            is told of by `Saving.failed`, so that all processes come to `finish`, which raises it on all.
    """
    group = group or OneProcess()
    operations = operations or FileOperations()
    final = checkpoints_folder(run_folder) / step_name(step)
    partial = final.with_name(final.name + PARTIAL)
    gathered = group.gather([(piece.entry, piece.first, piece.count) for piece in pieces])
    small: dict[str, bytes] = {}

    @naming_newest(run_folder)
    def prepare() -> Files:
        small.update(_small_files(config_text, extra_files or {}))
        files = _plan(extent for of_rank in gathered for extent in of_rank)
        _prepare(partial, files, operations)
        return files

    files = group.on_root(prepare)

    def manifest_of(written: Iterable[tuple[str, StoredPiece]]) -> Manifest:
        copies = {name: Copy(len(text), hashlib.sha256(text).hexdigest()) for name, text in small.items()}
        model = tomllib.loads(config_text).get("model", {})
        return Manifest(step, state, model, _stored_files(files, written), copies)

    saving = Saving(final, group, operations, manifest_of, moved)
    saving._begin(files, pieces, small, snapshot)
    return saving


class Saving:
    """A save that was begun. All processes of the group have theirs, and call `finish` together."""

    def __init__(
        self,
        folder: Path,
        group: Group,
        operations: FileOperations,
        manifest_of: Callable[[Iterable[tuple[str, StoredPiece]]], Manifest],
        moved: Callable[[], None],
    ) -> None:
        self.folder = folder
        """Of the checkpoint; it is there when the save is finished."""
        self.background_seconds = 0.0
        """How long the thread wrote."""
        self._partial = folder.with_name(folder.name + PARTIAL)
        self._group, self._operations, self._manifest_of, self._moved = group, operations, manifest_of, moved
        self._written: list[tuple[str, StoredPiece]] = []
        self._bytes = 0
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread: threading.Thread | None = None

    @property
    def under_way(self) -> bool:
        """Whether the thread of this process still writes."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this process could not write its part: `finish` will raise it."""
        return self._error is not None

    def finish(self) -> Path:
        """Wait until everybody has written, and make it a checkpoint; gives its folder, on all ranks.

        Raises:
            UserError: on all ranks, where one could not write.
        """
        self._wait()
        if self._error is not None and not isinstance(self._error, UserError):
            raise self._error
        outcomes = self._group.gather((self._written, None if self._error is None else str(self._error)))

        @naming_newest(self.folder.parent.parent)
        def conclude() -> None:
            for _, sentence in outcomes:
                if sentence is not None:
                    raise UserError(sentence)
            manifest = self._manifest_of(piece for written, _ in outcomes for piece in written)
            write_file(self._operations, self._partial / manifests.NAME, manifest.to_text().encode())
            _publish(self._partial, self.folder, self._operations)

        self._group.on_root(conclude)
        return self.folder

    def abandon(self) -> None:
        """Leave it undone, as a crash would: the next save removes what is there. Waits for the thread."""
        self._abandoned = True
        if self._thread is not None:
            self._thread.join()

    # --- inside ------------------------------------------------------------------------------------

    def _begin(
        self, files: Files, pieces: Sequence[Piece], small: Mapping[str, bytes], snapshot: Snapshot | None
    ) -> None:
        by_file: dict[str, list[Piece]] = {}
        for piece in pieces:
            by_file.setdefault(piece.entry.file + SUFFIX, []).append(piece)
        # Rank 0 wrote the headers of all files, which have to be synced too.
        whose = list(files) if self._group.rank == 0 else list(by_file)
        synced: set[str] = set()
        if snapshot is not None:
            snapshot.clear()

        def at_once() -> Iterator[_Task]:
            for name, of_file in by_file.items():
                parts = (
                    part
                    for part in parts_of(files[name], of_file)
                    if snapshot is None or not snapshot.take(name, part)
                )
                for first in parts:  # if there is one: the task takes the others
                    synced.add(name)
                    yield _Task(name, chain([first], parts))

        self._run(at_once())
        if snapshot is not None:
            snapshot.settle()
        copies = {} if snapshot is None else snapshot.parts
        later = [_Task(name, copies.get(name, ())) for name in whose if name in copies or name not in synced]
        later += [_Task(name, content) for name, content in small.items()]
        if snapshot is None or self._error is not None or not later:
            self._run(later)
        else:
            self._thread = threading.Thread(target=self._run, args=(later,), name="pytrain save", daemon=True)
            self._thread.start()

    def _run(self, tasks: Iterable[_Task]) -> None:
        """In the thread too, so serial code only: kernels and messages belong to the thread that began the save."""
        behind = threading.current_thread() is self._thread
        wrote = self._wrote_behind if behind else self._wrote
        started = time.perf_counter()
        try:
            for task in tasks if self._error is None else ():
                path = self._partial / task.file
                if isinstance(task.content, bytes):
                    write_file(self._operations, path, task.content)
                    continue
                stored = write_parts(path, task.content, self._operations, wrote)
                self._written += [(task.file, piece) for piece in stored]
        except _AbandonedError:
            pass
        except UserError as error:
            self._error = error
        except BaseException as error:
            if not behind:
                raise
            self._error = error  # `finish` raises it where somebody can catch it
        if behind:
            self.background_seconds = time.perf_counter() - started

    def _wrote(self, count: int) -> None:
        self._bytes += count
        self._moved()

    def _wrote_behind(self, count: int) -> None:
        self._bytes += count
        if self._abandoned:
            raise _AbandonedError

    def _wait(self) -> None:
        """Until the thread is done; tells of what it moves meanwhile."""
        seen = self._bytes
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(LOOK_SECONDS)
            if self._bytes != seen:
                seen = self._bytes
                self._moved()


def _plan(extents: Iterable[tuple[TensorEntry, int, int]]) -> Files:
    """Lay out the files; the extents (entry, first, count) have to cover every tensor exactly once."""
    covered: dict[str, list[tuple[int, int]]] = {}
    entries: dict[str, TensorEntry] = {}
    for entry, first, count in extents:
        if entries.setdefault(entry.tensor, entry) != entry:
            raise ValueError(f"pieces disagree about {entry.tensor}: {entries[entry.tensor]} and {entry}")
        covered.setdefault(entry.tensor, []).append((first, first + count))
    for name, ranges in covered.items():
        end = 0
        for first, past in sorted(ranges):
            if first != end:
                raise ValueError(f"pieces of {name} {'overlap' if first < end else 'leave a gap'} at element {end}")
            end = past
        if end != entries[name].elements:
            raise ValueError(f"pieces of {name} end at element {end} of {entries[name].elements}")
    return layout_files(entries.values())


def _prepare(partial: Path, files: Files, operations: FileOperations) -> None:
    """Make the folder, and every file with its header and size; they reach the disk when the pieces do."""
    folder = partial.parent
    with naming(folder, "written to"):
        for missing in [path for path in (*reversed(folder.parents), folder) if not path.exists()]:
            operations.make_folder(missing)
            operations.sync_folder(missing.parent)
        clean(folder.parent, operations)
        operations.make_folder(partial)
    for name, layout in files.items():
        with naming(partial / name, "written"):
            descriptor = operations.create(partial / name)
            try:
                operations.write(descriptor, layout.header, 0)
                operations.truncate(descriptor, layout.size)
            finally:
                operations.close(descriptor)


def _small_files(config_text: str, extra_files: Mapping[str, Path]) -> dict[str, bytes]:
    contents = {CONFIG: config_text.encode()}
    for name, source in extra_files.items():
        with naming(source, "copied into the checkpoint"):
            contents[name] = source.read_bytes()
    return contents


def _stored_files(files: Files, written: Iterable[tuple[str, StoredPiece]]) -> dict[str, StoredFile]:
    pieces: dict[str, list[StoredPiece]] = {name: [] for name in files}
    for name, piece in written:
        pieces[name].append(piece)
    return {
        name: StoredFile(
            layout.size,
            Copy(len(layout.header), hashlib.sha256(layout.header).hexdigest()),
            layout.entries,
            layout.begins,
            tuple(sorted(pieces[name], key=lambda piece: piece.begin)),
        )
        for name, layout in files.items()
    }


def _publish(partial: Path, final: Path, operations: FileOperations) -> None:
    """Give the whole folder its name, once the names of its files are on the disk."""
    replaced = final.with_name(final.name + REPLACED)
    with naming(final, "written"):
        operations.sync_folder(partial)
        if final.exists():
            operations.rename(final, replaced)
        operations.rename(partial, final)
        operations.sync_folder(final.parent)
        if replaced.exists():
            operations.remove_folder(replaced)
