"""Products of a GPT-2 124M step, forward and backward, beside the peak of the same run, NumPy and PyTorch.

    python -m bench.matmul --dtype bf16
    python -m bench.matmul --peers numpy --peers torch

Rows are a micro-batch of 4 sequences of 256 tokens. NT is x W^T (the forward product of a column-parallel matrix),
NN x W (that of a row-parallel one, and the input gradient of the former), TN the weight gradient, which is in fp32.
Each is called as a step of one micro-batch calls it: packing included in every call, bias, residual and GELU written
with the product (`--bare` leaves them out), the head in the step's chunks, operands that rotate through more than
three times the last-level cache. Shares are of the largest peak that was probed between the layers.

Beside peers everybody computes the bare product on the same operands, in turns (A B A B); a call that is timed
follows 50 ms of the same library's that are not, in which the threads of another go to sleep.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytrain.native import native

from . import _record
from ._peers import in_fresh_environment
from ._probe import Probe
from ._products import VOCABULARY, Product, Rotation, Work, layers, products
from .peak import thread_counts

if TYPE_CHECKING:
    from pytrain._native import CpuDevice

ROWS = 1024
OWN = "pytrain"
SETTLE_SECONDS = 0.05
"""In which the idle threads of another library go to sleep; until then they look for work, on our cores."""


def step_head_rows(rows: int, dtype: str) -> int:
    """Rows of logits that a step of so many rows has at a time."""
    from pytrain.config import build_model
    from pytrain.stage import native_shape

    shape = native_shape(build_model({"preset": "gpt2-124m"}, "bench.matmul"))
    policy = native().Policy(weights=dtype, activations=dtype)
    _, table = native().plan_arena(
        shape, policy, first_op=0, last_op=shape.op_count, batch=rows, length=1, recompute=["none"] * 12
    )
    (logits,) = (row["bytes"] for row in table if row["name"].startswith("logits"))
    return min(rows, int(logits) // (4 * VOCABULARY))


def _calls(rotation: Rotation, device: CpuDevice, libraries: Mapping[str, Any]) -> dict[str, Work]:
    """Everybody who can compute this product."""
    calls = {OWN: rotation.own_call(device)}
    if "numpy" in libraries and rotation.dtype == "fp32":
        calls["numpy"] = rotation.numpy_call()
    if "torch" in libraries and rotation.dtype in ("fp32", "bf16"):
        calls["torch"] = rotation.torch_call(libraries["torch"])
    return calls


def turns(calls: Mapping[str, Work], runs: int, settle: float = SETTLE_SECONDS) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each.

    Several take turns (A B A B), each after calls of its own for `settle` seconds, at least one, that do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(runs):
        for name, call in calls.items():
            if len(calls) > 1:
                end = time.perf_counter() + settle
                call()
                while time.perf_counter() < end:
                    call()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def _case(product: Product, threads: int, times: Mapping[str, list[float]], repeats: float) -> dict[str, Any]:
    rates = {who: _record.summary([product.flops / s / 1e9 for s in seconds]) for who, seconds in times.items()}
    return {
        "name": product.name,
        **product._asdict(),
        "threads": threads,
        "repeats": repeats,
        "gflops": rates[OWN],
        "seconds": _record.summary(times[OWN]),
        "peers": {who: rate for who, rate in rates.items() if who != OWN},
        "ratio": {
            who: _record.summary([theirs / ours for ours, theirs in zip(times[OWN], seconds, strict=True)])
            for who, seconds in times.items()
            if who != OWN
        },
    }


def _row(case: Mapping[str, Any], peak: float) -> str:
    shape = f"{case['m']:>6} {case['n']:>6} {case['k']:>6}  {case['kind']}"
    ratios = "".join(f"  {_record.spread(ratio, digits=2):>19} x {who}" for who, ratio in case["ratio"].items())
    rate = _record.spread(case["gflops"])
    return f"{case['layer']:14} {case['what']:7} {shape}  {rate:>24}  {case['gflops']['median'] / peak:>6.1%}{ratios}"


def _weighted(cases: Sequence[Mapping[str, Any]], peak: float, threads: int) -> dict[str, Any]:
    """All products of a step together: of medians, and of the best runs."""
    flops = sum(case["repeats"] * 2.0 * case["m"] * case["n"] * case["k"] for case in cases)
    found: dict[str, Any] = {"threads": threads, "peak_gflops": peak, "flops": flops}
    for key, which in (("", "median"), ("best_", "min")):
        seconds = sum(case["repeats"] * case["seconds"][which] for case in cases)
        found |= {f"{key}seconds": seconds, f"{key}gflops": flops / seconds / 1e9}
        found[f"{key}share"] = found[f"{key}gflops"] / peak
    least = min(cases, key=lambda case: float(case["share"]))
    found |= {"least": least["name"], "least_share": least["share"]}
    for who in cases[0]["ratio"]:
        slowest = min(cases, key=lambda case: float(case["ratio"][who]["median"]))
        found[f"least_ratio_{who}"] = [slowest["name"], slowest["ratio"][who]["median"]]
    return found


def measure(threads: int, options: Mapping[str, Any], libraries: Mapping[str, Any]) -> dict[str, Any]:
    """Every product on so many threads: `cases`, `weighted` and the probes, printed as they come."""
    dtype, rows, peers = options["dtype"], options["rows"], options["peers"]
    device = native().CpuDevice(threads=threads)
    probe = Probe(device, dtype)
    peak = probe.take().gflops
    read = f"reading memory {probe.readings[0].read_gb_s:.1f} GB/s"
    print(f"{device.isa}, {threads} threads, {dtype}: peak {peak:.1f} GFLOP/s, {read}")
    print(f"{'':22} {'m':>6} {'n':>6} {'k':>6}      {'GFLOP/s':>24}  of peak", flush=True)
    cases: list[dict[str, Any]] = []
    for layer in layers():
        chunk = min(rows, options["head_rows"] or step_head_rows(rows, dtype)) if layer.name == "head" else rows
        for product in products(layer, chunk):
            rotation = Rotation(product.bare() if options["bare"] or peers else product, dtype)
            times = turns(_calls(rotation, device, libraries), options["runs"])
            cases.append(_case(rotation.product, threads, times, layer.repeats * rows / chunk))
            print(_row(cases[-1], peak), flush=True)
        peak = max(peak, probe.take().gflops)
    for case in cases:
        case["share"] = case["gflops"]["median"] / peak
    weighted = _weighted(cases, peak, threads)
    _print_weighted(weighted, probe)
    return {"cases": cases, "weighted": weighted, "probes": {"threads": threads, **probe.record()}}


def _print_weighted(found: Mapping[str, Any], probe: Probe) -> None:
    print(
        f"all, weighted: {found['gflops']:.1f} GFLOP/s, {found['share']:.1%} of the largest peak probed, "
        f"{found['peak_gflops']:.1f}, {found['seconds']:.3f} s; best runs {found['best_share']:.1%}; "
        f"least {found['least']} {found['least_share']:.1%}"
    )
    for who in ("numpy", "torch"):
        if f"least_ratio_{who}" in found:
            name, ratio = found[f"least_ratio_{who}"]
            print(f"beside {who}: {ratio:.2f} x at the least ({name})")
    record = probe.record()
    read, cached = (_record.spread(record[name]) for name in ("read_gb_s", "cache_gb_s"))
    print(f"between layers: reading memory {read} GB/s, copying in a cache {cached} GB/s")
    if record["spell"] is not None:
        print(record["spell"])


def imported(peers: Sequence[str], dtype: str, threads: int) -> dict[str, Any]:
    """The libraries to compare with; a sentence for each that cannot be."""
    found: dict[str, Any] = {}
    if "numpy" in peers:
        if dtype == "fp32":
            found["numpy"] = importlib.import_module("numpy")
        else:
            print("numpy: skipped: it multiplies in fp32 alone")
    if "torch" in peers:
        if _record.installed("torch") == _record.NOT_INSTALLED:
            print("torch: skipped: PyTorch is not installed")
        elif dtype == "fp16":
            print("torch: skipped: PyTorch is compared in fp32 and bf16 alone")
        else:
            found["torch"] = importlib.import_module("torch")
            found["torch"].set_num_threads(threads)
    return found


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="Only this many (default: 1, 2, 4, ... cores).")
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True, help="Timed, of each product.")
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]))
@click.option("--rows", default=ROWS, show_default=True, type=click.IntRange(min=1), help="Tokens at a time.")
@click.option("--head-rows", default=0, type=click.IntRange(min=0), help="At a time in the head (0: as in a step).")
@click.option("--bare", is_flag=True, help="Without bias, residual and GELU.")
@click.option("--peers", multiple=True, type=click.Choice(["numpy", "torch"]), help="Beside these; implies --bare.")
@_record.json_option
def command(**options: Any) -> None:
    """Measure the products of a GPT-2 124M step and print them as shares of the peak."""
    counts = [options["threads"]] if options["threads"] else thread_counts(native().CpuDevice().threads)
    found = list(_by_threads(counts, options) if options["peers"] else (measure(n, options, {}) for n in counts))
    results = {
        "cases": [case for part in found for case in part["cases"]],
        "weighted": [part["weighted"] for part in found],
        "probes": [part["probes"] for part in found],
    }
    _record.write(options["json_path"], "matmul", options, {"machine": _record.machine(max(counts)), **results})


def _by_threads(counts: Sequence[int], options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Beside peers: a process for each number of threads, since OpenBLAS reads it from its environment, once."""
    for threads in counts:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            words = [word for who in options["peers"] for word in ("--peers", who)]
            for name in ("runs", "dtype", "rows", "head_rows"):
                words += [f"--{name.replace('_', '-')}", str(options[name])]
            words += ["--threads", str(threads), "--json", str(part)]
            if in_fresh_environment(__spec__.name, words, threads):
                found = _record.read(part)
                yield {
                    key: found[key][0] if key != "cases" else found[key] for key in ("cases", "weighted", "probes")
                }
            else:
                yield measure(threads, options, imported(options["peers"], options["dtype"], threads))


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench matmul` does; returns when done."""
    command.main(arguments, prog_name="pytrain bench matmul", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.matmul")
