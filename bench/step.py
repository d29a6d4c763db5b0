"""A whole training step (forward, backward, clipping, AdamW) of the product's own trainer, alone or beside PyTorch.

    python -m bench.step --model gpt2-124m --batch 4 --seq 256 --peers torch

The trainer runs as in `pytrain train`, with loader, metrics and progress, in a process of its own; so does each peer.
They take turns in every round, and between them arithmetic and memory are probed. FLOPs are 6 N + 12 L T d
per token (N parameters, an untied input embedding left out; d = heads * head size); `mfu` is their share of the peak.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytrain.errors import UserError
from pytrain.progress import compact

from . import _record
from ._peers import PEERS, Peer, chosen_peers, start_peer, start_trainer
from ._probe import Probe, Reading, mean_of
from ._synthetic import MODELS, synthetic_run
from ._worker import Worker, WorkerError

if TYPE_CHECKING:
    from pytrain.config import ModelConfig, RunConfig

MANY_STEPS = 1000
TRAINER = "pytrain"
MODEL_HELP = f"A preset, or one of {', '.join(MODELS)}."
KEEP_HELP = "Make the run in this new folder; `pytrain train FOLDER/run.toml` then trains the same."
PROFILE_HELP = "Print the ops of a step, and write a Chrome trace of it (to step.trace.json)."


def flops_per_token(model: ModelConfig, length: int) -> int:
    """6 N + 12 L T d: forward and backward, scores counted whole though causal, as PyTorch users count it."""
    from pytrain.config import parameter_count

    looked_up = 0 if model.tied_head else model.vocabulary * model.hidden
    attention = 12 * model.layers * length * model.heads * model.head_size
    return 6 * (parameter_count(model) - looked_up) + attention


@dataclass(frozen=True)
class Turn:
    """What one participant did in one round."""

    seconds: list[float]
    losses: list[float]
    probed: Reading
    """Means of the probes before and after."""
    answer: Mapping[str, Any]


class Contest:
    """Participants that take turns.

    Args:
        config: of the trainer's run.
        threads: that each computes with.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        from pytrain.native import native

        self.config = config
        self.probe = Probe(native().CpuDevice(threads=threads), config.precision.dtype)
        self.turns: dict[str, list[Turn]] = {}
        self.profiles: dict[str, dict[str, Any]] = {}
        length = config.data.sequence_length
        self.tokens = config.batch.global_batch * length
        self.flops = self.tokens * flops_per_token(config.model, length)

    def run(self, workers: Mapping[str, Worker], rounds: int, steps: int) -> None:
        """All rounds, then one profiled step of each.

        Raises:
            WorkerError: one of them ended.
        """
        before = self.probe.take()
        for _ in range(rounds):
            for name, worker in workers.items():
                answer = worker.ask("steps", count=steps)
                after = self.probe.take()
                turn = Turn(answer["seconds"], answer["loss"], mean_of(before, after), answer)
                self.turns.setdefault(name, []).append(turn)
                before = after
        for name, worker in workers.items():
            self.profiles[name] = profile = worker.ask("profile")
            if "products_gflops" in profile:
                profile["products_share"] = profile["products_gflops"] / self.probe.take().gflops

    def figures(self, name: str) -> dict[str, Any]:
        """What is reported of a participant."""
        turns = self.turns[name]
        seconds = [value for turn in turns for value in turn.seconds]
        shares = [self.flops / statistics.median(turn.seconds) / turn.probed.gflops / 1e9 for turn in turns]
        profile = {key: value for key, value in self.profiles[name].items() if key != "spans"}
        return {
            "tokens_per_s": self.tokens / statistics.median(seconds),
            "mfu": statistics.median(shares),
            "peak_rss_bytes": turns[-1].answer["peak_rss_bytes"],
            **profile,
            "step_seconds": _record.summary(seconds),
            "mfu_of_rounds": _record.summary(shares),
            "read_gb_s_of_rounds": _record.summary([turn.probed.read_gb_s for turn in turns]),
            "cache_gb_s_of_rounds": _record.summary([turn.probed.cache_gb_s for turn in turns]),
            "losses": [value for turn in turns for value in turn.losses],
        }

    def ratio(self, name: str) -> dict[str, Any]:
        """How many times a peer's speed the trainer has, paired round by round, and its share of the memory."""
        speeds = [
            statistics.median(theirs.seconds) / statistics.median(ours.seconds)
            for ours, theirs in zip(self.turns[TRAINER], self.turns[name], strict=True)
        ]
        ours, theirs = (self.turns[who][-1].answer["peak_rss_bytes"] for who in (TRAINER, name))
        return {"speed": _record.summary(speeds), "memory": ours / theirs}


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    try:
        kept.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{kept} cannot be made: {error.strerror}") from None
    yield kept


def _configuration(folder: Path, options: Mapping[str, Any]) -> RunConfig:
    """Of a synthetic run, or of the user's with what would stand in the way of measuring left out."""
    from pytrain import config

    if options["config"] is not None:
        overrides = [f'run.folder="{folder / "run"}"', "evaluation.every=0", "sample.every=0"]
        return config.load(options["config"], overrides)
    return synthetic_run(
        folder,
        options["model"],
        batch=options["batch"],
        length=options["seq"],
        steps=MANY_STEPS,
        global_batch=options["batch"] * options["accumulate"],
        dtype=options["dtype"],
        recompute=options["recompute"],
        tp=options["tp"],
    )


def _started(
    config: RunConfig, toml: Path, peers: Sequence[Peer], threads: int, skipped: dict[str, str], stack: ExitStack
) -> dict[str, Worker]:
    """The trainer and its peers, each after a step that touches its memory; why a peer is missing in `skipped`."""
    workers: dict[str, Worker] = {}
    trainer = start_trainer(config, toml, threads)
    stack.callback(trainer.close)
    try:
        trainer.wait_ready()
        trainer.ask("steps", count=1)
    except WorkerError as error:
        raise UserError(f"the trainer did not start: {error}") from None
    workers[TRAINER] = trainer
    for peer in peers:
        reason = peer.missing(config)
        if reason is not None:
            skipped[peer.name] = reason
            continue
        worker = start_peer(peer, config, threads)
        stack.callback(worker.close)
        try:
            worker.wait_ready()
            worker.ask("steps", count=1)
        except WorkerError as error:
            skipped[peer.name] = f"it did not run: {error}"
            continue
        workers[peer.name] = worker
    return workers


def _results(contest: Contest, options: Mapping[str, Any], skipped: Mapping[str, str]) -> dict[str, Any]:
    from pytrain.flops import model_flops

    from ._field import Case, verdict

    config = contest.config
    length = config.data.sequence_length
    peers: dict[str, Any] = {name: contest.figures(name) for name in contest.turns if name != TRAINER}
    case = Case(options["model"], config.batch.global_batch, length, config.precision.dtype)
    products = {name: found["products_share"] for name, found in peers.items()}
    judged = verdict(case, {name: found["mfu"] for name, found in peers.items()}, products)
    ours = contest.figures(TRAINER)
    causal = model_flops(config.model, length) / flops_per_token(config.model, length)
    reported = [value for turn in contest.turns[TRAINER] for value in turn.answer["reported_seconds"]]
    return {
        **ours,
        "tokens_per_s_reported": contest.tokens / statistics.median(reported),
        "mfu_causal": ours["mfu"] * causal,
        "tokens": contest.tokens,
        "flops": contest.flops,
        **contest.probe.record(),
        "memory": contest.turns[TRAINER][-1].answer["memory"],
        "peers": peers | {name: {"skipped": reason} for name, reason in skipped.items()},
        "ratios": {name: contest.ratio(name) for name in peers},
        "valid": judged.valid,
        "validity": judged.reason,
    }


def _print_row(name: str, found: Mapping[str, Any], ratio: Mapping[str, Any] | None) -> None:
    times = _record.spread(found["step_seconds"], 1e-3)
    beside = ""
    if ratio is not None:
        beside = f"  pytrain has {_record.spread(ratio['speed'], digits=3)} x, memory {ratio['memory']:.2f} x"
    print(
        f"{name:<21} {compact(found['tokens_per_s']):>7} tokens/s  {times:>24} ms  {found['mfu']:>6.1%} of peak  "
        f"{found['peak_rss_bytes'] / 1e9:.2f} GB  Python {found['python_share']:.2%}{beside}",
        flush=True,
    )


def _print(results: Mapping[str, Any], skipped: Mapping[str, str], profile: bool) -> None:
    _print_row(TRAINER, results, None)
    for name, found in results["peers"].items():
        if name not in skipped:
            _print_row(name, found, results["ratios"][name])
    for name, reason in skipped.items():
        print(f"{name}: skipped: {reason}")
    for name, found in results["peers"].items():
        if name not in skipped:
            print(f"{name + ' products':<29} {found['products_share']:.1%} of peak, a layer's forward ones alone")
    print(f"as train reports it   {compact(results['tokens_per_s_reported'])} tokens/s")
    print(f"peak                  {_record.spread(results['peak_gflops'])} GFLOP/s")
    print(f"reading memory        {_record.spread(results['read_gb_s'])} GB/s, probed as often")
    print(f"copying in a cache    {_record.spread(results['cache_gb_s'])} GB/s")
    memory = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in results["memory"].items())
    print(f"memory                {memory} GB")
    print(
        f"Python                {results['python_seconds'] * 1e3:.3f} ms a step beside {results['native_calls']} "
        f"native calls and {results['collectives']} collectives"
    )
    if results["spell"] is not None:
        print(results["spell"])
    if results["peers"] and not results["valid"]:
        print(f"{'invalid' if results['valid'] is False else 'unknown'}: {results['validity']}")
    if profile:
        for name, seconds in results["ops"].items():
            print(f"  {name:<28} {seconds * 1e3:>9.2f} ms  {seconds / results['ops_step_seconds']:>6.1%}")


@click.command()
@click.option("--model", "--preset", default="gpt2-124m", show_default=True, metavar="NAME", help=MODEL_HELP)
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="RUN.toml", help="This run and its corpus instead."
)
@click.option("--batch", default=4, show_default=True, type=click.IntRange(min=1), help="Sequences at a time.")
@click.option("--seq", "--length", "seq", default=256, show_default=True, type=click.IntRange(min=1), help="Tokens.")
@click.option("--accumulate", default=1, show_default=True, type=click.IntRange(min=1), help="Micro-batches a step.")
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]))
@click.option("--recompute", default="none", show_default=True, type=click.Choice(["none", "selective", "full"]))
@click.option("--tp", default=1, show_default=True, type=click.IntRange(min=1), help="Tensor-parallel ranks.")
@click.option("--threads", type=click.IntRange(min=1), help="Of all ranks together (default: all cores).")
@click.option("--steps", default=3, show_default=True, type=click.IntRange(min=1), help="Timed, in each round.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Of taking turns.")
@click.option("--peers", multiple=True, type=click.Choice(["torch", *PEERS]), help="torch: eager and compiled.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="FOLDER", help=KEEP_HELP)
@click.option(
    "--profile",
    is_flag=False,
    flag_value="step.trace.json",
    type=click.Path(path_type=Path),
    callback=_record.writable,
    help=PROFILE_HELP,
)
@_record.json_option
def command(**options: Any) -> None:
    """Time training steps, on random tokens by default."""
    run(options)


def run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure, print and write what the options of `command` say; the results."""
    from pytrain.config import parameter_count, resolved_toml

    from ._peers import pinned_threads

    threads = pinned_threads(options["threads"])
    skipped: dict[str, str] = {}
    with _folder(options["keep"]) as folder, ExitStack() as stack:
        config = _configuration(folder.absolute(), options)
        toml = folder / "run.toml"
        toml.write_text(resolved_toml(config), encoding="utf-8")
        contest = Contest(config, threads)
        machine = _record.machine(threads)
        print(
            f"{options['model'] if options['config'] is None else options['config']}: "
            f"{parameter_count(config.model):,} parameters, {config.batch.micro_batch} x "
            f"{config.data.sequence_length} tokens x {config.micro_batches}, {config.precision.dtype}, tp "
            f"{config.parallel.tp}, {machine['isa']}, {threads} threads, load {machine['load'][0]:.1f}",
            flush=True,
        )
        workers = _started(config, toml, chosen_peers(options["peers"]), threads, skipped, stack)
        try:
            contest.run(workers, options["rounds"], options["steps"])
        except WorkerError as error:
            raise UserError(f"a participant ended before the benchmark did: {error}") from None
    results = _results(contest, options, skipped)
    _print(results, skipped, options["profile"] is not None)
    if options["profile"] is not None:
        _write_trace(options["profile"], contest.profiles[TRAINER])
    _record.write(options["json_path"], "step", options, {"machine": machine, **results})
    return results


def _write_trace(path: Path, profile: Mapping[str, Any]) -> None:
    from ._profile import Span, write_trace

    spans = [Span(*values) for values in profile["spans"]]
    write_trace(path, spans, profile["ops_step_seconds"])
    print(f"wrote {path}; ui.perfetto.dev opens it")


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench step` does."""
    command.main(arguments, prog_name="pytrain bench step", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.step")
