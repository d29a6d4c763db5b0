"""How a job starts, and that it ends: within seconds, saying why, leaving nobody behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from pytrain.collectives import Group
from pytrain.collectives.process import Place, choose_progress, crowding, share_cores, sharing
from pytrain.launch import find_launcher, foreign_library, loaded_library, world
from tests.parallel.launch import liveness, run_ranks

FAILURES = "tests.parallel.programs.failures"
SOON = 30.0
"""Seconds for a job that takes two on an idle machine; without the abort it would wait for ever."""


@pytest.mark.parametrize(
    ("mode", "status", "sentence"),
    [
        ("raising", 1, "[rank 1 dp1/2] RuntimeError: deliberate"),
        ("killed", None, None),
        ("thread", 1, "[rank 0 of 2] RuntimeError: in a thread"),
        ("exiting", 3, None),
        ("user_error", 2, "[rank 1 of 2] error: run.toml: one rank alone does not like it"),
        ("shared_error", 2, "error: run.toml: nobody likes it"),
    ],
)
def test_a_failing_rank_ends_all(mode: str, status: int | None, sentence: str | None, tmp_path: Path) -> None:
    with liveness(tmp_path) as (path, pipe):
        ended = run_ranks(2, FAILURES, mode, path, timeout=SOON)
        pipe.assert_all_gone(SOON)
    assert ended.status == status if status is not None else ended.status != 0
    assert "after the failure" not in ended.output
    if sentence is not None:
        assert ended.output.count(sentence) == 1
    if mode == "raising":  # every line of the traceback says whose it is
        assert '[rank 1 dp1/2]     raise RuntimeError("deliberate")' in ended.output
    if mode in ("user_error", "shared_error", "exiting"):
        assert "Traceback" not in ended.output


def test_a_worker_of_the_tests_that_fails_ends_all(tmp_path: Path) -> None:
    """A grid whose second rank alone cannot build its model: the first one waits for it."""
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([{"shape": "gpt2", "dp": 2, "fails on": 1}]), encoding="utf-8")
    ended = run_ranks(2, "tests.parallel.grid_worker", str(cases), str(tmp_path / "none.json"), timeout=SOON)
    assert ended.status == 1
    assert ended.output.count("[rank 1] RuntimeError: this rank was asked to fail") == 1
    assert not (tmp_path / "none.json").exists()


def test_a_hang_ends_with_a_report(tmp_path: Path) -> None:
    with liveness(tmp_path) as (path, pipe):
        ended = run_ranks(2, FAILURES, "hanging", path, timeout=SOON)
        pipe.assert_all_gone(SOON)
    assert ended.status != 0
    assert "after the failure" not in ended.output
    lines = ended.output.splitlines()
    for rank, last in (
        (0, "all_reduce float32 x 34 sum by exchange"),
        (1, "receive float32 x 56 from 0 tag 5"),
    ):
        assert any(line.startswith(f"[rank {rank} of 2] phase: step 7, forward;") for line in lines)
        own = [line for line in lines if line.startswith(f"[rank {rank} of 2]   ")]
        assert "all_reduce float32 x 12" in own[-2]
        assert last in own[-1]
        assert own[-1].endswith("NOT FINISHED")
    assert any("watchdog: group world (0, 1): rank 1 at operation" in line for line in lines)
    assert any("rank 0 sent 0 messages to rank 1" in line and "received 1" in line for line in lines)


def test_a_frozen_rank_0_does_not_keep_the_others(tmp_path: Path) -> None:
    with liveness(tmp_path) as (path, pipe):
        ended = run_ranks(2, FAILURES, "frozen", path, timeout=SOON)
        pipe.assert_all_gone(SOON)
    assert ended.status != 0
    assert "no answer from rank 0" in ended.output


def test_a_rank_that_works_is_not_a_hang(tmp_path: Path) -> None:
    with liveness(tmp_path) as (path, pipe):
        ended = run_ranks(2, FAILURES, "uneven", path, timeout=SOON)
        pipe.assert_all_gone(SOON)
    assert (ended.status, ended.output.count("went well")) == (0, 2)


def test_too_many_threads_are_warned_of_once(tmp_path: Path) -> None:
    with liveness(tmp_path) as (path, _):
        ended = run_ranks(2, FAILURES, "shared_error", path, timeout=SOON, threads=64)
    assert ended.output.count("warning: 2 ranks on ") == 1
    assert "run 128 threads on" in ended.output


def test_ranks_share_the_cores_where_no_number_of_threads_is_given(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    with liveness(tmp_path) as (path, _):
        ended = run_ranks(cores, FAILURES, "shared_error", path, timeout=SOON, threads=None)
    told = f"share {cores} cores: each takes 1 of the {cores} threads that one alone would"
    assert ended.output.count(told) == (1 if cores > 1 else 0)
    assert "hinder each other" not in ended.output


# --- without ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # in a batch script, outside srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"PMI_SIZE": "3"}, 3),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}, 2),
        ({"PMIX_RANK": "0"}, None),
        ({"PMIX_RANK": "5"}, 2),
        ({"PMI_SIZE": "many"}, None),
    ],
)
def test_the_environment_tells_the_launcher(environment: dict[str, str], ranks: int | None) -> None:
    launcher = find_launcher(environment)
    assert (None if launcher is None else launcher.ranks) == ranks


def test_a_foreign_library_is_refused_in_one_sentence() -> None:
    """The child has a world of one, whatever it is told of its launcher; MPI is not started in this process."""
    code = 'from pytrain.launch import world\nwith world(environment={"PMI_SIZE": "4"}): pass'
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = found.stderr.splitlines()[-1]
    assert last.startswith("pytrain.errors.UserError: ")
    sentence = last.removeprefix("pytrain.errors.UserError: ")
    assert sentence.startswith("mpiexec (PMI) started 4 processes (PMI_SIZE), but each sees an MPI world of size 1")
    path = sentence.split("mpi4py has loaded ")[1].split(" (")[0]
    assert Path(path).is_file()
    assert "libmpi" in Path(path).name


def test_the_launcher_is_named() -> None:
    launcher = find_launcher({"SLURM_STEP_NUM_TASKS": "8"})
    assert launcher is not None
    sentence = foreign_library(launcher, "/usr/lib/libmpi.so.40", "Open MPI v4.1.4,\n package")
    assert "srun started 8 processes (SLURM_STEP_NUM_TASKS)" in sentence
    assert "/usr/lib/libmpi.so.40 (Open MPI v4.1.4, package)" in sentence


def test_the_library_is_found_in_the_memory_map() -> None:
    maps = (
        "7f0 r-xp 0 08:01 1 /usr/lib/libmpdec.so.3\n"
        "7f1 rw-p 0 00:00 0\n"
        "7f2 r-xp 0 08:01 2 /opt/my mpi/lib/libmpi.so.12.4\n"
    )
    assert loaded_library(maps) == "/opt/my mpi/lib/libmpi.so.12.4"
    assert loaded_library("7f1 rw-p 0 00:00 0 [heap]\n") == "an unknown libmpi"


def test_one_process_is_a_group_of_one_without_mpi() -> None:
    with world(environment={}) as group:
        assert type(group) is Group
        assert group.size == 1


def place(node: int, cores: set[int], threads: int) -> Place:
    return Place(node, f"host{node}", frozenset(cores), threads)


def test_cores_are_shared_by_the_ranks_that_may_run_on_them() -> None:
    everything = frozenset(range(8))
    free = Place(0, "host0", everything, 8, given=False)
    assert [each.threads for each in share_cores([free] * 3)] == [2, 2, 2]
    assert [each.threads for each in share_cores([free] * 9)] == [1] * 9
    assert share_cores([free]) == [free]
    elsewhere = Place(1, "host1", everything, 8, given=False)
    assert [each.threads for each in share_cores([free, elsewhere])] == [8, 8]
    bound = [Place(0, "host0", frozenset({2 * n, 2 * n + 1}), 2, given=False) for n in range(4)]
    assert share_cores(bound) == bound
    given = place(0, set(everything), 8)
    assert [each.threads for each in share_cores([given, free])] == [8, 4], "what is given stays"
    assert sharing(free, free) is None
    assert "each takes 4 of the 8 threads" in (sharing(free, share_cores([given, free])[1]) or "")


def test_crowding_counts_the_cores_that_the_ranks_share() -> None:
    everything = set(range(8))
    assert crowding([place(0, everything, 4)] * 2, 0) is None
    crowded = crowding([place(0, everything, 4)] * 3, 0) or ""
    assert "3 ranks on host0 run 12 threads on 8 cores" in crowded
    assert crowded.endswith("; lower OMP_NUM_THREADS, or start fewer ranks")
    single = crowding([place(0, everything, 1)] * 9, 0) or ""
    assert single == "9 ranks on host0 run 9 threads on 8 cores and will hinder each other; start fewer ranks"
    bound = [place(0, {0, 1}, 2), place(0, {2, 3}, 2), place(1, {0}, 9)]
    assert crowding(bound, 0) is None
    assert "host1" in (crowding(bound, 1) or "")
    tight = [place(0, {0, 1}, 3), place(0, {2, 3}, 1)]
    assert "runs 3 threads on the 2 cores of its affinity mask" in (crowding(tight, 0) or "")


@pytest.mark.parametrize(
    ("places", "mode", "use"),
    [
        ([place(0, {0, 1, 2, 3}, 2)], "thread", "1 rank with 2 threads together may run on 4"),
        ([place(0, {0, 1, 2, 3}, 2)] * 2, "test", "2 ranks with 4 threads together may run on 4"),
        # One core for two progress threads.
        ([place(0, {0, 1, 2, 3, 4}, 2)] * 2, "thread", "2 ranks with 4 threads together may run on 5"),
        # Another rank's spare core is none of ours.
        ([place(0, {0, 1}, 2), place(0, {2, 3}, 1)], "test", "1 rank with 2 threads together may run on 2"),
        ([place(0, {0, 1}, 1), place(0, {2, 3}, 2)], "thread", "1 rank with 1 threads together may run on 2"),
        # The same numbers on another node.
        ([place(0, {0, 1}, 1), place(1, {0, 1}, 1)], "thread", "1 rank with 1 threads together may run on 2"),
        ([place(0, {0, 1}, 1), place(0, {0, 1}, 1)], "test", "2 ranks with 2 threads together may run on 2"),
        # The node has a spare core, but this rank may not run on it.
        ([place(0, {0}, 1), place(0, {0, 1, 2}, 1)], "test", "2 ranks with 2 threads together may run on 3"),
        ([place(0, {0, 1}, 4)], "test", "1 rank with 4 threads together may run on 2"),
    ],
)
def test_a_thread_moves_messages_on_where_it_has_a_core(places: list[Place], mode: str, use: str) -> None:
    choice = choose_progress("auto", places, 0)
    left = "one" if mode == "thread" else "none"
    assert str(choice) == f"{mode}: {use} cores of host0, which leaves {left} for a thread"


@pytest.mark.parametrize("mode", ["thread", "test"])
def test_who_configures_the_progress_gets_it(mode: Literal["thread", "test"]) -> None:
    for cores in ({0}, {0, 1, 2}):
        assert choose_progress(mode, [place(0, cores, 1)], 0) == (mode, "as configured")
