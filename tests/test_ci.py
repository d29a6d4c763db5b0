"""The judgements that .ci/run leaves to Python: which skips are allowed, and what the README's blocks are."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

SUITE = """<testsuites><testsuite tests="4" failures="{failures}" errors="0" skipped="1">
<testcase classname="tests.test_ci" name="test_one"/>
<testcase classname="tests.test_ci" name="test_two[a.b]">
<skipped type="pytest.skip" message="{reason}">tests/test_ci.py:1: {reason}</skipped></testcase>
</testsuite></testsuites>"""
RULES = "# comment\n\nparity never\ntests needs (torch|a GPU)\nany on every phase\n"


def load(name: str) -> ModuleType:
    """A script of .ci as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("phase", "reason", "failures", "status"),
    [
        ("tests", "needs torch", 0, 0),
        ("tests", "on every phase", 0, 0),
        ("parity", "on every phase", 0, 0),
        ("parity", "needs torch", 0, 1),  # allowed in another phase only
        ("tests", "needs torch, and more", 0, 1),  # the whole reason has to match
        ("tests", "needs torch", 1, 1),
    ],
)
def test_summary(
    phase: str, reason: str, failures: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "skips.txt"
    rules.write_text(RULES, encoding="utf-8")
    (tmp_path / f"{phase}.xml").write_text(SUITE.format(reason=reason, failures=failures), encoding="utf-8")
    assert load("results").summary(rules, tmp_path) == status
    shown = capsys.readouterr().out.splitlines()
    refused = int(status and not failures)
    assert f"{phase}: 1 skipped{', which skips.txt does not allow' if refused else ''}: {reason}" in shown
    assert shown[-1] == f"{3 - failures} passed, {failures + refused} failed, {1 - refused} skipped"


def test_no_test_at_all_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "skips.txt").write_text(RULES, encoding="utf-8")
    assert load("results").summary(tmp_path / "skips.txt", tmp_path) == 1


def test_skipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = tmp_path / "tests.xml"
    results.write_text(SUITE.format(reason="needs torch", failures=0), encoding="utf-8")
    assert load("results").skipped_files(results) == ["tests/test_ci.py"]


def test_readme_block() -> None:
    block = load("readme").block
    demo = "text\n<!-- ci:demo -->\n```bash\npip install .\n```\n"
    text = f"{demo}<!-- ci:tests -->\n\n```\na\nb\n```\n```\nc\n```\n"
    assert block(text, "demo") == "pip install .\n"
    assert block(text, "tests") == "a\nb\n"
    with pytest.raises(SystemExit, match="0 blocks marked <!-- ci:offline -->"):
        block(text, "offline")
