"""A SentencePiece model and the tokenizer.json made from it encode alike, and a tokenizer travels whole."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import sentencepiece

from pytrain.checkpoint import Checkpoint, tokenizer_files
from pytrain.checkpoint.huggingface import export_huggingface, import_huggingface
from pytrain.checkpoint.huggingface.tokenizer import generated_files, parse_model
from pytrain.config import build_model, load
from pytrain.data.tokenizer import load_tokenizer, train_sentencepiece
from tests.huggingface_cases import GPT2, MODELS, model, random_weights, save_weights

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="the package tokenizers is not installed"
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the package transformers is not installed"
)
KINDS: tuple[Literal["unigram", "bpe"], ...] = ("unigram", "bpe")
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n　全角の空白と💡\t。\n" * 4
HARD = [
    "",
    " ",
    "  two leading",
    "trailing  \n",
    "\n\n\t\tx = 1\r\n",
    "byte pieces: é ü 𝔘 \u0000?",
    "it spells <0x41> and <0x0A>",
    "▁ is the sign itself",
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(inspect.getsource(inspect)[:60_000] + JAPANESE, encoding="utf-8")
    train_sentencepiece([folder / "text.txt"], folder / "tokenizer.model", 700, request.param)
    return folder / "tokenizer.model"


def converted(path: Path, **others: bytes) -> Any:
    import tokenizers

    files = generated_files({"tokenizer.model": path.read_bytes(), **others})
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())


def texts() -> list[str]:
    return [inspect.getsource(json.decoder), JAPANESE, inspect.getsource(np.testing.assert_allclose), *HARD]


def test_model_is_parsed_as_the_library_reads_it(tokenizer_path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    parsed = parse_model(tokenizer_path.read_bytes())
    assert len(parsed.pieces) == processor.get_piece_size()
    for index, piece in enumerate(parsed.pieces):
        assert (piece.text, piece.score) == (processor.id_to_piece(index), processor.get_score(index))
        assert (piece.kind == 2, piece.kind == 3, piece.kind == 6) == (
            processor.is_unknown(index),
            processor.is_control(index),
            processor.is_byte(index),
        )
    assert (parsed.unknown, parsed.end) == (processor.unk_id(), processor.eos_id())
    assert (parsed.byte_fallback, parsed.dummy_prefix, parsed.squeeze_spaces) == (True, False, False)


@needs_tokenizers
def test_converted_tokenizer_encodes_alike(tokenizer_path: Path) -> None:
    ours = load_tokenizer(tokenizer_path)
    theirs = converted(tokenizer_path)
    for text in texts():
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, repr(text[:40])
        assert theirs.decode(ids) == ours.decode(ids)


@needs_tokenizers
@pytest.mark.parametrize("kind", KINDS)
def test_user_defined_pieces_come_first(tmp_path: Path, kind: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("use the <tool> or call <tool> of few words\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, model_type=kind,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, user_defined_symbols=["<tool>", "l"], minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    ours, theirs = load_tokenizer(tmp_path / "tokenizer.model"), converted(tmp_path / "tokenizer.model")
    for sample in ("call<tool>words", "all <tool>", "lll"):
        ids = ours.encode(sample)
        assert theirs.encode(sample).ids == ids, sample
        assert theirs.decode(ids) == sample


@needs_tokenizers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("squeeze", [False, True])
def test_models_of_others(tmp_path: Path, kind: str, rule: str, squeeze: bool) -> None:
    """SentencePiece's own defaults: a space before the text, NFKC, runs of spaces made one."""
    text = tmp_path / "text.txt"
    text.write_text("a small text of a few words\nﬁnd １２ m²\n" * 9, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, model_type=kind,
        byte_fallback=True, normalization_rule_name=rule, remove_extra_whitespaces=squeeze, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    ours, theirs = load_tokenizer(tmp_path / "tokenizer.model"), converted(tmp_path / "tokenizer.model")
    for sample in ("a word", " few   words ", "x", "", "  ", "ﬁnd １ m²", "two\nlines\tand"):
        ids = ours.encode(sample)
        assert theirs.encode(sample).ids == ids, sample
        assert theirs.decode(ids) == ours.decode(ids), sample


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@needs_tokenizers
@pytest.mark.parametrize("added", [None, True, False])
def test_texts_begin_as_the_imported_model_says(tokenizer_path: Path, added: bool | None) -> None:
    """A LLaMA that came with a tokenizer.model alone: the tokenizer.json made for it keeps the begin token."""
    values = LLAMA if added is None else LLAMA | {"add_bos_token": added}
    theirs = converted(tokenizer_path, **{"tokenizer_config.json": json.dumps(values).encode()})
    begin = [1] if added is not False else []
    for text in (JAPANESE, "", "x"):
        ids = load_tokenizer(tokenizer_path).encode(text)
        assert theirs.encode(text).ids == begin + ids
        assert theirs.encode(text, "x").ids == begin + ids + theirs.encode("x").ids
        assert theirs.encode(text, add_special_tokens=False).ids == ids


@needs_transformers
def test_an_imported_llama_is_exported_with_its_begin_token(tmp_path: Path, tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    # Its LlamaTokenizer would put a space before the text besides, which this model knows nothing of.
    values = LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    ours = load_tokenizer(tmp_path / "tokenizer.model")
    shape = build_model(MODELS["llama"] | {"vocabulary": 700})
    weights = random_weights(shape, "fp32", seed=2)
    files = tokenizer_files(tmp_path / "tokenizer.model")
    folder = export_huggingface(save_weights(tmp_path / "run", shape, "fp32", weights, files), tmp_path / "hf")
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    assert (ours.begin_id, theirs.bos_token_id) == (1, 1)
    assert theirs.encode(JAPANESE) == [1, *ours.encode(JAPANESE)]


@needs_transformers
def test_transformers_loads_the_exported_tokenizer(tmp_path: Path, tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    shape = build_model(MODELS["llama"] | {"vocabulary": 700})
    weights = random_weights(shape, "fp32", seed=2)
    checkpoint = save_weights(tmp_path / "run", shape, "fp32", weights, tokenizer_files(tokenizer_path))
    folder = export_huggingface(checkpoint, tmp_path / "hf")
    ours = load_tokenizer(tokenizer_path)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == ours.eod_id
    for text in texts():
        ids = ours.encode(text)
        assert theirs.encode(text) == ids, repr(text[:40])
        assert theirs.decode(ids) == ours.decode(ids)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.eod_id, ours.eod_id)
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": ours.eod_id,
        "eos_token_id": ours.eod_id,
    }


def test_the_tokenizer_comes_back(tmp_path: Path, tokenizer_path: Path) -> None:
    shape = build_model(GPT2 | {"vocabulary": 700})
    weights = random_weights(shape, "fp32", seed=2)
    checkpoint = save_weights(tmp_path / "run", shape, "fp32", weights, tokenizer_files(tokenizer_path))
    folder = export_huggingface(checkpoint, tmp_path / "hf")
    imported = import_huggingface(folder, tmp_path / "again")
    assert imported.tokenizer == tmp_path / "again" / "tokenizer" / "tokenizer.model"
    assert imported.tokenizer.read_bytes() == tokenizer_path.read_bytes()
    again = Checkpoint.open(imported.checkpoint)
    again.check_tokenizer(load_tokenizer(tokenizer_path).sha256, tokenizer_path)
    assert load(imported.run_toml).tokenizer.path == str(imported.tokenizer)
    assert next(iter(again.extra_files())) == "tokenizer.model"
    second = export_huggingface(again, tmp_path / "hf2")
    assert sorted(path.name for path in second.iterdir()) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_goes_with_a_tokenizer(tmp_path: Path) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "words.json",
        "words.model",
        "x.txt",
    ):
        (tmp_path / name).write_text(name)
    files = tokenizer_files(tmp_path / "tokenizer.json")
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert list(tokenizer_files(tmp_path / "words.json")) == ["tokenizer.json", "tokenizer_config.json"]
    assert tokenizer_files(tmp_path / "words.model") == {"tokenizer.model": tmp_path / "words.model"}


def test_an_export_without_tokenizer(tmp_path: Path) -> None:
    shape = model("llama")
    checkpoint = save_weights(tmp_path / "run", shape, "fp32", random_weights(shape, "fp32", seed=2))
    folder = export_huggingface(checkpoint, tmp_path / "hf")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
