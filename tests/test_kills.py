"""Runs killed at random points of named phases, and resumed, end as the undisturbed one: a few; see tests/long."""

from pathlib import Path

import numpy as np
import pytest

from tests import kill_worker, runs
from tests.kills import kill_until_through

PHASES = {
    1: (kill_worker.UPDATE, kill_worker.WRITE, kill_worker.MANIFEST, kill_worker.RENAME),
    2: (kill_worker.WRITE, kill_worker.BACKWARD),
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_again_and_again(tmp_path: Path, random: np.random.Generator, ranks: int) -> None:
    died = kill_until_through(runs.make_corpora(tmp_path / "data"), tmp_path, ranks, PHASES[ranks], random)
    print(dict(died))
    assert sum(died.values()) == len(PHASES[ranks])
    assert sum(count for phase, count in died.items() if phase.startswith("save")) * 3 >= sum(died.values())
