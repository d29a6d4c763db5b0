"""A folder of transformers as a run that holds one checkpoint, of step 0, to train onward from."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytrain.checkpoint.companions import NAMES, file_sha256, find_tokenizer
from pytrain.checkpoint.files import naming
from pytrain.checkpoint.huggingface.configuration import TOKEN_IDS, import_model, read_json
from pytrain.checkpoint.huggingface.names import HEAD, IGNORED, Match, matches
from pytrain.checkpoint.huggingface.weights import Stored, WeightFiles, check_dtype
from pytrain.checkpoint.parameters import weight_entries
from pytrain.checkpoint.pieces import Progress, TensorEntry, convert
from pytrain.checkpoint.store import check_writable, free_bytes, newest_checkpoint, required_bytes
from pytrain.checkpoint.writer import save
from pytrain.config import ModelConfig, build, resolved_toml
from pytrain.data.tokenizer import is_sentencepiece
from pytrain.errors import UserError

RUN_TOML = "run.toml"
TOKENIZER_FOLDER = "tokenizer"
# Where the run.toml expects the corpora, which nobody but the user can name.
TRAIN_PREFIX = "data/train"


@dataclass(frozen=True)
class ImportedRun:
    """What an import wrote.

    checkpoint: RUN/checkpoints/step-000000. run_toml: RUN/run.toml, in which the corpora have to be named.
    tokenizer: the file in RUN/tokenizer, None where the model came without one. widened: the dtypes that were found
    where there were several, all of which became fp32; else empty.
    """

    checkpoint: Path
    run_toml: Path
    tokenizer: Path | None
    widened: tuple[str, ...] = ()


@dataclass(frozen=True)
class _ImportedPiece:
    """A whole tensor of ours, read from theirs when it is written."""

    entry: TensorEntry
    read: Callable[[], NDArray[Any]]
    first: int = 0

    @property
    def count(self) -> int:
        return self.entry.elements

    @property
    def data(self) -> NDArray[Any]:
        return self.read()


def import_huggingface(folder: str | Path, run_folder: str | Path, progress: Progress | None = None) -> ImportedRun:
    """Make a run of a GPT-2 or LLaMA model: weights in their dtype, configuration, tokenizer.

    Where tensors differ in dtype all become fp32, which loses nothing: training has one type for all.

    Raises:
        UserError: a file is missing or malformed, the model is one that pytrain does not compute, a tensor is
            missing,
            has another shape or no place in the model, or the run folder already holds a checkpoint.
    """
    folder, run_folder = Path(folder), Path(run_folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json, so it is not a model in Hugging Face form")
    existing = newest_checkpoint(run_folder)
    if existing is not None:
        raise UserError(f"{run_folder} already holds the checkpoint {existing.name}; name another run folder")
    model = import_model(folder / "config.json")
    source = _with_prefix(WeightFiles.open(folder), model)
    shapes = {entry.tensor: entry for entry in weight_entries(model, "fp32")}
    pieces = list(_pieces(source, model, shapes, progress))
    needed, free = required_bytes(piece.entry for piece in pieces), free_bytes(run_folder)
    if needed > free:
        raise UserError(f"{run_folder}: the checkpoint needs {needed} bytes, and {free} are free")
    check_writable(run_folder)
    companions = _companions(folder)
    tokenizer = _copy_tokenizer(companions, run_folder / TOKENIZER_FOLDER)
    dtype = next(piece.entry.dtype for piece in pieces if piece.entry.tensor == "embed.tokens")
    text = _run_toml(run_folder, model, dtype, tokenizer)
    config = read_json(folder / "config.json")
    state = {
        "samples": 0,
        "tokens": 0,
        "tokenizer_sha256": file_sha256(tokenizer) if tokenizer else None,
        "huggingface": {key: config.get(key) for key in TOKEN_IDS},
    }
    checkpoint = save(run_folder, 0, pieces, state, text, companions)
    with naming(run_folder / RUN_TOML, "written"):
        (run_folder / RUN_TOML).write_text(text, encoding="utf-8")
    found = _dtypes(source, model)
    return ImportedRun(checkpoint, run_folder / RUN_TOML, tokenizer, found if len(found) > 1 else ())


def _with_prefix(source: WeightFiles, model: ModelConfig) -> WeightFiles:
    """The same, less the buffers that are ignored; GPT-2 files from the hub lack "transformer." in the "
    "names."""
    tensors = {}
    for name, stored in source.tensors.items():
        if name.endswith(IGNORED[model.family]):
            continue
        bare = model.family == "gpt2" and name != HEAD and not name.startswith("transformer.")
        tensors[f"transformer.{name}" if bare else name] = stored
    return WeightFiles(source.folder, tensors)


def _pieces(
    source: WeightFiles, model: ModelConfig, shapes: Mapping[str, TensorEntry], progress: Progress | None
) -> Iterator[_ImportedPiece]:
    """Our tensors, each with the way to read it; all names, shapes and dtypes are checked before anything "
    "is read."""
    wanted = matches(model)
    for match in wanted:
        if match.theirs not in source.tensors:
            raise UserError(f"{source.folder} has no tensor {match.theirs}")
        _check(match, source.tensors[match.theirs], shapes)
    known = {match.theirs for match in wanted}
    for name in source.tensors:
        if name == HEAD and model.tied_head:
            _check_tied(source, wanted)
        elif name not in known:
            raise UserError(
                f"{source.tensors[name].file} holds the tensor {name}, which has no place in a "
                f"{model.family} model of {model.layers} layers"
            )
    found = _dtypes(source, model)
    dtype = found[0] if len(found) == 1 else "fp32"
    total = sum(entry._replace(dtype=dtype).bytes for entry in shapes.values())
    done = 0
    for match in wanted:
        begin = 0
        for name in match.ours:
            entry = shapes[name]._replace(dtype=dtype)
            done += entry.bytes
            yield _ImportedPiece(entry, _reader(source, match, begin, entry, (done, total), progress))
            begin += entry.shape[0]


def _dtypes(source: WeightFiles, model: ModelConfig) -> tuple[str, ...]:
    """Those of the tensors of the model, each once; a head stored beside the embedding that it is tied to is none."""
    return tuple(sorted({source.tensors[match.theirs].dtype for match in matches(model)}))


def _reader(
    source: WeightFiles,
    match: Match,
    begin: int,
    entry: TensorEntry,
    done: tuple[int, int],
    progress: Progress | None,
) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        theirs = source.read(match.theirs)
        turned = theirs.T if match.transposed else theirs
        data = np.ascontiguousarray(turned[begin : begin + entry.shape[0]]).ravel()
        stored = source.tensors[match.theirs].dtype
        if stored != entry.dtype:
            data = convert(data, stored, entry.dtype, entry.tensor)
        if progress is not None:
            progress(*done)
        return data

    return read


def _check(match: Match, stored: Stored, shapes: Mapping[str, TensorEntry]) -> None:
    check_dtype(match.theirs, stored)
    first = shapes[match.ours[0]].shape
    expected = (sum(shapes[name].shape[0] for name in match.ours), *first[1:])
    if match.transposed:
        expected = expected[::-1]
    if stored.shape != expected:
        raise UserError(
            f"{stored.file}: {match.theirs} has shape {list(stored.shape)}, but config.json makes it {list(expected)}"
        )


def _check_tied(source: WeightFiles, wanted: list[Match]) -> None:
    embedding = next(match.theirs for match in wanted if match.ours == ("embed.tokens",))
    if not np.array_equal(source.read(HEAD), source.read(embedding)):
        raise UserError(
            f"{source.tensors[HEAD].file}: {HEAD} differs from {embedding}, but config.json ties the two "
            f"(tie_word_embeddings)"
        )


def _companions(folder: Path) -> dict[str, Path]:
    """The tokenizer's files, the one that pytrain is to load first; others are kept for an export.

    SentencePiece's own format comes first, because reading it needs no further package; as in `load_tokenizer`.
    """
    found = {name: folder / name for name in NAMES if (folder / name).is_file()}
    model = found.pop("tokenizer.model", None)
    if model is not None and is_sentencepiece(model):
        return {"tokenizer.model": model, **found}
    return found


def _copy_tokenizer(companions: Mapping[str, Path], folder: Path) -> Path | None:
    """Copy the files to where no bounding of the disk deletes them; the path of the tokenizer there."""
    tokenizer = find_tokenizer(companions)
    if tokenizer is None:
        return None
    with naming(folder, "written to"):
        folder.mkdir(exist_ok=True)
        for name, path in companions.items():
            shutil.copyfile(path, folder / name)
    return folder / tokenizer.name


def _run_toml(run_folder: Path, model: ModelConfig, dtype: str, tokenizer: Path | None) -> str:
    """A whole configuration around the model; learning rate and length suit a first try on more text."""
    missing = (
        "" if tokenizer else "\n# The model came without a tokenizer that pytrain reads: name one in [tokenizer]."
    )
    config = build(
        {
            "run": {"folder": str(run_folder), "steps": 1000},
            "model": model.model_dump(exclude_none=True),
            "tokenizer": {"path": str(tokenizer or run_folder / TOKENIZER_FOLDER / "tokenizer.json")},
            "data": {"train": [TRAIN_PREFIX], "sequence_length": min(model.context, 1024)},
            "batch": {"micro_batch": 1, "global_batch": 8},
            "learning_rate": {"peak": 2e-5, "warmup_steps": 50},
            "precision": {"dtype": dtype},
            "checkpoint": {"every": 200},
        },
        "imported model",
    )
    return (
        f"# An imported model. To train it onward, prepare a corpus and name it in "
        f"[[data.train]].{missing}\n\n" + resolved_toml(config)
    )
