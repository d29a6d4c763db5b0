"""Runs under mpiexec: a command of pytrain, and which files each rank opened under a folder.

    mpiexec -n 4 python -m tests.parallel.opens_worker FOLDER REPORT COMMAND ...

REPORT-R.json has for rank R the path of every file below FOLDER that it opened, as often as it did.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the command; its exit status."""
    folder, report, *words = sys.argv[1:]
    opened: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path.startswith(folder):
                opened.append(os.path.relpath(path, folder))

    sys.addaudithook(note)
    from pytrain.__main__ import main as command

    status = command(words)
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    Path(f"{report}-{rank}.json").write_text(json.dumps(opened), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
