"""What every benchmark shares: where a number was measured, how numbers are summarised, and the JSON they go to."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from pytrain import information
from pytrain.errors import ExitCode, UserError
from pytrain.native import native

NOT_INSTALLED = information.NOT_INSTALLED
FORMAT = 2
"""Of the files: a number that goes up when a key changes its meaning."""
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
ENVIRONMENT = (
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"),
    *("PYTRAIN_ISA", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT", "LD_PRELOAD"),
)
"""Variables that change a timing."""
SAMPLE_SECONDS = 2e-3
"""A sample repeats a short call until it takes about this long."""


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, governor, threads, load, versions and commit, as JSON values.

    Args:
        threads: that the benchmark computes with; by default those of the product's device.
    """
    facts = native().information()
    return {
        "cpu": information.cpu_model(),
        "caches": information.caches(),
        "memory": information.memory(),
        "cores": os.cpu_count(),
        "cores_in_mask": len(os.sched_getaffinity(0)),
        "governor": governor(),
        "threads": threads or facts["threads"],
        "load": list(os.getloadavg()),
        "isa": facts["isa"],
        "native": facts,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "pytrain": information.version(),
        "commit": information.commit(),
        "libraries": information.library_versions() | {"torch": installed("torch")},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def governor() -> str:
    """How the clock of the first core is chosen; "unknown" where the kernel shows none, as in most guests."""
    try:
        return GOVERNOR.read_text(encoding="ascii").strip()
    except OSError:
        return information.UNKNOWN


def installed(package: str) -> str:
    """The version of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and all values of a measurement."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def spread(values: Mapping[str, Any], unit: float = 1.0, digits: int = 1) -> str:
    """A summary for people: `median (min to max)`, each divided by `unit`."""
    median, low, high = (f"{values[name] / unit:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one run of each call, in each of `rounds` rounds in which the calls take turns (A B A B).

    What disturbs the machine for a while disturbs all of them. A first round is not counted; short calls are
    repeated in a sample, which gives their mean.
    """
    repeats = {name: max(1, round(SAMPLE_SECONDS / max(_seconds(call, 1), 1e-7))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_seconds(call, repeats[name]))
    return times


def _seconds(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def start(command: click.Command, name: str) -> None:
    """Run a benchmark as a program of this name: wrong input is a sentence and exit status 2, as in `pytrain`."""
    try:
        command(prog_name=name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(ExitCode.BAD_INPUT))


def writable(_context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """A callback of options that name a file to write."""
    check_writable(path)
    return path


def check_writable(path: Path | None) -> None:
    """Find out before minutes are measured, not after.

    Raises:
        UserError: it cannot be written there.
    """
    if path is not None:
        folder = path.absolute().parent
        if path.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder")
        if not folder.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {folder}")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UserError(f"{path} cannot be written: permission denied")


json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    callback=writable,
    help="Write the results here too.",
)


def write(path: Path | None, bench: str, options: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """The results of one benchmark as a JSON file: its name, its options, the machine, and what it found.

    Args:
        path: None writes nothing.
        bench: the module's name.
        options: what it was asked to do.
        results: further keys of the file's object; `machine` may be among them.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    found = {"bench": bench, "format": FORMAT, "options": dict(options), "machine": machine(), **results}
    try:
        path.write_text(json.dumps(found, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        UserError: the file cannot be read, or is not one of a benchmark.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "bench" not in found or "machine" not in found:
        raise UserError(f"{path} is not a JSON file that a benchmark wrote with --json")
    return found
