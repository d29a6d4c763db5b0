"""Fifty kills: 25 of one process and 25 of two ranks, at random points of every phase."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests import kill_worker, runs
from tests.kills import kill_until_through

KILLS = 25


@pytest.mark.parametrize("ranks", [1, 2])
def test_fifty_killed_runs_end_as_the_undisturbed_one(
    tmp_path: Path, random: np.random.Generator, ranks: int
) -> None:
    """Every phase is asked for at least once, the others are drawn; all must have been died in at the end."""
    asked = [*kill_worker.PHASES, *random.choice(kill_worker.PHASES, KILLS - len(kill_worker.PHASES))]
    random.shuffle(asked)
    died = kill_until_through(runs.make_corpora(tmp_path / "data"), tmp_path, ranks, list(map(str, asked)), random)
    report(died, ranks)
    assert sum(died.values()) == KILLS
    assert [phase for phase in kill_worker.PHASES if not died[phase]] == []
    assert 3 * sum(died[phase] for phase in kill_worker.PHASES if phase.startswith("save")) >= KILLS


def report(died: Counter[str], ranks: int) -> None:
    """The kills per phase."""
    print(f"kills per phase, {ranks} rank{'s' if ranks > 1 else ''}:")
    for phase in kill_worker.PHASES:
        print(f"  {phase:22} {died[phase]:3}")
