"""Training jobs that stand still until it is their turn, so that several can be timed alternately.

Every process of a job waits in `read` on a pipe of its own, which takes no core from the job whose turn it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pytrain import launch
from pytrain.errors import UserError

if TYPE_CHECKING:
    from pytrain.train import Trainer


class Job:
    """One training run on so many ranks, from its configuration in `folder / "run.toml"`.

    Args:
        folder: of this job alone; pipes and reports of its ranks go there.
        ranks: how many processes; more than one are started by mpiexec.
        threads: of each.
        cores: as many for each rank, in order: where it may run.
        module: the benchmark; run with --worker FOLDER it calls `work`.
    """

    def __init__(self, folder: Path, ranks: int, threads: int, cores: Sequence[int], module: str) -> None:
        self.folder = folder
        plan = [list(cores[rank * threads : (rank + 1) * threads]) for rank in range(ranks)]
        (folder / "cores.json").write_text(json.dumps(plan), encoding="utf-8")
        for name in [*(f"turns-{rank}" for rank in range(ranks)), "reports"]:
            os.mkfifo(folder / name)
        command = [sys.executable, "-m", module, "--worker", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if ranks > 1:
            mpiexec, settings = launch.find_mpiexec()
            command = [*mpiexec, "-n", str(ranks), *command]
            environment |= settings
        # Opened for both directions, a pipe never makes anybody wait for the other end.
        self._turns = [os.open(folder / f"turns-{rank}", os.O_RDWR) for rank in range(ranks)]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        self._reports = os.open(folder / "reports", os.O_RDONLY | os.O_NONBLOCK)
        self._buffer = b""

    def turn(self, steps: int) -> list[dict[str, Any]]:
        """Let it take so many steps; what rank 0 says of each.

        Raises:
            UserError: the job has ended.
        """
        for pipe in self._turns:
            os.write(pipe, f"{steps}\n".encode())
        found: list[dict[str, Any]] = json.loads(self._line())
        return found

    def _line(self) -> bytes:
        import select

        while b"\n" not in self._buffer:
            if self._process.poll() is not None:
                raise UserError(f"the job in {self.folder} ended with status {self._process.returncode}; see above")
            if select.select([self._reports], [], [], 1.0)[0]:
                self._buffer += os.read(self._reports, 65536)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it; one that does not end by itself is killed."""
        for pipe in self._turns:
            os.write(pipe, b"0\n")
            os.close(pipe)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._reports)


def pin(folder: Path) -> None:
    """Keep this process to its own cores; call before anything starts threads."""
    launcher = launch.find_launcher(os.environ)
    plan = json.loads((folder / "cores.json").read_text(encoding="utf-8"))
    rank = 0 if launcher is None else _rank(os.environ)
    os.sched_setaffinity(0, plan[rank])


def _rank(environment: os._Environ[str]) -> int:
    """This process's number, as launchers tell it before MPI is started."""
    for variable in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if environment.get(variable, "").isdecimal():
            return int(environment[variable])
    raise UserError("the launcher tells a process neither PMI_RANK nor OMPI_COMM_WORLD_RANK, so it cannot be pinned")


def work(folder: Path) -> None:
    """A process of a job: train as the folder's run.toml says, whenever it is its turn."""
    from pytrain import config
    from pytrain.progress import NoProgress
    from pytrain.train import Trainer

    settings = config.load(folder / "run.toml")
    grid = settings.parallel
    with (
        launch.world(launch.settings_of(settings), ranks=grid.dp * grid.pp * grid.tp) as world,
        Trainer(settings, progress=NoProgress(), world=world) as trainer,
        (folder / f"turns-{world.rank}").open() as turns,
        (folder / "reports").open("w") as reports,
    ):
        while steps := int(turns.readline()):
            found = [_report(trainer) for _ in range(steps)]
            if world.rank == 0:
                reports.write(json.dumps(found) + "\n")
                reports.flush()


def _report(trainer: Trainer) -> dict[str, Any]:
    """A step: tokens per second, seconds waited and hidden in each group of rank 0, and each rank's wait in all."""
    metrics = trainer.step()
    groups = trainer.groups
    waits = sum(group.counters.waited_seconds for group in (groups.world, groups.tp, groups.pp, groups.dp))
    return {
        "tok_s": metrics.tok_s,
        "step_s": metrics.step_s,
        "loss": metrics.loss,
        "waited_s": groups.world.gather(waits),
        "groups": {
            name: {"waited_s": traffic.waited_s, "hidden_s": traffic.hidden_s, "bytes_sent": traffic.bytes_sent}
            for name, traffic in metrics.groups.items()
        },
    }
