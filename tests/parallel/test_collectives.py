"""Groups over real MPI; `programs/collectives.py` holds the checks."""

import pytest

from tests.parallel.launch import check_ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_operation(ranks: int, seed: int) -> None:
    assert "all agree" in check_ranks(ranks, "tests.parallel.programs.collectives", str(seed))
