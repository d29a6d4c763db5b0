"""`bench.step`: the product's trainer as a worker, what is in a step, and when a comparison counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import _record, _worker
from bench._field import SHARES, Case, verdict
from bench._profile import Recorder, Span, watch, write_trace
from bench._synthetic import synthetic_run
from bench.step import flops_per_token
from pytrain.config import build_model, parameter_count
from pytrain.errors import UserError
from pytrain.progress import NoProgress
from pytrain.train import Trainer
from tests.bench.commands import check_summary, measure

TINY = ("--model", "gpt2-tiny", "--batch", "2", "--seq", "16", "--threads", "1")
FIGURES = {"tokens_per_s", "mfu", "peak_rss_bytes", "python_share", "ops"}


def torch_is_here() -> bool:
    return _record.installed("torch") != _record.NOT_INSTALLED


def test_step_writes_what_is_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    found = measure("step", tmp_path, *TINY, "--steps", "2", "--rounds", "2", "--profile", str(trace))
    assert set(found) >= FIGURES | {"mfu_causal", "losses", "peers", "ratios", "valid", "native_calls"}
    check_summary(found["step_seconds"], 4)
    check_summary(found["peak_gflops"], 3)  # before, and after each of two turns
    check_summary(found["read_gb_s"], 3)
    check_summary(found["cache_gb_s"], 3)
    before, between, after = found["read_gb_s"]["values"]
    assert found["read_gb_s_of_rounds"]["values"] == pytest.approx([(before + between) / 2, (between + after) / 2])
    output = capsys.readouterr().out
    assert "reading memory" in output
    assert (found["spell"] is None) == ("probes within this run differ" not in output)
    assert found["tokens_per_s"] == pytest.approx(32 / found["step_seconds"]["median"])
    # What `pytrain train` reports leaves out its own line and display, and nothing else.
    assert found["tokens_per_s_reported"] >= found["tokens_per_s"]
    assert found["peers"] == {}
    assert 0 < found["python_share"] < 1
    assert len(found["losses"]) == 4
    assert sum(found["ops"].values()) == pytest.approx(found["ops_step_seconds"], rel=1e-6)
    wanted = {"embed.forward", "attention.backward_input", "mlp.backward_weight", "head.forward"}
    assert wanted | {"norm.forward", "gradient_norm", "adamw", "python"} <= set(found["ops"])
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"step", "adamw", "mlp.forward"} <= {event["name"] for event in spans}
    step = next(event for event in spans if event["name"] == "step")
    assert all(event["ts"] >= 0 and event["ts"] + event["dur"] <= step["dur"] + 1e-3 for event in spans)
    assert f"wrote {trace}" in output


def test_step_on_two_slices(tmp_path: Path) -> None:
    found = measure("step", tmp_path, *TINY, "--steps", "1", "--rounds", "1", "--tp", "2")
    assert found["collectives"] > 0
    assert found["ops"]["waiting"] > 0
    assert found["native_calls"] > 9


def test_step_of_a_given_run(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    config = synthetic_run(tmp_path / "files", "llama-tiny", batch=2, length=16, steps=100)
    from pytrain.config import resolved_toml

    (tmp_path / "run.toml").write_text(resolved_toml(config), encoding="utf-8")
    options = (
        "--config",
        str(tmp_path / "run.toml"),
        "--steps",
        "1",
        "--rounds",
        "1",
        "--keep",
        str(tmp_path / "kept"),
    )
    found = measure("step", tmp_path, *options, "--threads", "1")
    assert found["tokens"] == 32
    assert (tmp_path / "kept" / "run.toml").exists()
    assert not (tmp_path / "files" / "run").exists()  # the user's run folder is left alone
    with pytest.raises(UserError, match="kept cannot be made"):
        measure("step", tmp_path, *options)


def test_step_beside_pytorch(tmp_path: Path) -> None:
    if not torch_is_here():
        pytest.skip("PyTorch is not installed: nothing to compare with")
    found = measure("step", tmp_path, *TINY, "--steps", "1", "--rounds", "2", "--peers", "torch_eager")
    peer = found["peers"]["torch_eager"]
    assert set(peer) >= FIGURES | {"losses"}
    assert 0 < peer["products_share"] < 1
    assert peer["products_gflops"] > 0
    check_summary(found["ratios"]["torch_eager"]["speed"], 2)
    assert found["ratios"]["torch_eager"]["memory"] == found["peak_rss_bytes"] / peer["peak_rss_bytes"]
    assert found["valid"] is None  # nobody knows what PyTorch reaches with so small a model
    assert peer["losses"][0] == pytest.approx(found["losses"][0], rel=0.02)  # ln(vocabulary), both
    assert any("mm" in name for name in peer["ops"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_peer_learns(family: str, dtype: str) -> None:
    if not torch_is_here():
        pytest.skip("PyTorch is not installed: nothing to compare with")
    from bench._torch import TorchSteps
    from bench._torch_model import Transformer

    model = build_model({"preset": f"{family}-tiny"}, "test").model_dump(mode="json")
    assert sum(p.numel() for p in Transformer(model, 16).parameters()) == parameter_count(
        build_model({"preset": f"{family}-tiny"}, "test")
    )
    spec = {"model": model, "batch": 2, "length": 16, "accumulate": 2, "dtype": dtype, "compile": False, "threads": 1}
    steps = TorchSteps(spec)
    for group in steps.optimizer.param_groups:
        group["lr"] = 1e-2
    losses = steps.steps(24)["loss"]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("reason", "options"),
    [("PyTorch is not installed", ()), ("fp32 and bf16 alone", ("--dtype", "fp16")), ("one process", ("--tp", "2"))],
)
def test_a_missing_peer_is_a_sentence(
    reason: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import _peers

    here = "2.13" if options else _record.NOT_INSTALLED
    monkeypatch.setattr(_peers, "installed", lambda _name: here)
    config = synthetic_run(
        tmp_path, "gpt2-tiny", batch=2, length=16, steps=9, dtype="fp16" if "fp16" in options else "fp32",
        tp=2 if "2" in options else 1,
    )  # fmt: skip
    (eager, compiled) = _peers.chosen_peers(["torch", "torch_eager"])
    assert (eager.name, compiled.name, compiled.compiled) == ("torch_eager", "torch_compile", True)
    missing = eager.missing(config)
    assert missing is not None
    assert reason in missing


def test_a_peer_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import _peers, step

    def failing(*_arguments: object) -> _worker.Worker:
        return _worker.Worker([sys.executable, "-c", "raise SystemExit('no compiler')"], {})

    monkeypatch.setattr(step, "start_peer", failing)
    monkeypatch.setattr(_peers, "installed", lambda _name: "2.13")
    found = measure("step", tmp_path, *TINY, "--steps", "1", "--rounds", "1", "--peers", "torch_compile")
    assert found["peers"] == {"torch_compile": {"skipped": "it did not run: no compiler"}}


def test_a_trainer_that_fails_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the trainer did not start: \S*random.idx does not exist"):
        measure("step", tmp_path, "--config", str(broken_run(tmp_path)))


def broken_run(folder: Path) -> Path:
    """A run without its corpus, which shows when the trainer opens it."""
    config = synthetic_run(folder, "gpt2-tiny", batch=2, length=16, steps=9)
    from pytrain.config import resolved_toml

    (folder / "random.idx").unlink()
    (folder / "broken.toml").write_text(resolved_toml(config), encoding="utf-8")
    return folder / "broken.toml"


# --- what is counted ----------------------------------------------------------------------------------------


def test_flops_are_those_of_the_field() -> None:
    model = build_model({"preset": "gpt2-124m"}, "test")
    assert flops_per_token(model, 256) == 6 * 124_439_808 + 12 * 12 * 256 * 768
    llama = build_model({"preset": "llama-tiny"}, "test")
    assert not llama.tied_head
    assert flops_per_token(llama, 8) == 6 * (parameter_count(llama) - 256 * 64) + 12 * 2 * 8 * 64


def test_a_verdict() -> None:
    case = Case("gpt2-124m", 4, 256, "fp32")
    known = SHARES[case]
    fast = dict.fromkeys(known, 0.9)
    assert verdict(case, dict(known), fast).valid is True
    assert verdict(case, {"torch_eager": 0.94 * known["torch_eager"]}, fast).valid is True
    shares = {"torch_eager": known["torch_eager"], "torch_compile": 0.92 * known["torch_compile"]}
    short = verdict(case, shares, fast)
    assert short.valid is False
    assert "torch_compile" in short.reason
    assert short.reason.endswith(
        "its products alone reach 90.0% of the peak here, so what holds it back lies outside of them"
    )
    slow = verdict(case, shares, fast | {"torch_compile": 0.4})
    assert slow.valid is False  # the rule stays: a slow library is named, not excused
    assert slow.reason.endswith("so on this CPU its library of products holds its steps under that share")
    assert verdict(case._replace(batch=5), dict(known), fast).valid is None
    assert verdict(case, {}, {}).valid is None


def trained(folder: Path, watched: bool, split: bool) -> tuple[list[float], Recorder]:
    folder.mkdir()
    config = synthetic_run(folder, "llama-tiny", batch=2, length=16, steps=9, global_batch=4)
    recorder = Recorder(split)
    with Trainer(config, progress=NoProgress()) as trainer:
        if not watched:
            return [trainer.advance().loss for _ in range(3)], recorder
        with watch(trainer.model.stages.values(), recorder):
            losses = [trainer.advance().loss for _ in range(3)]
        return losses, recorder


def test_watching_changes_no_bit_and_misses_no_op(tmp_path: Path) -> None:
    plain, _ = trained(tmp_path / "plain", watched=False, split=False)
    whole, calls = trained(tmp_path / "whole", watched=True, split=False)
    apart, ops = trained(tmp_path / "apart", watched=True, split=True)
    assert plain == whole == apart
    assert plain[0] != plain[1]
    forward = [span for span in calls.spans if span.name == "forward"]
    assert len(forward) == 6  # one call for each micro-batch
    layer = [span for span in ops.spans if span.detail == "layer 0 mlp"]
    names = [span.name for span in layer]
    assert names.count("mlp.forward") == names.count("mlp.backward_input") == names.count("mlp.backward_weight") == 6
    assert sum(ops.by_name().values()) == pytest.approx(ops.seconds)
    assert list(ops.by_name().values()) == sorted(ops.by_name().values(), reverse=True)


def test_python_is_what_native_calls_are_not(tmp_path: Path) -> None:
    from bench._trainer import WatchedStep

    recorder = Recorder(split=False)
    recorder.spans = [Span("forward", 1.0, 1.5, ""), Span("adamw", 1.75, 2.0, "")]
    step = WatchedStep(recorder, 1.0, 2.25, waited=0.25, collectives=1)
    assert step.python_seconds == 0.25
    with pytest.raises(UserError, match="cannot be written"):
        write_trace(tmp_path / "no" / "such.json", recorder.spans, step.seconds)


# --- workers ------------------------------------------------------------------------------------------------

ECHO = """
from bench._worker import serve, take_over_output
class Steps:
    def steps(self, count):
        print("this is no answer")
        return {"count": count}
    def profile(self):
        raise SystemExit("out of memory")
answers = take_over_output()
serve(Steps(), answers)
"""


def test_a_worker_answers_until_it_ends() -> None:
    worker = _worker.Worker([sys.executable, "-c", ECHO], {})
    worker.wait_ready()
    assert worker.ask("steps", count=3) == {"count": 3}
    with pytest.raises(_worker.WorkerError, match="out of memory"):
        worker.ask("profile")
    worker.close()  # again


def test_a_worker_hides_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    code = "import os, json; print(json.dumps({k: os.environ.get(k) for k in ('OPENBLAS_CORETYPE', 'A')}))"
    worker = _worker.Worker([sys.executable, "-c", code], {"A": "1"}, ["OPENBLAS_CORETYPE"])
    assert worker._receive() == {"OPENBLAS_CORETYPE": None, "A": "1"}
    worker.close()


def test_peak_memory_is_the_process_own() -> None:
    code = (
        "import time; from bench._worker import peak_rss_bytes as p; b = p(); x = b'1' * 64_000_000; print(p() - b)"
    )
    big = b"1" * 400_000_000  # the parent's own memory must not count
    import subprocess

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60e6 < int(found.stdout) < 80e6
    assert len(big) > 0
