"""The block of `pytrain info`."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pytrain
from pytrain import information
from pytrain.config.run import ParallelSection
from pytrain.native import native as load_native


def replace_native(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None) -> None:
    monkeypatch.delattr(pytrain, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "pytrain._native", module)
    load_native.cache_clear()  # so that it looks again, here and after the test
    monkeypatch.setattr("pytrain.information.native", load_native.__wrapped__)


def test_the_block_names_machine_and_versions() -> None:
    facts = dict(line.split(":", 1) for line in information.report().splitlines())
    assert facts["pytrain"].strip().startswith(f"{pytrain.__version__}, commit ")
    assert facts["cores"].strip().startswith(f"{len(os.sched_getaffinity(0))} in the affinity mask")
    assert {
        "Python",
        "platform",
        "libc",
        "CPU",
        "OMP_NUM_THREADS",
        "caches",
        "memory",
        "libraries",
        "MPI",
    } <= set(facts)
    import numpy

    assert f"numpy {numpy.__version__}" in facts["libraries"]


def test_the_native_module_tells_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    native = ModuleType("pytrain._native")
    native.Error = ValueError  # type: ignore[attr-defined]
    native.information = lambda: {  # type: ignore[attr-defined]
        "isa": "avx2",
        "built": ["scalar", "avx2"],
        "dropped": {"avx512": "no compiler support"},
        "none": [],
    }
    replace_native(monkeypatch, native)
    assert information.native_facts() == {
        "native isa": "avx2",
        "native built": "scalar, avx2",
        "native dropped": "avx512 (no compiler support)",
        "native none": "none",
    }


def test_a_native_module_that_does_not_load_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_native(monkeypatch, None)
    assert information.native_facts()["native module"].startswith("not loaded: ")


def test_no_mpi_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert information.mpi_library().startswith("none (")


def test_the_commit_is_that_of_the_source_tree() -> None:
    root = Path(information.__file__).parents[1]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        assert information.commit().startswith("unknown")
    else:
        assert head.stdout.startswith(information.commit().removesuffix("-dirty"))


def test_an_arm_processor_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : 0\nCPU implementer : 0x46\nCPU part : 0x001\n\nprocessor : 1\nCPU part : 0x002\n"
    monkeypatch.setattr(information, "_text", lambda path: text if path.name == "cpuinfo" else "")
    assert information.cpu_model() == "CPU implementer 0x46, CPU part 0x001"
    assert information.memory() == "unknown"


def test_core_groups_are_numa_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The four core memory groups of an A64FX, whose first 24 cores are ours."""
    nodes = [tmp_path / f"node{number}" for number in (10, 4, 5)]
    lists = {"node4": "12-23", "node5": "24-35", "node10": "36-47,50"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12, 34)) - {20})
    monkeypatch.setattr(Path, "glob", lambda self, pattern: nodes)
    monkeypatch.setattr(information, "_text", lambda path: lists[path.parent.name] + "\n")
    assert information.core_groups() == (
        "node4 with 11 cores, node5 with 10 cores; best with one process per group: mpiexec -n 2, OMP_NUM_THREADS=10"
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {36, 50, 99})
    assert information.core_groups() == "node10 with 2 cores"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {99})
    assert information.core_groups() == "unknown"


@pytest.mark.parametrize(
    ("bits", "a64fx", "bf16", "line", "expected"),
    [
        (0, False, False, 64, "of fixed length (no SVE)"),
        (512, True, False, 256, "SVE of 512 bits (A64FX), without bf16 products; cache lines of 256 bytes"),
        (256, False, True, 64, "SVE of 256 bits, with bf16 products; cache lines of 64 bytes"),
    ],
)
def test_vectors(
    monkeypatch: pytest.MonkeyPatch, bits: int, a64fx: bool, bf16: bool, line: int, expected: str
) -> None:
    features = {"vector_bits": bits, "a64fx": a64fx, "sve_bf16": bf16, "cache_line": line}
    native = ModuleType("pytrain._native")
    native.Error = ValueError  # type: ignore[attr-defined]
    native.information = dict  # type: ignore[attr-defined]
    native.kernels = ModuleType("kernels")  # type: ignore[attr-defined]
    native.kernels.features = lambda: features  # type: ignore[attr-defined]
    replace_native(monkeypatch, native)
    assert information.vectors() == expected


@pytest.mark.parametrize(
    ("a64fx", "groups", "expected"),
    [
        (True, [12, 12, 12, 12], "4 of 12 threads, one per core group"),
        (True, [2], "4 of 12 threads, one per core memory group of an A64FX (this process sees 2 cores)"),
        (True, [12], "4 of 12 threads, one per core memory group of an A64FX (this process sees 12 cores)"),
        (False, [72, 70], "2 of 70 threads, one per core group"),
        (False, [64], "1 of 64 threads"),
    ],
)
def test_choices(monkeypatch: pytest.MonkeyPatch, a64fx: bool, groups: list[int], expected: str) -> None:
    def device(fp16_chains: bool) -> None:
        assert fp16_chains
        if not a64fx:
            raise ValueError("no chains")

    native = ModuleType("pytrain._native")
    native.Error = ValueError  # type: ignore[attr-defined]
    native.information = dict  # type: ignore[attr-defined]
    native.CpuDevice = device  # type: ignore[attr-defined]
    native.kernels = ModuleType("kernels")  # type: ignore[attr-defined]
    native.kernels.features = lambda: {"a64fx": a64fx}  # type: ignore[attr-defined]
    replace_native(monkeypatch, native)
    found = {f"node{number}": cores for number, cores in enumerate(groups)}
    monkeypatch.setattr(information, "_cores_by_group", lambda: found)
    choices = information.choices()
    assert choices["ranks per node"] == expected
    assert ('"chains" is there, twice as fast' if a64fx else '"chains" needs SVE') in choices["fp16 sums"]
    assert ("map of ranks" in choices["rank map"]) == a64fx
    inside = f"neighbours are tensor-parallel, parallel.tp up to {4 if a64fx else len(groups)} stays on a node"
    assert (inside if a64fx or len(groups) > 1 else "parallel.tp crosses nodes") in choices["rank map"]
    assert ParallelSection.model_fields["rank_order"].default == "dp-pp-tp"


def test_without_the_native_module_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_native(monkeypatch, None)
    assert information.choices() == {}
