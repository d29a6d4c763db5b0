"""The checkpoints of a run: begun at the end of a step, written behind the next ones, and whole in the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytrain import checkpoint
from pytrain.metrics import Saved
from pytrain.native import native
from pytrain.training_state import owned_pieces

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Group
    from pytrain.config import RunConfig
    from pytrain.config.run import CheckpointSection
    from pytrain.optimizer import AdamW

NOTHING, WRITING, FAILED = range(3)
"""What a rank says of the save under way; of several ranks the largest holds for all."""


def snapshot_bytes(settings: CheckpointSection, owned: int) -> int:
    """Bytes of host memory that a rank takes for copies, if it saves `owned` bytes."""
    if not settings.asynchronous or not settings.every:
        return 0
    size = min(int(settings.snapshot_gb * 1e9), owned)
    return size - size % 2  # storage types have two bytes at least


class Saver:
    """Saves for one rank. At most one save is under way; only the thread that calls this talks to other ranks.

    Args:
        config: the whole run.
        optimizer: of this rank, with the stages whose weights it updates.
        world: all ranks.
        device: takes and counts the memory of the snapshot.
        note: told of each checkpoint that is whole.
        operations: the file system, for tests that break it.
    """

    def __init__(
        self,
        config: RunConfig,
        optimizer: AdamW,
        world: Group,
        device: _native.Device,
        note: Callable[[str], None],
        operations: checkpoint.FileOperations | None = None,
    ) -> None:
        self.folder = Path(config.run.folder)
        self._config, self._optimizer, self._world, self._note = config, optimizer, world, note
        self._operations = operations or checkpoint.FileOperations()
        self._saving: checkpoint.Saving | None = None
        self._step = 0
        self._blocked = 0.0
        self._saved: Saved | None = None
        owned = sum(piece.data.nbytes for piece in owned_pieces(optimizer))
        size = snapshot_bytes(config.checkpoint, owned)
        self._snapshot: checkpoint.Snapshot | None = None
        if size:
            self._memory = native().Buffer(device, size // 2, "bf16", "snapshot")
            device.fill(self._memory.array, 0.0)  # a run that starts shall not run out of memory at its first save
            self._snapshot = checkpoint.Snapshot(
                self._memory.array.view(np.uint8), device.start_copy, device.finish_copies
            )

    @property
    def status(self) -> int:
        """Of the save under way on this rank: NOTHING to wait for, still WRITING, or FAILED."""
        if self._saving is None:
            return NOTHING
        if self._saving.failed:
            return FAILED
        return WRITING if self._saving.under_way else NOTHING

    def start(self, step: int, state: dict[str, Any]) -> Path:
        """Begin the checkpoint of a step; training may go on when this returns. All ranks call it together.

        Gives the folder that it will have.

        Raises:
            UserError: on all ranks; also where the save before this one failed.
        """
        if not self._config.checkpoint.asynchronous:
            return self.save(step, state)
        return self._start(step, state, self._snapshot).folder

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of a step, and return when it is whole. All ranks call it together.

        Raises:
            UserError: on all ranks; also where the save before this one failed.
        """
        folder = self._start(step, state, None).folder
        self.finish()
        return folder

    def agreed(self, status: int) -> None:
        """Finish the save under way where no rank still writes, or one failed.

        Args:
            status: the largest of all ranks.

        Raises:
            UserError: on all ranks, where one could not write.
        """
        if self._saving is not None and status != WRITING:
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and delete what need not be kept any more.

        All ranks call it together.

        Raises:
            UserError: on all ranks, where one could not write.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        started = time.perf_counter()
        folder = saving.finish()
        keep = self._config.checkpoint
        self._world.on_root(lambda: checkpoint.prune(self.folder, keep.keep_last, keep.keep_every, self._operations))
        self._blocked += time.perf_counter() - started
        self._saved = Saved(self._step, self._blocked, saving.background_seconds)
        behind = f", {saving.background_seconds:.2f} s more behind the training" if saving.background_seconds else ""
        self._note(f"step {self._step}: saved {folder} in {self._blocked:.2f} s{behind}")

    def abandon(self) -> None:
        """Leave the save under way undone, after an error: the checkpoint before it stays the newest."""
        if self._saving is not None:
            self._saving.abandon()
            self._saving = None

    def take_saved(self) -> Saved | None:
        """What the last checkpoint took, told once."""
        saved, self._saved = self._saved, None
        return saved

    def _start(self, step: int, state: dict[str, Any], snapshot: checkpoint.Snapshot | None) -> checkpoint.Saving:
        from pytrain.config import resolved_toml

        self.finish()
        started = time.perf_counter()
        self._step = step
        self._alive()
        self._saving = checkpoint.start_save(
            self.folder,
            step,
            owned_pieces(self._optimizer),
            state,
            resolved_toml(self._config),
            self._companions() if self._world.rank == 0 else None,
            self._world,
            self._operations,
            snapshot,
            self._alive,
        )
        self._blocked = time.perf_counter() - started
        return self._saving

    def _alive(self) -> None:
        self._world.phase = f"saving after step {self._step}"  # for the watchdog

    def _companions(self) -> dict[str, Path]:
        """Small files that go with each checkpoint, by the name they get there."""
        files = checkpoint.tokenizer_files(self._config.tokenizer.path)
        table = self._config.collectives.table
        return files if table is None else files | {"collectives.json": Path(table)}
