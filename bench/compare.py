"""Two results of a benchmark, or two commits, side by side.

    python -m bench.compare A.json B.json --assert-equal
    python -m bench.compare --commits main HEAD -- --model gpt2-14m --batch 16

Of two commits each is built in a temporary folder; then their `bench.step` run in turns, A B A B, with the options
after `--`. `--assert-equal` fails (exit status 1) where the losses are not the same, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pytrain.errors import UserError

from . import _record

BUILD_TOOLS = ("scikit_build_core", "pybind11", "Cython")
Figures = dict[str, Any]


def numbers(found: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(path, value) of each number below an object that is not one of a list of raw values."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            if key not in ("machine", "values", "losses", "options", "rounds"):
                yield from numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(found, list):
        for index, value in enumerate(found):
            name = value.get("name", index) if isinstance(value, Mapping) else index
            yield from numbers(value, f"{path}[{name}]")
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield path, float(found)


def differences(first: Figures, second: Figures) -> list[tuple[str, float, float]]:
    """The numbers that both have, where they differ; medians stand for their measurements."""
    others = dict(numbers(second))
    return [
        (path.removesuffix(".median"), value, others[path])
        for path, value in numbers(first)
        if path in others and others[path] != value and not path.endswith((".min", ".max"))
    ]


def changed_loss(first: Sequence[float], second: Sequence[float]) -> str | None:
    """A sentence about the first step whose losses differ, of those that both did; None if none does."""
    if not first or not second:
        return "there are no losses to compare: only bench.step writes them"
    for step, (one, other) in enumerate(zip(first, second, strict=False), 1):
        if one != other:
            return f"the loss of timed step {step} is {one!r} in the first and {other!r} in the second"
    return None


def compare_files(first: Figures, second: Figures) -> None:
    """Print what differs."""
    if first["bench"] != second["bench"]:
        raise UserError(f"one file is of bench.{first['bench']}, the other of bench.{second['bench']}")
    for name in ("cpu", "isa", "threads", "governor", "commit"):
        values = [found["machine"].get(name) for found in (first, second)]
        print(f"{name:<10} {values[0]}" if values[0] == values[1] else f"{name:<10} {values[0]}  ->  {values[1]}")
    for path, one, other in differences(first, second):
        ratio = f"{other / one:.3f} x" if one else ""
        print(f"{path:<60} {one:>14.6g} {other:>14.6g}  {ratio}")


# --- commits -------------------------------------------------------------------------------------------------


def repository() -> Path:
    """The checkout that this module lies in.

    Raises:
        UserError: it lies in none.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        raise UserError("commits can be compared in a checkout alone: run python -m bench.compare there")
    return root


def build(root: Path, commit: str, folder: Path) -> Path:
    """Check a commit out into `folder` and install it there; what goes on PYTHONPATH.

    Raises:
        UserError: there is no such commit, or it cannot be built.
    """
    source, site = folder / "source", folder / "site"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(root), "archive", commit], capture_output=True)
    if archive.returncode:
        raise UserError(f"there is no commit {commit}: {archive.stderr.decode().strip().splitlines()[-1]}")
    subprocess.run(["tar", "-xf", "-", "-C", str(source)], input=archive.stdout, check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    if all(importlib.util.find_spec(name) for name in BUILD_TOOLS):
        command.insert(-1, "--no-build-isolation")  # without a network too
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        lines = [line for line in (built.stderr + built.stdout).splitlines() if line.strip()]
        raise UserError(f"{commit} cannot be built: {lines[-1] if lines else 'pip says nothing'}")
    return site


def run_step(site: Path, options: Sequence[str], folder: Path) -> Figures:
    """One `bench.step` of what is installed in `site`.

    Raises:
        UserError: it fails, or is older than --json.
    """
    result = folder / "result.json"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "pytrain.bench.step", *options, "--json", str(result)]
    finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if finished.returncode or not result.exists():
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        raise UserError(f"bench.step of {site.parent.name} failed: {lines[-1] if lines else finished.returncode}")
    return _record.read(result)


Builder = Callable[[Path, str, Path], Path]


def compare_commits(
    commits: tuple[str, str], options: Sequence[str], rounds: int, builder: Builder = build
) -> dict[str, list[Figures]]:
    """What `bench.step` of both commits found, in turns; by commit.

    Args:
        commits: as git names them; the same twice measures the noise.
        options: of bench.step.
        rounds: how often each runs.
        builder: what makes a site of a commit.
    """
    root = repository()
    found: list[list[Figures]] = [[], []]
    with tempfile.TemporaryDirectory() as name:
        sites = []
        for letter, commit in zip("AB", commits, strict=True):
            print(f"{letter}: building {commit}", flush=True)
            sites.append(builder(root, commit, Path(name) / letter))
        for number in range(rounds):
            for results, site, letter in zip(found, sites, "AB", strict=True):
                results.append(run_step(site, options, Path(name)))
                speed = results[-1]["tokens_per_s"]
                print(f"round {number + 1}: {letter} {speed:.1f} tokens/s", flush=True)
    return dict(zip("AB", found, strict=True))


def _commit_results(found: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    speeds = {letter: [run["tokens_per_s"] for run in runs] for letter, runs in found.items()}
    ratios = [second / first for first, second in zip(speeds["A"], speeds["B"], strict=True)]
    return {
        "tokens_per_s": {letter: _record.summary(values) for letter, values in speeds.items()},
        "ratio": _record.summary(ratios),
        "peak_rss_bytes": {letter: max(run["peak_rss_bytes"] for run in runs) for letter, runs in found.items()},
        "losses": {letter: runs[0]["losses"] for letter, runs in found.items()},
    }


@click.command()
@click.option("--commits", nargs=2, metavar="A B", help="Build and run these instead of reading files.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Of two commits.")
@click.option("--assert-equal", is_flag=True, help="Fail where the losses differ.")
@_record.json_option
@click.argument("arguments", nargs=-1, metavar="[A.json B.json | -- OPTIONS OF bench.step]", type=click.UNPROCESSED)
def command(
    commits: tuple[str, str] | None,
    rounds: int,
    assert_equal: bool,
    json_path: Path | None,
    arguments: tuple[str, ...],
) -> None:
    """Compare two results, or two commits."""
    if commits is not None:
        results = _commit_results(compare_commits(commits, arguments, rounds))
        for letter, commit in zip("AB", commits, strict=True):
            print(f"{letter} {commit:<20} {_record.spread(results['tokens_per_s'][letter])} tokens/s")
        print(f"B over A: {_record.spread(results['ratio'], digits=3)}")
        losses = results["losses"]["A"], results["losses"]["B"]
        options = {"commits": commits, "rounds": rounds, "step": arguments}
        _record.write(json_path, "compare", options, results)
    else:
        if len(arguments) != 2:
            raise UserError("give two files that bench.step or another benchmark wrote, or --commits A B")
        first, second = (_record.read(Path(path)) for path in arguments)
        compare_files(first, second)
        losses = first.get("losses", []), second.get("losses", [])
        _record.write(json_path, "compare", {"files": arguments}, {"differences": differences(first, second)})
    if assert_equal:
        changed = changed_loss(*losses)
        if changed is not None:
            print(f"not equal: {changed}", file=sys.stderr)
            raise SystemExit(1)
        print(f"equal: {min(map(len, losses))} losses are the same, bit for bit")


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench compare` does."""
    command.main(arguments, prog_name="pytrain bench compare", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.compare")
