"""Where checkpoints lie in a run folder: RUN/checkpoints/step-000100.

Beside whole ones there may be `step-N.partial` (being written, or left by a crash), `step-N.replaced` (whole;
about to give way to a new one of the same step) and `step-N.deleted` (being deleted).
"""

import errno
import fcntl
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pytrain.checkpoint import manifest as manifests
from pytrain.checkpoint.files import FileOperations, naming
from pytrain.checkpoint.header import layout_files
from pytrain.checkpoint.pieces import TensorEntry
from pytrain.errors import UserError

PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
LOCK = "run.lock"
_STEP = re.compile(r"step-(\d{6,})")


def checkpoints_folder(run_folder: str | Path) -> Path:
    """RUN/checkpoints."""
    return Path(run_folder) / "checkpoints"


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:06d}"


def step_folders(run_folder: str | Path) -> dict[int, Path]:
    """Folders of a run that have a manifest, by step, oldest first; their files are not looked at.

    Where a crash came between the two renames that replace a checkpoint, the old one stands for its step.
    """
    folder = checkpoints_folder(run_folder)
    found: dict[int, Path] = {}
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        match = _STEP.fullmatch(name.removesuffix(REPLACED))
        if match and (folder / name / manifests.NAME).is_file():
            found.setdefault(int(match[1]), folder / name)  # "step-N" sorts before "step-N.replaced"
    return dict(sorted(found.items()))


def newest_checkpoint(run_folder: str | Path) -> Path | None:
    """Folder of the newest checkpoint of a run, or None where it has none yet."""
    folders = step_folders(run_folder)
    return folders[max(folders)] if folders else None


@contextmanager
def naming_newest(run_folder: str | Path) -> Iterator[None]:
    """Have a `UserError` inside, of a checkpoint that could not be written, say which one to go on from."""
    try:
        yield
    except UserError as error:
        newest = newest_checkpoint(run_folder)
        if newest is None:
            raise UserError(f"{error}; the run has no whole checkpoint yet") from error
        raise UserError(f"{error}; once that is mended, --resume auto goes on from {newest}") from error


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: `path`, or the newest where `path` is a run folder or its `checkpoints`.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {reason}, so it is no checkpoint")
    if (path / manifests.NAME).is_file():
        return path
    run_folder = path.parent if path.name == "checkpoints" else path
    newest = newest_checkpoint(run_folder)
    if newest is None:
        what = f"has no {manifests.NAME}" if _STEP.match(path.name) else "holds no checkpoint with one"
        raise UserError(f"{path} is not a whole checkpoint: it {what}; the manifest is written last")
    return newest


def read_manifest(folder: Path) -> manifests.Manifest:
    """The manifest of a checkpoint, after a look at the size of each of its files.

    Raises:
        UserError: the manifest cannot be read, or a file is missing or has another size.
    """
    path = folder / manifests.NAME
    with naming(path, "read"):
        content = path.read_bytes()
    manifest = manifests.parse(content, path)
    sizes = {name: file.bytes for name, file in manifest.files.items()}
    sizes |= {name: copy.bytes for name, copy in manifest.copies.items()}
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            raise UserError(f"{folder / name} is missing, but the checkpoint's manifest lists it") from None
        if found != size:
            what = "truncated" if found < size else "damaged"
            raise UserError(f"{folder / name} is {what}: it has {found} bytes, not {size}")
    return manifest


def is_whole(folder: Path) -> bool:
    """Whether the manifest can be read and every file has its size; contents are not verified."""
    try:
        read_manifest(folder)
    except UserError:
        return False
    return True


def check_whole(folder: Path) -> None:
    """As `read_manifest`; where this checkpoint of a run is not whole, the sentence names the newest that is.

    It is not taken unasked: what was trained after it would be lost without a word.

    Raises:
        UserError: the manifest cannot be read, or a file is missing or has another size.
    """
    try:
        read_manifest(folder)
    except UserError as error:
        others = [other for other in step_folders(folder.parents[1]).values() if other != folder and is_whole(other)]
        if not others:
            raise UserError(f"{error}; the run has no other whole checkpoint") from None
        raise UserError(f"{error}; {others[-1]} is whole: --resume {others[-1]} goes on from there") from None


def clean(run_folder: str | Path, operations: FileOperations) -> None:
    """Remove what a crash left; a replaced checkpoint without successor gets its name back."""
    folder = checkpoints_folder(run_folder)
    for path in sorted(folder.iterdir()):
        stem, suffix = path.with_suffix(""), path.suffix
        if not _STEP.fullmatch(stem.name) or suffix not in (PARTIAL, REPLACED, DELETED):
            continue
        with naming(path, "removed"):
            if suffix == REPLACED and not stem.exists():
                operations.rename(path, stem)
                operations.sync_folder(folder)
            else:
                operations.remove_folder(path)


def check_writable(run_folder: str | Path) -> None:
    """Make the run folder and see that a file can be written in it, before any work is done.

    Raises:
        UserError: it cannot.
    """
    folder = checkpoints_folder(run_folder)
    with naming(folder, "written to"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"pytrain")
            file.flush()
            os.fsync(file.fileno())


class FolderLock:
    """Keeps other jobs out of a run folder, by a lock on its file `run.lock`, until it is closed or forgotten.

    The lock ends with this process, however it ends: a file that was left behind holds nobody up. One process may
    lock a folder more than once. `works` is false where the file system has no locks.
    """

    def __init__(self, run_folder: str | Path) -> None:
        """Take the lock.

        Raises:
            UserError: another process has it; the folder cannot be written to.
        """
        path = Path(run_folder) / LOCK
        self._file = -1
        self.works = True
        with naming(path, "written"):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(self._file, 1000).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{run_folder} is in use by {holder}; wait until it has ended, or choose another run.folder"
                ) from None
            self.works = False
            return
        with naming(path, "written"):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)

    def close(self) -> None:
        """Let others in."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


def required_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes on disk of one checkpoint of these tensors, without the manifest and the small files."""
    return sum(layout.size for layout in layout_files(entries).values())


def free_bytes(run_folder: str | Path) -> int:
    """Free bytes on the disk where the run folder lies, or would be made."""
    folder = Path(run_folder).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free
