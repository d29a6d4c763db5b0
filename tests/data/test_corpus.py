"""`prepare`, end to end: the ids are the tokenizer's, whatever the workers, the kind of file and the cuts."""

import functools
import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard

from pytrain.data import corpus as module
from pytrain.data.corpus import prepare
from pytrain.data.indexed import IndexedDataset
from pytrain.data.sidecar import read_sidecar
from pytrain.data.tokenizer import SentencePieceTokenizer
from pytrain.errors import UserError


def stored_documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    ends = [*dataset.document_starts[1:].tolist(), len(dataset.tokens)]
    return [dataset.tokens[begin:end].tolist() for begin, end in zip(dataset.document_starts, ends, strict=True)]


def outputs(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx", "json")]


def test_text_and_json_lines(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, source_code: str, japanese: str
) -> None:
    texts = [source_code, japanese, "", "last"]
    (tmp_path / "a.py").write_text(texts[0], encoding="utf-8", newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[2:]).encode()
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    calls: list[tuple[int, int, int, int]] = []
    inputs = [tmp_path / name for name in ("a.py", "b.txt.gz", "c.jsonl.zst")]
    prefix = tmp_path / "corpus.v1"
    report = prepare(inputs, prefix, tokenizer.path, progress=lambda *values: calls.append(values))
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] if text else [] for text in texts]
    assert stored_documents(prefix) == expected
    size = sum(path.stat().st_size for path in inputs)
    tokens = sum(map(len, expected))
    utf8_bytes = sum(len(text.encode()) for text in texts)
    assert (report.files, report.documents, report.empty_documents) == (3, 4, 1)
    assert (report.tokens, report.utf8_bytes, report.input_bytes) == (tokens, utf8_bytes, size)
    assert calls[-1] == (size, size, 4, tokens)
    note = read_sidecar(prefix)
    assert note is not None
    assert (note.documents, note.tokens, note.utf8_bytes) == (4, tokens, utf8_bytes)
    assert note.sha256 == hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
    assert (note.tokenizer_sha256, note.vocabulary_size) == (tokenizer.sha256, 500)
    assert [name for name in sorted(os.listdir(tmp_path)) if "corpus" in name] == [
        "corpus.v1.bin",
        "corpus.v1.idx",
        "corpus.v1.json",
    ]


def test_without_end_of_document(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "t.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    prepare([tmp_path / "t.jsonl"], tmp_path / "c", tokenizer.path, append_eod=False, text_key="body")
    assert stored_documents(tmp_path / "c") == [tokenizer.encode("a"), tokenizer.encode("b")]


def test_workers_do_not_change_the_bytes(
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    random: np.random.Generator,
    japanese: str,
) -> None:
    monkeypatch.setattr(module, "TASK_BYTES", 2000)
    (tmp_path / "in").mkdir()
    for index in range(12):
        line = japanese[: int(random.integers(0, len(japanese)))]
        text = line * int(random.integers(1, 30))
        (tmp_path / "in" / f"{index:02}.txt").write_text(text, encoding="utf-8")
    for workers in (1, 3):
        prepare([tmp_path / "in"], tmp_path / f"c{workers}", tokenizer.path, workers)
    assert outputs(tmp_path / "c1") == outputs(tmp_path / "c3")


def test_error_in_a_worker(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TASK_BYTES", 100)
    lines = [json.dumps({"text": "fine" * 10})] * 20 + ["{}"] + [json.dumps({"text": "fine" * 10})] * 20
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"t.jsonl, line 21: there is no key 'text'"):
        prepare([tmp_path / "t.jsonl"], tmp_path / "c", tokenizer.path, 2)
    assert os.listdir(tmp_path) == ["t.jsonl"]


def test_a_worker_that_dies(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ignore_interrupts", functools.partial(os._exit, 1))
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(UserError, match="a tokenising process died"):
        prepare([tmp_path / "t.txt"], tmp_path / "c", tokenizer.path, 2)
    assert os.listdir(tmp_path) == ["t.txt"]


def test_cuts_do_not_change_the_ids(tmp_path: Path, tokenizer: SentencePieceTokenizer, source_code: str) -> None:
    """A document larger than a segment: lines are short, so every cut falls after a newline."""
    (tmp_path / "t.py").write_text(source_code, encoding="utf-8", newline="")
    for segment_bytes in (1 << 20, 300):
        prepare([tmp_path / "t.py"], tmp_path / f"c{segment_bytes}", tokenizer.path, segment_bytes=segment_bytes)
    assert outputs(tmp_path / f"c{1 << 20}") == outputs(tmp_path / "c300")


@pytest.mark.parametrize("name", ["line.txt", "line.jsonl"])
def test_a_line_of_ten_megabytes(tmp_path: Path, tokenizer: SentencePieceTokenizer, name: str) -> None:
    text = "吾輩は猫である、名前 " * 330_000
    assert len(text.encode()) > 10_000_000
    line = text if name.endswith(".txt") else json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / name).write_text(line, encoding="utf-8")
    report = prepare([tmp_path / name], tmp_path / "c", tokenizer.path)
    assert (report.documents, report.utf8_bytes) == (1, len(text.encode()))
    ids = IndexedDataset(tmp_path / "c").tokens[:-1]
    step = len(ids) // 50
    decoded = "".join(tokenizer.decode(ids[begin : begin + step].tolist()) for begin in range(0, len(ids), step))
    # Decoding in parts may split a character's bytes at 50 places; lengths tell whether text was lost.
    assert abs(len(decoded) - len(text)) < 400


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.txt", b"", r"t.txt: there is no text, so no corpus was written"),
        ("t.jsonl", b'{"text": ""}\n', r"t.jsonl: there is no text, so no corpus was written"),
        ("t.jsonl", b"\n", r"t.jsonl: there is no text, so no corpus was written"),
        ("t.txt", b"a\n\xff", r"t.txt, line 2: byte 0xff is not valid UTF-8"),
        ("t.txt", b"a\0", r"t.txt, line 1: there is a NUL character"),
        ("t.jsonl", b'{"a": "b"}', r"t.jsonl, line 1: there is no key 'text'"),
        ("t.txt.gz", b"plain", r"t.txt.gz is damaged"),
    ],
)
def test_bad_input_keeps_the_earlier_corpus(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / "good.txt").write_text("good")
    prepare([tmp_path / "good.txt"], tmp_path / "c", tokenizer.path)
    before = outputs(tmp_path / "c")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prepare([tmp_path / name], tmp_path / "c", tokenizer.path)
    assert outputs(tmp_path / "c") == before
    assert sorted(os.listdir(tmp_path)) == sorted(["good.txt", name, "c.bin", "c.idx", "c.json"])


def test_bad_arguments(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(UserError, match="no input file"):
        prepare([], tmp_path / "c", tokenizer.path)
    with pytest.raises(UserError, match=r"missing does not exist"):
        prepare([tmp_path / "missing"], tmp_path / "c", tokenizer.path)
    with pytest.raises(UserError, match="workers must be at least 1, not 0"):
        prepare([tmp_path / "t.txt"], tmp_path / "c", tokenizer.path, 0)
    with pytest.raises(UserError, match=r"tokenizer .*no.model does not exist"):
        prepare([tmp_path / "t.txt"], tmp_path / "c", tmp_path / "no.model")
    with pytest.raises(UserError, match=r"the folder of .*t.txt/c cannot be made: (File exists|Not a directory)"):
        prepare([tmp_path / "t.txt"], tmp_path / "t.txt" / "c", tokenizer.path)
