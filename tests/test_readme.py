"""What the README shows runs: its Python example, and every command and key that it names."""

import re
from pathlib import Path

import pytest

from pytrain.config import resolved_toml
from pytrain.config.explain import all_keys
from tests import runs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    corpora = runs.make_corpora(tmp_path / "corpora")
    config = runs.configuration(corpora, tmp_path / "run", "llama", run__steps=3, evaluation__every=0)
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(resolved_toml(config), encoding="utf-8")
    exec(compile(example.replace("run.steps=200", "run.steps=4"), "README.md", "exec"), {})
    assert "Evaluation(loss=" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/step-000004/manifest.json").exists()


def test_every_file_and_folder_it_names_exists() -> None:
    (tree,) = re.findall(r"^### The tree\n\n```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    folder = ROOT
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT / names[0]
            names = names[:1]
        for name in names:
            path = (folder if line.startswith(" ") else ROOT) / name
            nested = ROOT / "native/cpu" / name
            assert path.exists() or nested.exists(), f"{name} in the README's tree"
    for name in re.findall(r"`(tests/[\w/]+\.py)`", README):
        assert (ROOT / name).exists(), name


def test_every_key_it_names_is_one() -> None:
    known = {key.name for key in all_keys()}
    sections = {name.split(".")[0] for name in known}
    named = {name for name in re.findall(r"\b([a-z_]+\.[a-z_]+)\b", README) if name.split(".")[0] in sections}
    files = {name for name in named if name.endswith((".py", ".toml", ".model", ".json"))}
    assert {"parallel.dp", "run.folder", "collectives.watchdog_seconds"} <= named
    assert named - files <= known | {"data.train"}, named - files - known
