"""The dry run: what it prints, and that the memory it plans is what the run then holds."""

import re
from pathlib import Path
from typing import Any

import pytest

from pytrain import estimate
from pytrain.config import RunConfig, commented_toml, load, parameter_count
from pytrain.data.tokenizer import train_sentencepiece
from pytrain.errors import ExitCode
from pytrain.rank import Plan
from pytrain.train import Trainer
from tests import runs
from tests.runs import Corpora, Quiet, configuration, quiet_train


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return runs.make_corpora(tmp_path_factory.mktemp("corpora") / "data")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_dry_run_knows_the_memory(corpora: Corpora, tmp_path: Path, dtype: str, recompute: str) -> None:
    saving = {"checkpoint__every": 1, "checkpoint__snapshot_gb": 1.0 if recompute == "none" else 1e-4}
    config = configuration(corpora, tmp_path / "run", precision__dtype=dtype, recompute__policy=recompute, **saving)
    memory = estimate.largest_rank(config)
    planned = memory.by_kind
    assert sum(memory.by_lifetime.values()) <= planned["activations"]
    with Trainer(config, progress=Quiet()) as trainer:
        trainer.step()
        held = {kind: trainer.device.bytes_in_use(kind) for kind in planned}
    assert held == planned
    assert (held["master"] > 0) == (dtype == "bf16")
    if recompute == "none":
        assert held["snapshot"] == (12 if dtype == "fp32" else 14) * parameter_count(config.model)  # all there is
    else:
        assert held["snapshot"] == 100_000


def test_the_dry_run_prints_what_the_run_takes(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run", run__peak_tflops=0.5)
    file = runs.write_toml(config, tmp_path / "run.toml")
    done = runs.run_command("train", file, "--dry-run")
    assert done.returncode == ExitCode.OK, done.stderr
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"
    assert f"{parameter_count(config.model):,} parameters" in done.stdout
    assert "768 in 6 steps of 128 (2 micro-batches of 2 sequences)" in done.stdout
    for kind in ("weights", "gradients", "optimizer", "activations"):
        assert kind in done.stdout
    assert "snapshot" not in done.stdout
    assert "\ntime:        under a second, at 50% of a peak of 0.500 TFLOP/s (configured); " in done.stdout
    slow = runs.run_command("train", file, "--dry-run", "--set", "run.peak_tflops=1e-6")
    assert re.search(r"^time: +about 0:0[0-9]:[0-9]{2}, at 50%", slow.stdout, re.MULTILINE), slow.stdout
    behind = runs.run_command("train", file, "--dry-run", "--set", "checkpoint.every=2")
    assert f"snapshot {estimate._bytes(3 * 4 * parameter_count(config.model))}" in behind.stdout
    quiet_train(config)
    size = sum(len(content) for content in runs.tensor_bytes(tmp_path / "run", 6).values())
    assert f"checkpoint:  {size / 1e3:.2f} kB each" in done.stdout
    assert "free at " in done.stdout
    assert re.search(r"[\d.]+ MFLOP per token, [1-9]\d*\.\d{3} MFLOP in all", done.stdout), done.stdout
    assert re.search(r"^data: +a tokenizer of 311 tokens, [\d,]+ tokens to train on$", done.stdout, re.MULTILINE)
    assert "not found" not in done.stdout
    assert "of a peak of 0.500 TFLOP/s (configured)" in done.stdout


@pytest.mark.parametrize(
    ("count", "text"),
    [(8e8, "800.000 MFLOP"), (2.5e12, "2.500 TFLOP"), (1e15, "1.000 PFLOP"), (3.1e22, "31.000 ZFLOP")],
)
def test_arithmetic_has_a_fitting_unit(count: float, text: str) -> None:
    assert estimate._flop(count) == text


def test_the_dry_run_names_what_is_not_here(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run", tokenizer__path=str(tmp_path / "no.model"))
    config = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={"train": (config.data.train[0], config.data.train[0].model_copy(update={"prefix": "no/ja"}))}
            )
        }
    )
    (line,) = [line for line in estimate.report(config).splitlines() if "not found here" in line]
    missing = f"tokenizer {tmp_path / 'no.model'}, data.train no/ja (.bin, .idx)"
    assert line == f"data:        not found here: {missing}; training will need them"


@pytest.mark.parametrize("key", ["train", "heldout"])
@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_the_dry_run_names_each_file_of_a_corpus(corpora: Corpora, tmp_path: Path, key: str, ending: str) -> None:
    for suffix in {"bin", "idx"} - {ending}:
        (tmp_path / f"half.{suffix}").write_bytes((corpora.folder / f"train.{suffix}").read_bytes())
    config = configuration(corpora, tmp_path / "run")
    half = config.data.train[0].model_copy(update={"prefix": str(tmp_path / "half")})
    config = config.model_copy(update={"data": config.data.model_copy(update={key: (half,)})})
    assert f"not found here: data.{key} {tmp_path}/half (.{ending}); training" in estimate.report(config)


def test_the_dry_run_refuses_what_training_would(corpora: Corpora, tmp_path: Path) -> None:
    """With status 2 and the same sentence."""
    config = configuration(corpora, tmp_path / "run")
    other = tmp_path / "other.model"
    train_sentencepiece([corpora.text("more")], other, 300, "bpe")
    file = runs.write_toml(config, tmp_path / "run.toml")
    changes = {
        "model.vocabulary=300": "model.vocabulary (300) is smaller than the 311 tokens of ",
        f"tokenizer.path={other}": "tokenizer",
        "data.sequence_length=100000": "fewer than one sample of 100000",
    }
    for change, sentence in changes.items():
        more = ["--set", "model.context=100000"] if "length" in change else []
        dry, real = (
            runs.run_command("train", file, *option, "--set", change, *more) for option in (["--dry-run"], [])
        )
        assert dry.returncode == real.returncode == ExitCode.BAD_INPUT, (dry.stdout, dry.stderr, real.stderr)
        assert sentence in dry.stderr
        assert dry.stderr == real.stderr


def test_published_grids_are_planned(tmp_path: Path) -> None:
    """Fugaku-LLM's and Frontier's; what a GPU run pins in host memory is told apart."""
    fugaku = _preset("fugaku-13b", tmp_path, parallel={"tp": 6, "pp": 8, "dp": 288}, run={"peak_tflops": 6.76})
    text = estimate.report(fugaku)
    assert "13,223,813,760 parameters" in text
    assert "400,077,619,200 in 96,900 steps of 4,128,768 (7 micro-batches of 1 sequences)" in text
    assert "(configured) on each of 13,824 ranks, waits not counted; " in text
    assert "pinned" not in text
    frontier = _preset("frontier-22b", tmp_path, parallel={"pp": 8, "dp": 2, "zero": 1}, run={"device": "hip"})
    memory = estimate.largest_rank(frontier)
    direct = _preset(
        "frontier-22b",
        tmp_path,
        parallel={"pp": 8, "dp": 2, "zero": 1},
        run={"device": "hip"},
        collectives={"device_buffers": "direct"},
    )
    staged = memory.by_kind["staging"] - estimate.largest_rank(direct).by_kind["staging"]
    assert memory.pinned == staged + memory.by_kind["snapshot"] > memory.by_kind["snapshot"] > 0
    text = estimate.report(frontier)
    assert f"; {estimate._bytes(memory.pinned)} of it pinned in host memory, the rest on the GPU\n" in text
    assert "\ntime:        n/a: give the peak of the GPU as run.peak_tflops; `pytrain bench" in text


def test_pinned_memory_is_bounded_by_the_bucket(tmp_path: Path) -> None:
    """Three buckets of sums over dp: of whole layers, or of parts of at most `parallel.bucket_mb`."""
    hidden, parallel = 6144, {"pp": 8, "dp": 2, "zero": 1}
    layer = 4 * (12 * hidden**2 + 13 * hidden)
    pinned = {}
    for size in (50, 256, 1e6):
        config = _preset("frontier-22b", tmp_path, parallel={**parallel, "bucket_mb": size}, run={"device": "hip"})
        pinned[size] = estimate.rank_memory(Plan(config), 3, 0).pinned
    for size in (50, 256):
        fewest = -(-layer // (size * 10**6))
        assert 3 * (layer - size * 1e6) <= pinned[1e6] - pinned[size] <= 3 * (layer - layer / fewest)


def _preset(name: str, folder: Path, **changes: dict[str, Any]) -> RunConfig:
    """A preset's run on another grid, with data that is not there."""
    path = folder / f"{name}.toml"
    path.write_text(commented_toml(name), encoding="utf-8")
    sets = [f"{section}.{key}={value}" for section, table in changes.items() for key, value in table.items()]
    return load(path, sets)
