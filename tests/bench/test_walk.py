"""Every benchmark as a user meets it: its help, a wrong option, and a file that cannot be written."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from bench import __main__ as everything
from bench import _record
from pytrain.errors import UserError

MODULES = sorted(path.stem for path in Path(everything.__file__).parent.glob("*.py") if not path.stem.startswith("_"))
CLICK = [name for name in MODULES if name != "hip"]  # which has argparse, as its issue says


def command_of(name: str) -> click.Command:
    found = importlib.import_module(f"bench.{name}").command
    assert isinstance(found, click.Command)
    return found


def test_the_readme_lists_every_module() -> None:
    readme = (Path(everything.__file__).parent / "README.md").read_text(encoding="utf-8")
    listed = {line.split("`")[1] for line in readme.splitlines() if line.startswith("| `")}
    assert set(MODULES) <= listed


@pytest.mark.parametrize("name", CLICK)
def test_every_option_is_explained(name: str) -> None:
    command = command_of(name)
    shown = CliRunner().invoke(command, ["--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert command.help
    explained = {
        parameter.name: parameter.help or parameter.type.to_info_dict()["param_type"] != "String"
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
    }
    assert all(explained.values()), explained
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert max(parameter.opts, key=len) in shown.output


@pytest.mark.parametrize("name", CLICK)
def test_a_wrong_option_is_a_sentence(name: str) -> None:
    shown = CliRunner().invoke(command_of(name), ["--no-such-option"])
    assert shown.exit_code == 2
    assert shown.stderr.splitlines()[-1].startswith("Error: No such option '--no-such-option'.")


def test_a_wrong_option_of_hip_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import hip

    with pytest.raises(SystemExit) as ended:
        hip.main(["--no-such-option"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: unrecognized arguments: --no-such-option")


def test_hip_without_its_tools_is_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.hip", "--build", str(tmp_path / "build")]
    for more, missing in (((), "hipcc"), (("--architecture", "gfx942"), "clang-19")):
        ended = subprocess.run([*command, *more], capture_output=True, text=True, env=os.environ | {"PATH": "/none"})
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"error: {missing} is not installed: apt-get install ")
        assert len(ended.stderr.splitlines()) == 1
    ended = subprocess.run([*command, "--json", str(tmp_path)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, f"error: {tmp_path} cannot be written: it is a folder\n")


@pytest.mark.parametrize("name", [name for name in CLICK if name != "report"])
def test_a_file_that_cannot_be_written_is_found_before_measuring(name: str, tmp_path: Path) -> None:
    path = tmp_path / "none" / "x.json"
    with pytest.raises(UserError) as found:
        command_of(name).main(["--json", str(path)], standalone_mode=False)
    assert str(found.value) == f"{path} cannot be written: there is no folder {path.parent}"
    with pytest.raises(UserError, match="cannot be written: it is a folder"):
        command_of(name).main(["--json", str(tmp_path)], standalone_mode=False)


@pytest.mark.parametrize("name", ["peak", "mca"])
def test_a_program_ends_with_status_2_and_a_sentence(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"bench.{name}", "--json", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"error: {tmp_path} cannot be written: it is a folder\n"


def test_what_a_record_says(tmp_path: Path) -> None:
    _record.write(tmp_path / "x.json", "x", {"rounds": 1}, {"cases": []})
    found: dict[str, Any] = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    machine = found["machine"]
    assert machine["cpu"]
    assert machine["governor"]
    assert machine["threads"] >= 1
    assert {"numpy", "torch", "mpi4py"} <= set(machine["libraries"])
    assert machine["commit"]
    assert machine["pytrain"]
    assert machine["native"]["isa"] == machine["isa"]
