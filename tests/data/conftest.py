"""What the data tests share: a text, a tokenizer trained on it, a small corpus."""

import json.decoder
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pytrain.data.indexed import IndexedWriter
from pytrain.data.tokenizer import SentencePieceTokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def source_code() -> str:
    """A Python source file: indentation, tabs and blank lines matter in it."""
    return Path(json.decoder.__file__).read_text(encoding="utf-8") + "if x:\n\ty = 1\t# tab\r\n\n\n   z\n"


@pytest.fixture(scope="session")
def japanese() -> str:
    """No spaces between words, wide characters, and some outside the Basic Multilingual Plane."""
    return (
        "吾輩は猫である。名前はまだ無い。\n"
        "どこで生れたかとんと見当がつかぬ。何でも暗い所でニャーニャー泣いていた。\n"
        "　全角の空白、ＡＢＣ、ｶﾀｶﾅ、①②③、「括弧」…と💡。\n"
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, source_code: str, japanese: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(source_code + japanese * 5, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    return train_sentencepiece([text_file], path, 500, "bpe")


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """write_corpus(documents, vocabulary=..., name=...) -> prefix."""

    def write(documents: Sequence[Sequence[int]], vocabulary: int = 1000, name: str = "corpus") -> Path:
        prefix = tmp_path / name
        with IndexedWriter(prefix, vocabulary) as writer:
            for document in documents:
                writer.add_document(document)
        return prefix

    return write
