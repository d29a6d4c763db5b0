"""Batches of training samples and of held-out text, as pure functions of integers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pytrain import _batch
from pytrain.data.indexed import IndexedDataset, map_tokens
from pytrain.data.mixture import Mixture, Phase
from pytrain.data.sidecar import Sidecar, check_tokenizer, read_sidecar, sidecar_path
from pytrain.errors import UserError

T = TypeVar("T")

# Offsets of a corpus without document boundaries: the native loop does not look at them.
NO_STARTS: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class CorpusSpec:
    """One corpus of a mixture: path without `.bin`, weight by tokens, and a name for messages and metrics."""

    prefix: str | Path
    weight: float = 1.0
    name: str = ""

    @property
    def label(self) -> str:
        """The name, or the last part of the prefix."""
        return self.name or Path(self.prefix).name


@dataclass(frozen=True, slots=True)
class Batch:
    """`count` samples of T tokens, flattened row by row: rows = count * T.

    tokens, targets (-1: left out of the loss), positions, document_starts: int32 [rows], C-contiguous. A row
    attends to the keys from its `document_starts` (index within the sample) to itself. sample_ids: int64
    [count], window within the corpus; corpus_ids: int32 [count].
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    positions: NDArray[np.int32]
    document_starts: NDArray[np.int32]
    sample_ids: NDArray[np.int64]
    corpus_ids: NDArray[np.int32]


class OnRoot(Protocol):
    """Calls a function in one process of several, and gives its result or `UserError` to all of them."""

    def __call__(self, call: Callable[[], T], /) -> T: ...


def alone(call: Callable[[], T]) -> T:
    """`OnRoot` of one process."""
    return call()


@dataclass(frozen=True)
class _Index:
    """What the index of a corpus and its note say, as far as windows need it; plain data, so that it can travel."""

    bin_path: Path
    dtype: np.dtype[Any]
    tokens: int
    starts: NDArray[np.int64]
    """Token at which each document begins; NO_STARTS without document boundaries."""
    sidecar: Sidecar | None


def _read_index(
    prefix: str | Path, label: str, vocabulary: int, document_boundaries: bool, tokenizer_sha256: str | None
) -> _Index:
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    check_tokenizer(prefix, sidecar, tokenizer_sha256, vocabulary)
    tokens = len(dataset.tokens)
    if sidecar is not None and (sidecar.tokens, sidecar.documents) != (tokens, dataset.documents):
        raise UserError(
            f"{sidecar_path(dataset.prefix)} describes {sidecar.tokens} tokens in {sidecar.documents} documents, but "
            f"{dataset.bin_path.name} holds {tokens} in {dataset.documents}: prepare the corpus again"
        )
    if tokens < 2:
        raise UserError(f"{dataset.bin_path}: the corpus {label} is empty")
    starts = dataset.document_starts if document_boundaries else NO_STARTS
    return _Index(dataset.bin_path, dataset.dtype, tokens, starts, sidecar)


class _Corpus:
    """One opened corpus and the options with which windows are cut from it."""

    def __init__(
        self,
        prefix: str | Path,
        label: str,
        vocabulary: int,
        document_boundaries: bool,
        mask_boundary: bool,
        tokenizer_sha256: str | None,
        on_root: OnRoot,
    ) -> None:
        self.label = label
        self.vocabulary = vocabulary
        self.document_boundaries = document_boundaries
        self.mask_boundary = mask_boundary
        index = on_root(lambda: _read_index(prefix, label, vocabulary, document_boundaries, tokenizer_sha256))
        self.bin_path, self.starts, self.sidecar = index.bin_path, index.starts, index.sidecar
        self.tokens = map_tokens(index.bin_path, index.dtype, index.tokens)

    def fill(self, windows: NDArray[np.int64], rows: NDArray[np.int64], outputs: Sequence[NDArray[np.int32]]) -> None:
        """Fill rows `rows` of tokens, targets, positions and document_starts ([B, T] each) from token
        `windows`.
        """
        bad = _batch.fill_windows(
            self.tokens,
            self.starts,
            windows,
            rows,
            self.vocabulary,
            self.document_boundaries,
            self.mask_boundary,
            *outputs,
        )
        if bad >= 0:
            raise UserError(
                f"{self.bin_path}: token {bad} of the corpus {self.label} has the id "
                f"{int(self.tokens[bad])}, outside the vocabulary of {self.vocabulary}"
            )


def _outputs(count: int, length: int) -> tuple[NDArray[np.int32], ...]:
    return tuple(np.empty((count, length), np.int32) for _ in range(4))


def _flattened(
    outputs: Sequence[NDArray[np.int32]], sample_ids: NDArray[np.int64], corpus_ids: NDArray[np.int32]
) -> Batch:
    tokens, targets, positions, document_starts = (output.reshape(-1) for output in outputs)
    return Batch(tokens, targets, positions, document_starts, sample_ids, corpus_ids)


def _check_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise UserError(f"the sequence length must be at least 1, not {sequence_length}")


class Loader:
    """Training samples of a mixture of corpora, in an order fixed by the seed alone.

    Sample j of a corpus is tokens[j * T : j * T + T + 1] of its stream of documents: inputs are the first T,
    targets the last T. With `document_boundaries`, attention and positions restart at each document and
    (`mask_boundary`) the first token of a document is not predicted from the one before; an end-of-document
    id belongs to the document it ends and is predicted. Without, documents run into one another. A document
    that began before its sample counts positions from the sample's first token.

    phases: weights over time; by default one phase of the corpora's own weights. tokenizer_sha256: of the
    run's tokenizer, compared with what each corpus was prepared with. on_root: where several processes open the
    same corpora together, reads indices and notes in one of them. Raises UserError, naming the file.
    """

    def __init__(
        self,
        corpora: Sequence[CorpusSpec],
        sequence_length: int,
        vocabulary: int,
        seed: int,
        document_boundaries: bool = False,
        *,
        mask_boundary: bool = True,
        phases: Sequence[Phase] | None = None,
        tokenizer_sha256: str | None = None,
        on_root: OnRoot = alone,
    ) -> None:
        _check_length(sequence_length)
        self.sequence_length = sequence_length
        self._corpora = [
            _Corpus(
                spec.prefix, spec.label, vocabulary, document_boundaries, mask_boundary, tokenizer_sha256, on_root
            )
            for spec in corpora
        ]
        self.names = tuple(corpus.label for corpus in self._corpora)
        on_root(self._check_sizes)
        sizes = [(len(corpus.tokens) - 1) // sequence_length for corpus in self._corpora]
        if phases is None:
            phases = [Phase(0, tuple(spec.weight for spec in corpora))]
        self.mixture = Mixture(sizes, phases, seed, self.names)

    def _check_sizes(self) -> None:
        for corpus in self._corpora:
            if len(corpus.tokens) <= self.sequence_length:
                raise UserError(
                    f"{corpus.bin_path}: the corpus {corpus.label} has {len(corpus.tokens)} tokens, "
                    f"fewer than one sample of {self.sequence_length} + 1"
                )

    @property
    def sidecars(self) -> tuple[Sidecar | None, ...]:
        """The note of each corpus (hashes for the run's record), None where another tool made it."""
        return tuple(corpus.sidecar for corpus in self._corpora)

    @property
    def corpus_tokens(self) -> tuple[int, ...]:
        """Tokens of each corpus."""
        return tuple(len(corpus.tokens) for corpus in self._corpora)

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count - 1 of the global order; a pure function of the two
        integers.

        Which samples a data-parallel rank asks for is the trainer's affair. Raises UserError for an id
        outside the vocabulary.
        """
        corpus_ids, sample_ids = self.mixture.locate(first_sample, count)
        outputs = _outputs(count, self.sequence_length)
        for corpus in np.unique(corpus_ids) if len(self._corpora) > 1 else (0,):
            rows = np.flatnonzero(corpus_ids == corpus).astype(np.int64)
            self._corpora[int(corpus)].fill(sample_ids[rows] * self.sequence_length, rows, outputs)
        return _flattened(outputs, sample_ids, corpus_ids)


class HeldOut:
    """A held-out corpus in file order: window j holds the inputs j * T .. j * T + T - 1.

    Every token after the first is the target of exactly one window (none for the first of a document, where
    boundaries are masked); the rest of the last window has targets -1. `windows`: how many there are;
    `utf8_bytes`: bytes of the text, for bits per byte = nats / ln 2 / bytes, None for a corpus without the
    note of `pytrain prepare`. Options as in `Loader`.
    """

    def __init__(
        self,
        prefix: str | Path,
        sequence_length: int,
        vocabulary: int,
        document_boundaries: bool = False,
        *,
        name: str = "",
        mask_boundary: bool = True,
        tokenizer_sha256: str | None = None,
        on_root: OnRoot = alone,
    ) -> None:
        _check_length(sequence_length)
        self.sequence_length = sequence_length
        label = CorpusSpec(prefix, name=name).label
        self._corpus = _Corpus(
            prefix, label, vocabulary, document_boundaries, mask_boundary, tokenizer_sha256, on_root
        )
        self.name = label
        self.tokens = len(self._corpus.tokens)
        self.windows = -(-(self.tokens - 1) // sequence_length)
        self.sidecar = self._corpus.sidecar
        self.utf8_bytes = None if self.sidecar is None else self.sidecar.utf8_bytes

    @property
    def predicted_tokens(self) -> int:
        """How many targets count in the loss, over all windows."""
        if not (self._corpus.document_boundaries and self._corpus.mask_boundary):
            return self.tokens - 1
        starts = np.unique(self._corpus.starts)
        return self.tokens - 1 - int(np.count_nonzero((starts > 0) & (starts < self.tokens)))

    def batch(self, first_window: int, count: int) -> Batch:
        """Windows first_window .. first_window + count - 1; those past the end are all padding (targets
        -1).
        """
        outputs = _outputs(count, self.sequence_length)
        rows = np.arange(count, dtype=np.int64)
        windows = first_window + rows
        self._corpus.fill(windows * self.sequence_length, rows, outputs)
        return _flattened(outputs, windows, np.zeros(count, np.int32))

    def batches(self, count: int) -> Iterator[Batch]:
        """All windows, `count` at a time; the last batch is padded to `count`."""
        for first in range(0, self.windows, count):
            yield self.batch(first, count)
