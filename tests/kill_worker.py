"""A run that stops dead at a named point until it is killed.

    python -m tests.kill_worker RUN.toml FOLDER SPEC.json       (or under mpiexec)

FOLDER/pipe is told when a rank comes to its point ("RANK PID" a line), and shows by its end that no rank lives any
more. SPEC.json has "rank", "phase" and "count" (die there when this rank comes to this phase for the count-th time;
a phase of "" never does), "wait" (stop dead there, or tell and go on) and the keys of [checkpoint] to change. Rank R
writes its process to FOLDER/pid-R, keeps the phase in which it is in FOLDER/phase-R, and at a good end writes to
FOLDER/counts-R.json how often it came to each phase.

The hooks are the product's seams for tests: the file operations that the trainer is given, and methods wrapped here.
"""

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytrain import _native, config, launch
from pytrain.checkpoint import Checkpoint, FileOperations
from pytrain.collectives import Group
from pytrain.passes import Passes
from pytrain.progress import NoProgress
from pytrain.train import Trainer

START, RESUME, FORWARD, BACKWARD, UPDATE, EVALUATION = (
    *("start-up", "resume", "step: forward", "step: backward", "step: update", "evaluation"),
)
PREPARE, WRITE, SYNC, MANIFEST, RENAME, SYNC_FOLDER, DELETE = (
    *("save: prepare", "save: write", "save: fsync", "save: manifest", "save: rename", "save: fsync of folder"),
    "save: delete",
)
PHASES = (
    *(START, RESUME, FORWARD, BACKWARD, UPDATE, EVALUATION),
    *(PREPARE, WRITE, SYNC, MANIFEST, RENAME, SYNC_FOLDER, DELETE),
)


class Guide:
    """Where this rank is, and whether it is to die there."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
        self.counts: Counter[str] = Counter()
        self._spec = spec
        self._pipe = os.open(folder / "pipe", os.O_WRONLY)
        self._phase = os.open(folder / f"phase-{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._lock = threading.Lock()
        pid = folder / f"pid-{self.rank}"
        pid.with_suffix(".new").write_text(str(os.getpid()), encoding="utf-8")
        pid.with_suffix(".new").rename(pid)

    def reach(self, phase: str, half: Callable[[], object] = lambda: None) -> None:
        """Come to a phase; where this rank is to wait to be killed, `half` of what comes is done before."""
        with self._lock:
            os.pwrite(self._phase, phase.ljust(40).encode(), 0)
            self.counts[phase] += 1
            spec = self._spec
            if (spec["rank"], spec["phase"], spec["count"]) != (self.rank, phase, self.counts[phase]):
                return
        if spec["wait"]:
            half()
        os.write(self._pipe, f"{self.rank} {os.getpid()}\n".encode())
        if spec["wait"]:
            threading.Event().wait()


class GuidedOperations(FileOperations):
    """The file system, slow enough to die between any two operations and in the middle of a write."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide
        self._manifests: set[int] = set()

    def make_folder(self, path: Path) -> None:
        """At PREPARE."""
        self._guide.reach(PREPARE)
        super().make_folder(path)

    def create(self, path: Path) -> int:
        """At PREPARE, or MANIFEST."""
        of_manifest = path.name == "manifest.json"
        self._guide.reach(MANIFEST if of_manifest else PREPARE)
        descriptor = super().create(path)
        if of_manifest:
            self._manifests.add(descriptor)
        return descriptor

    def truncate(self, descriptor: int, size: int) -> None:
        """At PREPARE."""
        self._guide.reach(PREPARE)
        super().truncate(descriptor, size)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """At WRITE, or MANIFEST."""
        write = super().write
        phase = MANIFEST if descriptor in self._manifests else WRITE
        self._guide.reach(phase, lambda: write(descriptor, data[: len(data) // 2], offset))
        write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        """At SYNC, or MANIFEST."""
        self._guide.reach(MANIFEST if descriptor in self._manifests else SYNC)
        super().sync(descriptor)

    def close(self, descriptor: int) -> None:
        """A descriptor's number may come again."""
        self._manifests.discard(descriptor)
        super().close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """At SYNC_FOLDER."""
        self._guide.reach(SYNC_FOLDER)
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        """At RENAME: of a whole checkpoint, or of one that is to be deleted."""
        self._guide.reach(RENAME)
        super().rename(source, target)

    def remove_folder(self, path: Path) -> None:
        """At DELETE."""
        self._guide.reach(DELETE, lambda: sorted(path.iterdir())[-1].unlink())
        super().remove_folder(path)


def wrap(owner: Any, name: str, before: Callable[..., object]) -> None:
    """Call `before` with the arguments whenever a method is called."""
    method = getattr(owner, name)

    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        before(*arguments)
        return method(self, *arguments, **options)

    setattr(owner, name, wrapped)


def run(guide: Guide, settings: config.RunConfig, world: Group) -> None:
    """To the end of the run, or of this process."""
    wrap(Checkpoint, "read_into", lambda *_: guide.reach(RESUME))
    wrap(Passes, "forward", lambda _, pass_: guide.reach(EVALUATION if pass_ == "evaluate" else FORWARD))
    wrap(Passes, "backward", lambda *_: guide.reach(BACKWARD))
    wrap(_native.CpuDevice, "adamw_each", lambda *_: guide.reach(UPDATE))
    with Trainer(settings, "auto", NoProgress(), world, GuidedOperations(guide)) as trainer:
        guide.reach(START)
        trainer.run()


def main() -> None:
    """One session of the run."""
    file, folder, spec_file = map(Path, sys.argv[1:])
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    guide = Guide(folder, spec)
    guide.reach(START)
    settings = config.load(
        file, [f"checkpoint.{key}={json.dumps(value)}" for key, value in spec["checkpoint"].items()]
    )
    with launch.world(launch.settings_of(settings), settings.parallel.dp) as world:
        run(guide, settings, world)
    (folder / f"counts-{guide.rank}.json").write_text(json.dumps(guide.counts), encoding="utf-8")


if __name__ == "__main__":
    main()
