"""The loader and held-out iteration against slices of the stored documents."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pytrain.data.indexed import IndexedDataset, IndexedWriter
from pytrain.data.loader import Batch, CorpusSpec, HeldOut, Loader
from pytrain.data.mixture import Phase
from pytrain.data.sidecar import Sidecar
from pytrain.errors import UserError

Write = Callable[..., Path]
EOD = 999


def documents(random: np.random.Generator, count: int, vocabulary: int = 900) -> list[list[int]]:
    return [[*random.integers(0, vocabulary, int(random.integers(0, 30))).tolist(), EOD] for _ in range(count)]


def noted(prefix: Path, ids: list[int], **changes: object) -> Path:
    """A one-document corpus with its note."""
    note = Sidecar(1, len(ids), 123, "00", "a" * 64, 1000, "0")
    with IndexedWriter(prefix, 1000) as writer:
        writer.add_document(ids)
        writer.close(dataclasses.replace(note, **changes))
    return prefix


def fields(batch: Batch) -> list[list[int]]:
    return [getattr(batch, field.name).tolist() for field in dataclasses.fields(batch)]


def test_samples_are_slices(write_corpus: Write, random: np.random.Generator) -> None:
    length = 16
    streams = []
    specs = []
    for index in range(3):
        parts = documents(random, 40)
        streams.append(np.concatenate(parts))
        specs.append(CorpusSpec(write_corpus(parts, name=f"c{index}"), weight=index + 1))
    loader = Loader(specs, length, 1000, seed=3)
    batch = loader.batch(100, 50)
    for array in (batch.tokens, batch.targets, batch.positions, batch.document_starts):
        assert array.dtype == np.int32
        assert array.shape == (50 * length,)
        assert array.flags.c_contiguous
    for row, (corpus, sample) in enumerate(zip(batch.corpus_ids, batch.sample_ids, strict=True)):
        window = streams[corpus][sample * length : sample * length + length + 1]
        assert batch.tokens.reshape(50, length)[row].tolist() == window[:-1].tolist()
        assert batch.targets.reshape(50, length)[row].tolist() == window[1:].tolist()
    assert batch.positions.tolist() == list(range(length)) * 50
    assert not batch.document_starts.any()
    assert set(batch.corpus_ids.tolist()) == {0, 1, 2}


def test_one_epoch_covers_the_corpus(write_corpus: Write) -> None:
    prefix = write_corpus([list(range(1, 102))])
    loader = Loader([CorpusSpec(prefix)], 10, 1000, seed=0)
    batch = loader.batch(0, 10)
    assert sorted(batch.targets.tolist()) == list(range(2, 102))
    assert sorted(batch.sample_ids.tolist()) == list(range(10))


@pytest.mark.parametrize(("tokens", "samples"), [(11, 1), (20, 1), (21, 2), (30, 2)])
def test_only_whole_samples_count(write_corpus: Write, tokens: int, samples: int) -> None:
    """A sample needs one token more than its length, for its last target."""
    loader = Loader([CorpusSpec(write_corpus([[1] * tokens]))], 10, 1000, seed=0)
    assert loader.mixture.sizes == (samples,)
    assert (loader.batch(0, 4).targets == 1).all()


def test_batch_depends_on_the_integers_alone(write_corpus: Write, random: np.random.Generator) -> None:
    """Any cut into micro-batches and ranks sees the same samples, in any order of asking."""
    specs = [CorpusSpec(write_corpus(documents(random, 30), name=name)) for name in ("a", "b")]
    loader = Loader(specs, 8, 1000, 5, True)
    whole = loader.batch(7, 12)
    again = Loader(specs, 8, 1000, 5, True)
    parts = {first: again.batch(first, 3) for first in (16, 10, 7, 13)}
    for name in ("tokens", "targets", "positions", "document_starts", "sample_ids", "corpus_ids"):
        joined = np.concatenate([getattr(parts[first], name) for first in sorted(parts)])
        assert np.array_equal(getattr(whole, name), joined), name
    assert fields(Loader(specs, 8, 1000, 6, True).batch(7, 12)) != fields(whole)


def test_document_boundaries(write_corpus: Write) -> None:
    prefix = write_corpus([[1, 2, EOD], [3, EOD], [], [4, 5, 6, EOD]])
    batch = Loader([CorpusSpec(prefix)], 8, 1000, 0, True).batch(0, 1)
    assert batch.tokens.tolist() == [1, 2, EOD, 3, EOD, 4, 5, 6]
    assert batch.targets.tolist() == [2, EOD, -1, EOD, -1, 5, 6, EOD]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.document_starts.tolist() == [0, 0, 0, 3, 3, 5, 5, 5]
    unmasked = Loader([CorpusSpec(prefix)], 8, 1000, 0, True, mask_boundary=False).batch(0, 1)
    assert unmasked.targets.tolist() == [2, EOD, 3, EOD, 4, 5, 6, EOD]
    assert unmasked.positions.tolist() == batch.positions.tolist()


def test_phases(write_corpus: Write) -> None:
    specs = [CorpusSpec(write_corpus([list(range(200))], name=name)) for name in ("a", "b")]
    loader = Loader(specs, 4, 1000, 0, phases=[Phase(0, (1, 0)), Phase(10, (0, 1))])
    assert loader.batch(5, 10).corpus_ids.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 1000])
def test_held_out_covers_every_token_once(
    write_corpus: Write, random: np.random.Generator, boundaries: bool, length: int
) -> None:
    parts = [*documents(random, 12), [], []]
    prefix = write_corpus(parts)
    stream = IndexedDataset(prefix).tokens.tolist()
    held_out = HeldOut(prefix, length, 1000, boundaries)
    batches = list(held_out.batches(3))
    assert all(batch.tokens.shape == (3 * length,) for batch in batches)
    tokens = np.concatenate([batch.tokens for batch in batches])[: len(stream) - 1]
    targets = np.concatenate([batch.targets for batch in batches])
    assert tokens.tolist() == stream[:-1]
    expected = stream[1:]
    if boundaries:
        starts = {sum(map(len, parts[:index])) for index in range(len(parts))}
        expected = [-1 if index + 1 in starts else token for index, token in enumerate(expected)]
    assert targets[: len(expected)].tolist() == expected
    assert (targets[len(expected) :] == -1).all()
    assert int((targets >= 0).sum()) == held_out.predicted_tokens
    assert held_out.windows == len(range(0, len(stream) - 1, length))


def test_held_out_bytes(tmp_path: Path, write_corpus: Write) -> None:
    assert HeldOut(noted(tmp_path / "n", [1, 2, 3]), 2, 1000).utf8_bytes == 123
    assert HeldOut(write_corpus([[1, 2, 3]]), 2, 1000).utf8_bytes is None


def test_foreign_id_names_corpus_and_id(write_corpus: Write) -> None:
    prefix = write_corpus([[1, 2, 3, 500, 4, 5, 6]], name="pages")
    loader = Loader([CorpusSpec(prefix, name="wiki")], 3, 400, 0)
    with pytest.raises(
        UserError, match=r"pages.bin: token 3 of the corpus wiki has the id 500, .* vocabulary of 400"
    ):
        loader.batch(0, 2)
    with pytest.raises(UserError, match="has the id 500"):
        HeldOut(prefix, 3, 400).batch(0, 1)


def test_tokenizer_of_another_run(tmp_path: Path) -> None:
    prefix = noted(tmp_path / "n", [1, 2, 3])
    Loader([CorpusSpec(prefix)], 2, 1000, 0, tokenizer_sha256="a" * 64)
    for open_it in (
        lambda: Loader([CorpusSpec(prefix)], 2, 1000, 0, tokenizer_sha256="b" * 64),
        lambda: HeldOut(prefix, 2, 1000, tokenizer_sha256="b" * 64),
    ):
        with pytest.raises(
            UserError, match=r"n.json: .* tokenizer of sha256 aaaa.* but this run's tokenizer has bbbb"
        ):
            open_it()


def test_vocabulary_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"n.json: .* 1000 pieces, but the model's vocabulary is 999"):
        Loader([CorpusSpec(noted(tmp_path / "n", [1, 2, 3]))], 2, 999, 0)


@pytest.mark.parametrize("changes", [{"tokens": 4}, {"documents": 2}])
def test_note_of_another_corpus(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"n.json describes .* but n.bin holds 3 in 1: prepare the corpus again"):
        Loader([CorpusSpec(noted(tmp_path / "n", [1, 2, 3], **changes))], 2, 1000, 0)


def test_missing_and_empty_corpora(tmp_path: Path, write_corpus: Write) -> None:
    with pytest.raises(UserError, match=r"nowhere.idx does not exist"):
        Loader([CorpusSpec(tmp_path / "nowhere")], 2, 10, 0)
    empty = write_corpus([[], []], name="empty")
    for open_it in (lambda: Loader([CorpusSpec(empty)], 2, 10, 0), lambda: HeldOut(empty, 2, 10)):
        with pytest.raises(UserError, match=r"empty.bin: the corpus empty is empty"):
            open_it()
    short = write_corpus([[1, 2, 3, 4]], name="short")
    with pytest.raises(UserError, match=r"short.bin: the corpus short has 4 tokens, fewer than one sample of 4 \+ 1"):
        Loader([CorpusSpec(short)], 4, 10, 0)
    with pytest.raises(UserError, match="no corpus to draw from"):
        Loader([], 4, 10, 0)
    for make in (lambda: Loader([CorpusSpec(short)], 0, 10, 0), lambda: HeldOut(short, 0, 10)):
        with pytest.raises(UserError, match="sequence length must be at least 1"):
            make()


def test_names(write_corpus: Write) -> None:
    prefix = write_corpus([[1, 2, 3]], name="pages")
    loader = Loader([CorpusSpec(prefix), CorpusSpec(prefix, 2.0, "again")], 2, 10, 0)
    assert loader.names == ("pages", "again")
    assert loader.corpus_tokens == (3, 3)
    assert loader.sidecars == (None, None)
