"""Threads: every task runs once, errors come back, and the process's floating-point mode is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from pytrain._native import Error, kernels


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 1000])
def test_every_task_runs_once_on_a_valid_thread(threads: int, tasks: int) -> None:
    ran = kernels.parallel_tasks(threads, tasks)
    assert len(ran) == tasks
    assert all(0 <= thread < threads for thread in ran)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_leaves_the_region_whole(threads: int) -> None:
    for _ in range(3):
        with pytest.raises(Error, match="task 17 failed on purpose"):
            kernels.parallel_tasks(threads, 50, failing=17)
    assert len(kernels.parallel_tasks(threads, 50)) == 50


def test_no_thread_is_an_error() -> None:
    with pytest.raises(Error, match="at least one thread"):
        kernels.parallel_tasks(0, 5)


def environment(**changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "PYTRAIN_"))}
    return kept | changes


def printed(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, where `kernels` is imported."""
    command = [sys.executable, "-c", f"from pytrain._native import kernels\n{code}"]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True, check=False)


def test_threads_follow_omp_num_threads() -> None:
    assert printed("print(kernels.default_threads())", OMP_NUM_THREADS="3").stdout.strip() == "3"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_threads_follow_the_affinity_mask() -> None:
    core = min(os.sched_getaffinity(0))
    code = "print(kernels.default_threads(), kernels.features()['affinity_cores'])"
    limited = f"import os\nos.sched_setaffinity(0, {{{core}}})\n"
    command = [sys.executable, "-c", f"{limited}from pytrain._native import kernels\n{code}"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("isa", kernels.tables())
def test_pytrain_isa_forces_one(isa: str) -> None:
    assert printed("print(kernels.chosen())", PYTRAIN_ISA=isa).stdout.strip() == isa


def test_without_pytrain_isa_the_best_is_chosen() -> None:
    assert printed("print(kernels.chosen())").stdout.strip() == kernels.tables()[0]


def test_a_wrong_pytrain_isa_lists_the_right_ones() -> None:
    result = printed("print(kernels.chosen())", PYTRAIN_ISA="sse9")
    assert result.returncode != 0
    assert "PYTRAIN_ISA=sse9" in result.stderr
    assert ", ".join(kernels.tables()) in result.stderr


def test_subnormals_survive_outside_native_calls() -> None:
    tiny = np.full(100_000, 1e-40, np.float32)
    kernels.parallel_tasks(3, 1000)
    assert (tiny + tiny > tiny).all()
    with pytest.raises(Error):
        kernels.parallel_tasks(3, 1000, failing=500)
    assert (tiny + tiny > 0).all(), "an exception left the flush mode on"
    with pytest.raises(Error):
        kernels.parallel_tasks(1, 1000, failing=500)
    assert (tiny + tiny > 0).all(), "an exception left the flush mode on"
