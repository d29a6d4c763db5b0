"""The text about a corpus, through the command."""

from pathlib import Path

import numpy as np
import pytest

from pytrain.cli import run
from pytrain.data.indexed import IndexedWriter
from pytrain.errors import ExitCode
from tests import runs

DOCUMENTS = ([5, 700, 3], [], [299])


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A corpus of another tool: three documents of four tokens, and no note."""
    with IndexedWriter(tmp_path / "corpus", 1000) as writer:
        for ids in DOCUMENTS:
            writer.add_document(np.array(ids))
        writer.close()
    return tmp_path / "corpus"


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_corpus_of_another_tool(prefix: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    assert run(["inspect", f"{prefix}{ending}"]) == ExitCode.OK
    shown = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert {name: value.strip() for name, value in shown.items()} == {
        "corpus": f"{prefix}.bin and .idx",
        "documents": "3",
        "tokens": "4 of 2 bytes each",
        "largest id": "700",
        "note": f"none ({prefix}.json): tokenizer and bytes of text are not known",
    }


def test_a_prepared_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora = runs.make_corpora(tmp_path / "data")
    assert run(["inspect", str(corpora.folder / "more")]) == ExitCode.OK
    shown = capsys.readouterr().out
    size = sum(len(text.encode()) for text in runs.random_documents(20, 1))
    assert "documents:   20\n" in shown
    assert f"text:        {size:,} bytes of UTF-8, " in shown
    assert f"tokenizer:   {runs.VOCABULARY - 9:,} tokens, sha256 " in shown


def test_half_a_corpus_is_refused(prefix: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path(f"{prefix}.bin").unlink()
    assert run(["inspect", str(prefix)]) == ExitCode.BAD_INPUT
    assert f"{prefix}.bin does not exist; a corpus is the pair" in capfd.readouterr().err


def test_what_is_neither(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path / "nothing")]) == ExitCode.BAD_INPUT
    assert "nothing does not exist, so it is no checkpoint" in capfd.readouterr().err
