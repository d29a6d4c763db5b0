"""Ranks that fail in one way or another; the job must end within seconds and say why.

mpiexec -n 2 python -m tests.parallel.programs.failures MODE LIVENESS-PIPE
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

import numpy as np

from pytrain import launch
from pytrain.collectives import Group, Settings
from pytrain.errors import UserError
from tests.parallel.launch import hold

LAST = "after the failure"  # must never be printed


def wait_for_the_others(group: Group) -> None:
    group.barrier()
    print(LAST, flush=True)


def raising(group: Group) -> None:
    if group.rank == group.size - 1:
        group.label = "rank 1 dp1/2"
        raise RuntimeError("deliberate")
    wait_for_the_others(group)


def killed(group: Group) -> None:
    group.barrier()
    if group.rank == group.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_the_others(group)


def thread(group: Group) -> None:
    def fail() -> None:
        raise RuntimeError("in a thread")

    if group.rank == 0:
        worker = threading.Thread(target=fail)
        worker.start()
        worker.join()
    wait_for_the_others(group)


def exiting(group: Group) -> None:
    if group.rank == 0:
        sys.exit(3)
    wait_for_the_others(group)


def user_error(group: Group) -> None:
    if group.rank == 1:
        raise UserError("run.toml: one rank alone does not like it")
    wait_for_the_others(group)


def shared_error(group: Group) -> None:
    def refuse() -> NoReturn:
        raise UserError("run.toml: nobody likes it")

    group.on_root(refuse)


def hanging(group: Group) -> None:
    """Rank 1 forgets an all-reduce and waits for a message instead."""
    group.phase = "step 7, forward"
    group.all_reduce(np.zeros(12, np.float32))
    if group.rank == 0:
        group.all_reduce(np.zeros(34, np.float32))
    else:
        group.receive(np.zeros(56, np.float32), 0, tag=5)
    wait_for_the_others(group)


def frozen(group: Group) -> None:
    """Rank 0 stops for good without a word: the others must end the job alone."""
    group.barrier()
    if group.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_the_others(group)


def uneven(group: Group) -> None:
    """Rank 0 waits longer than the watchdog's time while rank 1 shows that it works: nothing to end."""
    if group.rank == 1:
        for _ in range(30):
            group.phase = "preparing"
            threading.Event().wait(0.05)
    group.barrier()
    print("went well", flush=True)


MODES = {
    function.__name__: function
    for function in (*(raising, killed, thread, exiting, user_error, shared_error, hanging, frozen, uneven),)
}


def main(mode: str, pipe: str) -> int:
    hold(pipe)
    seconds = 0.5 if mode in ("hanging", "frozen", "uneven") else 600.0
    with launch.world(Settings(watchdog_seconds=seconds)) as group:
        MODES[mode](group)
    return 0


def as_command(mode: str, pipe: str) -> int:
    """With what the command line does about a `UserError`."""
    try:
        return main(mode, pipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(as_command(*sys.argv[1:]))
