"""The run folder before the first step."""

import os
from pathlib import Path

import pytest

from pytrain.checkpoint import check_writable, free_bytes, newest_checkpoint, save
from pytrain.errors import UserError
from tests.checkpoint_cases import save_random


def test_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "run")
    assert list((tmp_path / "a" / "run" / "checkpoints").iterdir()) == []
    assert newest_checkpoint(tmp_path / "a" / "run") is None


def test_unwritable_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^.*/file/run/checkpoints cannot be written to: Not a directory$"):
        check_writable(tmp_path / "file" / "run")
    sentence = r"^.*/file/run/checkpoints cannot be written to: Not a directory; the run has no whole checkpoint yet$"
    with pytest.raises(UserError, match=sentence):
        save(tmp_path / "file" / "run", 1, [], {}, "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        check_writable(tmp_path / "run")


def test_read_only_file_system_is_found() -> None:
    with pytest.raises(UserError, match=r"^/proc/run/checkpoints cannot be written to: .*$"):
        check_writable("/proc/run")


def test_newest_is_by_number_and_free_space_is_of_the_parent(tmp_path: Path) -> None:
    for step in (1000000, 999999):
        save_random(tmp_path, step, seed=1)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-1000000"
    assert free_bytes(tmp_path / "not" / "yet") > 0
