"""The header of a safetensors file, from the global table alone: every process computes the same bytes.

The safetensors library writes only whole files from one process's memory; a checkpoint's files are written by
many. The result is what the library would write (a test compares them).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pytrain.checkpoint.pieces import ITEM_BYTES, TensorEntry

SAFETENSORS_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FileLayout:
    """Where everything lies in one safetensors file.

    header: its first bytes, length prefix included. begins: first byte of each tensor, from the start of the
    file.
    size: bytes of the whole file.
    """

    header: bytes
    entries: Mapping[str, TensorEntry]
    begins: Mapping[str, int]
    size: int


def layout_file(entries: Iterable[TensorEntry]) -> FileLayout:
    """Lay out one file; the order of `entries` does not matter (wide dtypes come first, then by name)."""
    ordered = sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.tensor))
    # Loaders of the transformers library refuse a file without a known "format".
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    offset = 0
    for entry in ordered:
        offsets[entry.tensor] = offset
        table[entry.tensor] = {
            "dtype": SAFETENSORS_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(
        header,
        {entry.tensor: entry for entry in ordered},
        {name: len(header) + begin for name, begin in offsets.items()},
        len(header) + offset,
    )


def layout_files(entries: Iterable[TensorEntry]) -> dict[str, FileLayout]:
    """The layout of every file of a checkpoint, by file name with suffix."""
    files: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        files.setdefault(entry.file + SUFFIX, []).append(entry)
    return {name: layout_file(files[name]) for name in sorted(files)}
