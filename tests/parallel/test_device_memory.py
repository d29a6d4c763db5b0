"""Which MPI may be handed addresses of GPUs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytrain.collectives.device_memory import knows_gpus, outside, refuse_unless_gpu_aware
from pytrain.errors import UserError
from tests import runs


def mpich(status: int, aware: int) -> Any:
    """A library that answers so."""

    def query(kind: Any, answer: Any) -> int:
        assert kind.value == 2  # HIP
        answer._obj.value = aware
        return status

    return SimpleNamespace(MPIX_GPU_query_support=query)


def test_the_library_is_asked() -> None:
    assert knows_gpus(mpich(0, 1))
    assert not knows_gpus(mpich(0, 0))
    assert not knows_gpus(mpich(1, 1))  # an answer that is an error says nothing
    assert knows_gpus(SimpleNamespace(MPIX_Query_rocm_support=lambda: 1))  # type: ignore[arg-type]
    assert not knows_gpus(SimpleNamespace(MPIX_Query_rocm_support=lambda: 0))  # type: ignore[arg-type]
    assert not knows_gpus(SimpleNamespace())  # type: ignore[arg-type]


def test_a_library_without_an_answer_is_refused(tmp_path: Path) -> None:
    for path in ("libm.so.6", str(tmp_path / "libmpi.so")):
        with pytest.raises(UserError, match=r'device_buffers = "direct" needs an MPI .* use "staged"'):
            refuse_unless_gpu_aware(path)


def test_direct_is_for_gpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'collectives.device_buffers "direct" is about .* run.device is "cpu"'):
        runs.configuration(runs.Corpora(tmp_path), tmp_path / "run", collectives__device_buffers="direct")


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 4), (3, 7), (7, 10), (0, 10)])
def test_what_is_outside_a_piece(first: int, last: int) -> None:
    numbers = list(range(10))
    before, behind = outside(slice(first, last), 10)
    assert numbers[before] + numbers[first:last] + numbers[behind] == numbers
