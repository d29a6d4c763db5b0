"""Bad input through the command line: one sentence naming file or key, status 2, checkpoints untouched."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytrain.cli import run
from pytrain.data.indexed import IndexedDataset, IndexedWriter
from pytrain.data.tokenizer import train_sentencepiece
from pytrain.errors import ExitCode
from tests import runs
from tests.runs import Corpora


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """Corpora, and a run of two steps in "run" beside them."""
    corpora = runs.make_corpora(tmp_path_factory.mktemp("bad") / "data")
    runs.quiet_train(runs.configuration(corpora, corpora.folder / "run", run__steps=2, checkpoint__every=1))
    return corpora


@pytest.fixture
def corpora(originals: Corpora, tmp_path: Path) -> Corpora:
    """A copy that the test may break."""
    shutil.copytree(originals.folder, tmp_path / "data")
    return Corpora(tmp_path / "data")


Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """refused(*words): run the command, which must end with status 2 and one sentence; that sentence."""

    def command(*words: str | Path) -> str:
        capfd.readouterr()
        assert run([str(word) for word in words]) == ExitCode.BAD_INPUT
        shown = capfd.readouterr()
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, shown.err
        assert shown.err.endswith(errors[0] + "\n"), "nothing comes after the sentence"
        assert "Traceback" not in shown.err
        assert shown.out == ""
        return errors[0].removeprefix("error: ")

    return command


@pytest.fixture
def train_refused(corpora: Corpora, refused: Refused, tmp_path: Path) -> Refused:
    """Go on with the run of two steps, changed; its checkpoints must be the same bytes afterwards."""

    def command(*overrides: str, resume: str = "auto", **changes: Any) -> str:
        config = runs.configuration(corpora, corpora.folder / "run", **changes)
        file = runs.write_toml(config, tmp_path / "run.toml")
        before = {step: runs.tensor_bytes(corpora.folder / "run", step) for step in (1, 2)}
        metrics = (corpora.folder / "run" / "metrics.jsonl").read_bytes()
        words = [word for override in overrides for word in ("--set", override)]
        sentence = refused("train", file, "--resume", resume, *words)
        assert {step: runs.tensor_bytes(corpora.folder / "run", step) for step in (1, 2)} == before
        assert (corpora.folder / "run" / "metrics.jsonl").read_bytes() == metrics
        return sentence

    return command


# --- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.stpes=3", "run.stpes is not a key; did you mean run.steps?"),
        ("optimiser.clip=1", "did you mean [optimizer]?"),
        ('run.steps="many"', "run.steps"),
        ("run.steps=0", "run.steps"),
        ("batch.micro_batch=2.5", "batch.micro_batch"),
        ("model.hidden=26", "model.hidden (26) is not divisible by model.heads (4)"),
        ("model.kv_heads=3", "model.heads (4) is not divisible by model.kv_heads (3)"),
        ("data.sequence_length=65", "data.sequence_length (65) is longer than model.context (64)"),
        ("batch.global_batch=5", "batch.global_batch (5) is not divisible by batch.micro_batch"),
        ("model.dropout=0.1", "model.dropout"),
        ("parallel.dp=2", "parallel.dp"),
        ('precision.dtype="fp8"', "precision.dtype"),
    ],
)
def test_configuration(corpora: Corpora, refused: Refused, tmp_path: Path, override: str, words: str) -> None:
    text = (corpora.folder / "run" / "run.toml").read_text(encoding="utf-8")
    text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("head_size"))
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    assert words in refused("train", file, "--resume", "auto", "--set", override)


def test_a_toml_that_is_none(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[run\nsteps = 3\n", encoding="utf-8")
    assert str(file) in refused("train", file)
    assert "missing.toml does not exist" in refused("train", tmp_path / "missing.toml")


# --- corpora ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_corpus(corpora: Corpora, train_refused: Refused, ending: str) -> None:
    (corpora.folder / f"train.{ending}").unlink()
    assert str(corpora.folder / f"train.{ending}") in train_refused()


def test_an_empty_corpus(corpora: Corpora, train_refused: Refused) -> None:
    for ending in ("bin", "idx", "json"):
        (corpora.folder / f"train.{ending}").unlink()
    with IndexedWriter(corpora.folder / "train", runs.VOCABULARY) as writer:
        writer.end_document()
    sentence = train_refused()
    assert str(corpora.folder / "train.bin") in sentence
    assert "is empty" in sentence


def test_a_corpus_shorter_than_a_sample(corpora: Corpora, train_refused: Refused) -> None:
    for ending in ("bin", "idx", "json"):
        (corpora.folder / f"train.{ending}").unlink()
    with IndexedWriter(corpora.folder / "train", runs.VOCABULARY) as writer:
        writer.add_document(list(range(runs.LENGTH)))
    assert "fewer than one sample of 32 + 1" in train_refused()


@pytest.mark.parametrize(
    ("offset", "content", "words"),
    [
        (0, b"MMIDIDY", "is not a Megatron index: it begins with b'MMIDIDY"),
        (9, struct.pack("<Q", 7), "has index version 7, but only version 1 is known"),
        (17, b"\x63", "has dtype code 99"),
        (17, b"\x07", "which are not token ids"),
        (18, struct.pack("<Q", 10**15), "but its header"),
        (34, struct.pack("<i", -3), "has the negative length -3"),
        (34, struct.pack("<i", 999), "the pointer of sequence 1"),
    ],
)
def test_a_broken_index(corpora: Corpora, train_refused: Refused, offset: int, content: bytes, words: str) -> None:
    path = corpora.folder / "train.idx"
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    sentence = train_refused()
    assert words in sentence
    assert str(path) in sentence


@pytest.mark.parametrize("change", [b"", b"\0\0"])
def test_lengths_that_disagree_with_the_tokens(corpora: Corpora, train_refused: Refused, change: bytes) -> None:
    path = corpora.folder / "heldout.bin"
    path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-2])
    sentence = train_refused()
    assert str(path) in sentence
    assert "but heldout.idx describes" in sentence


def test_a_note_of_another_corpus(corpora: Corpora, train_refused: Refused) -> None:
    shutil.copyfile(corpora.folder / "more.json", corpora.folder / "train.json")
    assert str(corpora.folder / "train.json") in train_refused()


def test_an_id_outside_the_vocabulary(corpora: Corpora, train_refused: Refused) -> None:
    """A corpus without a note is read as it comes: the id is found in the batch that holds it."""
    for ending in ("bin", "idx", "json"):
        (corpora.folder / f"train.{ending}").unlink()
    with IndexedWriter(corpora.folder / "train", 1000) as writer:
        writer.add_document([runs.VOCABULARY] * 999)
    sentence = train_refused()
    assert str(corpora.folder / "train.bin") in sentence
    assert f"has the id {runs.VOCABULARY}, outside the vocabulary of {runs.VOCABULARY}" in sentence


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.txt", b"one\n\xff\xfe\n", "t.txt, line 2: byte 0xff is not valid UTF-8"),
        ("t.txt", b"one\ntwo\0\n", "t.txt, line 2: there is a NUL character"),
        ("t.jsonl", b'{"text": "a\\u0000"}\n', "t.jsonl, line 1: there is a NUL character"),
        ("t.jsonl", b'{"text": "a"}\n{"txet": "b"}\n', "t.jsonl, line 2: there is no key 'text'"),
        ("t.jsonl", b'{"text": "a"\n', "t.jsonl, line 1: not valid JSON"),
        ("t.txt", b"", "there is no text, so no corpus was written"),
        ("t.jsonl", b'{"text": ""}\n', "there is no text, so no corpus was written"),
        ("t.jsonl.gz", b"not gzip", "t.jsonl.gz"),
        ("t.txt.zst", b"not zstandard", "t.txt.zst"),
    ],
)
def test_text(corpora: Corpora, refused: Refused, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file, prefix = tmp_path / name, tmp_path / "corpus"
    file.write_bytes(content)
    assert words in refused("prepare", "--tokenizer", corpora.tokenizer, "--out", prefix, file)
    assert list(tmp_path.glob("corpus*")) == [], "no half a corpus is left"


def test_an_empty_document_is_counted(corpora: Corpora, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, prefix = tmp_path / "t.jsonl", tmp_path / "corpus"
    file.write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n', encoding="utf-8")
    words = ["prepare", "--tokenizer", corpora.tokenizer, "--out", prefix, file]
    assert run([str(word) for word in words]) == ExitCode.OK
    assert "3 documents (1 of them empty)" in capsys.readouterr().out
    assert IndexedDataset(prefix).documents == 3


def test_a_long_line_is_a_document_like_others(
    corpora: Corpora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 MB without a newline; the ids of a text do not depend on where it was cut to encode it."""
    text = "".join(runs.random_documents(40, 1)).replace("\n", " ")
    text *= 10_000_000 // len(text) + 1
    file, prefix = tmp_path / "t.jsonl", tmp_path / "corpus"
    file.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    words = ["prepare", "--tokenizer", corpora.tokenizer, "--out", prefix, file]
    assert run([str(word) for word in words]) == ExitCode.OK
    assert "1 documents" in capsys.readouterr().out
    note = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    assert note["utf8_bytes"] == len(text.encode("utf-8")) > 10_000_000


# --- tokenizers and checkpoints -----------------------------------------------------------------------------


def test_a_tokenizer_that_is_none(corpora: Corpora, train_refused: Refused) -> None:
    corpora.tokenizer.write_bytes(b"not a model")
    sentence = train_refused()
    assert str(corpora.tokenizer) in sentence
    assert "is not a SentencePiece model" in sentence
    corpora.tokenizer.unlink()
    assert f"the tokenizer {corpora.tokenizer} does not exist" in train_refused()


def test_a_tokenizer_that_did_not_make_the_corpus(corpora: Corpora, train_refused: Refused) -> None:
    train_sentencepiece([corpora.text("more")], corpora.tokenizer, runs.VOCABULARY - 9, "bpe")
    assert "train.json: the corpus was prepared with the tokenizer of sha256" in train_refused()


def test_a_tokenizer_that_does_not_match_the_checkpoint(corpora: Corpora, train_refused: Refused) -> None:
    train_sentencepiece([corpora.text("more")], corpora.tokenizer, runs.VOCABULARY - 9, "bpe")
    for name in ("train", "heldout"):
        Path(f"{corpora.folder / name}.json").unlink()  # corpora of another tool: nothing to compare with
    sentence = train_refused()
    assert f"the tokenizer {corpora.tokenizer}" in sentence
    assert "does not match the checkpoint" in sentence


def test_a_damaged_checkpoint_names_the_one_before(corpora: Corpora, refused: Refused, tmp_path: Path) -> None:
    config = runs.configuration(corpora, corpora.folder / "run", run__steps=3)
    file = runs.write_toml(config, tmp_path / "run.toml")
    first, second = (corpora.folder / "run" / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    damaged = second / "embed.weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    sentence = refused("train", file, "--resume", "auto")
    assert sentence.startswith(f"{damaged} is truncated: ")
    assert sentence.endswith(f"; {first} is whole: --resume {first} goes on from there")
    assert run(["train", str(file), "--resume", str(first)]) == ExitCode.OK
    (first / "manifest.json").unlink()
    (corpora.folder / "run" / "checkpoints" / "step-000003" / "manifest.json").unlink()
    damaged.write_bytes(b"")
    assert refused("train", file, "--resume", "auto").endswith("; the run has no other whole checkpoint")


def test_a_tokenizer_larger_than_the_model(corpora: Corpora, refused: Refused, tmp_path: Path) -> None:
    config = runs.configuration(corpora, tmp_path / "run")
    file = runs.write_toml(config, tmp_path / "run.toml")
    sentence = refused("train", file, "--set", "model.vocabulary=300")
    assert sentence.startswith("model.vocabulary (300) is smaller than the 311 tokens of ")


@pytest.mark.parametrize(
    "command",
    [["train", "RUN_TOML", "--resume", "auto"], ["generate", "RUN"], ["export", "RUN", "--hf", "OUT"]],
)
@pytest.mark.parametrize("damage", ["truncated", "bit", "gone"])
def test_a_damaged_checkpoint(
    corpora: Corpora, refused: Refused, tmp_path: Path, damage: str, command: list[str]
) -> None:
    folder = corpora.folder / "run"
    newest = folder / "checkpoints" / "step-000002"
    path = newest / "layer_001.weights.safetensors"
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(raw[:-4])
    elif damage == "bit":
        raw[-100] ^= 0x10
        path.write_bytes(raw)
    else:
        path.unlink()
    config = runs.configuration(corpora, folder)
    toml = runs.write_toml(config, tmp_path / "run.toml")
    before = {file.name: file.read_bytes() for file in newest.iterdir()}
    earlier = runs.tensor_bytes(folder, 1)
    places = {"RUN_TOML": toml, "RUN": folder, "OUT": tmp_path / "out"}
    sentence = refused(*(places.get(word, word) for word in command))
    assert "layer_001.weights.safetensors" in sentence
    if damage == "bit":
        assert "layer.1." in sentence, "the tensor is named"
    assert {file.name: file.read_bytes() for file in newest.iterdir()} == before
    assert runs.tensor_bytes(folder, 1) == earlier
    assert not (tmp_path / "out").exists()


def test_the_earlier_checkpoint_still_serves(corpora: Corpora, tmp_path: Path) -> None:
    newest = corpora.folder / "run" / "checkpoints" / "step-000002"
    whole = runs.tensor_bytes(corpora.folder / "run", 2)
    (newest / "embed.weights.safetensors").write_bytes(b"")
    config = runs.configuration(corpora, tmp_path / "again", run__steps=2)
    runs.quiet_train(config, str(newest.with_name("step-000001")))
    assert runs.tensor_bytes(tmp_path / "again", 2) == whole


@pytest.mark.parametrize("place", ["below a file", "full of nothing"])
def test_an_output_folder_that_cannot_be_written(
    corpora: Corpora, refused: Refused, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    folder = {"below a file": tmp_path / "file" / "run", "full of nothing": Path("/proc/pytrain/run")}[place]
    file = runs.write_toml(runs.configuration(corpora, folder), tmp_path / "run.toml")
    sentence = refused("train", file)
    assert str(folder) in sentence
    assert "cannot be written to" in sentence
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.toml"])
def test_a_file_of_the_run_that_cannot_be_written(
    corpora: Corpora, refused: Refused, tmp_path: Path, name: str
) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    file = runs.write_toml(runs.configuration(corpora, tmp_path / "run"), tmp_path / "run.toml")
    assert str(tmp_path / "run") in refused("train", file)
    assert not list((tmp_path / "run").rglob("step-*"))


def test_a_metrics_file_that_is_none(corpora: Corpora, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("hello\n", encoding="utf-8")
    file = runs.write_toml(runs.configuration(corpora, tmp_path / "run"), tmp_path / "run.toml")
    assert "metrics.jsonl line 1 is not a JSON object" in refused("train", file)
