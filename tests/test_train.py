"""Whole runs: resuming, repeating, evaluating, sampling, and what they leave on disk."""

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytrain import checkpoint, learning_rate
from pytrain.checkpoint import Checkpoint
from pytrain.data.indexed import IndexedDataset
from pytrain.data.loader import Batch
from pytrain.data.mixture import Mixture, Phase
from pytrain.errors import ExitCode, UserError
from pytrain.generate import generate_text
from pytrain.metrics import StepMetrics, read_metrics
from pytrain.schedule import forward_only
from pytrain.train import Trainer
from tests import reference, runs
from tests.runs import Corpora, Quiet, configuration, quiet_train


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return runs.make_corpora(tmp_path_factory.mktemp("corpora") / "data")


def stop_after(step: int, number: signal.Signals = signal.SIGTERM) -> Any:
    """An `after_step` that sends this process a signal."""

    def send(metrics: StepMetrics) -> None:
        if metrics.step == step:
            os.kill(os.getpid(), number)

    return send


# --- resuming and repeating ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt2", "fp32"), ("llama", "fp32"), ("llama", "bf16"), ("gpt2", "fp16")]
)
def test_a_resumed_run_is_the_undisturbed_one(corpora: Corpora, tmp_path: Path, family: str, dtype: str) -> None:
    changes = {"precision__dtype": dtype, "evaluation__every": 2, "sample__every": 3, "sample__tokens": 5}
    changes["sample__prompts"] = ["naïve"]
    if dtype == "fp16":
        changes["precision__loss_scale"] = 2.0**22  # too large for the first step: it halves
    whole, parts = (configuration(corpora, tmp_path / name, family, **changes) for name in ("whole", "parts"))
    quiet_train(whole)
    for stop in (2, 3):
        result = quiet_train(parts, "auto", stop_after(stop))
        assert (result.step, result.stopped) == (stop, "SIGTERM")
    result = quiet_train(parts, "auto")
    assert (result.step, result.stopped) == (6, None)
    runs.assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts", 6)
    lines = runs.timeless_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert runs.timeless_metrics(tmp_path / "parts") == lines
    states = [Checkpoint.open(tmp_path / name).state for name in ("whole", "parts")]
    assert {**states[0], "record": None} == {**states[1], "record": None}
    assert (states[0]["updates"] < 6) == (dtype == "fp16")
    files = runs.tensor_bytes(tmp_path / "whole", 6)
    assert len(files) == 8  # two layers, embed and head: weights and optimizer
    names = Checkpoint.open(tmp_path / "whole").tensors()
    assert ("embed.tokens.master" in names) == (dtype != "fp32")


def test_a_checkpoint_in_between_changes_nothing(corpora: Corpora, tmp_path: Path) -> None:
    quiet_train(configuration(corpora, tmp_path / "once"))
    quiet_train(configuration(corpora, tmp_path / "often", checkpoint__every=1))
    runs.assert_same_checkpoint(tmp_path / "once", tmp_path / "often", 6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(corpora: Corpora, tmp_path: Path, recompute: str) -> None:
    quiet_train(configuration(corpora, tmp_path / "none"))
    quiet_train(configuration(corpora, tmp_path / recompute, recompute__policy=recompute))
    runs.assert_same_checkpoint(tmp_path / "none", tmp_path / recompute, 6)


def test_resume_auto_without_a_checkpoint_starts_anew(corpora: Corpora, tmp_path: Path) -> None:
    quiet_train(configuration(corpora, tmp_path / "plain"))
    quiet_train(configuration(corpora, tmp_path / "auto"), "auto")
    runs.assert_same_checkpoint(tmp_path / "plain", tmp_path / "auto", 6)


def test_another_seed_is_another_run(corpora: Corpora, tmp_path: Path) -> None:
    quiet_train(configuration(corpora, tmp_path / "one", run__steps=1))
    quiet_train(configuration(corpora, tmp_path / "other", run__steps=1, run__seed=2))
    with pytest.raises(AssertionError):
        runs.assert_same_checkpoint(tmp_path / "one", tmp_path / "other", 1)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_its_own_folder_repeats_a_run(corpora: Corpora, tmp_path: Path, threads: str) -> None:
    """In a new process, with another number of threads, from the run.toml that the run left."""
    quiet_train(configuration(corpora, tmp_path / "first", precision__dtype="bf16", evaluation__every=3))
    again = runs.run_command(
        "train", tmp_path / "first", "--set", f"run.folder={tmp_path / 'again'}", OMP_NUM_THREADS=threads
    )
    assert (again.returncode, again.stdout) == (ExitCode.OK, ""), again.stderr
    runs.assert_same_checkpoint(tmp_path / "first", tmp_path / "again", 6)
    assert runs.timeless_metrics(tmp_path / "first") == runs.timeless_metrics(tmp_path / "again")


def test_from_the_weights_of_another_run(corpora: Corpora, tmp_path: Path) -> None:
    """A checkpoint of weights alone, as `import` writes it, starts a run with a new optimizer."""
    quiet_train(configuration(corpora, tmp_path / "first", run__steps=2, precision__dtype="bf16"))
    first = Checkpoint.open(tmp_path / "first")
    weights = [
        checkpoint.TensorPiece(*entry, 0, first.read(name).view(np.uint16).reshape(-1))
        for name, entry in first.tensors().items()
        if entry.file.endswith(".weights")
    ]
    checkpoint.save(tmp_path / "bare", 0, weights, {}, first.config_text)
    config = configuration(corpora, tmp_path / "second", precision__dtype="bf16")
    with Trainer(config, str(tmp_path / "bare"), Quiet()) as trainer:
        assert (trainer.step_number, trainer.samples, trainer.optimizer.updates) == (0, 0, 0)
        for spec, values in trainer.stage.parameters():
            expected = first.read(spec.name).reshape(-1)
            np.testing.assert_array_equal(values, expected.view(np.uint16), err_msg=spec.name)
            master = trainer.stage.slice_of(trainer.optimizer.states[0].master[spec.bucket], spec)
            np.testing.assert_array_equal(master, expected.astype(np.float32), err_msg=spec.name)


def test_other_corpora_on_the_way_are_said(corpora: Corpora, tmp_path: Path) -> None:
    quiet_train(configuration(corpora, tmp_path / "run", run__steps=2))
    for train, said in (("train", False), ("more", True)):
        progress = Quiet()
        changes = {"data__train": [str(corpora.folder / train)]}
        with Trainer(configuration(corpora, tmp_path / "run", **changes), "auto", progress):
            assert any("the corpora are not those" in line for line in progress.lines) == said


# --- what a run leaves on disk ------------------------------------------------------------------------------


def test_which_checkpoints_are_kept(corpora: Corpora, tmp_path: Path) -> None:
    keep = {"checkpoint__every": 1, "checkpoint__keep_last": 2, "checkpoint__keep_every": 3}
    quiet_train(configuration(corpora, tmp_path / "run", run__steps=8, **keep))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000006", "step-000007", "step-000008"]


def test_the_record_says_how_the_run_came_to_be(corpora: Corpora, tmp_path: Path) -> None:
    import hashlib

    config = configuration(corpora, tmp_path / "run", run__steps=1)
    quiet_train(config)
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert Checkpoint.open(tmp_path / "run").state["record"] == record
    assert {"pytrain", "commit", "python", "libraries", "hosts", "cpu", "threads"} < record.keys()
    assert {"isa", "blocking", "compiler"} <= record["native"].keys()
    assert record["grid"] == {"dp": 1, "pp": 1, "tp": 1}
    assert record["progress"] == ["not needed: one rank"]
    assert record["seed"] == 1234
    assert record["tokenizer_sha256"] == hashlib.sha256(corpora.tokenizer.read_bytes()).hexdigest()
    for name in ("train", "heldout"):
        content = (corpora.folder / f"{name}.bin").read_bytes()
        assert record["corpora"][name]["sha256"] == hashlib.sha256(content).hexdigest()
    from pytrain.config import load

    assert load(tmp_path / "run" / "run.toml") == config
    copied = Checkpoint.open(tmp_path / "run").extra_files()["tokenizer.model"]
    assert copied.read_bytes() == corpora.tokenizer.read_bytes()


def test_each_step_has_its_line(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run", run__peak_tflops=1.0)
    quiet_train(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for step, line in enumerate(lines, 1):
        assert (line["step"], line["samples"], line["tokens"]) == (step, 4 * step, 4 * step * runs.LENGTH)
        assert line["lr"] == learning_rate.of_run(config, step)
        assert (line["global_batch"], line["loss_scale"], line["skipped"]) == (4, 1.0, False)
        assert line["tok_s"] == pytest.approx(4 * runs.LENGTH / float(str(line["step_s"])))
        assert line["mfu"] == pytest.approx(line["tflops"])
        assert float(str(line["mem_gb"])) > 0.01
    losses = [float(str(line["loss"])) for line in lines]
    assert losses[0] == pytest.approx(math.log(runs.VOCABULARY), rel=0.05)
    assert losses[-1] < losses[0] - 0.5


def test_what_the_loader_is_asked_for(corpora: Corpora, tmp_path: Path) -> None:
    """Two corpora by weight; every sample of the order once, across steps and a resume."""
    changes = {"run__steps": 8}
    mixed = [{"prefix": str(corpora.folder / name), "weight": w} for name, w in (("train", 3.0), ("more", 1.0))]
    config = configuration(corpora, tmp_path / "run", data__train=mixed, **changes)
    seen: list[Batch] = []
    for resume, stop in (("none", 3), ("auto", 99)):
        with Trainer(config, resume, Quiet(stop_after(stop))) as trainer:
            run = trainer.engine.run

            def spy(program: Any, batches: list[Batch], run: Any = run, **options: Any) -> Any:
                seen.extend(batches)
                return run(program, batches, **options)

            trainer.engine.run = spy  # type: ignore[method-assign]
            trainer.run()
    datasets = [IndexedDataset(corpora.folder / name) for name in ("train", "more")]
    sizes = [(len(dataset.tokens) - 1) // runs.LENGTH for dataset in datasets]
    order = [Mixture(sizes, [Phase(0, (3.0, 1.0))], 1234)(sample) for sample in range(8 * 4)]
    assert all(len(batch.sample_ids) == 2 for batch in seen)
    corpus_ids = np.concatenate([batch.corpus_ids for batch in seen])
    sample_ids = np.concatenate([batch.sample_ids for batch in seen])
    assert list(zip(corpus_ids, sample_ids, strict=True)) == order
    assert len(set(order)) == len(order), "nothing twice within an epoch"
    assert np.bincount(corpus_ids).tolist() == pytest.approx([24, 8], abs=4)
    for batch in seen:
        for row, (corpus, sample) in enumerate(zip(batch.corpus_ids, batch.sample_ids, strict=True)):
            tokens = datasets[corpus].tokens[sample * runs.LENGTH : (sample + 1) * runs.LENGTH]
            np.testing.assert_array_equal(batch.tokens.reshape(2, -1)[row], tokens)


# --- held-out text and samples ------------------------------------------------------------------------------


def windows(corpora: Corpora, length: int) -> Iterator[reference.Batch]:
    """The held-out corpus cut by hand: documents do not see each other, nor predict each other."""
    dataset = IndexedDataset(corpora.folder / "heldout")
    tokens = np.asarray(dataset.tokens, np.int32)
    begins = set(map(int, dataset.document_starts))
    for first in range(0, len(tokens) - 1, length):
        inputs = tokens[first : first + length]
        inputs = inputs[: len(tokens) - 1 - first]
        targets = tokens[first + 1 : first + 1 + len(inputs)].copy()
        starts, start = np.zeros(len(inputs), np.int32), 0
        for index in range(len(inputs)):
            start = index if first + index in begins else start
            starts[index] = start
            if first + index + 1 in begins:
                targets[index] = -1
        yield reference.Batch(inputs, targets, np.arange(len(inputs), dtype=np.int32) - starts, starts, len(inputs))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_held_out_loss_is_the_references(corpora: Corpora, tmp_path: Path, family: str) -> None:
    config = configuration(corpora, tmp_path / "run", family, evaluation__every=4)
    progress = Quiet()
    with Trainer(config, progress=progress) as trainer:
        trainer.run()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "heldout" in line] == [4, 6]
    found: Any = lines[-1]["heldout"]
    found = found["heldout"]
    values = config.model.model_dump(exclude={"init_std"})
    stored = Checkpoint.open(tmp_path / "run")
    weights = {
        name: stored.read(name).astype(np.float64)
        for name, entry in stored.tensors().items()
        if entry.file.endswith(".weights")
    }
    passes = [
        reference.model_forward(reference.Shape(**values), weights, batch) for batch in windows(corpora, runs.LENGTH)
    ]
    loss_sum, count = sum(each[0] for each in passes), sum(each[1] for each in passes)
    assert found["loss"] == pytest.approx(loss_sum / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss_sum / count), rel=1e-5)
    texts = corpora.text("heldout").read_text(encoding="utf-8").splitlines()
    utf8_bytes = sum(len(json.loads(line)["text"].encode("utf-8")) for line in texts)
    bits_per_byte = loss_sum / math.log(2.0) / utf8_bytes
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-6)
    assert any(f"perplexity {found['perplexity']:.2f}, bits per byte" in line for line in progress.lines)


def test_part_of_the_held_out_text(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run", evaluation__batches=3)
    with Trainer(config, progress=Quiet()) as trainer:
        batches = [trainer.heldout[0].batch(2 * index, 2) for index in range(3)]
        expected = trainer.engine.run(forward_only(3), batches)
        found = trainer.evaluate()["heldout"]
        corpus = trainer.heldout[0]
    assert 0 < expected.target_count < corpus.predicted_tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert corpus.utf8_bytes is not None
    share = corpus.utf8_bytes * expected.target_count / corpus.predicted_tokens
    assert found.bits_per_byte == pytest.approx(expected.loss_sum / math.log(2.0) / share, rel=1e-12)


def test_samples_are_kept_with_the_metrics(corpora: Corpora, tmp_path: Path) -> None:
    prompts = ["naïve 語", ""]
    config = configuration(
        corpora,
        tmp_path / "run",
        checkpoint__every=3,
        sample__prompts=prompts,
        sample__every=3,
        sample__tokens=12,
        sample__temperature=0.7,
    )
    progress = Quiet()
    with Trainer(config, progress=progress) as trainer:
        trainer.run()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "prompts" in line] == [3, 6]
    for step in (3, 6):
        samples: Any = lines[step - 1]["prompts"]
        assert [sample["prompt"] for sample in samples] == prompts
        for sample in samples:
            folder = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
            pieces = generate_text(folder, sample["prompt"], tokens=12, temperature=0.7, seed=1234)
            assert sample["text"] == "".join(pieces)
            assert f"step {step}: {sample['prompt']}{sample['text']}" in progress.lines


def test_a_sample_may_fill_the_context(corpora: Corpora, tmp_path: Path) -> None:
    """More tokens are asked for than fit behind the prompt, which is not cut for it."""
    config = configuration(
        corpora,
        tmp_path / "run",
        sample__prompts=["naïve"],
        sample__every=1,
        sample__tokens=500,
        run__steps=1,
    )
    result = quiet_train(config)
    assert result.last is not None
    assert result.last.prompts[0].prompt == "naïve"


def test_a_prompt_without_room_is_refused_before_the_first_step(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run", sample__prompts=["語" * 300], sample__every=1)
    sentence = runs.refusal(config)
    assert sentence.startswith('sample.prompts: "語語')
    assert "at most 63 can be continued" in sentence
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- gradients that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_a_bad_gradient_is_named_and_skipped(corpora: Corpora, tmp_path: Path, gradients: str) -> None:
    name = "layer.1.mlp.up.weight"
    progress = Quiet()
    config = configuration(corpora, tmp_path / "run", precision__dtype="bf16", precision__gradients=gradients)
    with Trainer(config, progress=progress) as trainer:
        backward, stage = trainer.stage.backward, trainer.stage

        def poisoned(slot: int) -> None:
            backward(slot)
            bad = {"fp32": np.nan, "bf16": 0x7FC0}[gradients]
            if trainer.step_number == 2:
                stage.gradient(name)[1, 1] = stage.gradient("final_norm.weight")[0] = bad

        stage.backward = poisoned  # type: ignore[method-assign]
        trainer.step()
        trainer.step()
        before = [buffer.array.tobytes() for buffer in (*stage.weights, *trainer.optimizer.states[0].second)]
        bad = trainer.step()
        assert (bad.skipped, bad.step, trainer.optimizer.updates) == (True, 3, 2)
        assert [buffer.array.tobytes() for buffer in (*stage.weights, *trainer.optimizer.states[0].second)] == before
        good = trainer.step()
        assert (good.skipped, good.samples, trainer.optimizer.updates) == (False, 16, 3)
    where = "dp0/1 pp0/1 tp0/1"
    said = f"step 3: the gradient of {name} is not finite ({where}); the weights stay as they are"
    assert said in progress.lines


def test_fp16_finds_its_loss_scale(corpora: Corpora, tmp_path: Path) -> None:
    changes = {"precision__dtype": "fp16", "precision__loss_scale": 2.0**28}
    progress = Quiet()
    config = configuration(corpora, tmp_path / "run", run__steps=20, **changes)
    with Trainer(config, progress=progress) as trainer:
        trainer.run()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    scale = 2.0**28
    for line in lines:
        assert line["loss_scale"] == scale
        assert (line["grad_norm"] is None) == line["skipped"]
        scale /= 2 if line["skipped"] else 1
    assert lines[0]["skipped"]
    assert not lines[-1]["skipped"]
    count = sum(bool(line["skipped"]) for line in lines)
    assert sum("is not finite" in line for line in progress.lines) == count
    state = Checkpoint.open(tmp_path / "run").state
    assert (state["updates"], state["loss_scale"]) == (20 - count, scale)


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_folder_with_checkpoints_is_not_started_over(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run", run__steps=2)
    quiet_train(config)
    before = runs.tensor_bytes(tmp_path / "run", 2)
    sentence = runs.refusal(config)
    assert "already holds step-000002; go on with --resume auto, or choose another run.folder" in sentence
    assert runs.tensor_bytes(tmp_path / "run", 2) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run__seed": 5}, "run.seed is 5, but "),
        ({"data__sequence_length": 16}, "data.sequence_length is 16, but "),
        ({"precision__dtype": "bf16"}, "is fp32 in the checkpoint"),
    ],
)
def test_a_resume_with_another_meaning_is_refused(
    corpora: Corpora, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    quiet_train(configuration(corpora, tmp_path / "run", run__steps=2))
    before = runs.tensor_bytes(tmp_path / "run", 2)
    assert words in runs.refusal(configuration(corpora, tmp_path / "run", **change), "auto")
    assert runs.tensor_bytes(tmp_path / "run", 2) == before


def test_resuming_from_nothing_is_refused(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run")
    with pytest.raises(UserError, match="nowhere does not exist, so it is no checkpoint"):
        Trainer(config, str(tmp_path / "nowhere"), Quiet())
