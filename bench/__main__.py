"""All benchmarks, each in a short form, and a table at the end.

    python -m bench --out results

`results` then has a JSON file of each and report.html. Single ones take longer and say more: `python -m bench.NAME`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from pytrain import launch
from pytrain.errors import UserError
from pytrain.progress import compact

from . import _record


class Short(NamedTuple):
    """A benchmark's short form, and the line that it gets in the table."""

    options: tuple[str, ...]
    line: Callable[[Mapping[str, Any]], str]


def _peak(found: Mapping[str, Any]) -> str:
    case = found["cases"][-1]
    names = {"fp32_gflops": "fp32 GFLOP/s", "bf16_gflops": "bf16 GFLOP/s", "copy_gb_s": "GB/s copied"}
    # A ceiling is the best that was seen: a machine shared with others only ever looks slower than it is.
    return "up to " + ", ".join(f"{case[key]['max']:.0f} {name}" for key, name in names.items())


def _matmul(found: Mapping[str, Any]) -> str:
    parts = []
    for whole in found["weighted"]:
        threads = "1 thread" if whole["threads"] == 1 else f"{whole['threads']} threads"
        parts.append(f"{threads} {whole['share']:.0%} of peak (least {whole['least_share']:.0%})")
    return ", ".join([*parts, *(["PROBES DIFFER"] if any(probe["spell"] for probe in found["probes"]) else [])])


def _kernels(found: Mapping[str, Any]) -> str:
    """Of the instruction set that the product chooses here, which is the first."""
    isa = found["kernels"][0]["isa"]
    shares = [row["share"] for row in found["kernels"] if row["isa"] == isa]
    spread = _record.spread(_record.summary([100 * share for share in shares]), digits=0)
    return f"{len(shares)} operations on {isa}: {spread} % of their ceilings"


def _step(found: Mapping[str, Any]) -> str:
    memory = found["peak_rss_bytes"] / 1e9
    own = f"{found['tokens_per_s']:.0f} tokens/s, {found['mfu']:.0%} of peak, {memory:.2f} GB"
    ratios = [f"{ratio['speed']['median']:.2f} x {name}" for name, ratio in found["ratios"].items()]
    invalid = ["INVALID"] if found["valid"] is False else []
    return ", ".join([own, *ratios, *invalid, *(["PROBES DIFFER"] if found["spell"] else [])])


def _attention(found: Mapping[str, Any]) -> str:
    ratios = [case["ratio"]["median"] for case in found["cases"] if "ratio" in case]
    speeds = [case["gflops"]["median"] for case in found["cases"]]
    beside = f", {min(ratios):.2f} to {max(ratios):.2f} x torch" if ratios else ""
    return f"{min(speeds):.0f} to {max(speeds):.0f} GFLOP/s{beside}"


def _peers(found: Mapping[str, Any]) -> str:
    parts = []
    for kind, unit in (("products", "GFLOP/s"), ("rows", "GB/s")):
        cases = [case for case in found["cases"] if case["unit"] == unit]
        for who in ("numpy", "torch"):
            ratios = sorted(case["ratio"][who]["median"] for case in cases if who in case["ratio"])
            if ratios:
                parts.append(f"{kind} {ratios[0]:.2f} to {ratios[-1]:.2f} x {who}")
    return ", ".join(parts) or "nobody to compare with"


def _loader(found: Mapping[str, Any]) -> str:
    rates = [case["tokens_per_s"]["median"] for case in found["cases"]]
    return f"{compact(min(rates))} to {compact(max(rates))} tokens/s"


def _collectives(found: Mapping[str, Any]) -> str:
    ratios = [case["seconds"]["auto"]["median"] / case["seconds"]["MPI"]["median"] for case in found["cases"]]
    return f"auto takes {min(ratios):.2f} to {max(ratios):.2f} of MPI's time"


def _scaling(found: Mapping[str, Any]) -> str:
    ratios = [f"{case['case']} {case['ratios']['ranks']['median']:.2f}" for case in found["cases"]]
    return f"of one rank with two threads: {', '.join(ratios)}"


SHORT = {
    "peak": Short(("--mebibytes", "64", "--rounds", "2"), _peak),
    "matmul": Short(("--runs", "3"), _matmul),
    "kernels": Short(("--rounds", "3"), _kernels),
    "attention": Short(
        ("--length", "256", "--length", "1024", "--head-size", "64", "--head-size", "128", "--rounds", "3"),
        _attention,
    ),
    "loader": Short(("--tokens", "600000", "--rounds", "5"), _loader),
    "collectives": Short(("--ranks", "2", "--largest", "4", "--rounds", "5"), _collectives),
    "scaling": Short(
        ("--model", "14m", "--case", "dp", "--case", "tp", "--case", "pp-interleaved", "--rounds", "1"), _scaling
    ),
    "peers": Short(("--rounds", "3"), _peers),
    "step": Short(("--model", "gpt2-14m", "--batch", "16", "--steps", "1", "--peers", "torch_eager"), _step),
}
"""In the order in which they run."""
SEVERAL_RANKS = ("collectives", "scaling")


def cannot_run(name: str) -> str | None:
    """Why a benchmark cannot run on this machine; None where it can."""
    if name not in SEVERAL_RANKS:
        return None
    if len(os.sched_getaffinity(0)) < 2:
        return "two ranks beside each other need two cores in the affinity mask"
    try:
        launch.find_mpiexec()
    except UserError as error:
        return str(error)
    return None


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SHORT)), help="These alone; may be repeated.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep JSON files and report.html here."
)
def command(only: tuple[str, ...], out: Path | None) -> None:
    """Run every benchmark in a short form."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}") from None
        lines, failed = [], []
        found: list[str] = []
        names = only or tuple(SHORT)
        for number, name in enumerate(names, 1):
            reason = cannot_run(name)
            if reason is not None:
                lines.append(f"{name:<12} skipped: {reason}")
                continue
            begin = time.perf_counter()
            path = folder / f"{name}.json"
            print(f"=== {name} ({number} of {len(names)})", flush=True)
            command = [sys.executable, "-m", f"{__package__}.{name}", *SHORT[name].options, "--json", str(path)]
            status = subprocess.run(command).returncode
            seconds = time.perf_counter() - begin
            if status:
                failed.append(name)
                lines.append(f"{name:<12} {seconds:>6.0f} s  failed with status {status}")
            else:
                found.append(str(path))
                lines.append(f"{name:<12} {seconds:>6.0f} s  {SHORT[name].line(_record.read(path))}")
        if out is not None and found:
            report = [sys.executable, "-m", f"{__package__}.report", *found, "--out", str(out / "report.html")]
            subprocess.run(report, check=True)
    print("=== all", f"{'benchmark':<12} {'took':>8}", *lines, sep="\n", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    _record.start(command, "python -m bench")
