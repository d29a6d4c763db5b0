"""Loading: any run of elements of any tensor, whatever pieces it was written in, verified as it is read."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytrain.checkpoint.files import Group, OneProcess, memory_of, naming
from pytrain.checkpoint.manifest import Manifest, StoredFile, StoredPiece
from pytrain.checkpoint.pieces import (
    ITEM_BYTES,
    Progress,
    TensorEntry,
    TensorPiece,
    convert,
    storage_dtype,
    value_dtype,
)
from pytrain.checkpoint.store import find_checkpoint, read_manifest
from pytrain.checkpoint.writer import CONFIG
from pytrain.errors import UserError

_READ_BYTES = 16 * 2**20


class _Wanted(NamedTuple):
    """A requested piece, and the bytes of the file that it asks for."""

    piece: TensorPiece
    stored_dtype: str
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder, its manifest, and the configuration it was written under."""

    folder: Path
    manifest: Manifest
    config_text: str

    @classmethod
    def open(cls, path: str | Path, group: Group | None = None) -> "Checkpoint":
        """Open a checkpoint folder, or the newest checkpoint of a run folder.

        In a group only rank 0 touches the disk; all get the same answer, or the same error.

        Raises:
            UserError: there is none, its format is newer, or a file is missing or has another size.
        """
        group = group or OneProcess()

        def read() -> "Checkpoint":
            folder = find_checkpoint(path)
            manifest = read_manifest(folder)
            return cls(folder, manifest, _read_copy(folder, manifest, CONFIG).decode())

        return group.on_root(read)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def state(self) -> Mapping[str, Any]:
        """What the trainer gave to `save`."""
        return self.manifest.state

    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name: its dtype, global shape, and the file it is in."""
        return {name: entry for file in self.manifest.files.values() for name, entry in file.entries.items()}

    def extra_files(self) -> dict[str, Path]:
        """The small files that were copied along (the tokenizer), by name, as `save` takes them."""
        return {name: self.folder / name for name in self.manifest.copies if name != CONFIG}

    def check_tokenizer(self, sha256: str, path: str | Path) -> None:
        """Compare with `state["tokenizer_sha256"]`; a checkpoint that has none was made without a tokenizer.

        Raises:
            UserError: the tokenizer at `path`, of this sha256, is not the one that the model was trained
            with.
        """
        expected = self.state.get("tokenizer_sha256")
        if expected is not None and expected != sha256:
            raise UserError(
                f"the tokenizer {path} (sha256 {sha256[:16]}...) does not match the checkpoint "
                f"{self.folder}, which was trained with another (sha256 {expected[:16]}...)"
            )

    def read(self, name: str) -> NDArray[Any]:
        """One whole tensor in its global shape, as float32, float16 or ml_dtypes.bfloat16.

        Raises:
            UserError: there is no such tensor, or its bytes are damaged.
        """
        entry = self._entry(name)
        data = np.empty(entry.elements, storage_dtype(entry.dtype))
        self.read_into([TensorPiece(entry.file, name, entry.dtype, entry.shape, 0, data)])
        return data.view(value_dtype(entry.dtype)).reshape(entry.shape)

    def read_into(self, pieces: Sequence[TensorPiece], convert_dtype: bool = False) -> None:
        """Fill `data` of every piece from the bytes on disk; what overlaps is read whole and verified.

        Args:
            pieces: any runs of elements; they need not be those that were saved.
            convert_dtype: allow a piece to have another dtype than the file, and round.

        Raises:
            UserError: a tensor is missing, has another shape or dtype, or its bytes are damaged.
        """
        wanted: dict[str, list[_Wanted]] = {}
        for piece in pieces:
            entry = self._matching_entry(piece, convert_dtype)
            if piece.count:
                file = entry.file + ".safetensors"
                begin = self.manifest.files[file].begins[entry.tensor] + piece.first * ITEM_BYTES[entry.dtype]
                end = begin + piece.count * ITEM_BYTES[entry.dtype]
                wanted.setdefault(file, []).append(_Wanted(piece, entry.dtype, begin, end))
        for file, of_file in wanted.items():
            with self._opened(file) as descriptor:
                for stored, overlapping in _overlaps(self.manifest.files[file], of_file):
                    self._read_piece(descriptor, file, stored, overlapping)

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything and compare with the manifest.

        Raises:
            UserError: the first file and tensor found damaged.
        """
        total = sum(file.bytes for file in self.manifest.files.values())
        done = 0
        for name in self.manifest.copies:
            _read_copy(self.folder, self.manifest, name)
        for name, file in self.manifest.files.items():
            with self._opened(name) as descriptor:
                done += file.header.bytes
                for stored in file.pieces:
                    self._read_piece(descriptor, name, stored, [])
                    done += stored.end - stored.begin
                    if progress is not None:
                        progress(done, total)

    def _entry(self, name: str) -> TensorEntry:
        for file in self.manifest.files.values():
            if name in file.entries:
                return file.entries[name]
        raise UserError(f"the checkpoint {self.folder} has no tensor {name}")

    def _matching_entry(self, piece: TensorPiece, convert_dtype: bool) -> TensorEntry:
        entry = self._entry(piece.tensor)
        if entry.shape != piece.shape:
            raise UserError(
                f"{piece.tensor} has shape {list(entry.shape)} in the checkpoint {self.folder}, "
                f"but shape {list(piece.shape)} in the model"
            )
        if entry.dtype != piece.dtype and not convert_dtype:
            raise UserError(
                f"{piece.tensor} is {entry.dtype} in the checkpoint {self.folder}, but {piece.dtype} is asked for"
            )
        return entry

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """A descriptor of a file whose header is what it was: other tools find the tensors through it."""
        path = self.folder / name
        with naming(path, "read"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                header = self.manifest.files[name].header
                if hashlib.sha256(os.pread(descriptor, header.bytes, 0)).hexdigest() != header.sha256:
                    raise UserError(f"{path} is damaged: its header is not the one that was written")
                yield descriptor
            finally:
                os.close(descriptor)

    def _read_piece(self, descriptor: int, file: str, stored: StoredPiece, overlapping: list[_Wanted]) -> None:
        """Read one stored piece whole, verify it, and copy what is wanted of it."""
        target = _direct_target(stored, overlapping)
        buffer = target if target is not None else np.empty(stored.end - stored.begin, np.uint8)
        digest = _read_and_hash(descriptor, buffer, stored.begin)
        if digest != stored.sha256:
            raise UserError(
                f"{self.folder / file} is damaged: bytes {stored.begin} to {stored.end}, of {stored.tensor}, "
                f"are not those that were written"
            )
        if target is None:
            for wanted in overlapping:
                _copy(buffer, stored, wanted)


def _read_copy(folder: Path, manifest: Manifest, name: str) -> bytes:
    with naming(folder / name, "read"):
        content = (folder / name).read_bytes()
    if name not in manifest.copies or hashlib.sha256(content).hexdigest() != manifest.copies[name].sha256:
        raise UserError(f"{folder / name} is damaged: it is not the file that was written")
    return content


def _overlaps(file: StoredFile, wanted: list[_Wanted]) -> Iterator[tuple[StoredPiece, list[_Wanted]]]:
    """The stored pieces that hold something wanted, in the order of the file, each once."""
    begins = [piece.begin for piece in file.pieces]
    overlapping: dict[int, list[_Wanted]] = {}
    for request in wanted:
        index = bisect_right(begins, request.begin) - 1
        while index < len(begins) and begins[index] < request.end:
            overlapping.setdefault(index, []).append(request)
            index += 1
    for index in sorted(overlapping):
        yield file.pieces[index], overlapping[index]


def _direct_target(stored: StoredPiece, overlapping: list[_Wanted]) -> NDArray[Any] | None:
    """The memory of the one request that takes the stored piece as it is, where there is such a one."""
    if len(overlapping) != 1:
        return None
    wanted = overlapping[0]
    if wanted.stored_dtype != wanted.piece.dtype or wanted.begin > stored.begin or wanted.end < stored.end:
        return None
    return wanted.piece.data.view(np.uint8)[stored.begin - wanted.begin : stored.end - wanted.begin]


def _copy(buffer: NDArray[Any], stored: StoredPiece, wanted: _Wanted) -> None:
    """Copy the part of a stored piece that a request asks for."""
    begin, end = max(stored.begin, wanted.begin), min(stored.end, wanted.end)
    item = ITEM_BYTES[wanted.stored_dtype]
    values = buffer[begin - stored.begin : end - stored.begin].view(storage_dtype(wanted.stored_dtype))
    first = (begin - wanted.begin) // item
    wanted.piece.data[first : first + values.size] = convert(
        values, wanted.stored_dtype, wanted.piece.dtype, wanted.piece.tensor
    )


def _read_and_hash(descriptor: int, buffer: NDArray[Any], offset: int) -> str:
    """Fill `buffer` from `offset`, and hash what was read; a file that ends early gives another hash."""
    digest = hashlib.sha256()
    memory = memory_of(buffer)
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done : done + _READ_BYTES]], offset + done)
        if count == 0:
            break
        digest.update(memory[done : done + count])
        done += count
    return digest.hexdigest()
