"""The demo on a small stand-in for the standard library."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from pytrain import demo
from pytrain.checkpoint import Checkpoint
from pytrain.data.indexed import IndexedDataset, IndexedWriter
from pytrain.errors import UserError
from pytrain.metrics import read_metrics

LICENCE = "# Permission is granted\n# to everybody.\n"


def hashes(text: str) -> set[str]:
    """Of the paragraphs of a text, whatever their white space: computed apart from the demo's own."""
    parts = re.split(r"\n\s*\n", text)
    return {hashlib.md5(re.sub(r"\s+", " ", part).strip().encode()).hexdigest() for part in parts if part.strip()}


def write_library(folder: Path, modules: int = 24) -> Path:
    """Modules and packages of random functions; every module has the licence, two share a function."""
    print("seed 3")
    random = np.random.default_rng(3)
    names = ["".join(random.choice(list("abcdefghijklmno"), 5)) for _ in range(300)]
    shared = "def shared():\n    return 'the same words'\n"

    def module() -> str:
        parts = [LICENCE]
        for _ in range(12):
            a, b, c = (names[int(index)] for index in random.integers(0, 300, 3))
            parts.append(f"def {a}({b}):\n    # {c} of {b}\n    return {b} + {int(random.integers(99))}\n")
        if random.random() < 0.5:
            parts.append("  " + shared.replace("\n", "  \n"))
        return "\n\n".join(parts)

    for index in range(modules):
        if index % 4:
            path = folder / f"{names[index]}.py"
        else:
            path = folder / names[index] / "__init__.py"
            (folder / names[index] / "test").mkdir(parents=True)
            (folder / names[index] / "inner.py").write_text(module())
            (folder / names[index] / "test" / "test_it.py").write_text("# never seen\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module())
    (folder / "test").mkdir()
    (folder / "test" / "regrtest.py").write_text("# never seen\n")
    (folder / "broken.py").write_bytes(b"# \xff\xfe not UTF-8\n")
    (folder / "notes.txt").write_text("not Python\n")
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(autouse=True)
def _little_heldout_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HELDOUT_BYTES", 6000)


def test_modules_are_whole_and_without_tests(library: Path) -> None:
    found = dict(demo.modules(library))
    assert len(found) == 24
    assert all(len(texts) in (1, 2) for texts in found.values())
    assert not any("never seen" in text for texts in found.values() for text in texts)


def test_no_paragraph_is_on_both_sides(library: Path) -> None:
    train, heldout = demo.split_modules(library)
    seen = set().union(*map(hashes, train))
    held = set().union(*map(hashes, heldout))
    assert seen
    assert held
    assert not seen & held
    assert hashes(LICENCE) <= seen | held, "what both have stays on one side"


def test_whole_modules_are_held_out(library: Path) -> None:
    """No function of a module is in training while another one of it is held out."""
    train, heldout = demo.split_modules(library)
    seen, held = (set().union(*map(hashes, texts)) for texts in (train, heldout))
    for name, texts in demo.modules(library):
        own = set().union(*map(hashes, texts))
        others = (set().union(*map(hashes, more)) for key, more in demo.modules(library) if key != name)
        own -= set().union(*others)
        assert own <= seen or own <= held, name
    size = sum(map(len, heldout))
    assert 1000 < size < 9000
    assert size < 0.4 * sum(map(len, train))


def test_the_split_is_the_same_everywhere(library: Path) -> None:
    assert demo.split_modules(library) == demo.split_modules(library)


def test_a_library_without_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no Python sources to learn from; train on your own text instead"):
        demo.split_modules(tmp_path)


def test_unigram_entropy(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "corpus", 300) as writer:
        writer.add_document([3, 3, 3, 3])
        writer.add_document([7, 7, 250, 9])
    shares = np.array([4, 2, 1, 1]) / 8
    expected = -(shares * np.log(shares)).sum()
    assert demo.unigram_entropy(tmp_path / "corpus") == pytest.approx(expected)


def test_three_steps_end_to_end(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "VOCABULARY", 400)
    monkeypatch.setattr(demo, "standard_library", lambda: library)
    said: list[str] = []
    found = demo.run(tmp_path / "demo", said.append, steps=3)
    text = "\n".join(said)
    run = tmp_path / "demo" / "run"
    assert Checkpoint.open(run).step == 3
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    tokens = IndexedDataset(tmp_path / "demo" / "data" / "heldout").tokens
    shares = np.bincount(tokens)[np.unique(tokens)] / len(tokens)
    assert found.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.share == pytest.approx(found.heldout.loss / found.unigram_entropy)
    assert f"Held-out loss {found.heldout.loss:.3f} nats per token" in text
    assert found.sample.startswith(demo.PROMPT)
    assert text.count(demo.PROMPT) == 1
    assert demo.PROMPT not in capsys.readouterr().err, "the progress has no second copy"
    for words in ("a sample from the model", str(run), "generate", "inspect", "init --preset", "tokenizer"):
        assert words.lower() in text.lower()
    for name in ("train", "heldout"):
        texts = (tmp_path / "demo" / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert all(json.loads(line)["text"] for line in texts)
    with pytest.raises(UserError, match="is not empty; remove it, or choose another --folder"):
        demo.run(tmp_path / "demo", said.append, steps=3)


def test_the_preset_has_a_million_parameters() -> None:
    from pytrain.config import model_preset, parameter_count

    assert parameter_count(model_preset("demo")) >= 1_000_000
