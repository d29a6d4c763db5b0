"""Which checkpoints are kept."""

from pathlib import Path

import pytest

from pytrain.checkpoint import prune
from tests.checkpoint_cases import save_random


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (0, 0, [10, 20, 30, 40, 50]),
        (1, 0, [50]),
        (2, 0, [40, 50]),
        (9, 0, [10, 20, 30, 40, 50]),
        (1, 20, [20, 40, 50]),
        (2, 30, [30, 40, 50]),
        (0, 20, [10, 20, 30, 40, 50]),
    ],
)
def test_what_is_kept(tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        save_random(tmp_path, step, seed=step)
    deleted = prune(tmp_path, keep_last, keep_every)
    assert steps(tmp_path) == kept
    assert [path.name for path in deleted] == [
        f"step-{step:06d}" for step in (10, 20, 30, 40, 50) if step not in kept
    ]
    assert prune(tmp_path, keep_last, keep_every) == []


def test_the_newest_whole_one_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_random(tmp_path, step, seed=step)
    file = tmp_path / "checkpoints" / "step-000030" / "embed.weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    prune(tmp_path, 1, 0)
    assert steps(tmp_path) == [20, 30]


def test_folders_of_others_stay(tmp_path: Path) -> None:
    for step in (10, 20):
        save_random(tmp_path, step, seed=step)
    for name in ("step-000005", "notes", "step-000001.partial"):
        (tmp_path / "checkpoints" / name).mkdir()
    prune(tmp_path, 1, 0)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["notes", "step-000001.partial", "step-000005", "step-000020"]


def test_seven_digits(tmp_path: Path) -> None:
    for step in (999999, 1000000):
        save_random(tmp_path, step, seed=1)
    prune(tmp_path, 1, 0)
    assert steps(tmp_path) == [1000000]
