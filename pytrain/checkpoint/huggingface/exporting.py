"""A checkpoint as a folder that transformers loads."""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytrain.checkpoint.files import FileOperations, memory_of, naming, write_file
from pytrain.checkpoint.header import layout_file
from pytrain.checkpoint.huggingface.configuration import TOKEN_IDS, export_model
from pytrain.checkpoint.huggingface.names import Match, matches
from pytrain.checkpoint.huggingface.tokenizer import end_of_document, generated_files
from pytrain.checkpoint.huggingface.weights import INDEX, SINGLE
from pytrain.checkpoint.pieces import Progress, TensorEntry
from pytrain.checkpoint.reader import Checkpoint
from pytrain.checkpoint.store import PARTIAL
from pytrain.config import ModelConfig, build_model
from pytrain.errors import UserError

SHARD_BYTES = 5 * 10**9  # what transformers calls "5GB", and loads comfortably


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """The shape of the model in a checkpoint, from the configuration saved with it."""
    source = f"{checkpoint.folder}/config.toml"
    return build_model(tomllib.loads(checkpoint.config_text)["model"], source)


def export_huggingface(
    checkpoint: Checkpoint,
    folder: str | Path,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `folder` with config.json, safetensors and tokenizer; one tensor is in memory at a time.

    Weights keep their dtype. The folder gets its name when it is whole, and must not exist (or be empty)
    before.

    Raises:
        UserError: the folder exists or cannot be written, the checkpoint is damaged, or transformers has no
            such model.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name a folder that does not")
    model = model_of(checkpoint)
    entries = _their_entries(checkpoint, matches(model))
    token_ids = _token_ids(checkpoint)
    config = export_model(model, next(iter(entries.values())).dtype, token_ids)
    operations = FileOperations()
    partial = folder.with_name(folder.name + PARTIAL)
    with naming(partial, "written to"):
        if partial.exists():
            operations.remove_folder(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    write_file(operations, partial / "config.json", _json(config))
    for name, content in _small_files(checkpoint, token_ids).items():
        write_file(operations, partial / name, content)
    _write_weights(checkpoint, partial, _shards(model, entries, shard_bytes), operations, progress)
    with naming(folder, "written to"):
        operations.sync_folder(partial)
        partial.replace(folder)
        operations.sync_folder(folder.parent)
    return folder


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """Those of the model that was imported, else of the tokenizer: the end of a document also begins the "
    "next."""
    imported: dict[str, Any] | None = checkpoint.state.get("huggingface")
    if imported is not None:
        return imported
    end = end_of_document(checkpoint.extra_files())
    return dict(zip(TOKEN_IDS, (end, end, None), strict=True))


def _small_files(checkpoint: Checkpoint, token_ids: Mapping[str, Any]) -> dict[str, bytes]:
    """Files copied from the checkpoint, and those that transformers needs but the checkpoint has not."""
    contents = {}
    for name, path in checkpoint.extra_files().items():
        with naming(path, "read"):
            contents[name] = path.read_bytes()
    generation = {key: value for key, value in token_ids.items() if value is not None}
    return {"generation_config.json": _json(generation), **generated_files(contents), **contents}


def _their_entries(checkpoint: Checkpoint, wanted: Iterable[Match]) -> dict[str, TensorEntry]:
    """Their tensors by name, with shape and dtype; the file is filled in later."""
    ours = checkpoint.tensors()
    entries = {}
    for match in wanted:
        for name in match.ours:
            if name not in ours:
                raise UserError(f"the checkpoint {checkpoint.folder} has no tensor {name}")
        first = ours[match.ours[0]]
        shape = (sum(ours[name].shape[0] for name in match.ours), *first.shape[1:])
        entries[match.theirs] = TensorEntry("", match.theirs, first.dtype, shape[::-1] if match.transposed else shape)
    return entries


def _shards(
    model: ModelConfig, entries: Mapping[str, TensorEntry], shard_bytes: int
) -> dict[str, list[tuple[Match, TensorEntry]]]:
    """Their tensors by file, in the model's order; a file is closed before it would pass `shard_bytes`."""
    groups: list[list[tuple[Match, TensorEntry]]] = [[]]
    size = 0
    for match in matches(model):
        entry = entries[match.theirs]
        if groups[-1] and size + entry.bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append((match, entry))
        size += entry.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def _write_weights(
    checkpoint: Checkpoint,
    folder: Path,
    shards: Mapping[str, list[tuple[Match, TensorEntry]]],
    operations: FileOperations,
    progress: Progress | None,
) -> None:
    total = sum(entry.bytes for group in shards.values() for _, entry in group)
    done = 0
    for file, group in shards.items():
        layout = layout_file(entry for _, entry in group)
        path = folder / file
        with naming(path, "written"):
            descriptor = operations.create(path)
            try:
                operations.write(descriptor, layout.header, 0)
                for match, entry in group:
                    data = _their_tensor(checkpoint, match)
                    operations.write(descriptor, memory_of(data), layout.begins[entry.tensor])
                    done += entry.bytes
                    if progress is not None:
                        progress(done, total)
                operations.sync(descriptor)
            finally:
                operations.close(descriptor)
    if len(shards) > 1:
        files = {entry.tensor: file for file, group in shards.items() for _, entry in group}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        write_file(operations, folder / INDEX, _json(index))


def _their_tensor(checkpoint: Checkpoint, match: Match) -> NDArray[Any]:
    """One of their tensors, contiguous, as unsigned integers of its width: the bytes matter, not the "
    "numbers."""
    parts = [checkpoint.read(name) for name in match.ours]
    joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
    turned = np.ascontiguousarray(joined.T) if match.transposed else joined
    return turned.view(f"u{turned.dtype.itemsize}")
