"""The tokenizer that goes with a checkpoint, and the files that transformers keeps beside a tokenizer."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pytrain.checkpoint.files import naming

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
NAMES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def tokenizer_files(path: str | Path) -> dict[str, Path]:
    """What `save` takes as `extra_files` for the tokenizer at `path`: name in the checkpoint -> file.

    A tokenizer.json or tokenizer.model brings along what lies beside it of NAMES: which token ends a
    document, a chat template. Any other name is a file of its own, and becomes "tokenizer" with its suffix.
    """
    path = Path(path)
    files = {"tokenizer" + path.suffix: path}
    if path.name in files:
        files |= {name: path.with_name(name) for name in NAMES if path.with_name(name).is_file()}
    elif path.suffix == ".json" and path.with_name("tokenizer_config.json").is_file():
        files["tokenizer_config.json"] = path.with_name("tokenizer_config.json")
    return files


def find_tokenizer(files: Mapping[str, Path]) -> Path | None:
    """The tokenizer among the files of a checkpoint, in the order in which they were given to `save`."""
    return next((path for name, path in files.items() if name in TOKENIZERS), None)


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with naming(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
