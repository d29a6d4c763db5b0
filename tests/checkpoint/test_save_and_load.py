"""What was saved comes back: by any number of ranks, in any pieces, in another dtype, by the library."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from numpy.typing import NDArray

from pytrain.checkpoint import Checkpoint, TensorEntry, TensorPiece, required_bytes, save
from pytrain.errors import UserError
from tests.checkpoint_cases import (
    CONFIG_TEXT,
    ENTRIES,
    STATE,
    ThreadGroup,
    cut,
    empty_pieces,
    random_arrays,
    run_ranks,
    save_random,
    whole_pieces,
)


def read_all(checkpoint: Checkpoint) -> dict[str, bytes]:
    pieces = empty_pieces(ENTRIES)
    checkpoint.read_into(pieces)
    return {piece.tensor: piece.data.tobytes() for piece in pieces}


def as_bytes(arrays: dict[str, NDArray[Any]]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def test_round_trip(tmp_path: Path) -> None:
    arrays = save_random(tmp_path, 100, seed=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000100"]
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.folder == tmp_path / "checkpoints" / "step-000100"
    assert checkpoint.step == 100
    assert checkpoint.state == STATE
    assert checkpoint.config_text == CONFIG_TEXT
    assert checkpoint.manifest.model == {"family": "llama", "layers": 1}
    assert checkpoint.tensors() == {entry.tensor: entry for entry in ENTRIES}
    assert read_all(checkpoint) == as_bytes(arrays)
    checkpoint.verify()
    for entry in ENTRIES:
        value = checkpoint.read(entry.tensor)
        assert value.shape == entry.shape
        assert value.dtype == {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}[entry.dtype]
        assert value.tobytes() == arrays[entry.tensor].tobytes()
    sizes = sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))
    assert required_bytes(ENTRIES) == sizes


def test_the_library_reads_the_files(tmp_path: Path) -> None:
    arrays = save_random(tmp_path, 1, seed=2)
    folder = Checkpoint.open(tmp_path).folder
    seen = set()
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                value = opened.get_tensor(name)
                assert value.tobytes() == arrays[name].tobytes()
                assert (file.stem, value.shape) == next(
                    (entry.file, entry.shape) for entry in ENTRIES if entry.tensor == name
                )
                seen.add(name)
    assert seen == set(arrays)


@pytest.mark.parametrize("seed", range(5))
def test_any_ranks_write_and_any_ranges_are_read(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = random_arrays(ENTRIES, seed)
    size = int(random.integers(2, 6))
    parts = [
        part
        for piece in whole_pieces(ENTRIES, arrays)
        for part in cut(piece, sorted(random.integers(0, piece.count + 1, 4).tolist()))
    ]
    owner = random.integers(0, size, len(parts))

    def write(group: ThreadGroup) -> Path:
        mine = [part for part, rank in zip(parts, owner, strict=True) if rank == group.rank]
        return save(tmp_path, 7, mine, STATE, CONFIG_TEXT, group=group)

    assert run_ranks(size, write) == [tmp_path / "checkpoints" / "step-000007"] * size
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.verify()
    assert read_all(checkpoint) == as_bytes(arrays)

    wanted = [
        part
        for piece in empty_pieces(ENTRIES)
        for part in cut(piece, sorted(random.integers(0, piece.count + 1, 3).tolist()))
    ]
    chosen = [part for part in wanted if random.random() < 0.7]
    checkpoint.read_into(chosen)
    for part in chosen:
        assert part.data.tobytes() == arrays[part.tensor][part.first : part.first + part.count].tobytes()


def test_files_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    arrays = save_random(tmp_path / "one", 3, seed=3)
    pieces = [part for piece in whole_pieces(ENTRIES, arrays) for part in cut(piece, [3])]
    run_ranks(
        3,
        lambda group: save(tmp_path / "three", 3, pieces[group.rank :: 3], STATE, CONFIG_TEXT, group=group),
    )
    for file in (tmp_path / "one" / "checkpoints" / "step-000003").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "three" / "checkpoints" / "step-000003" / file.name).read_bytes()


def test_a_large_piece_is_verified_in_parts(tmp_path: Path) -> None:
    entry = TensorEntry("embed.weights", "embed.tokens", "fp32", (17, 2**20))
    data = np.arange(entry.elements, dtype=np.float32)
    save(tmp_path, 1, [TensorPiece(*entry, 0, data)], {}, "")
    checkpoint = Checkpoint.open(tmp_path)
    stored = checkpoint.manifest.files["embed.weights.safetensors"].pieces
    assert [piece.end - piece.begin for piece in stored] == [64 * 2**20, 4 * 2**20]
    part = TensorPiece(*entry, 2**24 - 5, np.zeros(10, np.float32))
    checkpoint.read_into([part])
    np.testing.assert_array_equal(part.data, data[2**24 - 5 : 2**24 + 5])


@pytest.mark.parametrize(
    ("stored", "asked", "numpy_type"),
    [("fp32", "bf16", ml_dtypes.bfloat16), ("fp32", "fp16", np.float16), ("bf16", "fp32", np.float32)],
)
def test_conversion_rounds_to_nearest(tmp_path: Path, stored: str, asked: str, numpy_type: type) -> None:
    random = np.random.default_rng(5)
    values = random.standard_normal(1001).astype(np.float32)
    data = values if stored == "fp32" else values.astype(ml_dtypes.bfloat16).view(np.uint16)
    save(tmp_path, 1, [TensorPiece("head.weights", "w", stored, (1001,), 0, data)], {}, "")
    checkpoint = Checkpoint.open(tmp_path)
    expected: NDArray[Any] = checkpoint.read("w").astype(numpy_type)
    storage = np.float32 if asked == "fp32" else np.uint16
    piece = TensorPiece("", "w", asked, (1001,), 0, np.zeros(1001, storage))
    with pytest.raises(UserError, match=f"^w is {stored} in the checkpoint .*step-000001, but {asked} is asked for$"):
        checkpoint.read_into([piece])
    checkpoint.read_into([piece], convert_dtype=True)
    np.testing.assert_array_equal(piece.data.view(numpy_type), expected)


def test_conversion_refuses_what_does_not_fit(tmp_path: Path) -> None:
    data = np.array([1.0, np.inf, -70000.0], np.float32)
    save(tmp_path, 1, [TensorPiece("head.weights", "w", "fp32", (3,), 0, data)], {}, "")
    piece = TensorPiece("", "w", "fp16", (3,), 0, np.zeros(3, np.uint16))
    with pytest.raises(UserError, match=r"^w has values up to 70000, beyond the range of fp16$"):
        Checkpoint.open(tmp_path).read_into([piece], convert_dtype=True)


def test_extra_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "words.model").write_bytes(b"a tokenizer")
    save(tmp_path, 1, [], {}, "", {"tokenizer.model": tmp_path / "words.model"})
    files = Checkpoint.open(tmp_path).extra_files()
    assert {name: path.read_bytes() for name, path in files.items()} == {"tokenizer.model": b"a tokenizer"}


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_random(tmp_path, 5, seed=1)
    arrays = save_random(tmp_path, 5, seed=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert read_all(Checkpoint.open(tmp_path)) == as_bytes(arrays)


def test_only_rank_0_opens_and_all_get_its_answer(tmp_path: Path) -> None:
    save_random(tmp_path, 5, seed=1)

    def load(group: ThreadGroup) -> Checkpoint:
        return Checkpoint.open(tmp_path if group.rank == 0 else "/nowhere", group)

    assert run_ranks(3, load) == [Checkpoint.open(tmp_path)] * 3
    missing = run_ranks(3, lambda group: Checkpoint.open(tmp_path / "missing", group))
    assert [type(error) for error in missing] == [UserError] * 3
    assert len({str(error) for error in missing}) == 1


def test_pieces_that_do_not_cover_a_tensor_are_a_mistake(tmp_path: Path) -> None:
    entry = TensorEntry("head.weights", "w", "fp32", (4, 2))
    whole = TensorPiece(*entry, 0, np.zeros(8, np.float32))
    for pieces, message in [
        (cut(whole, [3])[:1], "pieces of w end at element 3 of 8"),
        (cut(whole, [3])[1:], "pieces of w leave a gap at element 0"),
        ([whole, *cut(whole, [3])[1:]], "pieces of w overlap at element 8"),
        (
            [*cut(whole, [3])[:1], TensorPiece("x", "w", "fp32", (8,), 3, np.zeros(5, np.float32))],
            "disagree about w",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            save(tmp_path, 1, pieces, {}, "")
    wrong: list[tuple[int, NDArray[Any]]] = [
        (1, np.zeros(8, np.float32)),
        (0, np.zeros(8)),
        (0, np.zeros((4, 2), np.float32)),
    ]
    for first, data in wrong:
        with pytest.raises(ValueError, match=r"^piece of w: "):
            TensorPiece(*entry, first, data)
