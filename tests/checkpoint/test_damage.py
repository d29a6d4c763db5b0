"""Bad input: each ends in one sentence that names the file, the tensor or the key, and changes nothing on "
"disk."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pytrain.checkpoint import Checkpoint, TensorPiece, find_checkpoint, newest_checkpoint
from pytrain.checkpoint.manifest import FORMAT_VERSION
from pytrain.errors import UserError
from tests.checkpoint_cases import ENTRIES, empty_pieces, save_random

WEIGHTS = "layer_000.weights.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of step 2, after one of step 1 that has to stay as it is."""
    save_random(tmp_path, 1, seed=1)
    save_random(tmp_path, 2, seed=2)
    return tmp_path / "checkpoints" / "step-000002"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(action: Callable[[], object], pattern: str) -> None:
    """The action raises a UserError of one line that matches the whole pattern."""
    with pytest.raises(UserError) as caught:
        action()
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


def flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("file", [WEIGHTS, "embed.weights.safetensors", "config.toml", "manifest.json"])
def test_truncated_file(folder: Path, file: str) -> None:
    before = contents(folder.with_name("step-000001"))
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-1])
    size = len(content)
    expected = f".*step-000002/{file} is truncated: it has {size - 1} bytes, not {size}"
    if file == "manifest.json":
        expected = ".*step-000002/manifest.json is damaged: .*"
    refused(lambda: Checkpoint.open(folder.parent.parent), expected)
    assert contents(folder.with_name("step-000001")) == before
    Checkpoint.open(folder.with_name("step-000001")).verify()


def test_missing_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(lambda: Checkpoint.open(folder), f".*/{WEIGHTS} is missing, but the checkpoint's manifest lists it")


def test_file_removed_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / WEIGHTS).unlink()
    refused(checkpoint.verify, f".*/{WEIGHTS} cannot be read: No such file or directory")


def test_file_truncated_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3])
    refused(checkpoint.verify, f".*/{WEIGHTS} is damaged: bytes .*")


def test_flipped_bit_in_a_tensor_is_named(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    file = checkpoint.manifest.files[WEIGHTS]
    for name, begin in file.begins.items():
        flip(folder / WEIGHTS, begin + 3)
        expected = (
            f".*step-000002/{WEIGHTS} is damaged: bytes {begin} to [0-9]+, of {name}, are not those that were written"
        )
        refused(checkpoint.verify, expected)
        refused(lambda name=name: checkpoint.read(name), expected)  # type: ignore[misc]
        others = [piece for piece in empty_pieces(ENTRIES) if piece.tensor != name]
        checkpoint.read_into(others)
        flip(folder / WEIGHTS, begin + 3)
    checkpoint.verify()


def test_flipped_bit_outside_the_range_that_is_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    entry = next(entry for entry in ENTRIES if entry.tensor == "embed.tokens")
    file = checkpoint.manifest.files["embed.weights.safetensors"]
    flip(folder / "embed.weights.safetensors", file.bytes - 1)
    piece = TensorPiece(*entry, 0, np.zeros(2, np.float32))
    refused(lambda: checkpoint.read_into([piece]), ".* of embed.tokens, are not those that were written")


@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit_is_found(folder: Path, seed: int) -> None:
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(25):
            byte, bit = int(random.integers(len(whole))), int(random.integers(8))
            flip(path, byte, bit)
            with pytest.raises(UserError, match=re.escape(path.name)):
                Checkpoint.open(folder).verify()
            path.write_bytes(whole)
    Checkpoint.open(folder).verify()


def test_flipped_bit_in_the_header(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    flip(folder / WEIGHTS, 40)
    refused(
        lambda: checkpoint.read("layer.0.norm1.weight"),
        f".*/{WEIGHTS} is damaged: its header is not the one that was written",
    )


def test_newer_format(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    newer = FORMAT_VERSION + 1
    (folder / "manifest.json").write_text(text.replace('"version": 1', f'"version": {newer}'))
    refused(
        lambda: Checkpoint.open(folder),
        f".*/manifest.json has format version {newer}, but this pytrain reads up to {FORMAT_VERSION}; use "
        "the version of pytrain that wrote it, or a newer one",
    )


def test_manifest_is_json_and_sealed(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    assert values["state"]["samples"] == 640
    values["state"]["samples"] = 641
    (folder / "manifest.json").write_text(json.dumps(values))
    refused(lambda: Checkpoint.open(folder), ".*/manifest.json is damaged: its text does not have the sha256 .*")
    (folder / "manifest.json").write_text("[]")
    refused(lambda: Checkpoint.open(folder), ".*/manifest.json is not the manifest of a pytrain checkpoint")


def test_tokenizer_mismatch(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_tokenizer("ab" * 32, "a.model")
    refused(
        lambda: checkpoint.check_tokenizer("cd" * 32, "a.model"),
        r"the tokenizer a.model \(sha256 cdcdcdcdcdcdcdcd\.\.\.\) does not match the checkpoint "
        r".*step-000002, which was trained with another \(sha256 abababababababab\.\.\.\)",
    )


def test_wrong_shape_and_missing_tensor(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    piece = TensorPiece("embed.weights", "embed.tokens", "fp32", (14, 7), 0, np.zeros(98, np.float32))
    refused(
        lambda: checkpoint.read_into([piece]),
        r"embed.tokens has shape \[13, 7\] in the checkpoint .*step-000002, but shape \[14, 7\] in the model",
    )
    missing = TensorPiece("head.weights", "head.weight", "fp32", (1,), 0, np.zeros(1, np.float32))
    refused(lambda: checkpoint.read_into([missing]), "the checkpoint .*step-000002 has no tensor head.weight")
    refused(lambda: checkpoint.read("head.weight"), "the checkpoint .*step-000002 has no tensor head.weight")


def test_no_checkpoint(tmp_path: Path, folder: Path) -> None:
    refused(lambda: find_checkpoint(tmp_path / "no"), ".*/no does not exist, so it is no checkpoint")
    (tmp_path / "file").touch()
    refused(lambda: find_checkpoint(tmp_path / "file"), ".*/file is not a folder, so it is no checkpoint")
    (tmp_path / "empty").mkdir()
    refused(lambda: find_checkpoint(tmp_path / "empty"), ".*/empty is not a whole checkpoint: it holds no .*")
    (folder / "manifest.json").unlink()
    refused(
        lambda: find_checkpoint(folder),
        ".*step-000002 is not a whole checkpoint: it has no manifest.json; .*",
    )
    assert newest_checkpoint(tmp_path) == folder.with_name("step-000001")
    assert Checkpoint.open(tmp_path).step == 1
    assert Checkpoint.open(tmp_path / "checkpoints").step == 1
