"""Logits through the cache of keys and values, sampling, and text that comes out piece by piece."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain import _native
from pytrain.data.tokenizer import load_tokenizer
from pytrain.errors import ExitCode, UserError
from pytrain.generate import CHUNK, Generator, LoadedModel, choose, generate_text
from pytrain.stage import Stage
from tests import reference, runs, spine
from tests.reference_cases import GPT2, LLAMA, LLAMA3_SCALING
from tests.runs import Corpora

LENGTH = CHUNK + 30
LONG = {"context": 192, "vocabulary": runs.VOCABULARY}
SHAPES = {
    "gpt2": dataclasses.replace(GPT2, **LONG),
    "gpt2 untied": dataclasses.replace(GPT2, tied_head=False, **LONG),
    "llama": dataclasses.replace(LLAMA, **LONG),
    "llama tied": dataclasses.replace(LLAMA, tied_head=True, rope_scaling=LLAMA3_SCALING, **LONG),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return runs.make_corpora(tmp_path_factory.mktemp("corpora") / "data")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, corpora: Corpora) -> dict[str, Path]:
    """Run folders of models with visible weights."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: runs.save_model(
            folder / name.replace(" ", "-"),
            spine.model_config(shape),
            reference.visible_parameters(shape, 7),
            corpora.tokenizer,
        )
        for name, shape in SHAPES.items()
    }


def random_tokens(count: int, seed: int) -> list[int]:
    print(f"seed {seed}")
    return [int(token) for token in np.random.default_rng(seed).integers(0, runs.VOCABULARY, count)]


def reference_logits(name: str, tokens: list[int]) -> NDArray[np.float64]:
    array = np.asarray(tokens, np.int32)
    positions = np.arange(len(tokens), dtype=np.int32)
    batch = reference.Batch(array, array, positions, np.zeros_like(array), len(tokens))
    return reference.model_logits(SHAPES[name], reference.visible_parameters(SHAPES[name], 7), batch)


# --- logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_references(models: dict[str, Path], name: str) -> None:
    tokens = random_tokens(LENGTH, 1)
    found = LoadedModel(models[name]).generator(LENGTH).logits(tokens)
    expected = reference_logits(name, tokens)
    assert expected.std() >= 1.0
    difference = float(np.abs(found - expected).max())
    print(f"largest difference {difference:.3g}")
    assert difference < 3e-5


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_change_no_bit(models: dict[str, Path], name: str) -> None:
    """The whole prompt at once, token by token, and in uneven parts."""
    tokens = random_tokens(LENGTH, 2)
    generator = LoadedModel(models[name]).generator(LENGTH)
    whole = generator.logits(tokens)
    generator.forget()
    single = np.concatenate([generator.logits([token]) for token in tokens])
    np.testing.assert_array_equal(single, whole)
    generator.forget()
    edges = [0, 1, 8, 45, 46, 140, LENGTH]
    parts = [generator.logits(tokens[a:b]) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_of_the_logits_is_the_training_loss(models: dict[str, Path], name: str) -> None:
    tokens = random_tokens(LENGTH, 3)
    logits = LoadedModel(models[name]).generator(LENGTH).logits(tokens[:-1]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(LENGTH - 1), tokens[1:]]
    config = spine.model_config(SHAPES[name])
    stage = Stage(_native.CpuDevice(), config, spine.policy(), batch=1, length=LENGTH - 1, training=False)
    stage.load_weights(reference.visible_parameters(SHAPES[name], 7))
    stage.scalars[:] = 0.0
    inputs, targets = (np.asarray(part, np.int32) for part in (tokens[:-1], tokens[1:]))
    positions = np.arange(LENGTH - 1, dtype=np.int32)
    batch = reference.Batch(inputs, targets, positions, np.zeros_like(inputs), LENGTH - 1)
    stage.load_batch(0, spine.native_batch(batch))
    stage.forward(0, "evaluate")
    assert losses.mean() == pytest.approx(stage.scalars[0] / stage.scalars[1], rel=3e-7)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bit_checkpoints(corpora: Corpora, tmp_path: Path, dtype: str) -> None:
    """The model is computed in the type that it was trained in: as far from float64 as its rounding."""
    config = runs.configuration(corpora, tmp_path / "run", precision__dtype=dtype, run__steps=2)
    runs.quiet_train(config)
    loaded = LoadedModel(tmp_path / "run")
    assert loaded.policy.weights == loaded.policy.activations == dtype
    tokens = random_tokens(20, 4)
    found = loaded.generator(20).logits(tokens)
    weights = {spec.name: loaded.checkpoint.read(spec.name).astype(np.float64) for spec in loaded.layout.tensors}
    shape = reference.Shape(**config.model.model_dump(exclude={"init_std"}))
    array = np.asarray(tokens, np.int32)
    positions = np.arange(20, dtype=np.int32)
    batch = reference.Batch(array, array, positions, np.zeros_like(array), 20)
    expected = reference.model_logits(shape, weights, batch)
    error = float(np.abs(found - expected).max() / expected.std())
    print(f"{dtype}: error {error:.3g}")
    assert error < {"bf16": 0.1, "fp16": 0.01}[dtype]


# --- choosing a token ---------------------------------------------------------------------------------------


def frequencies(logits: NDArray[np.float32], count: int = 20_000, **options: Any) -> NDArray[np.float64]:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    random = np.random.default_rng(5)
    drawn = [choose(logits, random=random, **settings) for _ in range(count)]
    return np.bincount(drawn, minlength=len(logits)) / count


LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_sharpens(temperature: float) -> None:
    expected = np.exp(LOGITS / temperature)
    expected /= expected.sum()
    np.testing.assert_allclose(frequencies(LOGITS, temperature=temperature), expected, atol=0.012)


def test_no_temperature_takes_the_likeliest() -> None:
    assert frequencies(LOGITS, 50, temperature=0).tolist() == [0, 1, 0, 0, 0]


def test_top_k_keeps_the_likeliest() -> None:
    expected = np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85
    np.testing.assert_allclose(frequencies(LOGITS, top_k=3), expected, atol=0.012)
    assert frequencies(LOGITS, 50, top_k=1).tolist() == [0, 1, 0, 0, 0]
    np.testing.assert_allclose(frequencies(LOGITS, top_k=99), np.exp(LOGITS), atol=0.012)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.7, [1, 3, 4]), (0.97, 5)]
)
def test_top_p_keeps_as_few_as_have_it(top_p: float, kept: Any) -> None:
    found = frequencies(LOGITS, 2000, top_p=top_p)
    assert np.flatnonzero(found).tolist() == (list(range(5)) if kept == 5 else kept)
    probabilities = np.exp(LOGITS)[np.flatnonzero(found)]
    np.testing.assert_allclose(found[found > 0], probabilities / probabilities.sum(), atol=0.03)


def test_top_p_counts_what_top_k_left() -> None:
    """0.4 of the 0.65 that two tokens have is more than 0.6."""
    assert np.flatnonzero(frequencies(LOGITS, 200, top_k=2, top_p=0.6)).tolist() == [1]


def test_extreme_logits() -> None:
    wild = np.array([-1e30, 3e4, 2e4, -np.inf], np.float32)
    assert frequencies(wild, 50, temperature=0.01).tolist() == [0, 1, 0, 0]


# --- continuing ---------------------------------------------------------------------------------------------


def written(generator: Generator, prompt: list[int], **options: Any) -> list[int]:
    return list(generator.continue_tokens(prompt, **options))


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_without_a_cache_is_the_same(models: dict[str, Path], name: str) -> None:
    prompt = random_tokens(11, 6)
    generator = LoadedModel(models[name]).generator(64)
    found = written(generator, prompt, tokens=20, temperature=0)
    tokens = list(prompt)
    for _ in range(20):
        tokens.append(int(reference_logits(name, tokens)[-1].argmax()))
    assert found == tokens[11:]
    assert written(generator, prompt, tokens=20, temperature=0) == found, "the cache is emptied before"


def test_the_seed_decides(models: dict[str, Path]) -> None:
    generator = LoadedModel(models["llama"]).generator(64)
    prompt = random_tokens(5, 7)
    first = written(generator, prompt, tokens=30, temperature=1.5, seed=1)
    assert written(generator, prompt, tokens=30, temperature=1.5, seed=1) == first
    assert written(generator, prompt, tokens=30, temperature=1.5, seed=2) != first
    assert written(generator, prompt, tokens=10, temperature=1.5, seed=1) == first[:10]


def test_where_it_ends(models: dict[str, Path]) -> None:
    generator = LoadedModel(models["llama"]).generator(24)
    prompt = random_tokens(10, 8)
    every = written(generator, prompt, tokens=99, temperature=1.0)
    assert len(every) == 14, "prompt and continuation fill the cache"
    stop = every[6]
    assert written(generator, prompt, tokens=99, stop=stop, temperature=1.0) == every[: every.index(stop) + 1]
    assert written(generator, prompt[:1], tokens=23, temperature=0) != []


def test_ids_that_the_tokenizer_does_not_have_are_not_chosen(models: dict[str, Path]) -> None:
    generator = LoadedModel(models["gpt2"]).generator(150)
    found = written(generator, [1], tokens=140, temperature=5.0, vocabulary=40)
    assert max(found) < 40
    assert max(written(generator, [1], tokens=140, temperature=5.0)) >= 40


def test_prompts_that_cannot_be_continued(models: dict[str, Path]) -> None:
    generator = LoadedModel(models["llama"]).generator(24)
    with pytest.raises(UserError, match="the prompt has 24 tokens, and the model continues at most 23"):
        generator.continue_tokens(random_tokens(24, 9), tokens=1)
    with pytest.raises(UserError, match="the prompt is empty"):
        generator.continue_tokens([], tokens=1)


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_the_text(models: dict[str, Path], corpora: Corpora, seed: int) -> None:
    """A hot model writes mostly bytes, few of which are characters; what it writes is not lost."""
    prompt = "naïve 語"
    options: dict[str, Any] = {"tokens": 60, "temperature": 3.0, "seed": seed}
    pieces = list(generate_text(models["llama"], prompt, **options))
    tokenizer = load_tokenizer(corpora.tokenizer)
    generator = LoadedModel(models["llama"]).generator(192)
    ids = tokenizer.encode(prompt)
    size = tokenizer.vocabulary_size
    tokens = written(generator, ids, stop=tokenizer.eod_id, vocabulary=size, **options)
    assert "".join(pieces) == tokenizer.decode([token for token in tokens if token != tokenizer.eod_id])
    assert "" not in pieces


def test_half_a_character_is_never_shown(
    models: dict[str, Path], corpora: Corpora, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "猫 é💡ÿ"
    tokenizer = load_tokenizer(corpora.tokenizer)
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "some characters take several tokens"
    monkeypatch.setattr(Generator, "continue_tokens", lambda *_, **__: iter([*ids, tokenizer.eod_id]))
    pieces = list(generate_text(models["llama"], "x"))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 3, "and it comes as it is written"


def test_a_tokenizer_as_llama_2s(models: dict[str, Path], corpora: Corpora, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt begins with its token, and the first word after the prompt keeps the space that decoding drops."""
    plain = load_tokenizer(corpora.tokenizer)
    given: list[list[int]] = []

    class Prefixed:
        begin_id, eod_id, vocabulary_size, encode = 1, plain.eod_id, plain.vocabulary_size, plain.encode

        def decode(self, ids: list[int]) -> str:
            return plain.decode(ids).removeprefix(" ")

    def continue_tokens(_: Generator, prompt: list[int], **__: Any) -> Any:
        given.append(prompt)
        return iter(plain.encode(" two words"))

    monkeypatch.setattr(LoadedModel, "tokenizer", lambda _: Prefixed())
    monkeypatch.setattr(Generator, "continue_tokens", continue_tokens)
    assert "".join(generate_text(models["llama"], "one")) == " two words"
    assert "".join(generate_text(models["llama"], "")).lstrip() == "two words"
    assert given == [[1, *plain.encode("one")], [1]]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_prompt_longer_than_the_context(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from pytrain.cli import run

    assert run(["generate", str(models[name]), "--prompt", "語" * 192]) == ExitCode.BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: the prompt has 192 tokens, and the model continues at most 191")


def test_the_command_writes_prompt_and_continuation(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from pytrain.cli import run

    words = ["generate", str(models["llama"]), "--prompt", "語 ", "--tokens", "9", "--seed", "3"]
    assert run(words) == ExitCode.OK
    streamed = capsys.readouterr().out
    assert run([*words, "--no-stream"]) == ExitCode.OK
    assert capsys.readouterr().out == streamed
    pieces = generate_text(models["llama"], "語 ", tokens=9, temperature=0.8, seed=3)
    assert streamed == "語 " + "".join(pieces) + "\n"


def test_no_prompt_begins_after_the_end_of_a_document(models: dict[str, Path], corpora: Corpora) -> None:
    tokenizer = load_tokenizer(corpora.tokenizer)
    pieces = generate_text(models["llama"], "", tokens=12, temperature=0)
    generator = LoadedModel(models["llama"]).generator(20)
    expected = written(
        generator,
        [tokenizer.eod_id],
        tokens=12,
        temperature=0,
        stop=tokenizer.eod_id,
        vocabulary=tokenizer.vocabulary_size,
    )
    assert "".join(pieces) == tokenizer.decode([token for token in expected if token != tokenizer.eod_id])


def test_what_cannot_write_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        generate_text(tmp_path / "nothing", "x")
    folder = runs.save_model(
        tmp_path / "mute",
        spine.model_config(SHAPES["llama"]),
        reference.visible_parameters(SHAPES["llama"], 1),
    )
    with pytest.raises(UserError, match="holds no tokenizer, so it cannot read a prompt"):
        generate_text(folder, "x")
