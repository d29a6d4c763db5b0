"""The block of `pytrain info`."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pytrain
from pytrain import information
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
