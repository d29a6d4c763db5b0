"""A SentencePiece model as the `tokenizer.json` that every version of transformers loads.

transformers' own LlamaTokenizer reads a tokenizer.model only with protobuf installed, and takes every one for
BPE. The `.model` file is copied too, for other tools.
"""

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pytrain.checkpoint.companions import find_tokenizer
from pytrain.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary; `kind` is NORMAL, CONTROL, ..."""

    text: str
    score: float
    kind: int


class SentencePieceModel(NamedTuple):
    """What of a SentencePiece model decides how it encodes; ids are indices into `pieces`."""

    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    unknown: int
    end: int
    normalization: bytes
    dummy_prefix: bool
    squeeze_spaces: bool


def end_of_document(files: Mapping[str, Path]) -> int | None:
    """Id of the end-of-document token of the tokenizer among a checkpoint's files; None where there is "
    "none."""
    from pytrain.data.tokenizer import load_tokenizer

    path = find_tokenizer(files)
    return None if path is None else load_tokenizer(path).eod_id


def generated_files(contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files transformers needs beside a SentencePiece tokenizer.model.

    `contents` are the small files of a checkpoint. A tokenizer.json among them is left as it is; one that is made
    puts before a text what a tokenizer_config.json among them says.
    """
    from pytrain.data.tokenizer import CONFIGURATION, begin_name

    if "tokenizer.model" not in contents or "tokenizer.json" in contents:
        return {}
    model = parse_model(contents["tokenizer.model"])
    end = model.pieces[model.end].text if model.end >= 0 else None
    begin = begin_name(json.loads(contents.get(CONFIGURATION, b"{}")))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": end,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": model.pieces[model.unknown].text,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer_json(model, begin), ensure_ascii=False, indent=1).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def tokenizer_json(model: SentencePieceModel, begin: str | None = None) -> dict[str, Any]:
    """The content of a tokenizer.json that encodes as the model does, and puts the piece `begin` before a text.

    With one exception, that pytrain's own models do not meet: under a dummy prefix, the text after a
    user-defined piece gets a prefix too.
    """
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(model)),
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(model))},
        "pre_tokenizer": None,
        "post_processor": None if begin is None else _beginning(model, begin),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(model) if model.kind == UNIGRAM else _bpe(model),
    }


def _beginning(model: SentencePieceModel, begin: str) -> dict[str, Any]:
    """The token before a text, and before each of a pair of texts."""
    token = next((index for index, piece in enumerate(model.pieces) if piece.text == begin), None)
    if token is None:
        raise UserError(f"tokenizer.model has no piece {begin!r}, the begin token named by tokenizer_config.json")

    def begun(text: str, number: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": begin, "type_id": number}},
            {"Sequence": {"id": text, "type_id": number}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": begun("A", 0),
        "pair": begun("A", 0) + begun("B", 1),
        "special_tokens": {begin: {"id": begin, "ids": [token], "tokens": [begin]}},
    }


def _normalizers(model: SentencePieceModel) -> Iterator[dict[str, Any]]:
    """What happens to the text first; the order is SentencePiece's."""
    if model.normalization:
        charsmap = base64.b64encode(model.normalization).decode()
        yield {"type": "Precompiled", "precompiled_charsmap": charsmap}
    if model.squeeze_spaces:
        yield {"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if model.dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _added_tokens(model: SentencePieceModel) -> Iterator[dict[str, Any]]:
    """Pieces that are found in the text before anything else."""
    for index, piece in enumerate(model.pieces):
        if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED):
            yield {
                "id": index,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.kind != USER_DEFINED,
            }


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    # SentencePiece never finds a byte piece in text that happens to spell "<0x41>"; here only its score keeps
    # it from being found: less than its six characters one by one.
    hidden = 8 * min(piece.score for piece in model.pieces if piece.kind == NORMAL)
    return {
        "type": "Unigram",
        "unk_id": model.unknown,
        "vocab": [[piece.text, piece.score if piece.kind == NORMAL else hidden] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    """Merges are not in the file: two pieces merge where a third spells both, the best score first."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    merges = [
        (-score, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unknown].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
        # Older readers know a merge only as one string, and no piece holds a plain space.
        "merges": [f"{left} {right}" for _, left, right in sorted(merges)],
    }


def parse_model(content: bytes) -> SentencePieceModel:
    """Read a SentencePiece model file (a protocol buffer, of which these few fields matter)."""
    pieces = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(content):
        if field == 1:
            values = dict(_fields(value))
            pieces.append(Piece(values[1].decode(), _float(values.get(2)), values.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        raise UserError("tokenizer.model is neither of type unigram nor bpe, and transformers has no other")
    return SentencePieceModel(
        pieces=pieces,
        kind=kind,
        byte_fallback=bool(trainer.get(35, 0)),
        unknown=_signed(trainer.get(40, 0)),
        end=_signed(trainer.get(42, 2)),
        normalization=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze_spaces=bool(normalizer.get(4, 1)),
    )


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: int, or bytes (also for fixed-width numbers)."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(content, position)
            yield field, value
            continue
        if kind == 2:
            size, position = _varint(content, position)
        else:
            size = {1: 8, 5: 4}[kind]
        yield field, content[position : position + size]
        position += size


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _float(content: bytes | None) -> float:
    return struct.unpack("<f", content)[0] if content else 0.0
