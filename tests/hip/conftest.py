"""The HIP device on the CPU: every test runs kernels under the shim, in an order of fibers shuffled by its seed.

The native module has to be built for it (`-DPYTRAIN_HIP=SHIM`, see native/hip/README.md), which phase `hip` of CI
does. In any other build this folder has no tests.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytrain import _native

FOLDER = Path(__file__).resolve().parent
SHIM: Any = getattr(_native, "hip_shim", None)
LAST = "test_every_kernel_of_the_object_ran"
"""Counts what all others launched, so it goes last, and only where all of them run."""

collect_ignore_glob = [] if SHIM is not None else ["test_*.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The count of kernels goes to the end."""
    ours = [item for item in items if FOLDER in item.path.parents]
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
    SHIM.set_order("shuffled", seed)
    before = SHIM.counts()["divergent_barriers"]
    yield
    SHIM.set_order("ascending")
    SHIM.set_devices(1)
    assert SHIM.counts()["divergent_barriers"] == before


@pytest.fixture
def device() -> _native.Device:
    """A HIP device under the shim."""
    return _native.hip_device(0)
