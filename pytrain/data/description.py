"""What a corpus holds, as text for people."""

from pathlib import Path

from pytrain.data.indexed import IndexedDataset
from pytrain.data.sidecar import read_sidecar

ENDINGS = (".bin", ".idx")


def corpus_prefix(path: Path) -> Path | None:
    """The prefix of the corpus that a path names, with or without an ending; None where there is none.

    A folder is not a corpus, whatever lies beside it.
    """
    prefix = path.with_suffix("") if path.suffix in ENDINGS else path
    return prefix if not path.is_dir() and any(Path(f"{prefix}{ending}").is_file() for ending in ENDINGS) else None


def describe(prefix: Path) -> str:
    """Size, ids and origin of a corpus, a line each; reads the whole index, and of the tokens every one.

    Raises:
        UserError: the files do not belong together, or the note beside them is none.
    """
    data = IndexedDataset(prefix)
    note = read_sidecar(prefix)
    tokens = len(data.tokens)
    lines = [
        ("corpus", f"{prefix}.bin and .idx"),
        ("documents", f"{data.documents:,}"),
        ("tokens", f"{tokens:,} of {data.dtype.itemsize} bytes each"),
        ("largest id", f"{data.max_token():,}" if tokens else "none: the corpus is empty"),
    ]
    if note is None:
        lines.append(("note", f"none ({prefix}.json): tokenizer and bytes of text are not known"))
    else:
        per_token = f", {note.utf8_bytes / tokens:.2f} per token" if tokens else ""
        lines += [
            ("text", f"{note.utf8_bytes:,} bytes of UTF-8{per_token}"),
            ("tokenizer", f"{note.vocabulary_size:,} tokens, sha256 {note.tokenizer_sha256}"),
            ("prepared by", f"pytrain {note.pytrain_version}"),
        ]
    return "\n".join(f"{name + ':':12} {value}" for name, value in lines)
