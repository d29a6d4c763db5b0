"""Tokenizers whose own tools put a token before each text: corpora and prompts begin as the model learnt it."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from pytrain.data.corpus import prepare
from pytrain.data.indexed import IndexedDataset
from pytrain.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, prompt_ids
from pytrain.errors import UserError

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A SentencePiece model as Llama 2's: bytes for rare characters, a space before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text_file.read_text(encoding="utf-8").split("\n")),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("llama2") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def with_configuration(source: Path, folder: Path, configuration: Mapping[str, Any], name: str) -> Path:
    (folder / name).write_bytes(source.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder / name


@pytest.mark.parametrize(
    ("configuration", "begins"),
    [
        (LLAMA, True),
        (LLAMA | {"bos_token": {"content": "<s>", "lstrip": False}}, True),
        ({"add_bos_token": True}, True),
        (LLAMA | {"add_bos_token": False}, False),
        (LLAMA | {"bos_token": None}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}, False),
        ({}, False),
    ],
)
def test_the_configuration_beside_a_sentencepiece_model(
    tmp_path: Path, llama2: Path, configuration: dict[str, Any], begins: bool
) -> None:
    made = load_tokenizer(with_configuration(llama2, tmp_path, configuration, "tokenizer.model"))
    begin = sentencepiece.SentencePieceProcessor(model_file=str(llama2)).bos_id()
    assert made.begin_id == (begin if begins else None)
    assert prompt_ids(made, "def x") == [begin] * begins + made.encode("def x")
    assert prompt_ids(made, "") == [begin if begins else made.eod_id]


def test_a_model_of_another_name_is_no_companion(tmp_path: Path, llama2: Path) -> None:
    """As for checkpoints, which would not take the tokenizer_config.json along."""
    assert load_tokenizer(with_configuration(llama2, tmp_path, LLAMA, "words.model")).begin_id is None


def test_a_begin_token_that_is_not_there(tmp_path: Path, llama2: Path) -> None:
    path = with_configuration(llama2, tmp_path, LLAMA | {"bos_token": "<begin>"}, "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer.model has no piece '<begin>', the begin token named by"):
        load_tokenizer(path)


def json_tokenizer(folder: Path, template: str | None) -> Path:
    """Three words, and a post-processor with this template."""
    library = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    vocabulary = {"<unk>": 0, "<eos>": 1, "<bos>": 2, "a": 3, "b": 4}
    made = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    if template is not None:
        made.post_processor = library.processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("template", "begin"),
    [(None, None), ("$A", None), ("<bos> $A", 2), ("<bos> $A <eos>", 2), ("$A <eos>", None)],
)
def test_the_post_processor_of_a_tokenizer_json(tmp_path: Path, template: str | None, begin: int | None) -> None:
    made = load_tokenizer(json_tokenizer(tmp_path, template))
    assert (made.begin_id, made.encode("a b")) == (begin, [3, 4])
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "eos_token": "<eos>"}')
    assert load_tokenizer(tmp_path).begin_id is None


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [part.tolist() for part in np.split(np.asarray(dataset.tokens), dataset.document_starts[1:])]


@pytest.mark.parametrize("bos", [True, False])
def test_documents_of_a_corpus_begin_once(tmp_path: Path, llama2: Path, source_code: str, bos: bool) -> None:
    """Empty ones stay empty, and one that is tokenised in pieces has one beginning; the folder is made."""
    made = load_tokenizer(with_configuration(llama2, tmp_path, LLAMA, "tokenizer.model"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("one", "", "two words")))
    (tmp_path / "b.txt").write_text(source_code, encoding="utf-8", newline="")
    prefix = tmp_path / "new" / "folder" / "c"
    report = prepare(
        [tmp_path / "a.jsonl", tmp_path / "b.txt"], prefix, made.path, prepend_bos=bos, segment_bytes=3000
    )
    assert report.begin_id == (made.begin_id if bos else None)
    begin = [made.begin_id] * bos
    one, empty, two, long = documents(prefix)
    assert (one, empty) == ([*begin, *made.encode("one"), made.eod_id], [])
    assert two == [*begin, *made.encode("two words"), made.eod_id]
    assert (long[0] == made.begin_id, long.count(1), long.count(2)) == (bos, int(bos), 1)


def shown(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer, prompt)
    return "".join(decoder.push(token) for token in ids) + decoder.finish()


def test_a_continuation_keeps_its_first_space(tmp_path: Path, llama2: Path) -> None:
    """Such a model's first piece of a text loses its space: what follows a prompt is not the first."""
    made = load_tokenizer(with_configuration(llama2, tmp_path, LLAMA, "tokenizer.model"))
    prompt, text = "return 名前", " for self in 吾輩"
    whole = prompt_ids(made, prompt + text)
    cut = len(prompt_ids(made, prompt))
    assert whole[:cut] == prompt_ids(made, prompt), "the text is cut between two tokens"
    assert made.decode(whole[cut:]) == text[1:], "alone, the space is lost"
    assert shown(made, whole[:cut], whole[cut:]) == text
