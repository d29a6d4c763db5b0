"""The emulated Arm machine for the tests of this folder: `pytest tests/arm --arm FOLDER` (see README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.arm.machine import Machine


@pytest.fixture(scope="session")
def arm(request: pytest.FixtureRequest) -> Machine:
    """The machine that --arm names."""
    folder = request.config.getoption("arm")
    if folder is None:
        pytest.skip("no Arm machine to emulate: see tests/arm/README.md")
    return Machine(Path(folder).resolve())
