"""`PREFIX.json`, the note that `pytrain prepare` leaves beside `PREFIX.bin` and `PREFIX.idx`.

Megatron's files say neither which tokenizer made them nor how much text they stand for; a corpus made by
another tool has no note, and then neither check nor bits per byte are available.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pytrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a prepared corpus is made of.

    documents: entries of the index, empty ones included; tokens: ids in `.bin`, end-of-document ids included;
    utf8_bytes: bytes of text, end-of-document ids not counted; sha256: of `.bin`; tokenizer_sha256: of the
    tokenizer file; vocabulary_size: pieces of that tokenizer.
    """

    documents: int
    tokens: int
    utf8_bytes: int
    sha256: str
    tokenizer_sha256: str
    vocabulary_size: int
    pytrain_version: str

    def write(self, path: Path) -> None:
        """Write and fsync the note as JSON; the caller renames it into place."""
        with path.open("x", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())


def sidecar_path(prefix: str | Path) -> Path:
    """`PREFIX.json`."""
    return Path(f"{prefix}.json")


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """The note beside `PREFIX.bin`, or None where another tool made the corpus.

    Raises UserError when the file exists and is not such a note.
    """
    path = sidecar_path(prefix)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object, not a {type(values).__name__}")
    known = {field.name: field.type for field in dataclasses.fields(Sidecar)}
    for name, kind in known.items():
        if name not in values:
            raise UserError(f"{path} has no key {name!r}: it was not written by `pytrain prepare`")
        if type(values[name]) is not kind:
            raise UserError(
                f"{path}: {name!r} is {values[name]!r}, which is not of type {getattr(kind, '__name__', kind)}"
            )
    return Sidecar(**{name: values[name] for name in known})


def check_tokenizer(
    prefix: str | Path, sidecar: Sidecar | None, tokenizer_sha256: str | None, vocabulary: int
) -> None:
    """Refuse a corpus of another tokenizer, or of more pieces than the model's vocabulary.

    Does nothing for a corpus without a note; `tokenizer_sha256` None leaves the first check out.
    """
    if sidecar is None:
        return
    if tokenizer_sha256 is not None and sidecar.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"{sidecar_path(prefix)}: the corpus was prepared with the tokenizer of sha256 "
            f"{sidecar.tokenizer_sha256[:16]}..., but this run's tokenizer has {tokenizer_sha256[:16]}...; "
            "prepare the corpus again or use its tokenizer"
        )
    if sidecar.vocabulary_size > vocabulary:
        raise UserError(
            f"{sidecar_path(prefix)}: the corpus was prepared with a tokenizer of {sidecar.vocabulary_size} "
            "pieces, "
            f"but the model's vocabulary is {vocabulary}"
        )
