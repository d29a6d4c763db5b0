"""Starting and ending the ranks of a run: MPI is started here, once, and only where there are many.

    with launch.world(settings) as group:
        ...

An exception in one rank prints its traceback with the rank's label and ends the job.
"""

from __future__ import annotations

import array
import atexit
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pytrain.collectives import Group, Settings, SharedError, Table, read_table
from pytrain.errors import ExitCode, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from pytrain.collectives.mpi_group import MpiGroup
    from pytrain.collectives.watchdog import Watchdog
    from pytrain.config import RunConfig

LONGEST_READ = 2.0
"""Seconds that a launcher has to read what a rank says before its end."""


@dataclass(frozen=True)
class Launcher:
    """What started this process, as its environment tells."""

    name: str
    ranks: int
    """Processes that it started; 2 stands for several where only this process's number is known."""
    variable: str


def find_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that started this process with others, or None."""
    variables = (
        ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpiexec"),
        ("SLURM_STEP_NUM_TASKS", "srun"),
        ("PMI_SIZE", "mpiexec (PMI)"),
    )
    found = [
        Launcher(name, int(environment[variable]), variable)
        for variable, name in variables
        if environment.get(variable, "").isdecimal()
    ]
    # A batch script has SLURM_NTASKS too, but is no task of a step.
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_NTASKS", "").isdecimal():
        found.append(Launcher("srun", int(environment["SLURM_NTASKS"]), "SLURM_NTASKS"))
    if environment.get("PMIX_RANK", "").isdecimal() and int(environment["PMIX_RANK"]) > 0:
        found.append(Launcher("a PMIx launcher", 2, "PMIX_RANK"))
    return max(found, key=lambda launcher: launcher.ranks, default=None)


def find_mpiexec() -> tuple[list[str], dict[str, str]]:
    """The mpiexec beside this Python, else on the path, with what must be in its environment to start any
    number of ranks on this machine, as root too.

    Raises:
        UserError: there is none.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise UserError("there is no mpiexec beside this Python or on the path; `pip install mpich` brings one")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    if not re.search("Open ?MPI|OpenRTE|PRRTE", version, re.IGNORECASE):
        return [found], {}
    return [found], {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }


def loaded_library(maps: str) -> str:
    """Path of the libmpi in a process's memory map (the text of /proc/self/maps)."""
    for line in maps.splitlines():
        path = line[line.find("/") :] if "/" in line else ""
        if re.match(r"lib(p?mpi|mpich|mpi_\w+)[.\w-]*\.so", Path(path).name):
            return path
    return "an unknown libmpi"


def foreign_library(launcher: Launcher, library: str, version: str) -> str:
    """The sentence that refuses a world of one where there should be more."""
    words = " ".join(version.split())
    count = str(launcher.ranks) if launcher.variable != "PMIX_RANK" else "several"
    return (
        f"{launcher.name} started {count} processes ({launcher.variable}), but each sees an MPI world of "
        f"size 1: mpi4py has loaded {library} ({words}), which does not belong to that launcher; start with "
        "the mpiexec of that library, or install an mpi4py for the launcher's"
    )


def _mpi() -> MPI.Intracomm:
    """COMM_WORLD of an MPI that threads may use at the same time.

    Raises:
        UserError: no MPI library, or one without threads.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"several ranks need an MPI library, and none can be loaded ({str(error).splitlines()[0]}); "
            "`pip install mpich` brings one with its mpiexec"
        ) from None
    if not MPI.Is_initialized():  # who only looks at the library imports mpi4py without starting it
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        atexit.register(MPI.Finalize)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise UserError("this MPI library was started without MPI_THREAD_MULTIPLE, which progress and watchdog need")
    return MPI.COMM_WORLD


@contextmanager
def world(
    settings: Settings | Callable[[], Settings] | None = None,
    ranks: int = 1,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Group]:
    """The group of all ranks, and the end of all of them when one fails.

    Args:
        settings: the same on all ranks, or what reads them, which rank 0 alone calls; defaults if None.
        ranks: how many the configuration asks for; with more than one MPI is started even where no launcher
            shows in the environment.
        environment: what the launcher left its traces in.

    Raises:
        UserError: the launcher and the MPI library do not belong together.
    """
    launcher = find_launcher(environment)
    if ranks == 1 and (launcher is None or launcher.ranks == 1):
        yield Group()
        return
    communicator = _mpi()
    if communicator.Get_size() == 1:
        if launcher is not None and launcher.ranks > 1:
            from mpi4py import MPI

            library = loaded_library(Path("/proc/self/maps").read_text(encoding="utf-8"))
            raise UserError(foreign_library(launcher, library, MPI.Get_library_version().split("\n")[0]))
        yield Group()
        return
    ranks_of_job = _Ranks(communicator)
    try:
        yield ranks_of_job.start(_shared_settings(communicator, settings))
        ranks_of_job.finish()
    except SharedError:
        ranks_of_job.stop_threads()
        if communicator.Get_rank() > 0:
            raise SystemExit(int(ExitCode.BAD_INPUT)) from None  # rank 0 says it
        raise
    except BaseException as error:
        ranks_of_job.abort(error)


def settings_of(config: RunConfig) -> Settings:
    """What [collectives] of a configuration asks for."""
    asked = config.collectives
    return Settings(
        own=asked.own,
        check=asked.check,
        progress=asked.progress,
        overlap=asked.overlap,
        device_buffers=asked.device_buffers,
        watchdog_seconds=asked.watchdog_seconds,
        table=Table() if asked.table is None else read_table(Path(asked.table)),
    )


def _shared_settings(communicator: MPI.Intracomm, settings: Settings | Callable[[], Settings] | None) -> Settings:
    """Read on rank 0, and given to all; so is a sentence about what cannot be read."""
    if not callable(settings):
        return settings or Settings()
    outcome: Settings | str = ""
    if communicator.Get_rank() == 0:
        try:
            outcome = settings()
        except UserError as error:
            outcome = str(error)
    outcome = communicator.bcast(outcome)
    if isinstance(outcome, str):
        raise SharedError(outcome)
    return outcome


class _Ranks:
    """What `world` starts and ends."""

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self._group: MpiGroup | None = None
        self._watchdog: Watchdog | None = None
        self._thread_hook = threading.excepthook

    def start(self, settings: Settings) -> Group:
        from pytrain.collectives.device_memory import refuse_unless_gpu_aware
        from pytrain.collectives.mpi_group import world_group
        from pytrain.collectives.watchdog import Watchdog

        if settings.device_buffers == "direct":
            path = loaded_library(Path("/proc/self/maps").read_text(encoding="utf-8"))
            try:
                refuse_unless_gpu_aware(path)
            except UserError as error:  # all ranks find the same: rank 0 says it
                raise SharedError(str(error)) from None
        threading.excepthook = self._thread_failed
        self._group = world_group(settings, self._communicator)
        _warn_of_crowding(self._group)
        if settings.watchdog_seconds > 0:
            journal = self._group.process.journal
            self._watchdog = Watchdog(self._communicator, journal, settings.watchdog_seconds)
        return self._group

    def finish(self) -> None:
        """The regular end, which all ranks reach."""
        assert self._group is not None
        self._group.barrier()  # while every watchdog still answers
        self.stop_threads()
        self._group.close()

    def stop_threads(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        if self._group is not None:
            self._group.process.progress.close()
        threading.excepthook = self._thread_hook

    def abort(self, error: BaseException) -> NoReturn:
        """Say what happened here, and end all ranks."""
        if isinstance(error, SystemExit):
            if not error.code:
                raise error
            status = error.code if isinstance(error.code, int) else int(ExitCode.CRASHED)
            lines = [] if isinstance(error.code, int) else [str(error.code)]
        elif isinstance(error, UserError):
            status, lines = int(ExitCode.BAD_INPUT), [f"error: {error}"]
        elif isinstance(error, KeyboardInterrupt):
            status, lines = int(ExitCode.INTERRUPTED), ["interrupted"]
        else:
            status = int(ExitCode.CRASHED)
            lines = "".join(traceback.format_exception(error)).splitlines()
        self._end(status, lines)

    def _thread_failed(self, arguments: threading.ExceptHookArgs) -> None:
        """An exception that ended a thread is one that ends the job."""
        if arguments.exc_value is not None:
            self.abort(arguments.exc_value)

    def _end(self, status: int, lines: list[str]) -> NoReturn:
        label = f"rank {self._communicator.Get_rank()}" if self._group is None else self._group.label
        # one write: lines of several ranks are not to be mixed
        sys.stderr.write("".join(f"[{label}] {line}\n" for line in lines))
        sys.stderr.flush()
        sys.stdout.flush()
        _wait_until_read(sys.stderr.fileno())
        self._communicator.Abort(status)
        os._exit(status)  # called from a thread, MPICH's abort comes back


def _wait_until_read(descriptor: int) -> None:
    """Let a launcher take what was written to its pipe: an abort may make it forget what it has not read yet."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return
    end = time.monotonic() + LONGEST_READ
    left = array.array("i", [1])
    while time.monotonic() < end:
        fcntl.ioctl(descriptor, termios.FIONREAD, left, True)
        if left[0] == 0:
            return
        time.sleep(0.005)


def _warn_of_crowding(group: MpiGroup) -> None:
    """On the first rank alone, for its own node; where the ranks made room for each other by themselves, that too."""
    from pytrain.collectives.process import crowding

    places = group.process.places
    if group.rank == 0 and group.process.sharing is not None:
        print(f"note: {group.process.sharing}", file=sys.stderr, flush=True)
    sentence = crowding(places, places[0].node)
    if group.rank == 0 and sentence is not None:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
