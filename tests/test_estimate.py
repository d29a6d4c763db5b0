"""The dry run: what it prints, and that the memory it plans is what the run then holds."""

from pathlib import Path

import pytest

from pytrain import estimate
from pytrain.config import parameter_count
from pytrain.errors import ExitCode
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
    behind = runs.run_command("train", file, "--dry-run", "--set", "checkpoint.every=2")
    assert f"snapshot {estimate._bytes(3 * 4 * parameter_count(config.model))}" in behind.stdout
    quiet_train(config)
    size = sum(len(content) for content in runs.tensor_bytes(tmp_path / "run", 6).values())
    assert f"checkpoint:  {size / 1e3:.2f} kB each" in done.stdout
    assert "free at " in done.stdout
    assert "GFLOP per token" in done.stdout
    assert "of a peak of 0.500 TFLOP/s (configured)" in done.stdout
