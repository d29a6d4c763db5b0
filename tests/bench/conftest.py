"""Benchmarks pin themselves to cores; the tests after them are to have all of theirs."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def all_cores() -> Iterator[None]:
    """Give the process its affinity mask back."""
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)
