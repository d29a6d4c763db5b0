"""The HIP device: every test runs kernels under the shim, in an order of fibers shuffled by its seed.

The native module has to be built for it (`-DPYTRAIN_HIP=SHIM`, see native/hip/README.md), which phase `hip` of CI
does. In a build for a GPU, and with one, the tests of operations run on it, but for what only the shim can tell. In
any other build this folder has no tests.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytrain import _native
from tests.hip.managed import Managed

FOLDER = Path(__file__).resolve().parent
SHIM: Any = getattr(_native, "hip_shim", None)
LAST = "test_every_kernel_of_the_object_ran"
"""Counts what all others launched, so it goes last, and only where all of them run."""
ON_A_GPU = ("test_attention.py", "test_matmul.py", "test_operations.py")
OPEN = _native.hip_device


def gpu_is_there() -> bool:
    """Whether this build opens a GPU; the shim's is none."""
    if SHIM is not None:
        return False
    try:
        OPEN(0)
    except _native.Error:
        return False
    return True


GPU = gpu_is_there()
if GPU:
    _native.hip_device = lambda index: Managed(OPEN(index))  # type: ignore[assignment, return-value]

NOT_HERE = [path.name for path in FOLDER.glob("test_*.py") if not GPU or path.name not in ON_A_GPU]
collect_ignore_glob = [] if SHIM is not None else NOT_HERE


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The count of kernels goes to the end; on a GPU nobody can order threads or count launches."""
    ours = [item for item in items if FOLDER in item.path.parents]
    if GPU:
        sources = {item: inspect.getsource(item.function) for item in ours}  # type: ignore[attr-defined]
        asking = [item for item, source in sources.items() if "shim" in source or "weight_gradient(" in source]
        config.hook.pytest_deselected(items=asking)
        items[:] = [item for item in items if item not in asking]
        return
    last = [item for item in ours if item.name.startswith(LAST)]
    files = {item.path.name for item in ours}
    if files != {path.name for path in FOLDER.glob("test_*.py")}:
        config.hook.pytest_deselected(items=last)
    items[:] = [item for item in items if item not in last]
    if files == {path.name for path in FOLDER.glob("test_*.py")}:
        items.extend(last)


@pytest.fixture(autouse=True)
def fibers(seed: int) -> Iterator[None]:
    """Shuffled fibers; afterwards no barrier may have diverged."""
    if SHIM is None:
        yield
        return
    SHIM.set_order("shuffled", seed)
    before = SHIM.counts()["divergent_barriers"]
    yield
    SHIM.set_order("ascending")
    SHIM.set_devices(1)
    assert SHIM.counts()["divergent_barriers"] == before


@pytest.fixture
def device() -> _native.Device:
    """A HIP device, under the shim or a GPU."""
    return _native.hip_device(0)
