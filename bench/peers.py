"""The parts of a step beside NumPy and PyTorch: products at a GPT-2 124M step's shapes, LayerNorm and GELU.

    python -m bench.peers

All of them compute in one process and take turns in every round, with the same number of threads. A library that is
not installed is left out in a sentence; so is a kernel that the environment forces on OpenBLAS.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import click
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pytrain.native import native

from . import _record
from ._peers import HIDDEN as FORCED

Work = Callable[[], object]
TOKENS, HIDDEN, VOCABULARY = 1024, 768, 50257


class Product(NamedTuple):
    """c (m, n) = op(a) op(b); `transposed` names the operands that lie the other way round."""

    name: str
    m: int
    n: int
    k: int
    transposed: str


def products(tokens: int, vocabulary: int) -> Iterator[Product]:
    """Forward, input gradient and weight gradient of each matrix of a layer, and of the head."""
    shapes = {
        "qkv": (3 * HIDDEN, HIDDEN),
        "attention.out": (HIDDEN, HIDDEN),
        "mlp.up": (4 * HIDDEN, HIDDEN),
        "mlp.down": (HIDDEN, 4 * HIDDEN),
        "head": (vocabulary, HIDDEN),
    }
    for name, (outputs, inputs) in shapes.items():
        yield Product(f"{name} forward", tokens, outputs, inputs, "b")
        yield Product(f"{name} dX", tokens, inputs, outputs, "")
        yield Product(f"{name} dW", outputs, inputs, tokens, "a")


def product_calls(device: Any, torch: Any, product: Product, dtype: str) -> dict[str, Work]:
    """The same product by everybody who can compute it."""
    random = np.random.default_rng(1)
    m, n, k = product.m, product.n, product.k
    turned_a, turned_b = ("a" in product.transposed), ("b" in product.transposed)
    a: NDArray[Any] = random.standard_normal((k, m) if turned_a else (m, k), dtype=np.float32)
    b: NDArray[Any] = random.standard_normal((n, k) if turned_b else (k, n), dtype=np.float32)
    c: NDArray[Any] = np.zeros((m, n), np.float32)
    calls: dict[str, Work] = {}
    if dtype == "bf16":
        a, b, c = (x.astype(ml_dtypes.bfloat16).view(np.uint16) for x in (a, b, c))
    calls["pytrain"] = lambda: device.matmul(c, a, b, transpose_a=turned_a, transpose_b=turned_b)
    if dtype == "fp32":
        left, right, out = a.T if turned_a else a, b.T if turned_b else b, np.empty_like(c)
        calls["numpy"] = lambda: np.matmul(left, right, out=out)
    if torch is not None:
        x, y, z = (_tensor(torch, value, dtype) for value in (a, b, c.copy()))
        x, y = x.T if turned_a else x, y.T if turned_b else y
        calls["torch"] = lambda: torch.mm(x, y, out=z)
    return calls


def _tensor(torch: Any, array: NDArray[Any], dtype: str) -> Any:
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if dtype == "bf16" else found


def row_calls(device: Any, torch: Any, tokens: int) -> Iterator[tuple[str, int, dict[str, Work]]]:
    """(name, bytes, calls) of LayerNorm and GELU forward, fp32."""
    random = np.random.default_rng(1)
    x = random.standard_normal((tokens, HIDDEN), dtype=np.float32)
    weight, bias, y = np.ones(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32), np.empty_like(x)
    mean, rstd = np.empty(tokens, np.float32), np.empty(tokens, np.float32)
    calls: dict[str, Work] = {
        "pytrain": lambda: device.norm_forward(y, mean, rstd, x, weight, bias, 1e-5),
        "numpy": lambda: _numpy_layernorm(x, weight, bias),
    }
    up = random.standard_normal((tokens, 4 * HIDDEN), dtype=np.float32)
    active = np.empty_like(up)
    gelu: dict[str, Work] = {
        "pytrain": lambda: device.gelu_forward(active, up),
        "numpy": lambda: _numpy_gelu(up),
    }
    if torch is not None:
        functional = torch.nn.functional
        tensors = [torch.from_numpy(array) for array in (x, weight, bias, up)]
        calls["torch"] = lambda: functional.layer_norm(tensors[0], (HIDDEN,), tensors[1], tensors[2])
        gelu["torch"] = lambda: functional.gelu(tensors[3], approximate="tanh")
    yield "layernorm forward", 2 * x.nbytes, calls
    yield "gelu forward", 2 * up.nbytes, gelu


def _numpy_layernorm(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[Any]:
    centred = x - x.mean(1, keepdims=True)
    normal: NDArray[Any] = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + 1e-5) * weight + bias
    return normal


def _numpy_gelu(x: NDArray[Any]) -> NDArray[Any]:
    active: NDArray[Any] = 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))
    return active


def _result(name: str, dtype: str, amount: float, unit: str, times: Mapping[str, list[float]]) -> dict[str, Any]:
    own = times["pytrain"]
    return {
        "name": name,
        "dtype": dtype,
        "unit": unit,
        "rate": {who: _record.summary([amount / value / 1e9 for value in seconds]) for who, seconds in times.items()},
        "ratio": {
            who: _record.summary([theirs / ours for ours, theirs in zip(own, seconds, strict=True)])
            for who, seconds in times.items()
            if who != "pytrain"
        },
    }


def measure(device: Any, torch: Any, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every comparison, one after another."""
    tokens, rounds = options["tokens"], options["rounds"]
    for dtype in options["dtypes"]:
        for product in products(tokens, options["vocabulary"]):
            flops = 2.0 * product.m * product.n * product.k
            times = _record.alternate(product_calls(device, torch, product, dtype), rounds)
            yield _result(product.name, dtype, flops, "GFLOP/s", times)
    for name, size, calls in row_calls(device, torch, tokens):
        yield _result(name, "fp32", size, "GB/s", _record.alternate(calls, rounds))


def _print(found: Mapping[str, Any]) -> None:
    rates = ", ".join(f"{who} {_record.spread(rate)}" for who, rate in found["rate"].items())
    ratios = ", ".join(f"{ratio['median']:.2f} x {who}" for who, ratio in found["ratio"].items())
    print(f"{found['dtype']:<5} {found['name']:<24} {rates} {found['unit']}; {ratios or 'nobody to compare with'}")


@click.command()
@click.option("--tokens", default=TOKENS, show_default=True, type=click.IntRange(min=1), help="Rows of x.")
@click.option("--vocabulary", default=VOCABULARY, show_default=True, type=click.IntRange(min=1), help="Of the head.")
@click.option("--dtype", "dtypes", multiple=True, default=("fp32", "bf16"), show_default=True,
              type=click.Choice(["fp32", "bf16"]))  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Of taking turns.")
@_record.json_option
def command(**options: Any) -> None:
    """Compare products and rows with NumPy's and PyTorch's."""
    threads = options["threads"] or native().CpuDevice().threads
    wanted = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    forced = [name for name in FORCED if name in os.environ]
    if forced or any(os.environ.get(name) != value for name, value in wanted.items()):
        # OpenBLAS reads its variables when NumPy is imported, which it is here already.
        if forced:
            print(f"{', '.join(forced)} is left out: a forced kernel is no peer", flush=True)
        environment = {name: value for name, value in os.environ.items() if name not in forced} | wanted
        finished = subprocess.run([sys.executable, "-m", __spec__.name, *_arguments(options)], env=environment)
        if finished.returncode:
            raise SystemExit(finished.returncode)
        return
    _compare(options, threads)


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """The command line that says the same."""
    words = [word for name in ("tokens", "vocabulary", "rounds") for word in (f"--{name}", str(options[name]))]
    words += [word for dtype in options["dtypes"] for word in ("--dtype", dtype)]
    for name, key in (("--threads", "threads"), ("--json", "json_path")):
        if options[key] is not None:
            words += [name, str(options[key])]
    return words


def _compare(options: Mapping[str, Any], threads: int) -> None:
    torch: Any = None
    if _record.installed("torch") == _record.NOT_INSTALLED:
        print("torch: skipped: PyTorch is not installed")
    else:
        torch = importlib.import_module("torch")
        torch.set_num_threads(threads)
    device = native().CpuDevice(threads=threads)
    device.reserve(options["tokens"], 4 * HIDDEN, 64)
    results = []
    for found in measure(device, torch, options):
        results.append(found)
        _print(found)
    _record.write(options["json_path"], "peers", options, {"cases": results, "torch": torch is not None})


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench peers` does."""
    command.main(arguments, prog_name="pytrain bench peers", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.peers")
