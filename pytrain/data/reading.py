"""Text files of a corpus, plain or compressed, as a bounded-memory stream of document pieces.

`.jsonl` and `.ndjson` files hold one JSON object, and so one document, a line; any other file is one document
of UTF-8 text. `.gz` and `.zst` are decompressed on the way.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from pytrain.errors import UserError

# A longer text document is handed on in pieces of this size; a longer JSON line is refused.
SEGMENT_BYTES = 1 << 20
MAXIMUM_LINE_BYTES = 1 << 27
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Piece:
    """A whole document or a part of one. `line`: number of its first line in the file, from 1; `last`: ends
    it.
    """

    path: str
    line: int
    data: bytes
    is_json: bool
    last: bool


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file to read: its path, its size on disk in bytes and whether it holds JSON lines."""

    path: Path
    size: int
    is_json: bool

    def pieces(self, segment_bytes: int, position: Callable[[int], None]) -> Iterator[Piece]:
        """The file's pieces in order; `position` is told the bytes of the file on disk read so far.

        Raises UserError naming the file for anything that cannot be read or decompressed.
        """
        with _reading_errors(self.path), self.path.open("rb") as raw:
            stream = _decompressed(self.path, raw)
            split = _json_pieces if self.is_json else _text_pieces
            for piece in split(str(self.path), stream, segment_bytes):
                position(raw.tell())
                yield piece


def find_inputs(paths: Sequence[str | Path]) -> list[InputFile]:
    """The files named, in the order given; a folder stands for its files, hidden ones left out, sorted by
    path.

    Raises UserError for a path that is not there, an empty folder, or no path at all.
    """
    if not paths:
        raise UserError("no input file was given")
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(each for each in path.rglob("*") if each.is_file() and not _is_hidden(each, path))
            if not found:
                raise UserError(f"{path} is a folder without files")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path} does not exist")
    return [InputFile(path, path.stat().st_size, _plain_suffix(path) in (".jsonl", ".ndjson")) for path in files]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _plain_suffix(path: Path) -> str:
    """The last suffix before a compression's."""
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix


def piece_text(piece: Piece, text_key: str) -> str:
    """The text of a piece.

    Raises UserError naming file and line for invalid UTF-8, NUL characters, invalid JSON or a missing key.
    """
    where = f"{piece.path}, line {piece.line}"
    try:
        text = piece.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = piece.line + piece.data.count(b"\n", 0, error.start)
        raise UserError(
            f"{piece.path}, line {line}: byte 0x{piece.data[error.start]:02x} is not valid UTF-8; convert "
            "the file first, "
            "for example with iconv"
        ) from None
    if piece.is_json:
        text = _json_text(text, text_key, where)
    if (nul := text.find("\0")) >= 0:
        line = piece.line if piece.is_json else piece.line + text.count("\n", 0, nul)
        raise UserError(
            f"{piece.path}, line {line}: there is a NUL character, so this is not plain text; leave the file "
            "out, or "
            "remove the NULs, for example with tr -d '\\0'"
        )
    return text


def text_segments(text: str, characters: int) -> Iterator[str]:
    """The text in parts of at most so many characters, cut after a newline, else before a space; none if
    empty.
    """
    begin = 0
    while len(text) - begin > characters:
        end = begin + characters
        cut = text.rfind("\n", begin, end) + 1
        if cut <= begin:
            cut = text.rfind(" ", begin + 1, end)
        if cut <= begin:
            cut = end
        yield text[begin:cut]
        begin = cut
    if begin < len(text):
        yield text[begin:]


def _json_text(line: str, text_key: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON object is expected, not a {type(value).__name__}")
    if text_key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise UserError(f"{where}: there is no key {text_key!r} (keys here: {keys})")
    text = value[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} must be a string, not a {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {text_key!r} holds half of a surrogate pair, which is not a character") from None
    return text


def _text_pieces(path: str, stream: BinaryIO, segment_bytes: int) -> Iterator[Piece]:
    """One document; all but the last piece end at a newline, else before a space, else between characters."""
    line = 1
    data = stream.read(segment_bytes).removeprefix(BYTE_ORDER_MARK)
    while len(data) >= segment_bytes - len(BYTE_ORDER_MARK):
        cut = _cut(data)
        yield Piece(path, line, data[:cut], is_json=False, last=False)
        line += data.count(b"\n", 0, cut)
        data = data[cut:]
        more = stream.read(segment_bytes - len(data))
        if not more:
            break
        data += more
    yield Piece(path, line, data, is_json=False, last=True)


def _cut(data: bytes) -> int:
    if (newline := data.rfind(b"\n")) >= 0:
        return newline + 1
    if (space := data.rfind(b" ")) > 0:
        return space
    # Continuation bytes are 10xxxxxx. At most three follow a first byte; more are an error for the decoder to
    # report.
    for cut in range(len(data) - 1, max(len(data) - 5, 0), -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return len(data)


def _json_pieces(path: str, stream: BinaryIO, segment_bytes: int) -> Iterator[Piece]:
    """One document a line, whatever `segment_bytes`; blank lines are skipped."""
    number = 0
    while data := stream.readline(MAXIMUM_LINE_BYTES + 1):
        number += 1
        if len(data) > MAXIMUM_LINE_BYTES:
            raise UserError(f"{path}, line {number}: the line is longer than {MAXIMUM_LINE_BYTES >> 20} MiB")
        if number == 1:
            data = data.removeprefix(BYTE_ORDER_MARK)
        if not data.isspace():
            yield Piece(path, number, data, is_json=True, last=True)


@contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardStream(path, raw), buffer_size=1 << 17)
    return raw


class _ZstandardStream(io.RawIOBase):
    """Decompressed bytes of all frames of a .zst file. The library's own reader takes a cut file for a short
    one.
    """

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path}: reading .zst needs the package zstandard (pip install zstandard)") from error
        self._library = zstandard
        self._path = path
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` with the next decompressed bytes; 0 at the end. Raises EOFError inside a cut
        frame.
        """
        while not self._ready:
            if not self._compressed:
                self._compressed = self._raw.read(1 << 16)
            if not self._compressed:
                if self._inside:
                    raise EOFError("the compressed file ended before the end of its last frame")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> None:
        try:
            self._ready = memoryview(self._frame.decompress(self._compressed))
        except self._library.ZstdError as error:
            raise UserError(f"{self._path} is damaged: {error}") from error
        self._inside = not self._frame.eof
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = self._library.ZstdDecompressor().decompressobj()
