"""Megatron's `.bin`/`.idx` pair: memory-mapped reader, streaming writer, merge.

`PREFIX.bin` is the concatenated little-endian token ids. `PREFIX.idx` is magic, version, dtype code, number
of sequences S and of document entries D, then int32 lengths [S] in tokens, int64 pointers [S] in bytes and
int64 document indices [D] (document d is sequences document_indices[d] .. document_indices[d + 1] - 1).
"""

import contextlib
import dataclasses
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from pytrain.data.sidecar import Sidecar, read_sidecar, sidecar_path
from pytrain.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Code 6 and 7 are float64 and float32: legal in the format, never token ids.
INTEGER_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = {6: "float64", 7: "float32"}
# Megatron's rule; below it ids fit 16 bits with room for a padded vocabulary.
UINT16_VOCABULARY = 65500
CHUNK = 1 << 20
MAXIMUM_LENGTH = 2**31 - 1


def dtype_code(vocabulary_size: int) -> int:
    """Code of the type in which Megatron stores ids of such a vocabulary: 8 (uint16) or 4 (int32)."""
    return 8 if vocabulary_size < UINT16_VOCABULARY else 4


def chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The array in pieces of at most CHUNK elements, so that a pass over a mapped file needs little
    memory.
    """
    for begin in range(0, len(array), CHUNK):
        yield array[begin : begin + CHUNK]


def _file_size(path: Path, prefix: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; a corpus is the pair {prefix}.bin and {prefix}.idx, named without the ending"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
    """A read-only map of `count` elements; mmap refuses empty ranges, so these become empty arrays."""
    if count == 0:
        return np.empty(0, dtype)
    try:
        return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def map_tokens(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """The ids of a `.bin`, mapped read-only; UserError where it cannot be read."""
    return _map(path, dtype, 0, count)


class IndexedDataset:
    """A token corpus, memory-mapped; every invariant of the format is checked on opening.

    prefix: the path without `.bin`. Attributes: `tokens` (flat read-only map of the ids, in the stored dtype,
    [N]), `sequence_lengths` (int32 [S], tokens), `document_indices` (int64 [D + 1], sequences), `documents`
    (D). Raises UserError with one sentence naming the file.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path = Path(f"{prefix}.bin")
        self.index_path = Path(f"{prefix}.idx")
        index_size = _file_size(self.index_path, self.prefix)
        bin_size = _file_size(self.bin_path, self.prefix)
        self.dtype, sequences, entries = self._read_header(index_size)
        end_of_lengths = HEADER.size + 4 * sequences
        end_of_pointers = end_of_lengths + 8 * sequences
        self.sequence_lengths = _map(self.index_path, np.dtype("<i4"), HEADER.size, sequences)
        self._pointers = _map(self.index_path, np.dtype("<i8"), end_of_lengths, sequences)
        self.document_indices = _map(self.index_path, np.dtype("<i8"), end_of_pointers, entries)
        total = self._check_sequences()
        self._check_documents(sequences)
        if bin_size != total * self.dtype.itemsize:
            raise UserError(
                f"{self.bin_path} has {bin_size} bytes, but {self.index_path.name} describes {total} tokens "
                "of "
                f"{self.dtype.itemsize} bytes ({total * self.dtype.itemsize} bytes)"
            )
        self.tokens = map_tokens(self.bin_path, self.dtype, total)
        self.documents = entries - 1

    def _read_header(self, size: int) -> tuple[np.dtype[Any], int, int]:
        """Check the 34 bytes of header against the file's size; dtype, sequences, document entries."""
        path = self.index_path
        try:
            with path.open("rb") as file:
                raw = file.read(HEADER.size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if raw[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path} is not a Megatron index: it begins with {raw[:9]!r}, not {MAGIC!r}")
        if len(raw) < HEADER.size:
            raise UserError(f"{path} is cut short: {len(raw)} bytes where the header alone takes {HEADER.size}")
        _, version, code, sequences, entries = HEADER.unpack(raw)
        if version != VERSION:
            raise UserError(f"{path} has index version {version}, but only version {VERSION} is known")
        if code in FLOAT_CODES:
            raise UserError(f"{path} stores {FLOAT_CODES[code]} values, which are not token ids (dtype code {code})")
        if code not in INTEGER_CODES:
            known = ", ".join(str(each) for each in sorted(INTEGER_CODES))
            raise UserError(f"{path} has dtype code {code}, but token ids have one of {known}")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if size == expected + sequences and sequences > 0:
            raise UserError(f"{path} carries sequence modes: it belongs to a multimodal dataset, not to text")
        if size != expected:
            raise UserError(
                f"{path} has {size} bytes, but its header ({sequences} sequences, {entries} document "
                "indices) needs "
                f"{expected}"
            )
        return INTEGER_CODES[code], sequences, entries

    def _check_sequences(self) -> int:
        """Check that lengths and byte pointers agree; the number of tokens."""
        total = 0
        for begin in range(0, len(self.sequence_lengths), CHUNK):
            lengths = self.sequence_lengths[begin : begin + CHUNK].astype(np.int64)
            if lengths.min() < 0:
                where = int(np.argmax(lengths < 0))
                raise UserError(
                    f"{self.index_path}: sequence {begin + where} has the negative length {lengths[where]}"
                )
            ends = total + np.cumsum(lengths)
            expected = (ends - lengths) * self.dtype.itemsize
            wrong = expected != self._pointers[begin : begin + CHUNK]
            if wrong.any():
                where = int(np.argmax(wrong))
                raise UserError(
                    f"{self.index_path}: the pointer of sequence {begin + where} is "
                    f"{self._pointers[begin + where]}, but the lengths before it put it at byte "
                    f"{expected[where]}"
                )
            total = int(ends[-1])
        return total

    def _check_documents(self, sequences: int) -> None:
        """Check that the document indices rise from 0 to the number of sequences."""
        indices = self.document_indices
        if len(indices) == 0:
            raise UserError(f"{self.index_path} has no document indices; even an empty corpus has one")
        if indices[0] != 0 or indices[-1] != sequences:
            raise UserError(
                f"{self.index_path}: document indices run from {indices[0]} to {indices[-1]}, but must run "
                "from 0 to "
                f"the number of sequences, {sequences}"
            )
        for begin in range(0, len(indices), CHUNK):
            falls = np.diff(indices[begin : begin + CHUNK + 1]) < 0
            if falls.any():
                where = begin + int(np.argmax(falls))
                raise UserError(
                    f"{self.index_path}: document index {where + 1} is {indices[where + 1]}, less than the "
                    "one before "
                    f"it ({indices[where]})"
                )

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """Token offset of each document's first token, int64 [documents], ascending; computed on first use.

        Empty documents share the offset of the next one; at the end of the corpus it is the number of tokens.
        """
        first_sequences = self.document_indices[:-1]
        starts = np.full(self.documents, len(self.tokens), np.int64)
        inside = first_sequences < len(self._pointers)
        starts[inside] = self._pointers[first_sequences[inside]] // self.dtype.itemsize
        return starts

    @cached_property
    def _largest(self) -> int:
        return max((int(piece.max()) for piece in chunks(self.tokens)), default=-1)

    def max_token(self) -> int:
        """The largest id of the corpus, -1 if it is empty; reads the whole `.bin` the first time."""
        return self._largest


def _write_index(
    file: BinaryIO,
    code: int,
    sequences: int,
    entries: int,
    lengths: Callable[[], Iterable[NDArray[Any]]],
    document_indices: Iterable[NDArray[Any]],
) -> None:
    """Write an index from streams of sequence lengths (read twice) and document indices."""
    file.write(HEADER.pack(MAGIC, VERSION, code, sequences, entries))
    for piece in lengths():
        file.write(piece.astype("<i4").tobytes())
    offset = 0
    for piece in lengths():
        sizes = piece.astype(np.int64) * INTEGER_CODES[code].itemsize
        pointers = offset + np.cumsum(sizes) - sizes
        file.write(pointers.astype("<i8").tobytes())
        offset += int(sizes.sum())
    for piece in document_indices:
        file.write(piece.astype("<i8").tobytes())


class _Files:
    """The temporary files of one corpus, renamed into place together or removed together."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._temporary: dict[str, Path] = {}

    def path(self, ending: str) -> Path:
        """The temporary path of `PREFIX.ending`, in the same folder so that a rename is atomic."""
        path = Path(f"{self.prefix}.{ending}.tmp-{os.getpid()}")
        self._temporary[ending] = path
        return path

    def open(self, ending: str) -> BinaryIO:
        """Create the temporary file of `PREFIX.ending` for writing and reading."""
        path = self.path(ending)
        try:
            path.unlink(missing_ok=True)
            return path.open("x+b", buffering=CHUNK)
        except OSError as error:
            del self._temporary[ending]
            raise UserError(f"{self.prefix}.{ending} cannot be written: {error.strerror}") from error

    def commit(self, endings: Sequence[str]) -> None:
        """Rename into place. The index goes last and the old one first: a pair with an index is whole."""
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        sidecar_path(self.prefix).unlink(missing_ok=True)
        for ending in endings:
            self._temporary.pop(ending).replace(f"{self.prefix}.{ending}")
        folder = os.open(self.prefix.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.remove()

    def remove(self) -> None:
        """Delete what is left."""
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
        self._temporary.clear()


class IndexedWriter:
    """Stream documents into `PREFIX.bin` and `PREFIX.idx`, one sequence a document, in bounded memory.

    Ids are stored as uint16 if vocabulary_size < 65500, else int32. Use as a context manager, or call `close`
    (or `abort`): the files appear under their names, fsynced and whole, on close; nothing is left after an
    error. An empty document is a document entry without a sequence, as Megatron writes it. Attributes:
    `tokens`, `documents`, `empty_documents`, counted so far.
    """

    def __init__(self, prefix: str | Path, vocabulary_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocabulary_size = vocabulary_size
        self.tokens = 0
        self.documents = 0
        self.empty_documents = 0
        self._code = dtype_code(vocabulary_size)
        self._current = 0
        self._hash = hashlib.sha256()
        self._files = _Files(self.prefix)
        self._stack = contextlib.ExitStack()
        try:
            self._bin = self._stack.enter_context(self._files.open("bin"))
            # Document lengths wait on disk: a corpus of 10^9 documents must not need gigabytes here.
            self._lengths = self._stack.enter_context(self._files.open("lengths"))
        except BaseException:
            self.abort()
            raise

    def append(self, ids: NDArray[Any] | Sequence[int]) -> None:
        """Append ids (any integers, [n]) to the current document.

        Raises UserError for an id outside the vocabulary or a document of more than 2^31 - 1 tokens.
        """
        array = np.asarray(ids, np.int64) if len(ids) else np.empty(0, np.int64)
        if len(array) == 0:
            return
        if array.min() < 0 or array.max() >= self.vocabulary_size:
            bad = int(array[(array < 0) | (array >= self.vocabulary_size)][0])
            raise UserError(f"{self.prefix}.bin: token id {bad} is outside the vocabulary of {self.vocabulary_size}")
        self._current += len(array)
        if self._current > MAXIMUM_LENGTH:
            raise UserError(f"{self.prefix}.idx: document {self.documents} has more than {MAXIMUM_LENGTH} tokens")
        raw = array.astype(INTEGER_CODES[self._code]).tobytes()
        self._hash.update(raw)
        self._write(self._bin, "bin", raw)

    def end_document(self) -> None:
        """Close the current document; without tokens it is an empty one."""
        self._write(self._lengths, "idx", struct.pack("<i", self._current))
        self.documents += 1
        self.empty_documents += self._current == 0
        self.tokens += self._current
        self._current = 0

    def add_document(self, ids: NDArray[Any] | Sequence[int]) -> None:
        """Append one whole document."""
        self.append(ids)
        self.end_document()

    @property
    def current_length(self) -> int:
        """Tokens of the document under way."""
        return self._current

    @property
    def sha256(self) -> str:
        """Hash of the `.bin` bytes so far, hexadecimal."""
        return self._hash.hexdigest()

    def close(self, sidecar: Sidecar | None = None) -> None:
        """Write the index (and `PREFIX.json` if given), fsync, and rename all into place."""
        if self._current:
            raise ValueError(f"{self.prefix}: close() inside a document; call end_document() first")
        endings = ["bin"]
        try:
            with self._files.open("idx") as index:
                self._write_index(index)
                _synchronise(index)
            _synchronise(self._bin)
            if sidecar is not None:
                path = self._files.path("json")
                path.unlink(missing_ok=True)
                sidecar.write(path)
                endings.append("json")
            self._stack.close()
            self._files.commit([*endings, "idx"])
        except OSError as error:
            self.abort()
            raise UserError(f"{self.prefix}.bin/.idx cannot be written: {error.strerror}") from error
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove the temporary files; files of that name from before stay as they were."""
        # Closing flushes, which fails again on a full disk; the error that led here is the one to report.
        with contextlib.suppress(OSError):
            self._stack.close()
        self._files.remove()

    def _write(self, file: BinaryIO, ending: str, raw: bytes) -> None:
        try:
            file.write(raw)
        except OSError as error:
            raise UserError(f"{self.prefix}.{ending} cannot be written: {error.strerror}") from error

    def _document_lengths(self) -> Iterator[NDArray[np.int32]]:
        self._lengths.flush()
        self._lengths.seek(0)
        while raw := self._lengths.read(4 * CHUNK):
            yield np.frombuffer(raw, "<i4")

    def _write_index(self, index: BinaryIO) -> None:
        def lengths() -> Iterator[NDArray[Any]]:
            return (piece[piece > 0] for piece in self._document_lengths())

        def document_indices() -> Iterator[NDArray[Any]]:
            yield np.zeros(1, np.int64)
            sequences = 0
            for piece in self._document_lengths():
                ends = sequences + np.cumsum(piece > 0, dtype=np.int64)
                yield ends
                sequences = int(ends[-1])

        count = self.documents - self.empty_documents
        _write_index(index, self._code, count, self.documents + 1, lengths, document_indices())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._bin.closed:
            self.close()


def merge(inputs: Sequence[str | Path], output: str | Path) -> None:
    """Concatenate corpora of one dtype into `OUTPUT.bin`/`.idx`, documents in the order of `inputs`.

    `OUTPUT.json` is written if every input has its note, and then all must name one tokenizer. Bounded
    memory; whole files or none, as with `IndexedWriter`. Raises UserError.
    """
    if not inputs:
        raise UserError(f"{output}: there is no corpus to merge")
    datasets = [IndexedDataset(prefix) for prefix in inputs]
    for dataset in datasets[1:]:
        if dataset.dtype != datasets[0].dtype:
            raise UserError(
                f"{dataset.bin_path} stores {dataset.dtype.name} but {datasets[0].bin_path} stores "
                f"{datasets[0].dtype.name}: corpora of different types cannot be merged"
            )
    notes = [read_sidecar(prefix) for prefix in inputs]
    files = _Files(Path(output))
    try:
        with files.open("bin") as stream:
            digest = hashlib.sha256()
            for dataset in datasets:
                for piece in chunks(dataset.tokens):
                    raw = piece.tobytes()
                    digest.update(raw)
                    stream.write(raw)
            _synchronise(stream)
        with files.open("idx") as index:
            _merge_indexes(index, datasets)
            _synchronise(index)
        endings = ["bin", "idx"]
        if all(note is not None for note in notes):
            _merge_sidecars([note for note in notes if note is not None], inputs, digest.hexdigest()).write(
                files.path("json")
            )
            endings.insert(1, "json")
        files.commit(endings)
    except OSError as error:
        raise UserError(f"{output}.bin/.idx cannot be written: {error.strerror}") from error
    finally:
        files.remove()


def _merge_indexes(index: BinaryIO, datasets: Sequence[IndexedDataset]) -> None:
    def lengths() -> Iterator[NDArray[Any]]:
        return (piece for dataset in datasets for piece in chunks(dataset.sequence_lengths))

    def document_indices() -> Iterator[NDArray[Any]]:
        yield np.zeros(1, np.int64)
        sequences = 0
        for dataset in datasets:
            for piece in chunks(dataset.document_indices[1:]):
                yield piece + sequences
            sequences += len(dataset.sequence_lengths)

    sequences = sum(len(dataset.sequence_lengths) for dataset in datasets)
    entries = sum(dataset.documents for dataset in datasets) + 1
    code = next(code for code, dtype in INTEGER_CODES.items() if dtype == datasets[0].dtype)
    _write_index(index, code, sequences, entries, lengths, document_indices())


def _merge_sidecars(notes: Sequence[Sidecar], prefixes: Sequence[str | Path], sha256: str) -> Sidecar:
    for note, prefix in zip(notes, prefixes, strict=True):
        if note.tokenizer_sha256 != notes[0].tokenizer_sha256:
            raise UserError(
                f"{prefix} and {prefixes[0]} were prepared with different tokenizers and cannot be merged"
            )
    return dataclasses.replace(
        notes[0],
        documents=sum(note.documents for note in notes),
        tokens=sum(note.tokens for note in notes),
        utf8_bytes=sum(note.utf8_bytes for note in notes),
        sha256=sha256,
    )


def _synchronise(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
