"""Megatron's files: golden bytes, round trips, and one sentence for each way a pair can be wrong."""

import dataclasses
import errno
import itertools
import os
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytrain.data.indexed import IndexedDataset, IndexedWriter, merge
from pytrain.data.sidecar import Sidecar, read_sidecar
from pytrain.errors import UserError

GOLDEN_BIN = bytes.fromhex("01000200030004000500")
GOLDEN_INDEX = bytes.fromhex(
    "4d4d494449445800000100000000000000080200000000000000030000000000000003000000020000000000000000000000"
    "0600000000000000000000000000000001000000000000000200000000000000"
)
SIDECAR = Sidecar(3, 5, 20, "00", "aa", 1000, "0")


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    prefix = tmp_path / "golden.v1"
    Path(f"{prefix}.bin").write_bytes(GOLDEN_BIN)
    Path(f"{prefix}.idx").write_bytes(GOLDEN_INDEX)
    return prefix


def flat(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def patch(prefix: Path, offset: int, layout: str, value: int) -> None:
    path = Path(f"{prefix}.idx")
    raw = bytearray(path.read_bytes())
    struct.pack_into(layout, raw, offset, value)
    path.write_bytes(raw)


def test_writer_makes_the_golden_bytes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a.b", 1000) as writer:
        writer.add_document([1, 2, 3])
        writer.append([4])
        writer.append([5])
        writer.end_document()
    assert (tmp_path / "a.b.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "a.b.idx").read_bytes() == GOLDEN_INDEX
    assert sorted(os.listdir(tmp_path)) == ["a.b.bin", "a.b.idx"]


def test_reader_reads_the_golden_bytes(golden: Path) -> None:
    dataset = IndexedDataset(golden)
    assert dataset.tokens.dtype == np.uint16
    assert dataset.tokens.tolist() == [1, 2, 3, 4, 5]
    assert dataset.sequence_lengths.tolist() == [3, 2]
    assert dataset.document_indices.tolist() == [0, 1, 2]
    assert dataset.document_starts.tolist() == [0, 3]
    assert dataset.document_starts.dtype == np.int64
    assert (dataset.documents, dataset.max_token()) == (2, 5)


def test_round_trip(tmp_path: Path, random: np.random.Generator) -> None:
    for vocabulary, dtype in ((65499, np.uint16), (65500, np.int32), (100_000, np.int32)):
        lengths = random.integers(0, 5, 200)
        lengths[-1] = 0
        documents = [random.integers(0, vocabulary, length).tolist() for length in lengths]
        with IndexedWriter(tmp_path / "c", vocabulary) as writer:
            for document in documents:
                writer.add_document(document)
        dataset = IndexedDataset(tmp_path / "c")
        assert dataset.tokens.dtype == dtype
        assert dataset.tokens.tolist() == flat(documents)
        assert dataset.max_token() == max(flat(documents))
        assert dataset.documents == 200
        assert dataset.document_starts.tolist() == (np.cumsum(lengths) - lengths).tolist()
        assert (writer.documents, writer.empty_documents) == (200, int((lengths == 0).sum()))
        assert dataset.sequence_lengths.min() > 0


def test_chunked_passes_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random: np.random.Generator) -> None:
    """Files larger than one chunk: the same bytes with a chunk of three."""
    documents = [random.integers(0, 9, length).tolist() for length in random.integers(0, 4, 50)]
    for name in ("whole", "chunked"):
        with IndexedWriter(tmp_path / name, 9) as writer:
            for document in documents:
                writer.add_document(document)
        monkeypatch.setattr("pytrain.data.indexed.CHUNK", 3)
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "chunked.idx").read_bytes()
    assert IndexedDataset(tmp_path / "whole").tokens.tolist() == flat(documents)


def test_several_sequences_in_a_document(golden: Path) -> None:
    """Megatron can split documents into sentences; here the first of three documents has both."""
    patch(golden, 26, "<Q", 4)
    path = Path(f"{golden}.idx")
    path.write_bytes(path.read_bytes()[:58] + struct.pack("<4q", 0, 2, 2, 2))
    dataset = IndexedDataset(golden)
    assert dataset.document_starts.tolist() == [0, 5, 5]


def test_empty_corpus_is_legal(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "e", 10) as writer:
        writer.add_document([])
    dataset = IndexedDataset(tmp_path / "e")
    assert (len(dataset.tokens), dataset.documents, dataset.max_token()) == (0, 1, -1)
    assert dataset.document_starts.tolist() == [0]


@pytest.mark.parametrize(
    ("offset", "layout", "value", "sentence"),
    [
        (0, "<B", 0x4E, r"golden.v1.idx is not a Megatron index: it begins with b'NMIDIDX"),
        (9, "<Q", 2, "golden.v1.idx has index version 2"),
        (17, "<B", 0, "golden.v1.idx has dtype code 0"),
        (17, "<B", 9, "golden.v1.idx has dtype code 9"),
        (17, "<B", 6, "golden.v1.idx stores float64 values"),
        (17, "<B", 7, "golden.v1.idx stores float32 values"),
        (17, "<B", 4, "golden.v1.idx: the pointer of sequence 1 is 6, but .* byte 12"),
        (18, "<Q", 3, "golden.v1.idx has 82 bytes, but its header .* needs 94"),
        (18, "<Q", 2**63, "golden.v1.idx has 82 bytes, but its header"),
        (26, "<Q", 4, "golden.v1.idx has 82 bytes, but its header .* needs 90"),
        (34, "<i", 2, "golden.v1.idx: the pointer of sequence 1 is 6, but .* byte 4"),
        (38, "<i", 3, "golden.v1.bin has 10 bytes, but golden.v1.idx describes 6 tokens of 2 bytes"),
        (38, "<i", -2, "golden.v1.idx: sequence 1 has the negative length -2"),
        (42, "<q", 2, "golden.v1.idx: the pointer of sequence 0 is 2"),
        (50, "<q", -6, "golden.v1.idx: the pointer of sequence 1 is -6"),
        (58, "<q", 1, "golden.v1.idx: document indices run from 1 to 2"),
        (66, "<q", 3, "golden.v1.idx: document index 2 is 2, less than the one before"),
        (74, "<q", 1, "golden.v1.idx: document indices run from 0 to 1, but must run from 0 to .* 2"),
    ],
)
def test_bad_index(golden: Path, offset: int, layout: str, value: int, sentence: str) -> None:
    patch(golden, offset, layout, value)
    with pytest.raises(UserError, match=sentence):
        IndexedDataset(golden)


def test_bad_documents_beyond_the_first_chunk(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytrain.data.indexed.CHUNK", 1)
    patch(golden, 66, "<q", 3)
    with pytest.raises(UserError, match="document index 2 is 2"):
        IndexedDataset(golden)


@pytest.mark.parametrize("size", [0, 9, 11])
def test_bad_bin_size(golden: Path, size: int) -> None:
    Path(f"{golden}.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"golden.v1.bin has {size} bytes, but golden.v1.idx describes 5 tokens"):
        IndexedDataset(golden)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_missing_file(golden: Path, ending: str) -> None:
    os.remove(f"{golden}.{ending}")
    with pytest.raises(UserError, match=rf"golden.v1.{ending} does not exist"):
        IndexedDataset(golden)


def test_no_document_indices(tmp_path: Path) -> None:
    (tmp_path / "n.bin").write_bytes(b"")
    (tmp_path / "n.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 0))
    with pytest.raises(UserError, match=r"n.idx has no document indices"):
        IndexedDataset(tmp_path / "n")


def test_multimodal_index(golden: Path) -> None:
    with open(f"{golden}.idx", "ab") as file:
        file.write(bytes(2))
    with pytest.raises(UserError, match="multimodal"):
        IndexedDataset(golden)


@pytest.mark.parametrize("length", range(0, 82, 3))
def test_every_truncation_is_refused(golden: Path, length: int) -> None:
    Path(f"{golden}.idx").write_bytes(GOLDEN_INDEX[:length])
    with pytest.raises(UserError, match=r"golden\.v1\.idx"):
        IndexedDataset(golden)


@settings(
    deadline=None,
    database=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(offset=st.integers(0, 81), value=st.integers(0, 255), cut=st.integers(0, 82))
def test_a_damaged_index_is_refused_or_consistent(golden: Path, offset: int, value: int, cut: int) -> None:
    raw = bytearray(GOLDEN_INDEX)
    raw[offset] = value
    Path(f"{golden}.idx").write_bytes(raw[:cut])
    try:
        dataset = IndexedDataset(golden)
    except UserError:
        return
    assert cut == 82
    assert dataset.sequence_lengths.sum() * dataset.dtype.itemsize == len(GOLDEN_BIN)
    assert dataset.document_starts.max() <= len(dataset.tokens)


def test_error_leaves_nothing_and_keeps_what_was(golden: Path) -> None:
    def stop_half_way() -> None:
        with IndexedWriter(golden, 10) as writer:
            writer.add_document([1])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert sorted(os.listdir(golden.parent)) == ["golden.v1.bin", "golden.v1.idx"]
    assert IndexedDataset(golden).tokens.tolist() == [1, 2, 3, 4, 5]


def test_full_disk_leaves_nothing_and_keeps_what_was(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = IndexedWriter(golden, 10)
    writer.add_document([1])

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"golden.v1.bin/.idx cannot be written: No space left on device"):
        writer.close()
    assert sorted(os.listdir(golden.parent)) == ["golden.v1.bin", "golden.v1.idx"]
    assert IndexedDataset(golden).tokens.tolist() == [1, 2, 3, 4, 5]


def test_overwriting_drops_the_old_note(golden: Path) -> None:
    with IndexedWriter(golden, 10) as writer:
        writer.add_document([1])
        writer.close(SIDECAR)
    assert read_sidecar(golden) == SIDECAR
    with IndexedWriter(golden, 10) as writer:
        writer.add_document([2])
    assert read_sidecar(golden) is None
    assert IndexedDataset(golden).tokens.tolist() == [2]


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for prefix in (tmp_path / "missing" / "c", tmp_path / "file" / "c"):
        with pytest.raises(UserError, match=rf"{re.escape(str(prefix))}.bin cannot be written"):
            IndexedWriter(prefix, 10)


@pytest.mark.parametrize("bad", [10, -1, 70000])
def test_writer_refuses_foreign_ids(tmp_path: Path, bad: int) -> None:
    with (
        pytest.raises(UserError, match=rf"c.bin: token id {bad} is outside the vocabulary of 10"),
        IndexedWriter(tmp_path / "c", 10) as writer,
    ):
        writer.add_document([1, bad])
    assert os.listdir(tmp_path) == []


def test_close_inside_a_document_is_a_mistake(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "c", 10)
    writer.append([1])
    with pytest.raises(ValueError, match="inside a document"):
        writer.close()
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_merge(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    parts = [[[1, 2], [], [3]], [[4]], [[], [5, 6]]]
    prefixes = [write_corpus(part, name=f"part{index}") for index, part in enumerate(parts)]
    merge(prefixes, tmp_path / "merged")
    write_corpus(flat(parts), name="expected")
    for ending in ("bin", "idx"):
        assert (tmp_path / f"merged.{ending}").read_bytes() == (tmp_path / f"expected.{ending}").read_bytes()
    assert not (tmp_path / "merged.json").exists()


def test_merge_adds_the_notes(tmp_path: Path) -> None:
    for index, name in enumerate("ab"):
        with IndexedWriter(tmp_path / name, 1000) as writer:
            writer.add_document([index])
            writer.close(SIDECAR)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    note = read_sidecar(tmp_path / "c")
    assert note is not None
    assert (note.documents, note.tokens, note.utf8_bytes) == (6, 10, 40)
    assert len(note.sha256) == 64
    other = dataclasses.replace(SIDECAR, tokenizer_sha256="bb")
    with IndexedWriter(tmp_path / "b", 1000) as writer:
        writer.add_document([1])
        writer.close(other)
    with pytest.raises(UserError, match="different tokenizers"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "d")
    assert not list(tmp_path.glob("d.*"))


def test_merge_refuses(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    small, large = write_corpus([[1]], 100, "small"), write_corpus([[1]], 100_000, "large")
    with pytest.raises(UserError, match=r"large.bin stores int32 but .*small.bin stores uint16"):
        merge([small, large], tmp_path / "m")
    with pytest.raises(UserError, match="no corpus to merge"):
        merge([], tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "c.json is not JSON"),
        ("[]", "c.json must hold one JSON object"),
        ("{}", "c.json has no key 'documents'"),
        ('{"documents": "3"}', "'documents' is '3', which is not of type int"),
    ],
)
def test_bad_note(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_sidecar(tmp_path / "c")
