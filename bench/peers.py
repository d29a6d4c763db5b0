"""The parts of a step beside NumPy and PyTorch: products at a GPT-2 124M step's shapes, LayerNorm and GELU.

    python -m bench.peers

All of them compute in one process and take turns in every round, with the same number of threads. A library that is
not installed is left out in a sentence; so is a kernel that the environment forces on OpenBLAS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from pytrain.native import native

from . import _record
from ._peers import in_fresh_environment
from ._products import HIDDEN, VOCABULARY, Rotation, Work, layers, products
from .matmul import imported, turns

TOKENS = 1024


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
        for layer in layers(options["vocabulary"]):
            for product in products(layer, tokens):
                rotation = Rotation(product.bare(), dtype)
                calls = {"pytrain": rotation.own_call(device)}
                if dtype == "fp32":
                    calls["numpy"] = rotation.numpy_call()
                if torch is not None:
                    calls["torch"] = rotation.torch_call(torch)
                yield _result(product.name, dtype, product.flops, "GFLOP/s", turns(calls, rounds))
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
    if not in_fresh_environment(__spec__.name, _arguments(options), threads):
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
    torch = imported(("torch",), "fp32", threads).get("torch")
    device = native().CpuDevice(threads=threads)
    device.reserve(options["tokens"], 4 * HIDDEN, 64)
    results = []
    for found in measure(device, torch, options):
        results.append(found)
        _print(found)
    found = {"machine": _record.machine(threads), "cases": results, "torch": torch is not None}
    _record.write(options["json_path"], "peers", options, found)


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench peers` does."""
    command.main(arguments, prog_name="pytrain bench peers", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.peers")
