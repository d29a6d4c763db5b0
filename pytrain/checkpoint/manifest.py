"""`manifest.json`: what a checkpoint holds, written last; its last line is the sha256 of the text before."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pytrain.checkpoint.pieces import TensorEntry
from pytrain.errors import UserError

FORMAT_VERSION = 1
NAME = "manifest.json"
_FORMAT = "pytrain checkpoint"
_SEAL = ',\n"sha256": "'


class StoredPiece(NamedTuple):
    """Bytes `begin` to `end` of a file: which tensor they belong to, and their sha256 while in memory."""

    tensor: str
    begin: int
    end: int
    sha256: str


class Copy(NamedTuple):
    """A small file kept beside the tensors: its size in bytes and its sha256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file: its size, its header, first byte of each tensor, and its pieces in order."""

    bytes: int
    header: Copy
    entries: Mapping[str, TensorEntry]
    begins: Mapping[str, int]
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything known about a checkpoint but the numbers in it.

    step: optimizer steps done. state: what the trainer wanted to remember. model: the [model] section of the
    configuration. files: the safetensors files, by name. copies: config.toml and files copied along, by name.
    """

    step: int
    state: Mapping[str, Any]
    model: Mapping[str, Any]
    files: Mapping[str, StoredFile]
    copies: Mapping[str, Copy]

    def to_text(self) -> str:
        """As JSON, one line per key."""
        values = {
            "format": _FORMAT,
            "version": FORMAT_VERSION,
            "step": self.step,
            "state": self.state,
            "model": self.model,
            "copies": {name: copy._asdict() for name, copy in self.copies.items()},
            "files": {name: _file_values(file) for name, file in self.files.items()},
        }
        body = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
        text = "{\n" + body
        return f'{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def _file_values(file: StoredFile) -> dict[str, Any]:
    return {
        "bytes": file.bytes,
        "header": file.header._asdict(),
        "tensors": {
            name: {"dtype": entry.dtype, "shape": entry.shape, "begin": file.begins[name]}
            for name, entry in file.entries.items()
        },
        "pieces": file.pieces,
    }


def parse(content: bytes, path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        UserError: not a manifest, of a newer format, or damaged; names `path`.
    """
    try:
        text = content.decode()
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise UserError(f"{path} is not the manifest of a pytrain checkpoint")
    version = values.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, but this pytrain reads up to {FORMAT_VERSION}; "
            f"use the version of pytrain that wrote it, or a newer one"
        )
    body, _, seal = text.rpartition(_SEAL)
    if seal != f'{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n':
        raise UserError(f"{path} is damaged: its text does not have the sha256 that stands in its last line")
    try:
        return _from_values(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a manifest of format version {version}: {error!r}") from None


def _from_values(values: dict[str, Any]) -> Manifest:
    files = {}
    for name, file in values["files"].items():
        stem = name.removesuffix(".safetensors")
        files[name] = StoredFile(
            file["bytes"],
            Copy(**file["header"]),
            {
                tensor: TensorEntry(stem, tensor, entry["dtype"], tuple(entry["shape"]))
                for tensor, entry in file["tensors"].items()
            },
            {tensor: entry["begin"] for tensor, entry in file["tensors"].items()},
            tuple(StoredPiece(*piece) for piece in file["pieces"]),
        )
    copies = {name: Copy(**copy) for name, copy in values["copies"].items()}
    return Manifest(values["step"], values["state"], values["model"], files, copies)
