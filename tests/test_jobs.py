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


SVE_JOBS = NATIVE / "cpu" / "sve" / "jobs"


@pytest.mark.parametrize(("name", "threads", "memory"), [("cmg", 12, "bind_local"), ("node", 48, "interleave_all")])
def test_fugaku_uses_the_whole_node(name: str, threads: int, memory: str, tmp_path: Path) -> None:
    """Both multiply-add pipes, all 48 cores, and a rank map that names each node of the torus once per process."""
    text = (SVE_JOBS / f"fugaku-{name}.sh").read_text(encoding="utf-8")
    head = " ".join(re.findall(r"^#PJM (.*)$", text, re.MULTILINE))
    for option in ("freq=2200,eco_state=0", "rank-map-hostfile=ranks.txt", "localtmp-size=", "-g "):
        assert option in head
    processes = int(re.findall(r"max-proc-per-node=(\d+)", head)[0])
    assert processes * threads == 48
    assert f"OMP_NUM_THREADS={threads} " in text
    assert f"memory_allocation_policy={memory}\n" in text
    # The only words that the paging policy knows; another one is an error at the start of each process.
    (policy,) = re.findall(r"XOS_MMM_L_PAGING_POLICY=(\S+)", text)
    assert set(policy.split(":")) <= {"demand", "prepage"}
    command = "".join(line.lstrip("# ") for line in text.splitlines(keepends=True) if re.search(r"awk|printf", line))
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    ranks = (tmp_path / "ranks.txt").read_text(encoding="utf-8").split()
    (shape,) = re.findall(r"node=(\d+)x(\d+)x(\d+):torus", head)
    nodes = {
        f"({x},{y},{z})" for x in range(int(shape[0])) for y in range(int(shape[1])) for z in range(int(shape[2]))
    }
    assert set(ranks) == nodes
    assert len(ranks) == processes * len(nodes)
    tensor_parallel = ranks[: 4 if name == "cmg" else 6]  # the fastest in pytrain's order
    assert len({re.sub(r"\(\d+", "", place) for place in tensor_parallel}) == 1, "neighbours along x, or one node"


def test_slurm_gives_each_process_its_cores() -> None:
    text = (SVE_JOBS / "slurm.sh").read_text(encoding="utf-8")
    assert 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores' in text
    assert "#SBATCH --signal=TERM@" in text
