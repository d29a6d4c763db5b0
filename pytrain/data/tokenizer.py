"""Text to token ids and back: SentencePiece models (and their training), Hugging Face `tokenizer.json`,
streaming decode.
"""

import hashlib
import heapq
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pytrain.data.reading import SEGMENT_BYTES, InputFile, find_inputs, piece_text
from pytrain.errors import UserError

# Names under which open models keep their end-of-document token, looked for in this order.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
REPLACEMENT = "\ufffd"

CONFIGURATION = "tokenizer_config.json"
BEGINNING_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")

SAMPLE_BYTES = 64 << 20
# SentencePiece drops longer sentences without a word, so lines are cut to this many bytes first.
SENTENCE_BYTES = 4096
# Partial sums of the EM steps are added thread by thread: the count is part of the result, so it is not the
# machine's.
THREADS = 8
# Atomic pieces: a newline never joins its neighbours, so that a text may be cut after it without changing its
# ids.
WHOLE_PIECES = ("\n", "\t")


class Tokenizer(Protocol):
    """What the data path and `generate` ask of a tokenizer. Text that spells a special token is plain
    text.
    """

    path: Path
    """The file it was loaded from."""
    sha256: str
    """Of that file, hexadecimal: what corpora and checkpoints remember."""
    vocabulary_size: int
    """Largest id + 1."""
    eod_id: int
    """The end-of-document id that `prepare` appends and `generate` stops at."""
    begin_id: int | None
    """The id that the model's own tools put before each text, so that `prepare` and `generate` do; None for none."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without any added begin or end id."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, control ids nothing."""


class SentencePieceTokenizer:
    """A SentencePiece `.model` file.

    Whether texts begin with a token is not in that file, but in a `tokenizer_config.json` beside a tokenizer.model.

    U+2581, SentencePiece's own sign for a space, decodes as a space: the one character that does not come
    back.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.path = Path(path)
        content = _read(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            if not content:
                raise ValueError("an empty file loads without complaint and fails later")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.path} is not a SentencePiece model (Llama 3's tokenizer.model is not one either: use "
                "its "
                "tokenizer.json)"
            ) from error
        self.vocabulary_size = self._processor.get_piece_size()
        self.eod_id = self._processor.eos_id()
        if self.eod_id < 0:
            raise UserError(f"{self.path} has no end-of-sentence piece to end documents with")
        self.begin_id = self._begin() if self.path.name == "tokenizer.model" else None

    def _begin(self) -> int | None:
        name = begin_name(_configuration_beside(self.path))
        if name is None:
            return None
        found: int = self._processor.piece_to_id(name)
        if self._processor.id_to_piece(found) != name:
            raise UserError(f"{self.path} has no piece {name!r}, the begin token named by {CONFIGURATION}")
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        text: str = self._processor.decode([int(each) for each in ids])
        return text


class HuggingFaceTokenizer:
    """A `tokenizer.json`, through the `tokenizers` library.

    eod_token: name of the end-of-document token; by default the `eos_token` of a `tokenizer_config.json`
    beside the file, else the first of END_NAMES in the vocabulary.
    """

    def __init__(self, path: str | Path, eod_token: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{path}: reading it needs the package tokenizers (pip install tokenizers)") from error
        self.path = Path(path)
        content = _read(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # The library raises plain Exception.
            raise UserError(f"{self.path} is not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary_size = max(vocabulary.values(), default=-1) + 1
        configuration = _configuration_beside(self.path)
        self.eod_id = vocabulary[_end_name(self.path, vocabulary, eod_token, configuration)]
        self.begin_id = None if configuration.get("add_bos_token") is False else self._begin()

    def _begin(self) -> int | None:
        """The id that the file's post-processor puts before a text, whatever it puts after it."""
        plain, whole = self.encode("a"), self._tokenizer.encode("a").ids
        begun = whole[: len(plain)] != plain and whole[1 : 1 + len(plain)] == plain
        return int(whole[0]) if begun else None

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        text: str = self._tokenizer.decode([int(each) for each in ids], skip_special_tokens=True)
        return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"the tokenizer {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}") from error


def _end_name(path: Path, vocabulary: dict[str, int], asked: str | None, configuration: dict[str, Any]) -> str:
    """The name of the end-of-document token of a tokenizer.json."""
    source = "asked for"
    if asked is None:
        asked, source = _token_name(configuration.get("eos_token")), f"named by {CONFIGURATION}"
    if asked is not None:
        if asked not in vocabulary:
            raise UserError(f"{path} has no token {asked!r}, the end-of-document token {source}")
        return asked
    for name in END_NAMES:
        if name in vocabulary:
            return name
    raise UserError(f"{path} has no end-of-document token: none of {', '.join(END_NAMES)}")


def begin_name(configuration: Mapping[str, Any]) -> str | None:
    """The token that a tokenizer_config.json puts before each text; transformers' LLaMA class does unless told not
    to.
    """
    if not configuration.get("add_bos_token", configuration.get("tokenizer_class") in BEGINNING_CLASSES):
        return None
    return _token_name(configuration.get("bos_token", "<s>"))


def _configuration_beside(path: Path) -> dict[str, Any]:
    """The content of the tokenizer_config.json in the tokenizer's folder; empty where there is none."""
    path = path.with_name(CONFIGURATION)
    if not path.exists():
        return {}
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object, but a {type(value).__name__}")
    return value


def _token_name(token: object) -> str | None:
    """Older files hold the token's whole description."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def is_sentencepiece(path: Path) -> bool:
    """Whether a file is a SentencePiece model; Llama 3 calls one tokenizer.model that is not."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, ValueError, OSError):
        return False
    return True


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a `.model` or `.json` file, or from a folder that holds tokenizer.model or
    tokenizer.json.

    Of a folder with both, SentencePiece's own file is taken, as an import does: a corpus and a model that come
    from one folder have the same tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        model, other = path / "tokenizer.model", path / "tokenizer.json"
        if model.exists() and (not other.exists() or is_sentencepiece(model)):
            return load_tokenizer(model)
        if other.exists():
            return load_tokenizer(other)
        raise UserError(f"the folder {path} holds neither tokenizer.json nor tokenizer.model")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise UserError(f"the tokenizer {path} must be a .model (SentencePiece) or .json (Hugging Face) file")


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that a model is to continue, at least one: begun as its documents are."""
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    return begin + tokenizer.encode(text) or [tokenizer.eod_id]


class StreamDecoder:
    """Text of a growing list of ids, never half a character.

    `push` returns the text that became certain; `finish` what is left, with U+FFFD for a character that never
    ended. The texts joined are `decode` of all ids, or, after `prompt`, what the ids add to its text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        # Ids before `_context` no longer matter; those before `_shown` are printed. The overlap is decoded
        # again each time, since a tokenizer may write the first id of a text differently (without its space).
        self._context = 0
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Add one id; the text it completes, possibly empty."""
        self._ids.append(token)
        before, now = self._texts()
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """The text held back so far."""
        before, now = self._texts()
        self._context = self._shown = len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return (
            self._tokenizer.decode(self._ids[self._context : self._shown]),
            self._tokenizer.decode(self._ids[self._context :]),
        )


def train_sentencepiece(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocabulary_size: int,
    model_type: Literal["unigram", "bpe"] = "unigram",
    *,
    character_coverage: float = 0.9995,
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
    text_key: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> SentencePieceTokenizer:
    """Train on the files (see `reading`) and write `output`, a `.model` file; the tokenizer it makes.

    Every text comes back exactly: no Unicode normalisation, spaces kept, bytes for rare characters
    (`byte_fallback`). character_coverage: share of the text's characters that get pieces of their own; 0.9995
    suits Japanese and Chinese. Reads all inputs, trains on at most `sample_bytes` of their lines, chosen by
    `seed`; the same inputs give the same file. progress(bytes_read, bytes_total) counts bytes on disk. Raises
    UserError.
    """
    path = Path(output)
    if path.suffix != ".model":
        raise UserError(f"the tokenizer {path} must be named .model")
    if model_type not in ("unigram", "bpe"):
        raise UserError(f"the model type must be unigram or bpe, not {model_type!r}")
    if vocabulary_size < 2:
        raise UserError(f"the vocabulary size must be above 1, not {vocabulary_size}")
    files = find_inputs(inputs)
    sample = _sample(_sentences(files, text_key, progress), sample_bytes, seed)
    if not sample:
        raise UserError(f"{', '.join(map(str, inputs))}: there is no text to train a tokenizer on")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of the tokenizer {path} cannot be made: {error.strerror}") from None
    _write(path, _train(sample, path, vocabulary_size, model_type, character_coverage))
    return SentencePieceTokenizer(path)


def _sentences(
    files: Sequence[InputFile], text_key: str, progress: Callable[[int, int], None] | None
) -> Iterator[str]:
    """The lines of all documents, cut to SENTENCE_BYTES, empty ones left out."""
    total = sum(file.size for file in files)
    done = 0
    position = 0

    def note(read: int) -> None:
        nonlocal position
        position = read

    for file in files:
        for piece in file.pieces(SEGMENT_BYTES, note):
            for line in piece_text(piece, text_key).split("\n"):
                yield from _cut_line(line)
            if progress is not None:
                progress(done + position, total)
        done += file.size


def _cut_line(line: str) -> Iterator[str]:
    # A character takes at most four bytes; most lines are short, and then there is nothing to encode.
    if 4 * len(line) <= SENTENCE_BYTES:
        if line:
            yield line
        return
    raw = line.encode("utf-8")
    begin = 0
    while begin < len(raw):
        end = min(begin + SENTENCE_BYTES, len(raw))
        while end < len(raw) and raw[end] & 0xC0 == 0x80:
            end -= 1
        yield raw[begin:end].decode("utf-8")
        begin = end


def _sample(sentences: Iterator[str], sample_bytes: int, seed: int) -> list[str]:
    """At most `sample_bytes` of the sentences, in their order: those with the smallest random numbers."""
    generator = np.random.Generator(np.random.Philox(seed))
    kept: list[tuple[float, int, str]] = []
    size = 0
    for index, sentence in enumerate(sentences):
        heapq.heappush(kept, (-generator.random(), index, sentence))
        size += len(sentence.encode("utf-8"))
        while size > sample_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode("utf-8"))
    return [sentence for _, _, sentence in sorted(kept, key=lambda entry: entry[1])]


def _train(sample: list[str], path: Path, vocabulary_size: int, model_type: str, character_coverage: float) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocabulary_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=list(WHOLE_PIECES),
            max_sentence_length=SENTENCE_BYTES,
            num_threads=THREADS,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        # The message begins with a source line and a condition in brackets; what follows is for people.
        reason = str(error).rpartition("] ")[2].strip().rstrip(".")
        raise UserError(
            f"{path}: SentencePiece could not train a tokenizer of {vocabulary_size} pieces on this text: {reason}"
        ) from error
    return model.getvalue()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
