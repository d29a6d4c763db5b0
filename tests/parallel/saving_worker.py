"""Runs under mpiexec: a training of which one rank cannot save.

    mpiexec -n 2 python -m tests.parallel.saving_worker MODE RUN.toml LIVENESS-PIPE

MODE "full": the disk is full when rank 1 writes tensors of step 4. "raising": an exception there instead. "healthy":
nothing, and each rank prints what its snapshot takes, and what the dry run says that it takes.
"""

import sys
from pathlib import Path

from pytrain import config, launch
from pytrain.checkpoint import FileOperations
from pytrain.errors import UserError
from pytrain.estimate import rank_memory
from pytrain.progress import NoProgress
from pytrain.train import Trainer
from tests.parallel.launch import hold


class FailingAtStep4(FileOperations):
    """Of rank 1, which writes nothing but tensors."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._fails = -1

    def open(self, path: Path) -> int:
        """Note whether it is of that step."""
        descriptor = super().open(path)
        if path.parent.name == "step-000004.partial":
            self._fails = descriptor
        return descriptor

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Half of it, then no more."""
        super().write(descriptor, data[: len(data) // 2] if descriptor == self._fails else data, offset)
        if descriptor == self._fails:
            raise self._error


ERRORS = {"full": OSError(28, "No space left on device"), "raising": RuntimeError("deliberate")}


def main(mode: str, file: str, pipe: str) -> int:
    """Train to the end of the run, or the job."""
    hold(pipe)
    settings = config.load(Path(file))
    with launch.world(launch.settings_of(settings), 2) as world:
        operations = FailingAtStep4(ERRORS[mode]) if mode in ERRORS and world.rank == 1 else None
        with Trainer(settings, "none", NoProgress(), world, operations) as trainer:
            if mode == "healthy":
                grid = trainer.groups.grid
                planned = rank_memory(trainer.model.plan, grid.pp_rank, grid.tp_rank).by_kind["snapshot"]
                held = trainer.device.bytes_in_use("snapshot")
                sys.stdout.write(f"{grid.label}: {held} planned {planned}\n")  # in one piece: both ranks speak
                sys.stdout.flush()
            trainer.run()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as found:
        print(f"error: {found}", file=sys.stderr)
        sys.exit(2)
