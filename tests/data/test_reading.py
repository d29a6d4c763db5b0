"""Cutting files into pieces: nothing lost, no character split, right line numbers; damaged files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from pytrain.data import reading
from pytrain.data.reading import InputFile, Piece, find_inputs, piece_text, text_segments
from pytrain.errors import UserError


def pieces(path: Path, segment_bytes: int = 1 << 20) -> list[Piece]:
    (file,) = find_inputs([path])
    return list(file.pieces(segment_bytes, lambda position: None))


def random_text(random: np.random.Generator, characters: int) -> str:
    alphabet = np.array(list("ab \n\t日本語🤷é"))
    return "".join(random.choice(alphabet, characters))


def test_pieces_join_to_the_text(tmp_path: Path, random: np.random.Generator) -> None:
    path = tmp_path / "t.txt"
    for segment_bytes in (8, 9, 16, 61, 10_000):
        text = random_text(random, int(random.integers(0, 300)))
        path.write_text(text, encoding="utf-8", newline="")
        found = pieces(path, segment_bytes)
        assert "".join(piece_text(piece, "text") for piece in found) == text
        assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
        assert max(len(piece.data) for piece in found) <= segment_bytes
        begin = 0
        for piece in found:
            assert piece.line == 1 + text.encode()[:begin].count(b"\n")
            begin += len(piece.data)


def test_cuts_prefer_newlines_then_spaces(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one two\nthree four five six seven")
    assert [piece.data for piece in pieces(path, 12)] == [
        b"one two\n",
        b"three four",
        b" five six",
        b" seven",
    ]


def test_text_segments(random: np.random.Generator) -> None:
    assert list(text_segments("", 5)) == []
    assert list(text_segments("ab\ncd efghijklmnop", 6)) == ["ab\n", "cd", " efghi", "jklmno", "p"]
    for characters in (1, 2, 7, 1000):
        text = random_text(random, 200)
        found = list(text_segments(text, characters))
        assert "".join(found) == text
        assert all(0 < len(segment) <= characters for segment in found)


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert [piece.data for piece in pieces(tmp_path / "t.txt")] == [b"abc"]
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert [piece_text(piece, "text") for piece in pieces(tmp_path / "t.jsonl")] == ["x"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a\\nb"}\n\n  \n{"text": "", "id": 1}\n{"text": "猫"}')
    found = pieces(path, 8)
    assert [piece_text(piece, "text") for piece in found] == ["a\nb", "", "猫"]
    assert [piece.line for piece in found] == [1, 4, 5]
    assert all(piece.last and piece.is_json for piece in found)


def compress(data: bytes, ending: str) -> bytes:
    if ending == "gz":
        return gzip.compress(data[:50]) + gzip.compress(data[50:])
    # Several frames in one file, as parallel compressors write them.
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return compressor.compress(data[:50]) + compressor.compress(data[50:])


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed(tmp_path: Path, ending: str, random: np.random.Generator) -> None:
    text = random_text(random, 400_000)
    path = tmp_path / f"t.txt.{ending}"
    path.write_bytes(compress(text.encode(), ending))
    positions: list[int] = []
    (file,) = find_inputs([path])
    assert "".join(piece_text(piece, "text") for piece in file.pieces(50_000, positions.append)) == text
    assert positions == sorted(positions)
    assert positions[-1] == file.size
    lines = "".join(json.dumps({"text": line}) + "\n" for line in ("a", "b"))
    path = tmp_path / f"t.jsonl.{ending}"
    path.write_bytes(compress(lines.encode(), ending))
    assert [piece_text(piece, "text") for piece in pieces(path)] == ["a", "b"]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_damaged(tmp_path: Path, ending: str, random: np.random.Generator) -> None:
    path = tmp_path / f"t.txt.{ending}"
    whole = compress(random.bytes(3000).hex().encode(), ending)
    for damaged in (
        whole[:-20],
        whole[: len(whole) // 2],
        b"not compressed at all",
        whole[:1000] + bytes(9) + whole[1009:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"t.txt.{ending} is damaged: ."):
            pieces(path)


def test_find_inputs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl.zst", ".hidden", "sub/c.ndjson.gz", ".git/config", "sub/d"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("12345")
    found = find_inputs([tmp_path / "in" / "b.txt", tmp_path / "in"])
    names = [str(file.path.relative_to(tmp_path / "in")) for file in found]
    assert names == ["b.txt", "a.jsonl.zst", "b.txt", "sub/c.ndjson.gz", "sub/d"]
    assert [file.is_json for file in found] == [False, True, False, True, False]
    assert {file.size for file in found} == {5}


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no input file was given"):
        find_inputs([])
    with pytest.raises(UserError, match=r"missing.txt does not exist"):
        find_inputs([tmp_path / "missing.txt"])
    with pytest.raises(UserError, match="is a folder without files"):
        find_inputs([tmp_path])
    vanished = InputFile(tmp_path / "gone.txt", 1, False)
    with pytest.raises(UserError, match=r"gone.txt cannot be read: No such file"):
        list(vanished.pieces(100, lambda position: None))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"ok\nok\n\xff bad", r"t.txt, line 3: byte 0xff is not valid UTF-8; convert"),
        ("é".encode("latin-1"), r"t.txt, line 1: byte 0xe9 is not valid UTF-8"),
        (b"ok\n\xe3\x81", r"t.txt, line 2: byte 0xe3 is not valid UTF-8"),
        ("text".encode("utf-16"), r"t.txt, line 1: byte 0xff is not valid UTF-8"),
        (b"\x80" * 100, r"t.txt, line 1: byte 0x80 is not valid UTF-8"),
        (b"one\ntwo\0\n", r"t.txt, line 2: there is a NUL character, .* remove"),
        ("text".encode("utf-16-le"), r"t.txt, line 1: there is a NUL character"),
    ],
)
@pytest.mark.parametrize("segment_bytes", [8, 1 << 20])
def test_text_that_is_none(tmp_path: Path, data: bytes, sentence: str, segment_bytes: int) -> None:
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        [piece_text(piece, "text") for piece in pieces(tmp_path / "t.txt", segment_bytes)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{", "t.jsonl, line 2: not valid JSON"),
        (b'{"text": "a"} x', "t.jsonl, line 2: not valid JSON"),
        (b"[" * 100_000, r"t.jsonl, line 2: (not valid JSON|the JSON is nested too deeply)"),
        (b'["text"]', "t.jsonl, line 2: a JSON object is expected, not a list"),
        (b'{"body": "x", "id": 1}', r"t.jsonl, line 2: there is no key 'text' \(keys here: 'body', 'id'\)"),
        (b"{}", r"t.jsonl, line 2: there is no key 'text' \(keys here: none\)"),
        (b'{"text": 3}', "t.jsonl, line 2: 'text' must be a string, not a int"),
        (b'{"text": null}', "t.jsonl, line 2: 'text' must be a string, not a NoneType"),
        (b'{"text": "\\ud800"}', "t.jsonl, line 2: 'text' holds half of a surrogate pair"),
        (b'{"text": "a\\u0000b"}', "t.jsonl, line 2: there is a NUL character"),
        (b'{"text": "\xff"}', "t.jsonl, line 2: byte 0xff is not valid UTF-8"),
    ],
)
def test_bad_json_line(tmp_path: Path, line: bytes, sentence: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=sentence):
        [piece_text(piece, "text") for piece in pieces(tmp_path / "t.jsonl")]


def test_json_line_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAXIMUM_LINE_BYTES", 1 << 20)
    (tmp_path / "t.jsonl").write_bytes(b"{}\n" + b"x" * (1 << 20) + b"\n")
    with pytest.raises(UserError, match=r"t.jsonl, line 2: the line is longer than 1 MiB"):
        pieces(tmp_path / "t.jsonl")
