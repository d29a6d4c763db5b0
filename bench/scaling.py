"""Two ranks of one thread against one rank of two threads: what parallelism itself costs.

    python -m bench.scaling
    python -m bench.scaling --model 14m --case tp --rounds 3 --json scaling.json

Same model, samples and global batch, on the same two cores. All jobs of a case are started once and take turns, one
standing still while another trains: baseline, ranks, ranks with overlap off, baseline, ... Ranks run under
`collectives.own = true`, point-to-point messages alone, and each is pinned to its core. A ratio is the median over
rounds of tokens/s of the ranks over those of the baseline in the same round.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pytrain.errors import UserError

from . import _jobs, _record

LENGTH, RANKS = 256, 2
MODELS: dict[str, dict[str, object]] = {
    "14m": {"family": "gpt2", "layers": 6, "hidden": 384, "heads": 6, "vocabulary": 8192, "context": LENGTH},
    "gpt2-124m": {"preset": "gpt2-124m"},
    "tiny": {"family": "gpt2", "layers": 4, "hidden": 32, "heads": 2, "vocabulary": 8192, "context": LENGTH},
}
MEASURED = ("14m", "gpt2-124m")
"""By default; the tiny one only shows that the program works."""
SEQUENCES = {"14m": 8, "gpt2-124m": 4, "tiny": 2}
"""Per step without accumulation."""


@dataclass(frozen=True)
class Case:
    """A way to use two ranks."""

    parallel: dict[str, object]
    target: float
    """Least share of the baseline's tokens per second."""
    micro_batches: int = 1
    """Of each rank; with one, nothing is accumulated."""


CASES = {
    "dp": Case({"dp": 2}, 0.90),
    "dp-zero1": Case({"dp": 2, "zero": 1}, 0.90),
    "tp": Case({"tp": 2}, 0.85),
    "pp-zero-bubble": Case({"pp": 2, "schedule": "zero-bubble"}, 0.85, 16),
    "pp-interleaved": Case({"pp": 2, "schedule": "interleaved", "chunks": 2}, 0.85, 16),
}


def write_job(
    folder: Path, data: Path, model: str, parallel: dict[str, object], *, batch: tuple[int, int], overlap: bool = True
) -> None:
    """The job's run.toml; `batch` is (micro_batch, global_batch)."""
    from pytrain.config import build, resolved_toml

    folder.mkdir()
    config = build(
        {
            "run": {"folder": str(folder / "run"), "steps": 10**6},
            "model": MODELS[model],
            "tokenizer": {"path": str(data / "tokenizer.model")},
            "data": {"train": [str(data / "random")], "sequence_length": LENGTH},
            "batch": {"micro_batch": batch[0], "global_batch": batch[1]},
            "learning_rate": {"peak": 1e-4},
            "parallel": parallel,
            "collectives": {"own": True, "overlap": overlap},
        },
        "the benchmark's configuration",
    )
    (folder / "run.toml").write_text(resolved_toml(config), encoding="utf-8")


def batches(model: str, case: Case) -> tuple[tuple[int, int], tuple[int, int]]:
    """(micro_batch, global_batch) of the baseline and of each rank.

    Where the ranks accumulate, the baseline takes the same micro-batches.
    """
    if case.micro_batches > 1:
        micro = max(1, SEQUENCES[model] // 4)
        return (micro, micro * case.micro_batches), (micro, micro * case.micro_batches)
    sequences = SEQUENCES[model]
    return (sequences, sequences), (sequences // int(str(case.parallel.get("dp", 1))), sequences)


def measure(model: str, name: str, folder: Path, rounds: int, steps: int, cores: list[int]) -> dict[str, Any]:
    """All rounds of one case; times of the last step of each turn, so that the others warm the caches up again."""
    case = CASES[name]
    alone, ranks = batches(model, case)
    data = folder.parent
    folder.mkdir()
    write_job(folder / "alone", data, model, {}, batch=alone)
    write_job(folder / "ranks", data, model, case.parallel, batch=ranks)
    write_job(folder / "in-turn", data, model, case.parallel, batch=ranks, overlap=False)
    with contextlib.ExitStack() as stack:
        jobs = {"alone": stack.enter_context(_jobs.Job(folder / "alone", 1, RANKS, cores, __spec__.name))}
        for other in ("ranks", "in-turn"):
            jobs[other] = stack.enter_context(_jobs.Job(folder / other, RANKS, 1, cores, __spec__.name))
        losses = {kind: job.turn(1)[0]["loss"] for kind, job in jobs.items()}  # touches all memory
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in jobs}
        for _ in range(rounds):
            for kind, job in jobs.items():
                found[kind] += job.turn(steps)[-1:]
    if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
        raise UserError(f"{name}: the jobs trained differently: losses {losses}")
    facts = {"name": f"{model} {name}", "model": model, "case": name, "tokens": alone[1] * LENGTH}
    return facts | {"rounds": found} | summary(case, found)


def summary(case: Case, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds."""
    speeds = {kind: [step["tok_s"] for step in steps] for kind, steps in found.items()}
    ratios = {
        kind: _record.summary([mine / alone for mine, alone in zip(speeds[kind], speeds["alone"], strict=True)])
        for kind in ("ranks", "in-turn")
    }
    groups = {
        kind: {
            group: {
                key: statistics.median(step["groups"][group][key] for step in found[kind])
                for key in ("waited_s", "hidden_s", "bytes_sent")
            }
            for group in found[kind][0]["groups"]
        }
        for kind in ("ranks", "in-turn")
    }
    waits = {
        kind: [
            statistics.median(step["waited_s"][rank] / step["step_s"] for step in found[kind])
            for rank in range(RANKS)
        ]
        for kind in ("ranks", "in-turn")
    }
    summaries = {kind: _record.summary(values) for kind, values in speeds.items()}
    return {"target": case.target, "speeds": summaries, "ratios": ratios, "groups": groups, "waits": waits}


def report(result: dict[str, Any]) -> str:
    """The lines of a case."""
    lines = [f"{result['model']} {result['case']}: {result['tokens']} tokens a step, medians (least to most)"]
    titles = {"alone": "1 rank x 2 threads", "ranks": "2 ranks x 1 thread", "in-turn": "  overlap off"}
    for kind, title in titles.items():
        speeds = result["speeds"][kind]
        line = f"  {title:20} {_record.spread(speeds, digits=0):>8} tokens/s"
        if kind != "alone":
            line += f", {_record.spread(result['ratios'][kind], digits=3)} of the baseline"
        if kind == "ranks":
            met = "met" if result["ratios"][kind]["median"] >= result["target"] else "missed"
            line += f" (target {result['target']:.2f}: {met})"
        if kind != "alone":
            line += "; waiting " + ", ".join(f"{share:.1%}" for share in result["waits"][kind]) + " of the step"
        lines.append(line)
        for group, traffic in result["groups"].get(kind, {}).items():
            lines.append(
                f"    {group:5} waited {traffic['waited_s'] * 1e3:8.1f} ms, "
                f"hidden {traffic['hidden_s'] * 1e3:8.1f} ms, sent {traffic['bytes_sent'] / 1e6:.2f} MB per step"
            )
    return "\n".join(lines)


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=MEASURED)
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=tuple(CASES))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Turns of each job.")
@click.option("--steps", default=1, show_default=True, type=click.IntRange(min=1), help="Of a turn; the last counts.")
@_record.json_option
@click.option("--worker", type=click.Path(path_type=Path), hidden=True)
def command(
    models: tuple[str, ...],
    cases: tuple[str, ...],
    rounds: int,
    steps: int,
    json_path: Path | None,
    worker: Path | None,
) -> None:
    """Compare two ranks of one thread with one rank of two threads."""
    if worker is not None:
        _jobs.pin(worker)
        _jobs.work(worker)
        return
    cores = sorted(os.sched_getaffinity(0))[:RANKS]
    if len(cores) < RANKS:
        raise UserError("two ranks beside each other need two cores in the affinity mask")
    from ._synthetic import write_corpus, write_tokenizer

    print(f"{platform.node()}, cores {cores}, sequence {LENGTH}, collectives.own, {rounds} rounds of {steps} steps")
    results = []
    for model in models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_corpus(folder / "random", 8192, 64 * LENGTH * max(SEQUENCES.values()))
            write_tokenizer(folder / "tokenizer.model")
            for case in cases:
                results.append(measure(model, case, folder / case, rounds, steps, cores))
                print(report(results[-1]), flush=True)
    options = {"models": models, "cases": cases, "rounds": rounds, "steps": steps}
    _record.write(json_path, "scaling", options, {"cases": results})


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench scaling` does."""
    command.main(arguments, prog_name="pytrain bench scaling", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.scaling")
