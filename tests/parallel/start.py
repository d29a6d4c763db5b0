"""Starts ranks under whichever mpiexec is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def mpiexec() -> str:
    """The launcher beside this Python, else that of the path; without one the test is skipped."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec: install an MPI, for example with pip install mpich")
    return found


def run_ranks(ranks: int, arguments: list[str], seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments on `ranks` ranks of one thread each; fails with their output."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        # Open MPI as root in a container, with more ranks than cores; others pass over these.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    command = [mpiexec(), "-n", str(ranks), sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)} gave {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done
