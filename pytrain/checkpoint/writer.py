"""Saving: each process writes its pieces of global tensors, rank 0 the rest; a whole folder is renamed."""

import hashlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytrain.checkpoint import manifest as manifests
from pytrain.checkpoint.files import FileOperations, Group, OneProcess, memory_of, naming, write_file
from pytrain.checkpoint.header import SUFFIX, FileLayout, layout_files
from pytrain.checkpoint.manifest import Copy, Manifest, StoredFile, StoredPiece
from pytrain.checkpoint.pieces import ITEM_BYTES, Piece, TensorEntry
from pytrain.checkpoint.store import PARTIAL, REPLACED, checkpoints_folder, clean, step_name

CONFIG = "config.toml"
PIECE_BYTES = 64 * 2**20  # a reader has to read and hash a piece whole, so none is larger than this

Files = dict[str, FileLayout]


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
    group = group or OneProcess()
    operations = operations or FileOperations()
    final = checkpoints_folder(run_folder) / step_name(step)
    partial = final.with_name(final.name + PARTIAL)
    gathered = group.gather([(piece.entry, piece.first, piece.count) for piece in pieces])
    files: Files = {}
    if group.rank == 0:
        files = _plan(extent for of_rank in gathered for extent in of_rank)
        _prepare(partial, files, operations)
    files = group.broadcast(files)
    written = group.gather(_write_pieces(partial, files, pieces, operations, all_files=group.rank == 0))
    if group.rank == 0:
        copies = _write_copies(partial, config_text, extra_files or {}, operations)
        model = tomllib.loads(config_text).get("model", {})
        manifest = Manifest(step, state, model, _stored_files(files, written), copies)
        write_file(operations, partial / manifests.NAME, manifest.to_text().encode())
        _publish(partial, final, operations)
    group.barrier()
    return final


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


def _write_pieces(
    partial: Path, files: Files, pieces: Sequence[Piece], operations: FileOperations, all_files: bool
) -> list[tuple[str, StoredPiece]]:
    """Write this process's pieces, and sync each file it wrote to; rank 0 wrote the header of all of them."""
    by_file: dict[str, list[Piece]] = {name: [] for name in files} if all_files else {}
    for piece in pieces:
        by_file.setdefault(piece.entry.file + SUFFIX, []).append(piece)
    written = []
    for name, of_file in by_file.items():
        with naming(partial / name, "written"):
            descriptor = operations.open(partial / name)
            try:
                for piece in of_file:
                    begin = files[name].begins[piece.entry.tensor]
                    written += [(name, part) for part in _write_piece(descriptor, begin, piece, operations)]
                operations.sync(descriptor)
            finally:
                operations.close(descriptor)
    return written


def _write_piece(
    descriptor: int, tensor_begin: int, piece: Piece, operations: FileOperations
) -> Iterable[StoredPiece]:
    """Write one piece in parts of at most PIECE_BYTES, each hashed in memory."""
    entry = piece.entry
    data = memory_of(piece.data)
    offset = tensor_begin + piece.first * ITEM_BYTES[entry.dtype]
    for first in range(0, len(data), PIECE_BYTES):
        part = data[first : first + PIECE_BYTES]
        digest = hashlib.sha256(part).hexdigest()
        operations.write(descriptor, part, offset + first)
        yield StoredPiece(entry.tensor, offset + first, offset + first + len(part), digest)


def _write_copies(
    partial: Path, config_text: str, extra_files: Mapping[str, Path], operations: FileOperations
) -> dict[str, Copy]:
    contents = {CONFIG: config_text.encode()}
    for name, source in extra_files.items():
        with naming(source, "copied into the checkpoint"):
            contents[name] = source.read_bytes()
    for name, content in contents.items():
        write_file(operations, partial / name, content)
    return {name: Copy(len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}


def _stored_files(files: Files, written: list[list[tuple[str, StoredPiece]]]) -> dict[str, StoredFile]:
    pieces: dict[str, list[StoredPiece]] = {name: [] for name in files}
    for of_rank in written:
        for name, piece in of_rank:
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
