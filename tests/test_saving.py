"""Checkpoints that are written while training goes on, and runs that go on otherwise than they began."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytrain import checkpoint
from pytrain.checkpoint import Checkpoint, FileOperations, parts
from pytrain.data.mixture import Mixture, Phase
from pytrain.errors import UserError
from pytrain.metrics import StepMetrics, read_metrics
from pytrain.train import Trainer
from tests import runs
from tests.runs import Corpora, Quiet, configuration, quiet_train

LONGEST = 60.0
"""Seconds that a test waits for a thread before it fails."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return runs.make_corpora(tmp_path_factory.mktemp("corpora") / "data")


class Held(FileOperations):
    """The thread that saves a step waits before each write until it may go on."""

    def __init__(self, step: int) -> None:
        self.writing, self.go_on = threading.Event(), threading.Event()
        self._caller = threading.current_thread()
        self._name = f"step-{step:06d}.partial"
        self._held: set[int] = set()

    def open(self, path: Path) -> int:
        """Note whether it is of that step."""
        descriptor = super().open(path)
        if path.parent.name == self._name:
            self._held.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        """Its number may come again."""
        self._held.discard(descriptor)
        super().close(descriptor)

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Wait, in the thread alone."""
        if descriptor in self._held and threading.current_thread() is not self._caller:
            self.writing.set()
            self.held()
        super().write(descriptor, data, offset)

    def held(self) -> None:
        """What it comes to."""
        assert self.go_on.wait(LONGEST), "nobody let the thread go on"


class FullBehind(Held):
    """The disk is full when the thread saves that step."""

    def held(self) -> None:
        """No space."""
        raise OSError(28, "No space left on device")


def at_step(step: int, call: Any) -> Any:
    """An `after_step` that calls after one step."""

    def after(metrics: StepMetrics) -> None:
        if metrics.step == step:
            call()

    return after


def manifest_values(folder: Path, step: int) -> tuple[Any, Any]:
    """What a manifest says, but for when, where and how the run was started."""
    manifest = Checkpoint.open(folder / "checkpoints" / f"step-{step:06d}").manifest
    state = {key: value for key, value in manifest.state.items() if key != "record"}
    return manifest.files, (manifest.step, state, manifest.model)


def saving_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pytrain save"]


@pytest.mark.parametrize("snapshot_gb", [1.0, 5e-5, 1e-9])
@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "fp32"), ("llama", "bf16")])
def test_a_checkpoint_written_behind_training_is_the_one_written_at_once(
    corpora: Corpora,
    tmp_path: Path,
    family: str,
    dtype: str,
    snapshot_gb: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of the snapshot of step 2 is written before steps 3 and 4 have changed everything."""
    monkeypatch.setattr(parts, "PART_BYTES", 5000)
    changes: dict[str, Any] = {"checkpoint__every": 2, "precision__dtype": dtype}
    quiet_train(configuration(corpora, tmp_path / "once", family, checkpoint__asynchronous=False, **changes))
    config = configuration(corpora, tmp_path / "behind", family, checkpoint__snapshot_gb=snapshot_gb, **changes)
    operations = Held(2)

    def release() -> None:
        if snapshot_gb > 1e-9:
            assert operations.writing.wait(LONGEST)
            assert not (tmp_path / "behind/checkpoints/step-000002").exists()
        operations.go_on.set()

    progress = Quiet(at_step(4, release))
    with Trainer(config, progress=progress, operations=operations) as trainer:
        trainer.run()
        assert trainer.device.bytes_in_use("snapshot") == min(
            int(snapshot_gb * 1e9) // 2 * 2,
            sum(piece.bytes for piece in Checkpoint.open(config.run.folder).tensors().values()),
        )
    for step in (2, 4, 6):
        runs.assert_same_checkpoint(tmp_path / "once", tmp_path / "behind", step)
        assert manifest_values(tmp_path / "once", step) == manifest_values(tmp_path / "behind", step)
    assert runs.timeless_metrics(tmp_path / "once") == runs.timeless_metrics(tmp_path / "behind")
    told = [line for line in progress.lines if ": saved " in line]
    assert [line.split(":")[0] for line in told] == ["step 2", "step 4", "step 6"]
    assert not saving_threads()


def test_metrics_tell_what_a_save_took(corpora: Corpora, tmp_path: Path) -> None:
    """In the line of the step after which it was whole: the next one's where training waited for it."""
    for name, asynchronous in (("behind", True), ("once", False)):
        config = configuration(
            corpora, tmp_path / name, run__steps=7, checkpoint__every=2, checkpoint__asynchronous=asynchronous
        )
        quiet_train(config)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        saved: list[Any] = [line["saved"] for line in lines if "saved" in line]
        assert [each["step"] for each in saved] == [2, 4, 6][: len(saved)]
        assert len(saved) == 3 if not asynchronous else len(saved) >= 2  # that of step 6 may be whole after step 7
        for line in lines:
            each: Any = line.get("saved")
            if each is not None:
                assert each["step"] < int(str(line["step"]))
        assert all(each["blocked_s"] > 0 for each in saved)
        assert [each["background_s"] > 0 for each in saved] == [asynchronous] * len(saved)


def test_no_memory_is_set_aside_where_nothing_is_written_behind(corpora: Corpora, tmp_path: Path) -> None:
    for name, changes in (
        ("never", {"checkpoint__every": 0}),
        ("at once", {"checkpoint__every": 2, "checkpoint__asynchronous": False}),
    ):
        with Trainer(configuration(corpora, tmp_path / name, **changes), progress=Quiet()) as trainer:
            assert trainer.device.bytes_in_use("snapshot") == 0


def test_the_block_is_left_with_the_save_whole(corpora: Corpora, tmp_path: Path) -> None:
    operations = Held(1)
    config = configuration(corpora, tmp_path / "run", checkpoint__every=100)
    with Trainer(config, progress=Quiet(), operations=operations) as trainer:
        trainer.step()
        folder = trainer.save(wait=False)
        assert operations.writing.wait(LONGEST)
        assert not folder.exists()
        operations.go_on.set()
    Checkpoint.open(folder).verify()


def test_a_signal_waits_for_the_save_under_way(corpora: Corpora, tmp_path: Path) -> None:
    operations = Held(2)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.05, operations.go_on.set).start()

    config = configuration(corpora, tmp_path / "run", checkpoint__every=2)
    with Trainer(config, progress=Quiet(at_step(3, stop)), operations=operations) as trainer:
        result = trainer.run()
    assert (result.step, result.stopped) == (3, "SIGTERM")
    for step in (2, 3):
        Checkpoint.open(tmp_path / f"run/checkpoints/step-00000{step}").verify()


def test_a_failed_write_behind_ends_the_run(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run", run__steps=1000, checkpoint__every=2)
    steps: list[int] = []
    sentence = r"^\S*/step-000004.partial/\S* cannot be written: No space left on device; .* from \S*/step-000002$"
    progress = Quiet(lambda metrics: steps.append(metrics.step))
    trainer = Trainer(config, progress=progress, operations=FullBehind(4))
    with pytest.raises(UserError, match=sentence), trainer:
        trainer.run()
    assert steps[-1] <= 6, "the next save at the latest finds it"
    found = Checkpoint.open(tmp_path / "run")
    assert found.step == 2
    found.verify()
    assert not saving_threads()


def test_an_error_in_training_leaves_the_checkpoint_before(corpora: Corpora, tmp_path: Path) -> None:
    operations = Held(4)

    def fail() -> None:
        assert operations.writing.wait(LONGEST)
        threading.Timer(0.05, operations.go_on.set).start()
        raise RuntimeError("deliberate")

    config = configuration(corpora, tmp_path / "run", checkpoint__every=2)
    trainer = Trainer(config, progress=Quiet(at_step(5, fail)), operations=operations)
    with pytest.raises(RuntimeError, match="deliberate"), trainer:
        trainer.run()
    assert not saving_threads()
    assert Checkpoint.open(tmp_path / "run").step == 2
    quiet_train(config, "auto")
    quiet_train(configuration(corpora, tmp_path / "undisturbed", checkpoint__every=2))
    runs.assert_same_checkpoint(tmp_path / "undisturbed", tmp_path / "run", 6)


# --- going on otherwise -------------------------------------------------------------------------------------


def test_what_an_import_noted_stays(corpora: Corpora, tmp_path: Path) -> None:
    """The ids of a Hugging Face model, which an export gives back: in every checkpoint, not only the first."""
    quiet_train(configuration(corpora, tmp_path / "first", run__steps=1))
    first = Checkpoint.open(tmp_path / "first")
    ids = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None}
    pieces = [
        checkpoint.TensorPiece(*entry, 0, first.read(name).reshape(-1))
        for name, entry in first.tensors().items()
        if entry.file.endswith(".weights")
    ]
    checkpoint.save(tmp_path / "run", 0, pieces, {"huggingface": ids}, first.config_text)
    changes: dict[str, Any] = {"checkpoint__every": 1, "run__steps": 2}
    quiet_train(configuration(corpora, tmp_path / "run", **changes), "auto")
    changes["run__steps"] = 3
    quiet_train(configuration(corpora, tmp_path / "run", **changes), "auto")
    for step in (1, 2, 3):
        assert Checkpoint.open(tmp_path / f"run/checkpoints/step-00000{step}").state["huggingface"] == ids
    assert "huggingface" not in first.state


def test_another_global_batch_goes_on_with_the_next_samples(corpora: Corpora, tmp_path: Path) -> None:
    quiet_train(configuration(corpora, tmp_path / "run", run__steps=2))
    progress = Quiet()
    config = configuration(corpora, tmp_path / "run", batch__global_batch=8)
    asked: list[int] = []
    with Trainer(config, "auto", progress) as trainer:
        assert trainer.loader is not None
        batch = trainer.loader.batch

        def spy(first: int, count: int) -> Any:
            asked.extend(range(first, first + count))
            return batch(first, count)

        trainer.loader.batch = spy  # type: ignore[method-assign]
        trainer.step()
        trainer.step()
        assert trainer.samples == 24
    assert asked == list(range(8, 24))
    said = [line for line in progress.lines if "batch.global_batch" in line]
    assert len(said) == 1
    assert said[0].startswith("note: batch.global_batch was 4 and is 8 from step 3 on: no sample is left out")
    progress = Quiet()
    with Trainer(configuration(corpora, tmp_path / "run", run__steps=9), "auto", progress):
        pass
    assert not [line for line in progress.lines if line.startswith("note")]


def mixed(corpora: Corpora, *weights: float) -> list[dict[str, Any]]:
    return [
        {"prefix": str(corpora.folder / name), "weight": weight}
        for name, weight in zip(("train", "more"), weights, strict=True)
    ]


def test_other_weights_of_the_corpora_begin_at_the_checkpoint(corpora: Corpora, tmp_path: Path) -> None:
    """Each corpus goes on where it was; the change is told, kept in the checkpoints, and resumed with."""
    folder = tmp_path / "run"
    phases = [Phase(0, (3.0, 1.0))]
    for steps, weights, told in (
        (2, (3.0, 1.0), None),
        (4, (6.0, 2.0), None),  # the same shares
        (6, (1.0, 2.0), "were train 3, more 1 and are train 1, more 2 from sample 16 on"),
        (8, (1.0, 2.0), None),
    ):
        progress = Quiet()
        config = configuration(corpora, folder, run__steps=steps, data__train=mixed(corpora, *weights))
        with Trainer(config, "auto", progress) as trainer:
            if told is not None:
                phases.append(Phase(16, weights))
            assert trainer.loader is not None
            expected = Mixture(trainer.loader.mixture.sizes, phases, 1234)
            found = trainer.loader.mixture
            assert [found(sample) for sample in range(80)] == [expected(sample) for sample in range(80)]
            trainer.run()
        said = [line for line in progress.lines if "weights of the corpora" in line]
        assert len(said) == (told is not None)
        assert all(told in line for line in said if told is not None)
    assert Checkpoint.open(folder).state["phases"] == [[0, [3.0, 1.0]], [16, [1.0, 2.0]]]
    drawn = [Mixture(expected.sizes, phases, 1234)(sample) for sample in range(32)]
    assert len(set(drawn)) == 32, "no sample twice"


def test_weights_changed_twice_at_one_checkpoint_are_one_change(corpora: Corpora, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    quiet_train(configuration(corpora, folder, run__steps=2, data__train=mixed(corpora, 1.0, 1.0)))
    for weight in (2.0, 5.0):
        with Trainer(
            configuration(corpora, folder, data__train=mixed(corpora, 1.0, weight)), "auto", Quiet()
        ) as again:
            assert again.phases == [Phase(0, (1.0, 1.0)), Phase(8, (1.0, weight))]
            again.save()
    with Trainer(configuration(corpora, folder, data__train=mixed(corpora, 1.0, 1.0)), "auto", Quiet()) as back:
        assert back.phases == [Phase(0, (1.0, 1.0))]


@pytest.mark.parametrize("change", ["order", "more", "name"])
def test_other_corpora_begin_another_order_and_are_told(corpora: Corpora, tmp_path: Path, change: str) -> None:
    quiet_train(configuration(corpora, tmp_path / "run", run__steps=2, data__train=mixed(corpora, 1.0, 2.0)))
    train = mixed(corpora, 1.0, 2.0)
    if change == "order":
        train.reverse()
    elif change == "more":
        train.append({"prefix": str(corpora.folder / "heldout"), "name": "third"})
    else:
        train[0]["name"] = "other"
    progress = Quiet()
    with Trainer(configuration(corpora, tmp_path / "run", data__train=train), "auto", progress) as trainer:
        assert trainer.phases == [Phase(0, tuple(each.get("weight", 1.0) for each in train))]
    assert len([line for line in progress.lines if "the corpora are not those" in line]) == 1
    assert not [line for line in progress.lines if "weights of the corpora" in line]


def test_another_held_out_corpus_is_no_other_run(corpora: Corpora, tmp_path: Path) -> None:
    quiet_train(configuration(corpora, tmp_path / "run", run__steps=2))
    progress = Quiet()
    changes: dict[str, Any] = {"data__heldout": [str(corpora.folder / "more")]}
    with Trainer(configuration(corpora, tmp_path / "run", **changes), "auto", progress):
        assert not [line for line in progress.lines if line.startswith("note")]


def test_a_snapshot_smaller_than_anything_is_none(corpora: Corpora, tmp_path: Path) -> None:
    config = configuration(corpora, tmp_path / "run", checkpoint__every=2, checkpoint__snapshot_gb=1e-9)
    with Trainer(config, progress=Quiet()) as trainer:
        assert trainer.device.bytes_in_use("snapshot") == 0
        trainer.run()
    assert np.isfinite(Checkpoint.open(tmp_path / "run").read("embed.tokens")).all()
