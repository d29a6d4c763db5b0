"""Bounding the disk: which checkpoints of a run are kept."""

from pathlib import Path

from pytrain.checkpoint.files import FileOperations, naming
from pytrain.checkpoint.store import DELETED, is_whole, step_folders


def prune(
    run_folder: str | Path, keep_last: int, keep_every: int, operations: FileOperations | None = None
) -> list[Path]:
    """Delete the checkpoints that need not be kept; rank 0 calls this after a save.

    Each is renamed before it is deleted, so that nobody takes a half-deleted one for whole. A damaged one
    counts for
    nothing: as many whole ones are kept, the newest always, and damaged ones newer than those stay as they
    are.

    Args:
        keep_last: keep this many of the newest whole ones; 0 keeps all.
        keep_every: besides, keep those whose step is a multiple; 0 for none.

    Returns:
        What was deleted, oldest first.

    Raises:
        UserError: a folder cannot be renamed or deleted.
    """
    if keep_last == 0:
        return []
    operations = operations or FileOperations()
    whole = 0
    surplus: list[Path] = []
    for step, folder in reversed(step_folders(run_folder).items()):
        if whole < keep_last:
            whole += is_whole(folder)
        elif not (keep_every and step % keep_every == 0):
            surplus.insert(0, folder)
    for folder in surplus:
        doomed = folder.with_name(folder.name + DELETED)
        with naming(folder, "deleted"):
            operations.rename(folder, doomed)
            operations.sync_folder(folder.parent)
            operations.remove_folder(doomed)
    return surplus
