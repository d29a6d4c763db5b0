"""Generation with slices on several ranks, and evaluation on any grid: what one process says, they say."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytrain.errors import ExitCode
from pytrain.evaluate import evaluate_checkpoint
from pytrain.generate import LoadedModel, generate_text
from pytrain.metrics import read_metrics
from tests import reference, runs, spine
from tests.parallel.grid_worker import SHAPES
from tests.parallel.inference_worker import SLICES, describe
from tests.parallel.launch import check_ranks, run_ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, shape in SHAPES.items():
        longer = dataclasses.replace(shape, context=192)
        weights = reference.visible_parameters(longer, 7)
        runs.save_model(folder / name.replace(" ", "-"), spine.model_config(longer), weights)
    return folder


def said(output: str) -> str:
    """What a job printed, without the warning that a small machine gets."""
    return "".join(line for line in output.splitlines(keepends=True) if not line.startswith("warning: "))


def test_slices_write_what_the_whole_model_writes(models: Path, tmp_path: Path) -> None:
    """Widths, heads and vocabulary do not divide by 2, 3 or 4; with 4 slices KV heads are shared."""
    check_ranks(4, "tests.parallel.inference_worker", str(models), str(tmp_path / "results.npz"))
    results = np.load(tmp_path / "results.npz")
    for folder in sorted(models.iterdir()):
        alone: dict[str, Any] = describe(LoadedModel(folder))
        assert alone["logits"].std() >= 1.0
        assert len(set(alone["sampled"])) > 2
        assert len(set(alone["logits"].argmax(axis=1))) > 5
        for size in SLICES:
            found = {key: results[f"{folder.name}/{size}/{key}"] for key in alone}
            difference = float(np.abs(found["logits"] - alone["logits"]).max())
            print(f"{folder.name}, {size} slices: largest difference of a logit {difference:.3g}")
            assert difference < 3e-5
            assert (found["logits"].argmax(axis=1) == alone["logits"].argmax(axis=1)).all()
            assert found["greedy"].tolist() == alone["greedy"]
            assert found["sampled"].tolist() == alone["sampled"]
            assert max(found["weight_bytes"]) < 0.75 * alone["weight_bytes"], "a rank holds only its slice"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A run of one process with its last line of metrics."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"run__steps": 3, "evaluation__every": 3, "sample__every": 3, "sample__tokens": 20}
    config = runs.configuration(
        runs.make_corpora(folder / "corpora"),
        folder / "alone",
        model__layers=3,
        batch__micro_batch=1,
        sample__temperature=0,
        sample__prompts=["naïve", "語"],
        **changes,
    )
    runs.quiet_train(config)
    return config, read_metrics(folder / "alone" / "metrics.jsonl")[-1]


def test_samples_and_evaluation_while_slices_and_replicas_train(trained: Any, tmp_path: Path) -> None:
    config, expected = trained
    path = runs.write_toml(config, tmp_path / "run.toml")
    grid = [f"--set=parallel.{key}=2" for key in ("dp", "tp")]
    check_ranks(4, "pytrain", "train", str(path), *grid, f"--set=run.folder={tmp_path / 'run'}")
    found = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    (progress,) = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))["progress"]
    assert progress.startswith(("poll: 4 ranks with 4 threads", "thread: 4 ranks with 4 threads"))
    assert found["prompts"] == expected["prompts"]
    assert found["heldout"]["heldout"]["loss"] == pytest.approx(expected["heldout"]["heldout"]["loss"], rel=1e-5)


@pytest.mark.parametrize(("ranks", "options"), [(4, ["--tp=2", "--pp=2"]), (3, ["--pp=3"]), (3, [])])
def test_a_checkpoint_is_evaluated_on_any_grid(trained: Any, ranks: int, options: list[str]) -> None:
    config, expected = trained
    alone = evaluate_checkpoint(config.run.folder)
    assert alone["heldout"].loss == pytest.approx(expected["heldout"]["heldout"]["loss"], rel=1e-6)
    assert said(check_ranks(ranks, "pytrain", "evaluate", config.run.folder, *options)) == (
        f"heldout: {alone['heldout'].sentence}\n"
    )


def test_only_rank_0_prints_what_all_ranks_write(trained: Any) -> None:
    folder = trained[0].run.folder
    words = ["generate", folder, "--prompt", "語 na", "--tokens", "30", "--seed", "3", "--tp", "2"]
    expected = "語 na" + "".join(generate_text(folder, "語 na", tokens=30, seed=3)) + "\n"
    assert said(check_ranks(2, "pytrain", *words)) == expected
    assert said(check_ranks(2, "pytrain", *words, "--no-stream")) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["generate", "FOLDER", "--prompt", "語" * 70],
            "the prompt has 70 tokens, and the model continues at most 63",
        ),
        (["generate", "FOLDER", "--tp", "3"], "--tp is 3, but the number of ranks is 2; start with mpiexec -n 3"),
        (["generate", "FOLDER/nothing"], "FOLDER/nothing does not exist, so it is no checkpoint"),
        (
            ["evaluate", "FOLDER", "--pp", "3"],
            "2 ranks are no multiple of tp * pp = 1 * 3; start as many, or change one",
        ),
        (["evaluate", "FOLDER", "--corpus", "FOLDER/no"], None),
    ],
)
def test_what_cannot_be_is_said_once(trained: Any, words: list[str], sentence: str | None) -> None:
    folder = trained[0].run.folder
    ended = run_ranks(2, "pytrain", *(word.replace("FOLDER", folder) for word in words))
    assert ended.status == ExitCode.BAD_INPUT
    if sentence is not None:
        assert said(ended.output) == f"error: {sentence.replace('FOLDER', folder)}\n"
    assert "Traceback" not in ended.output
