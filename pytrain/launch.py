"""Starting and ending the ranks of a run: MPI is started here, once, and only where there are many.

    with launch.world(settings) as group:
        ...

An exception in one rank prints its traceback with the rank's label and ends the job.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pytrain.collectives import Group, Settings, SharedError
from pytrain.errors import ExitCode, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from pytrain.collectives.mpi_group import MpiGroup


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
        f"{launcher.name} started {count} processes ({launcher.variable}), but each sees an MPI world of size "
        f"1: mpi4py has loaded {library} ({words}), which does not belong to that launcher; start with the "
        "mpiexec of that library, or install an mpi4py for the launcher's"
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
    if not MPI.Is_initialized():  # `pytrain info` only looks at the library
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise UserError(
            "this MPI library was started without MPI_THREAD_MULTIPLE, which progress and watchdog need"
        )
    return MPI.COMM_WORLD


@contextmanager
def world(
    settings: Settings | None = None, ranks: int = 1, environment: Mapping[str, str] = os.environ
) -> Iterator[Group]:
    """The group of all ranks, and the end of all of them when one fails.

    Args:
        settings: the same on all ranks; defaults if None.
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
    with _ending_together(communicator):
        yield from _start(communicator, settings or Settings())


def _start(communicator: MPI.Intracomm, settings: Settings) -> Iterator[Group]:
    from pytrain.collectives.mpi_group import world_group
    from pytrain.collectives.watchdog import Watchdog

    group = world_group(settings, communicator)
    _warn_of_crowding(group)
    seconds = settings.watchdog_seconds
    watchdog = Watchdog(communicator, group.process.journal, seconds) if seconds > 0 else None
    _LABELS.set(group)
    yield group
    if watchdog is not None:
        group.barrier()  # while every watchdog still answers
        watchdog.close()
    group.process.progress.close()
    group.close()
