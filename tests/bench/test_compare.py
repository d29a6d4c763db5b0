"""Two results, and two commits, side by side."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import compare
from bench.compare import changed_loss, differences
from pytrain.errors import UserError

MACHINE = {"cpu": "a CPU", "isa": "avx2", "threads": 2, "governor": "unknown", "commit": "abc"}


def result(folder: Path, name: str, **changes: Any) -> str:
    found: dict[str, Any] = {
        "bench": "step",
        "machine": MACHINE,
        "tokens_per_s": 100.0,
        "step_seconds": {"median": 2.0, "min": 1.0, "max": 3.0, "values": [1.0, 2.0, 3.0]},
        "losses": [5.0, 4.0],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(found | changes), encoding="utf-8")
    return str(path)


def test_equal_losses_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faster = {"tokens_per_s": 150.0, "step_seconds": {"median": 1.5, "min": 0.5, "max": 3.0, "values": [1.5]}}
    first, second = result(tmp_path, "a"), result(tmp_path, "b", **faster, machine=MACHINE | {"commit": "def"})
    compare.main([first, second, "--assert-equal", "--json", str(tmp_path / "c.json")])
    output = capsys.readouterr().out
    assert "abc  ->  def" in output
    assert "equal: 2 losses are the same, bit for bit" in output
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert found["differences"] == [["tokens_per_s", 100.0, 150.0], ["step_seconds", 2.0, 1.5]]


def test_a_changed_loss_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = 4.0 + 1e-15
    first, second = result(tmp_path, "a"), result(tmp_path, "b", losses=[5.0, changed])
    assert changed != 4.0
    compare.main([first, second])
    with pytest.raises(SystemExit) as ended:
        compare.main([first, second, "--assert-equal"])
    assert ended.value.code == 1
    assert f"the loss of timed step 2 is 4.0 in the first and {changed!r} in the second" in capsys.readouterr().err


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    first = result(tmp_path, "a")
    with pytest.raises(UserError, match=r"one file is of bench\.step, the other of bench\.peak"):
        compare.main([first, result(tmp_path, "b", bench="peak")])
    with pytest.raises(UserError, match="give two files"):
        compare.main([first])
    (tmp_path / "text.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.json is not a JSON file that a benchmark wrote"):
        compare.main([first, str(tmp_path / "text.json")])
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        compare.main([first, str(tmp_path / "none.json")])
    assert changed_loss([], [1.0]) is not None
    assert changed_loss([1.0, 2.0], [1.0]) is None
    assert differences({"a": [{"name": "x", "b": 1}]}, {"a": [{"name": "x", "b": 2}]}) == [("a[x].b", 1.0, 2.0)]


STEP = """
import json, sys
from pathlib import Path
options, path = sys.argv[1:-2], Path(sys.argv[-1])
log = Path({log!r})
log.write_text(log.read_text() + {letter!r}) if log.exists() else log.write_text({letter!r})
if "--fail" in options:
    raise SystemExit("no such option")
path.write_text(json.dumps({{
    "bench": "step", "machine": {{}}, "tokens_per_s": {speed}, "peak_rss_bytes": 7, "losses": {losses}
}}))
"""


def fake_builder(log: Path, losses: dict[str, list[float]]) -> compare.Builder:
    def build(_root: Path, commit: str, folder: Path) -> Path:
        package = folder / "site" / "pytrain" / "bench"
        package.mkdir(parents=True)
        for path in (package, package.parent):
            (path / "__init__.py").touch()
        speed = 100 if commit == "old" else 125
        text = STEP.format(log=str(log), letter=commit[0], speed=speed, losses=losses[commit])
        (package / "step.py").write_text(text, encoding="utf-8")
        return folder / "site"

    return build


def test_commits_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {"old": [3.0], "new": [3.0]}
    builder = fake_builder(tmp_path / "log", losses)
    found = compare.compare_commits(("old", "new"), ["--batch", "2"], 3, builder)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "ononon"
    assert compare._commit_results(found)["ratio"]["median"] == 1.25
    with pytest.raises(UserError, match=r"bench\.step of A failed: no such option"):
        compare.compare_commits(("old", "new"), ["--fail"], 1, builder)
    losses["new"] = [3.5]
    monkeypatch.setattr(compare.compare_commits, "__defaults__", (builder,))
    with pytest.raises(SystemExit):
        compare.main(["--commits", "old", "new", "--rounds", "1", "--assert-equal"])
    assert "step 1 is 3.0 in the first and 3.5 in the second" in capsys.readouterr().err


def test_a_commit_that_is_not_there(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    with pytest.raises(UserError, match="there is no commit no-such-commit"):
        compare.build(tmp_path, "no-such-commit", tmp_path / "A")
