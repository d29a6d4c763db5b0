"""The safetensors files of a Hugging Face folder, read tensor by tensor."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytrain.checkpoint.files import naming
from pytrain.checkpoint.header import SAFETENSORS_NAMES
from pytrain.checkpoint.huggingface.configuration import read_json
from pytrain.checkpoint.pieces import ITEM_BYTES, storage_dtype
from pytrain.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OUR_DTYPES = {theirs: ours for ours, theirs in SAFETENSORS_NAMES.items()}


class Stored(NamedTuple):
    """Where a tensor lies: file, dtype ("fp32", "bf16", "fp16"), shape, first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a folder by name."""

    folder: Path
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, folder: Path) -> "WeightFiles":
        """Read the headers.

        Raises:
            UserError: there are no safetensors files, one is missing or malformed, or a dtype is none of
                ours.
        """
        listed: dict[str, str] = {}
        files = [SINGLE]
        if (folder / INDEX).is_file():
            listed = read_json(folder / INDEX).get("weight_map", {})
            files = sorted(set(listed.values()))
        elif not (folder / SINGLE).is_file():
            raise UserError(
                f"{folder} holds neither {SINGLE} nor {INDEX}; weights in another format have to be saved as "
                f"safetensors first"
            )
        tensors: dict[str, Stored] = {}
        for name in files:
            tensors |= _read_header(folder / name)
        for name, file in listed.items():
            if name not in tensors:
                raise UserError(f"{folder / INDEX} lists the tensor {name}, but {file} does not hold it")
        return cls(folder, tensors)

    def read(self, name: str) -> NDArray[Any]:
        """One tensor in its shape, in the storage dtype of its kind (float32 or uint16)."""
        stored = self.tensors[name]
        count = math.prod(stored.shape)
        with naming(stored.file, "read"):
            data = np.fromfile(stored.file, storage_dtype(stored.dtype), count, offset=stored.begin)
        if data.size != count:
            raise UserError(f"{stored.file} is truncated: {name} is not whole")
        return data.reshape(stored.shape)


def _read_header(path: Path) -> dict[str, Stored]:
    """The library judges the file; the offsets, which it does not tell, are read here."""
    import safetensors

    if not path.is_file():
        raise UserError(f"{path} is missing, but {INDEX} lists it")
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    with naming(path, "read"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin = 8 + length + entry["data_offsets"][0]
        dtype = _OUR_DTYPES.get(entry["dtype"], entry["dtype"])
        tensors[name] = Stored(path, dtype, tuple(entry["shape"]), begin)
    return tensors


def check_dtype(name: str, stored: Stored) -> None:
    """Raise a `UserError` where a tensor is of a kind that pytrain does not keep."""
    if stored.dtype not in ITEM_BYTES:
        kinds = ", ".join(SAFETENSORS_NAMES.values())
        raise UserError(f"{stored.file}: {name} is {stored.dtype}, and pytrain keeps {kinds}")
