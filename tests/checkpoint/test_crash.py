"""A crash at every step of a save or a deletion: what is found afterwards is a whole checkpoint, old or "
"new."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pytrain.checkpoint import Checkpoint, FileOperations, Snapshot, newest_checkpoint, prune, save, start_save
from pytrain.errors import UserError
from tests.checkpoint_cases import (
    CONFIG_TEXT,
    ENTRIES,
    STATE,
    UnsyncedOperations,
    empty_pieces,
    random_arrays,
    save_random,
    whole_pieces,
)

# What the machine loses. "process": nothing that was asked for. "power": file contents and new names that
# were not synced. "renames": these, and renames that were not synced.
LOSSES = ("process", "power", "renames")


class Crash(BaseException):
    """The process is gone: nothing may catch this."""


class CrashingOperations(UnsyncedOperations):
    """Counts the operations and crashes in the one that is number `crash_at`; half of a write or deletion "
    "is done."""

    def __init__(self, crash_at: int | None, loss: str) -> None:
        self.crash_at = crash_at
        self.loss = loss
        self.done: list[str] = []
        self.crashed = False
        self._paths: dict[int, Path] = {}
        self._unsynced_content: set[Path] = set()
        self._unsynced_names: set[Path] = set()
        self._unsynced_renames: list[tuple[Path, Path]] = []

    def _step(self, name: str, half: Callable[[], None] = lambda: None) -> None:
        if len(self.done) == self.crash_at:
            half()
            self.crashed = True
            self._lose()
            raise Crash
        if not self.crashed:
            self.done.append(name)

    def _lose(self) -> None:
        if self.loss == "process":
            return
        for path in self._unsynced_content:
            if path.is_file():
                os.truncate(path, 0)
        for path in self._unsynced_names:
            if path.is_file():
                path.unlink()
        if self.loss == "renames":
            for source, target in reversed(self._unsynced_renames):
                target.rename(source)

    def make_folder(self, path: Path) -> None:
        self._step("make_folder")
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._step("create")
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self._unsynced_names.add(path)
        self._unsynced_content.add(path)
        return descriptor

    def open(self, path: Path) -> int:
        self._step("open")
        descriptor = super().open(path)
        self._paths[descriptor] = path
        return descriptor

    def truncate(self, descriptor: int, size: int) -> None:
        self._step("truncate")
        self._unsynced_content.add(self._paths[descriptor])
        super().truncate(descriptor, size)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._unsynced_content.add(self._paths[descriptor])
        self._step(
            "write",
            lambda: super(CrashingOperations, self).write(descriptor, data[: len(data) // 2], offset),
        )
        super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self._step("sync")
        self._unsynced_content.discard(self._paths[descriptor])

    def close(self, descriptor: int) -> None:
        try:
            if not self.crashed:  # else the program only gives back what a dead process loses anyway
                self._step("close")
        finally:
            super().close(descriptor)

    def sync_folder(self, path: Path) -> None:
        self._step("sync_folder")
        self._unsynced_names = {name for name in self._unsynced_names if name.parent != path}
        self._unsynced_renames = [pair for pair in self._unsynced_renames if pair[1].parent != path]

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

        def moved(path: Path) -> Path:
            return target / path.relative_to(source) if path.is_relative_to(source) else path

        self._unsynced_content = {moved(path) for path in self._unsynced_content}
        self._unsynced_names = {moved(path) for path in self._unsynced_names}
        self._unsynced_renames.append((source, target))

    def remove_folder(self, path: Path) -> None:
        self._step("remove_folder", lambda: sorted(path.iterdir())[-1].unlink())  # the manifest is not the last
        super().remove_folder(path)


@dataclass
class Scene:
    """A run, what its checkpoints may hold afterwards (by step), and what to do to it."""

    run: Path
    allowed: dict[int, list[dict[str, bytes]]]
    act: Callable[[FileOperations], object]
    may_be_empty: bool = False


def as_bytes(seed: int) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in random_arrays(ENTRIES, seed).items()}


def save_seed(run: Path, step: int, seed: int, operations: FileOperations) -> None:
    save(
        run,
        step,
        whole_pieces(ENTRIES, random_arrays(ENTRIES, seed)),
        STATE,
        CONFIG_TEXT,
        None,
        None,
        operations,
    )


def first_save(run: Path) -> Scene:
    return Scene(run, {1: [as_bytes(1)]}, lambda operations: save_seed(run, 1, 1, operations), may_be_empty=True)


def next_save(run: Path) -> Scene:
    save_random(run, 1, seed=1)
    return Scene(run, {1: [as_bytes(1)], 2: [as_bytes(2)]}, lambda operations: save_seed(run, 2, 2, operations))


def save_behind(run: Path) -> Scene:
    """Half of the bytes go through a snapshot and a thread, which comes when the rest is written."""
    save_random(run, 1, seed=1)

    def act(operations: FileOperations) -> None:
        pieces = whole_pieces(ENTRIES, random_arrays(ENTRIES, 2))
        memory = np.empty(sum(piece.data.nbytes for piece in pieces) // 2, np.uint8)
        start_save(run, 2, pieces, STATE, CONFIG_TEXT, operations=operations, snapshot=Snapshot(memory)).finish()

    return Scene(run, {1: [as_bytes(1)], 2: [as_bytes(2)]}, act)


def replacing_save(run: Path) -> Scene:
    save_random(run, 1, seed=1)
    return Scene(run, {1: [as_bytes(1), as_bytes(2)]}, lambda operations: save_seed(run, 1, 2, operations))


def save_after_crash(run: Path) -> Scene:
    """The folder is full of what crashes left: the save cleans it up first."""
    save_random(run, 1, seed=1)
    checkpoints = run / "checkpoints"
    (checkpoints / "step-000001").rename(checkpoints / "step-000001.replaced")
    for name in ("step-000001.partial", "step-000000.deleted"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "config.toml").touch()
    return Scene(run, {1: [as_bytes(1)], 2: [as_bytes(2)]}, lambda operations: save_seed(run, 2, 2, operations))


def deletion(run: Path) -> Scene:
    for step in (1, 2, 3):
        save_random(run, step, seed=step)
    return Scene(run, {3: [as_bytes(3)]}, lambda operations: prune(run, 1, 0, operations))


SCENES = (first_save, next_save, save_behind, replacing_save, save_after_crash, deletion)


def check_newest(scene: Scene) -> None:
    newest = newest_checkpoint(scene.run)
    if newest is None:
        assert scene.may_be_empty
        return
    checkpoint = Checkpoint.open(scene.run)
    assert checkpoint.folder == newest
    checkpoint.verify()
    pieces = empty_pieces(ENTRIES)
    checkpoint.read_into(pieces)
    assert {piece.tensor: piece.data.tobytes() for piece in pieces} in scene.allowed[checkpoint.step]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make_scene", SCENES)
def test_crash_at_every_operation(tmp_path: Path, make_scene: Callable[[Path], Scene], loss: str) -> None:
    scene = make_scene(tmp_path / "undisturbed")
    undisturbed = CrashingOperations(None, loss)
    scene.act(undisturbed)
    check_newest(scene)
    assert max(scene.allowed) == Checkpoint.open(scene.run).step
    for crash_at, name in enumerate(undisturbed.done):
        scene = make_scene(tmp_path / str(crash_at))
        with pytest.raises(Crash):
            scene.act(CrashingOperations(crash_at, loss))
        try:
            check_newest(scene)
        except Exception as error:
            raise AssertionError(f"after a crash in operation {crash_at}, {name}") from error
        # The next save works, and leaves nothing but whole checkpoints.
        after = save_random(scene.run, 9, seed=9)
        assert Checkpoint.open(scene.run).read("embed.tokens").tobytes() == after["embed.tokens"].tobytes()
        for folder in (scene.run / "checkpoints").iterdir():
            Checkpoint.open(folder).verify()
    expected = {"rename", "sync_folder", "remove_folder"}
    if make_scene in (next_save, save_behind):
        expected = {
            "make_folder",
            "create",
            "open",
            "truncate",
            "write",
            "sync",
            "close",
            "sync_folder",
            "rename",
        }
    assert expected <= set(undisturbed.done) or make_scene is first_save


class FullDisk(UnsyncedOperations):
    """No space left after some bytes."""

    def __init__(self, bytes_left: int) -> None:
        self.bytes_left = bytes_left

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            raise OSError(28, "No space left on device")
        super().write(descriptor, data, offset)


@pytest.mark.parametrize("bytes_left", range(0, 2400, 300))
def test_a_full_disk_is_one_sentence(tmp_path: Path, bytes_left: int) -> None:
    before = save_random(tmp_path, 1, seed=1)
    pieces = whole_pieces(ENTRIES, random_arrays(ENTRIES, 2))
    goes_on = "; once that is mended, --resume auto goes on from /.*/checkpoints/step-000001$"
    sentence = rf"^/.*step-000002.partial/\S* cannot be written: No space left on device{goes_on}"
    with pytest.raises(UserError, match=sentence):
        save(tmp_path, 2, pieces, STATE, CONFIG_TEXT, operations=FullDisk(bytes_left))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.step == 1
    assert checkpoint.read("embed.tokens").tobytes() == before["embed.tokens"].tobytes()


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path) -> None:
    pieces = whole_pieces(ENTRIES, random_arrays(ENTRIES, 2))
    with pytest.raises(UserError, match=r"No space left on device; the run has no whole checkpoint yet$"):
        save(tmp_path, 2, pieces, STATE, CONFIG_TEXT, operations=FullDisk(300))
