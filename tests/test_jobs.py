"""Job scripts are read by the shell that would run them."""

import re
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parent.parent / "native"
SCRIPTS = sorted(NATIVE.glob("**/jobs/*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_understands_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.read_text(encoding="utf-8").startswith("#!/bin/bash\n")


def test_frontier_places_ranks() -> None:
    """Eight ranks a node with the nearest GPU and its network card; tensor parallelism inside the node."""
    text = (NATIVE / "hip" / "jobs" / "frontier.sh").read_text(encoding="utf-8")
    head = " ".join(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE))
    for option in ("--ntasks-per-node=8", "--gpus-per-task=1", "--gpu-bind=closest", "--cpus-per-task=7"):
        assert option in head
    for line in ("MPICH_OFI_NIC_POLICY=GPU", "sbcast ", "--distribution=block", "run.device=hip"):
        assert line in text
