"""Saves whose copy a thread writes: the same bytes as without, bounded memory, and errors that arrive."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytrain.checkpoint import Checkpoint, Saving, Snapshot, parts, save, start_save
from pytrain.errors import UserError
from tests.checkpoint_cases import (
    CONFIG_TEXT,
    ENTRIES,
    STATE,
    ThreadGroup,
    UnsyncedOperations,
    cut,
    random_arrays,
    run_ranks,
    save_random,
    whole_pieces,
)

TOTAL = sum(entry.bytes for entry in ENTRIES)
PART = 40
"""Bytes of a part in these tests: the larger tensors are several."""


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", PART)


class Watched(UnsyncedOperations):
    """Notes which thread writes how many bytes of tensors; may hold the thread of the save at its first write."""

    def __init__(self, hold: bool = False) -> None:
        self.caller = threading.current_thread()
        self.at_once = self.behind = 0
        self.go_on = threading.Event()
        self.writing = threading.Event()
        if not hold:
            self.go_on.set()

    def open(self, path: Path) -> int:
        """Of a tensor file, to write parts to it."""
        return super().open(path)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Count."""
        if threading.current_thread() is self.caller:
            self.at_once += len(data)
        else:
            self.writing.set()
            assert self.go_on.wait(20), "nobody let the thread go on"
            self.behind += len(data)
        super().write(descriptor, data, offset)


def begin(run: Path, step: int, seed: int, size: int, operations: Any = None, **more: Any) -> Saving:
    """Start a save of random content; the content changes at once when that returns."""
    arrays = random_arrays(ENTRIES, seed)
    pieces = whole_pieces(ENTRIES, arrays)
    snapshot = Snapshot(np.empty(size, np.uint8))
    operations = operations or UnsyncedOperations()
    saving = start_save(run, step, pieces, STATE, CONFIG_TEXT, operations=operations, snapshot=snapshot, **more)
    for array in arrays.values():
        array[:] = 0
    return saving


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("size", [0, 1, PART, 3 * PART + 7, TOTAL // 2, TOTAL - 1, TOTAL, 2 * TOTAL])
def test_the_same_bytes_as_written_at_once(tmp_path: Path, size: int) -> None:
    """Manifest included, and although the originals change while the thread has not written anything yet."""
    save_random(tmp_path / "at once", 7, seed=3)
    operations = Watched(hold=True)
    saving = begin(tmp_path / "behind", 7, 3, size, operations)
    written = operations.at_once
    assert not (tmp_path / "behind/checkpoints/step-000007").exists()
    operations.go_on.set()
    assert saving.finish() == tmp_path / "behind/checkpoints/step-000007"
    one, other = (contents(tmp_path / name / "checkpoints/step-000007") for name in ("at once", "behind"))
    assert one == other
    # What is beyond the snapshot was written before the save was begun, and no more of it than need be.
    headers = sum(file.header.bytes for file in Checkpoint.open(tmp_path / "behind").manifest.files.values())
    at_once = written - headers
    assert at_once == max(TOTAL - size, 0) or (size < TOTAL and TOTAL - size <= at_once < TOTAL - size + PART)
    assert operations.behind == TOTAL - at_once + len(CONFIG_TEXT)  # and the small file is written behind too


def test_several_ranks_write_the_same_files(tmp_path: Path, random: np.random.Generator) -> None:
    arrays = random_arrays(ENTRIES, 5)
    save(tmp_path / "alone", 1, whole_pieces(ENTRIES, arrays), STATE, CONFIG_TEXT, operations=UnsyncedOperations())
    own: list[list[Any]] = [[], [], []]
    for piece in whole_pieces(ENTRIES, arrays):
        for number, part in enumerate(cut(piece, sorted(random.integers(0, piece.count, 2).tolist()))):
            own[(number + piece.count) % 3].append(part)

    def one(group: ThreadGroup) -> Path:
        snapshot = Snapshot(np.empty(group.rank * TOTAL // 5, np.uint8))
        saving = start_save(
            tmp_path / "three",
            1,
            own[group.rank],
            STATE,
            CONFIG_TEXT,
            group=group,
            operations=UnsyncedOperations(),
            snapshot=snapshot,
        )
        return saving.finish()

    assert run_ranks(3, one) == [tmp_path / "three/checkpoints/step-000001"] * 3
    one_file, others = (contents(tmp_path / name / "checkpoints/step-000001") for name in ("alone", "three"))
    assert one_file.keys() == others.keys()
    for name in one_file:
        if name.endswith(".safetensors"):
            assert one_file[name] == others[name]
    Checkpoint.open(tmp_path / "three").verify()


def test_the_snapshot_serves_one_save_after_the_other(tmp_path: Path) -> None:
    snapshot = Snapshot(np.empty(TOTAL, np.uint8))
    for step in (1, 2, 3):
        pieces = whole_pieces(ENTRIES, random_arrays(ENTRIES, step))
        operations = Watched()
        start_save(tmp_path, step, pieces, STATE, CONFIG_TEXT, operations=operations, snapshot=snapshot).finish()
        assert operations.behind == TOTAL + len(CONFIG_TEXT)
    for step in (1, 2, 3):
        stored = Checkpoint.open(tmp_path / f"checkpoints/step-00000{step}")
        stored.verify()
        assert stored.read("embed.tokens").tobytes() == random_arrays(ENTRIES, step)["embed.tokens"].tobytes()


def test_signs_of_life_come_from_the_caller(tmp_path: Path) -> None:
    signs: list[threading.Thread] = []
    saving = begin(tmp_path, 1, 1, TOTAL // 2, moved=lambda: signs.append(threading.current_thread()))
    assert len(signs) >= TOTAL // 2 // PART
    saving.finish()
    assert set(signs) == {threading.current_thread()}


class FailingBehind(UnsyncedOperations):
    """The thread's second write fails."""

    def __init__(self, error: BaseException, rank: int = 0) -> None:
        self.caller = threading.current_thread()
        self.error = error
        self.writes = 0

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Fail in the thread alone."""
        if threading.current_thread() is not self.caller:
            self.writes += 1
            if self.writes == 2:
                raise self.error
        super().write(descriptor, data, offset)


def test_a_full_disk_behind_is_one_sentence(tmp_path: Path) -> None:
    before = save_random(tmp_path, 1, seed=1)
    saving = begin(tmp_path, 2, 2, TOTAL, FailingBehind(OSError(28, "No space left on device")))
    goes_on = "; once that is mended, --resume auto goes on from /.*/checkpoints/step-000001$"
    sentence = rf"^/.*step-000002.partial/\S* cannot be written: No space left on device{goes_on}"
    with pytest.raises(UserError, match=sentence):
        saving.finish()
    assert saving.failed
    assert Checkpoint.open(tmp_path).read("embed.tokens").tobytes() == before["embed.tokens"].tobytes()
    save_random(tmp_path, 3, seed=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003"]


def test_an_exception_behind_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    saving = begin(tmp_path, 2, 2, TOTAL, FailingBehind(RuntimeError("deliberate")))
    with pytest.raises(RuntimeError, match="deliberate"):
        saving.finish()
    assert not list((tmp_path / "checkpoints").glob("step-??????"))


@pytest.mark.parametrize("size", [0, TOTAL])
def test_all_ranks_hear_of_the_one_that_could_not_write(tmp_path: Path, size: int) -> None:
    save_random(tmp_path, 1, seed=1)
    pieces = whole_pieces(ENTRIES, random_arrays(ENTRIES, 2))

    class Full(UnsyncedOperations):
        """For rank 1 alone."""

        def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
            """No."""
            raise OSError(28, "No space left on device")

    def one(group: ThreadGroup) -> Path:
        saving = start_save(
            tmp_path,
            2,
            pieces[group.rank :: 2],
            STATE,
            CONFIG_TEXT,
            group=group,
            operations=Full() if group.rank else UnsyncedOperations(),
            snapshot=Snapshot(np.empty(size, np.uint8)),
        )
        return saving.finish()

    errors = run_ranks(2, one)
    assert [type(error) for error in errors] == [UserError, UserError]
    assert len({str(error) for error in errors}) == 1
    assert "cannot be written: No space left on device" in str(errors[0])
    assert Checkpoint.open(tmp_path).step == 1


def test_what_is_abandoned_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_random(tmp_path, 1, seed=1)
    operations = Watched(hold=True)
    saving = begin(tmp_path, 2, 2, TOTAL, operations)
    assert operations.writing.wait(20)
    assert saving.under_way
    release = threading.Timer(0.05, operations.go_on.set)
    release.start()
    saving.abandon()
    release.join()
    assert not saving.under_way
    assert operations.behind <= 2 * PART  # the part that was under way, and no other
    assert Checkpoint.open(tmp_path).step == 1
    save_random(tmp_path, 3, seed=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003"]


class Synced(UnsyncedOperations):
    """Notes which tensor files are synced."""

    def __init__(self) -> None:
        self.synced: set[str] = set()
        self._names: dict[int, str] = {}

    def open(self, path: Path) -> int:
        """Note its name."""
        descriptor = super().open(path)
        self._names[descriptor] = path.name
        return descriptor

    def sync(self, descriptor: int) -> None:
        """Note it; small files are created, not opened."""
        if descriptor in self._names:
            self.synced.add(self._names[descriptor])

    def close(self, descriptor: int) -> None:
        """The number may come again."""
        self._names.pop(descriptor, None)
        super().close(descriptor)


@pytest.mark.parametrize("size", [None, 0, PART, TOTAL])
def test_headers_reach_the_disk_where_others_write_the_tensors(tmp_path: Path, size: int | None) -> None:
    """Rank 0 writes the headers of all files, so it syncs all of them, though it has nothing in most."""
    pieces = whole_pieces(ENTRIES, random_arrays(ENTRIES, 2))
    operations = [Synced(), Synced()]

    def one(group: ThreadGroup) -> Path:
        snapshot = None if size is None else Snapshot(np.empty(size, np.uint8))
        own = pieces[:1] if group.rank == 0 else pieces[1:]
        saving = start_save(
            tmp_path,
            2,
            own,
            STATE,
            CONFIG_TEXT,
            group=group,
            operations=operations[group.rank],
            snapshot=snapshot,
        )
        return saving.finish()

    run_ranks(2, one)
    files = set(Checkpoint.open(tmp_path).manifest.files)
    assert [each.synced for each in operations] == [files, files - {"embed.weights.safetensors"}]
