"""`prepare`: text files into Megatron's `.bin`/`.idx` with a note `.json` beside them.

The calling process reads, decompresses and cuts the files and writes the ids in order; worker processes
decode, parse and tokenise. Memory is bounded by the work in flight, a few MiB a worker, whatever the size of
files and documents. The output depends on inputs and tokenizer alone, not on the number of workers.
"""

import functools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytrain.data.indexed import INTEGER_CODES, IndexedWriter, dtype_code
from pytrain.data.reading import SEGMENT_BYTES, InputFile, Piece, find_inputs, piece_text, text_segments
from pytrain.data.sidecar import Sidecar
from pytrain.data.tokenizer import Tokenizer, load_tokenizer
from pytrain.errors import UserError
from pytrain.information import version

# Pieces are sent to a worker together up to this much text; a few such tasks wait for each worker.
TASK_BYTES = 1 << 20
TASKS_PER_WORKER = 3

ProgressCallback = Callable[[int, int, int, int], None]
"""progress(bytes_done, bytes_total, documents, tokens); bytes as on disk, compressed where files are."""


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `prepare` wrote: files read; documents, empty ones included; tokens; bytes of text; bytes on disk
    read; the id that each document begins with, if one was put there.
    """

    files: int
    documents: int
    empty_documents: int
    tokens: int
    utf8_bytes: int
    input_bytes: int
    begin_id: int | None


@dataclass(frozen=True, slots=True)
class _Task:
    pieces: list[Piece]
    position: int
    """Bytes of all inputs read up to the end of this task."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    ids: NDArray[Any]
    """All pieces' ids, in the type of the corpus."""
    lengths: list[int]
    utf8_bytes: int


def prepare(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: str | Path,
    workers: int = 1,
    *,
    prepend_bos: bool = True,
    append_eod: bool = True,
    text_key: str = "text",
    progress: ProgressCallback | None = None,
    segment_bytes: int = SEGMENT_BYTES,
) -> PrepareReport:
    """Tokenise the files (or folders) into `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`.

    `.jsonl`/`.ndjson` files give one document a line, the string under `text_key`; any other file is one
    document. `.gz` and `.zst` are decompressed. tokenizer: its file. workers: processes to tokenise in; 1
    stays in this one. prepend_bos: begin each document that is not empty with the tokenizer's begin id, if its
    model's own tools do so; append_eod: end it with the end-of-document id. Text documents longer than
    `segment_bytes` are tokenised in pieces, cut after a newline where there is one.

    The files appear whole or not at all, in a folder that is made where there is none, and replace those of an
    earlier run. Raises UserError with one
    sentence naming the file and line.
    """
    files = find_inputs(inputs)
    if workers < 1:
        raise UserError(f"the number of workers must be at least 1, not {workers}")
    loaded = load_tokenizer(tokenizer)
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of {prefix} cannot be made: {error.strerror}") from None
    total = sum(file.size for file in files)
    begin = loaded.begin_id if prepend_bos else None
    eod = loaded.eod_id if append_eod else None
    utf8_bytes = 0
    with IndexedWriter(prefix, loaded.vocabulary_size) as writer:
        for task, encoded in _encoded_tasks(_tasks(files, segment_bytes), loaded, text_key, workers):
            _write_task(writer, task, encoded, begin, eod)
            utf8_bytes += encoded.utf8_bytes
            if progress is not None:
                progress(task.position, total, writer.documents, writer.tokens)
        if writer.tokens == 0:
            raise UserError(f"{', '.join(map(str, inputs))}: there is no text, so no corpus was written")
        writer.close(
            Sidecar(
                documents=writer.documents,
                tokens=writer.tokens,
                utf8_bytes=utf8_bytes,
                sha256=writer.sha256,
                tokenizer_sha256=loaded.sha256,
                vocabulary_size=loaded.vocabulary_size,
                pytrain_version=version(),
            )
        )
    return PrepareReport(
        len(files), writer.documents, writer.empty_documents, writer.tokens, utf8_bytes, total, begin
    )


def _tasks(files: Sequence[InputFile], segment_bytes: int) -> Iterator[_Task]:
    """Group the pieces of all files into tasks of about TASK_BYTES."""
    pieces: list[Piece] = []
    size = 0
    done = 0
    position = 0

    def note(read: int) -> None:
        nonlocal position
        position = read

    for file in files:
        for piece in file.pieces(segment_bytes, note):
            pieces.append(piece)
            size += len(piece.data)
            if size >= TASK_BYTES:
                yield _Task(pieces, done + position)
                pieces, size = [], 0
        done += file.size
    if pieces:
        yield _Task(pieces, done)


def _encoded_tasks(
    tasks: Iterator[_Task], tokenizer: Tokenizer, text_key: str, workers: int
) -> Iterator[tuple[_Task, _Encoded]]:
    """Each task with its ids, in order."""
    if workers == 1:
        for task in tasks:
            yield task, _encode(tokenizer, text_key, task.pieces)
        return
    # Spawned, never forked: a process that has run OpenMP or MPI does not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_ignore_interrupts)
    waiting: deque[tuple[_Task, Future[_Encoded]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(_encode_in_worker, str(tokenizer.path), text_key, task.pieces)))
            if len(waiting) >= TASKS_PER_WORKER * workers:
                task, future = waiting.popleft()
                yield task, future.result()
        while waiting:
            task, future = waiting.popleft()
            yield task, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenising process died, most likely killed for want of memory; try fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def _worker_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of this worker process, loaded with its first task."""
    return load_tokenizer(path)


def _encode_in_worker(path: str, text_key: str, pieces: Sequence[Piece]) -> _Encoded:
    return _encode(_worker_tokenizer(path), text_key, pieces)


def _encode(tokenizer: Tokenizer, text_key: str, pieces: Sequence[Piece]) -> _Encoded:
    dtype = INTEGER_CODES[dtype_code(tokenizer.vocabulary_size)]
    arrays: list[NDArray[Any]] = []
    lengths: list[int] = []
    utf8_bytes = 0
    for piece in pieces:
        text = piece_text(piece, text_key)
        # A list of Python integers takes some forty bytes a token, so a long JSON text is encoded in segments
        # too.
        encoded = [np.array(tokenizer.encode(segment), dtype) for segment in text_segments(text, SEGMENT_BYTES)]
        arrays += encoded
        lengths.append(sum(map(len, encoded)))
        utf8_bytes += len(text.encode("utf-8"))
    return _Encoded(np.concatenate(arrays) if arrays else np.empty(0, dtype), lengths, utf8_bytes)


def _write_task(writer: IndexedWriter, task: _Task, encoded: _Encoded, begin: int | None, eod: int | None) -> None:
    first = 0
    for piece, length in zip(task.pieces, encoded.lengths, strict=True):
        if begin is not None and length > 0 and writer.current_length == 0:
            writer.append([begin])
        writer.append(encoded.ids[first : first + length])
        first += length
        if piece.last:
            if eod is not None and writer.current_length > 0:
                writer.append([eod])
            writer.end_document()
