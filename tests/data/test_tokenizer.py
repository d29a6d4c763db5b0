"""Tokenizers: exact round trips, training, streaming decode, and files that are not tokenizers."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from pytrain.data import tokenizer as module
from pytrain.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    is_sentencepiece,
    load_tokenizer,
    train_sentencepiece,
)
from pytrain.errors import UserError

AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "\n",
    "\n\n\n\tx\n",
    "tabs\t\tand\r\nDOS lines\r\n",
    "é e\u0301 ﬁ Å ½ ㍿ \u00a0 \u3000 \u200b \ufeff",
    "</s><s><unk>",
    "\u2028\x0b\x0c\x1f\x7f",
    "🤷🏽‍♀️ 𠮷野家 \U0010ffff",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> HuggingFaceTokenizer:
    """A byte-level BPE tokenizer.json like GPT-2's."""
    library = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(text_file)], trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    made.save(str(path))
    return HuggingFaceTokenizer(path)


@pytest.fixture(params=["sentencepiece", "hugging face"])
def either(request: pytest.FixtureRequest, tokenizer: SentencePieceTokenizer) -> Tokenizer:
    if request.param == "sentencepiece":
        return tokenizer
    made: Tokenizer = request.getfixturevalue("byte_level")
    return made


def test_round_trip(either: Tokenizer, source_code: str, japanese: str) -> None:
    for text in (source_code, japanese, *AWKWARD):
        ids = either.encode(text)
        assert either.decode(ids) == text
        assert all(0 <= token < either.vocabulary_size for token in ids)
        assert either.eod_id not in ids


def test_random_text_round_trip(either: Tokenizer, random: np.random.Generator) -> None:
    for _ in range(50):
        points = random.integers(1, 0x2FFFF, 20)
        # Surrogates are no characters, and U+2581 is SentencePiece's own sign for a space.
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000 and point != 0x2581)
        assert either.decode(either.encode(text)) == text


def test_unigram_round_trip(tmp_path: Path, text_file: Path, source_code: str, japanese: str) -> None:
    made = train_sentencepiece([text_file], tmp_path / "u.model", 450, "unigram")
    assert made.vocabulary_size == 450
    for text in (source_code, japanese, *AWKWARD):
        assert made.decode(made.encode(text)) == text


def test_hash_and_end(tokenizer: SentencePieceTokenizer, byte_level: HuggingFaceTokenizer) -> None:
    for each in (tokenizer, byte_level):
        assert each.sha256 == hashlib.sha256(each.path.read_bytes()).hexdigest()
    assert tokenizer.vocabulary_size == 500
    assert tokenizer.decode([tokenizer.eod_id]) == ""
    assert byte_level.eod_id == 0
    assert byte_level.decode([0]) == ""


def test_text_that_spells_a_special_token_stays_text(byte_level: HuggingFaceTokenizer) -> None:
    ids = byte_level.encode("a<|endoftext|>b")
    assert byte_level.eod_id not in ids
    assert byte_level.decode(ids) == "a<|endoftext|>b"


def test_newline_is_a_piece_of_its_own(tokenizer: SentencePieceTokenizer, source_code: str) -> None:
    """That it never joins its neighbours makes a cut after it harmless."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert processor.encode("\n\t\t", out_type=str) == ["\n", "\t", "\t"]
    lines = source_code.splitlines(keepends=True)
    assert tokenizer.encode(source_code) == [token for line in lines for token in tokenizer.encode(line)]


def check_stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    rest = decoder.finish()
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    whole = tokenizer.decode(ids)
    assert whole.startswith("".join(pieces))
    if "\ufffd" not in whole:
        assert "\ufffd" not in "".join(pieces)
        assert rest == ""
        assert sum(map(bool, pieces)) >= len(pieces) / 5


def test_stream_decode(either: Tokenizer, source_code: str, japanese: str) -> None:
    for text in (source_code[:2000], japanese, *AWKWARD):
        check_stream(either, either.encode(text))


def test_stream_decode_of_half_a_character(either: Tokenizer) -> None:
    ids = either.encode("a\U0010ffff")
    decoder = StreamDecoder(either)
    shown = [decoder.push(token) for token in ids[:-1]]
    assert "".join(shown) == "a"
    assert set(decoder.finish()) == {"\ufffd"}
    check_stream(either, ids[:-1])


def test_stream_decode_of_random_ids(either: Tokenizer, random: np.random.Generator) -> None:
    for _ in range(20):
        check_stream(either, random.integers(3, either.vocabulary_size, 40).tolist())


def test_stream_decode_with_a_dummy_prefix(tmp_path: Path, text_file: Path) -> None:
    """Llama 2's kind of model drops the first space of a text, and only that one."""
    model = io.BytesIO()
    lines = text_file.read_text(encoding="utf-8").split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path / "llama2.model"
    path.write_bytes(model.getvalue())
    made = load_tokenizer(path)
    ids = made.encode("def decode(self, s): return 名前 for x in self")
    assert "".join(made.decode([token]) for token in ids) != made.decode(ids)
    check_stream(made, ids)


def test_training_is_deterministic_and_reads_all_kinds(tmp_path: Path, text_file: Path) -> None:
    text = text_file.read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines), encoding="utf-8")
    progress: list[tuple[int, int]] = []
    first = train_sentencepiece(
        [text_file], tmp_path / "a.model", 450, progress=lambda *values: progress.append(values)
    )
    second = train_sentencepiece([tmp_path / "lines.jsonl"], tmp_path / "b.model", 450, text_key="body")
    assert first.sha256 == second.sha256
    assert progress[-1] == (text_file.stat().st_size, text_file.stat().st_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model", "lines.jsonl"]


def test_sample_is_bounded_and_fixed_by_the_seed() -> None:
    sentences = [f"sentence {index} あ" for index in range(1000)]
    sample = module._sample(iter(sentences), 2000, 1)
    assert 1900 < sum(len(sentence.encode()) for sentence in sample) <= 2000
    assert sample == sorted(sample, key=sentences.index)
    assert sample == module._sample(iter(sentences), 2000, 1)
    assert sample != module._sample(iter(sentences), 2000, 2)
    assert sentences.index(sample[0]) < 200
    assert sentences.index(sample[-1]) > 800
    assert module._sample(iter(sentences), 1 << 20, 1) == sentences


def test_long_lines_reach_the_trainer(tmp_path: Path) -> None:
    """SentencePiece by itself drops lines over 4192 bytes, and with them every piece of this text."""
    (tmp_path / "long.txt").write_text("吾輩は猫である" * 3000 + "abc", encoding="utf-8")
    made = train_sentencepiece([tmp_path / "long.txt"], tmp_path / "l.model", 280, "bpe")
    assert len(made.encode("吾輩は猫である")) <= 3
    pieces = list(module._cut_line("aあ" * 3000))
    assert "".join(pieces) == "aあ" * 3000
    assert max(len(piece.encode()) for piece in pieces) <= 4096


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"vocabulary_size": 100_000},
            "t.model: SentencePiece could not train .* 100000 pieces .*: Vocabulary size too",
        ),
        (
            {"vocabulary_size": 50},
            "t.model: SentencePiece could not train .* 50 pieces .*: Vocabulary size is smaller",
        ),
        ({"vocabulary_size": 1}, "vocabulary size must be above 1"),
        ({"model_type": "word"}, "model type must be unigram or bpe, not 'word'"),
        ({"inputs": []}, "no input file was given"),
    ],
)
def test_bad_training(tmp_path: Path, text_file: Path, arguments: dict[str, object], sentence: str) -> None:
    values: dict[str, object] = {
        "inputs": [text_file],
        "vocabulary_size": 400,
        "model_type": "bpe",
        **arguments,
    }
    with pytest.raises(UserError, match=sentence) as caught:
        train_sentencepiece(output=tmp_path / "t.model", **values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_tokenizer_is_made(tmp_path: Path, text_file: Path) -> None:
    made = train_sentencepiece([text_file], tmp_path / "new" / "folder" / "t.model", 500)
    assert (tmp_path / "new" / "folder" / "t.model").is_file()
    assert made.vocabulary_size == 500


def test_bad_training_output_and_text(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(UserError, match=r"t.txt must be named .model"):
        train_sentencepiece([text_file], tmp_path / "t.txt", 400)
    with pytest.raises(UserError, match=r"folder of the tokenizer .*t.model cannot be made: "):
        train_sentencepiece([text_file], text_file / "t.model", 400)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty.txt: there is no text to train a tokenizer on"):
        train_sentencepiece([tmp_path / "empty.txt"], tmp_path / "t.model", 400)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.model", b"IQ== 0\nIg== 1\n", "a.model is not a SentencePiece model"),
        ("a.model", b"", "a.model is not a SentencePiece model"),
        ("a.json", b"{}", "a.json is not a tokenizer.json"),
        ("a.json", b"\xff", "a.json is not a tokenizer.json"),
        ("a.txt", b"", r"a.txt must be a .model \(SentencePiece\) or .json"),
    ],
)
def test_not_a_tokenizer(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    if name.endswith(".json"):
        pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path / name)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*x.model does not exist"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(UserError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)


def test_folder(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_a_folder_with_both(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    """The one that an import takes: the corpus that is prepared with the folder fits the imported model."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_llama3s_tokenizer_model_is_not_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert not is_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def edited(tokenizer: HuggingFaceTokenizer, folder: Path, change: Callable[[str], str], config: str = "") -> Path:
    path = folder / "tokenizer.json"
    path.write_text(change(tokenizer.path.read_text(encoding="utf-8")), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(config)
    return path


def test_end_of_document_token(tmp_path: Path, byte_level: HuggingFaceTokenizer) -> None:
    path = edited(byte_level, tmp_path, lambda text: text, '{"eos_token": {"content": "!"}}')
    assert HuggingFaceTokenizer(path).eod_id == byte_level.encode("!")[0]
    assert HuggingFaceTokenizer(path, "<|endoftext|>").eod_id == 0
    with pytest.raises(UserError, match=r"no token '<no>', the end-of-document token asked for"):
        HuggingFaceTokenizer(path, "<no>")
    edited(byte_level, tmp_path, lambda text: text, '{"eos_token": "<no>"}')
    with pytest.raises(UserError, match=r"no token '<no>', .* named by tokenizer_config.json"):
        HuggingFaceTokenizer(path)
    edited(byte_level, tmp_path, lambda text: text, "[]")
    with pytest.raises(UserError, match=r"tokenizer_config.json is not a JSON object"):
        HuggingFaceTokenizer(path)


def test_no_end_of_document_token(tmp_path: Path, byte_level: HuggingFaceTokenizer) -> None:
    path = edited(byte_level, tmp_path, lambda text: text.replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(UserError, match=r"has no end-of-document token: none of <\|endoftext\|>"):
        HuggingFaceTokenizer(path)


def test_model_without_an_end_piece(tmp_path: Path, text_file: Path) -> None:
    model = io.BytesIO()
    lines = text_file.read_text(encoding="utf-8").split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        eos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "n.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=r"n.model has no end-of-sentence piece"):
        load_tokenizer(tmp_path / "n.model")
