"""Every operation of the CPU device, on every instruction set that this machine has, and the ceiling that binds it.

    python -m bench.kernels

Sizes are those of a GPT-2 124M step of 1024 tokens. Memory-bound operations are compared with copying as many bytes,
and so with the cache that holds them; the others with the peak of fused multiply-adds. All take turns in every round.
GB/s count each array once for each time that it is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from pytrain.native import native

from . import _record
from ._products import aligned, random_array
from .peak import peak_gflops

if TYPE_CHECKING:
    from pytrain._native import CpuDevice

ROWS, HIDDEN, HEADS, HEAD_SIZE, LENGTH, VOCABULARY = 1024, 768, 12, 64, 256, 50257
HEAD_ROWS = 256
Work = Callable[[], object]


FLOPS = {
    "layernorm forward": 7, "layernorm backward": 13, "rmsnorm forward": 4, "rmsnorm backward": 9,
    "gelu forward": 9, "gelu backward": 17, "swiglu forward": 4, "swiglu backward": 9, "rope": 3, "residual add": 2,
    "bias backward": 1, "head statistics": 4, "loss backward": 3, "adamw": 15, "sum of squares": 2, "add": 1,
}  # fmt: skip
"""Of memory-bound operations, for each element: operations of the formula, a transcendental function being one."""


class Operation(NamedTuple):
    """A call with what it moves and computes."""

    name: str
    bytes: int
    work: Work
    elements: int = 0
    """Of a memory-bound one, for FLOPS; 0 where it only moves."""
    flops: int = 0
    """Of an arithmetic-bound one."""


class Sizes(NamedTuple):
    """Of the arrays."""

    rows: int
    dtype: str

    def array(self, *shape: int) -> NDArray[Any]:
        """Random numbers as they are stored: float32, or uint16 with bits of bf16 or fp16."""
        return random_array(self.dtype, *shape)

    @property
    def half(self) -> str:
        """What uint16 arrays hold."""
        return "bf16" if self.dtype == "fp32" else self.dtype


def norms(device: CpuDevice, sizes: Sizes) -> Iterator[Operation]:
    """LayerNorm and RMSNorm, forward and backward."""
    half = sizes.half
    x, y, dx = (sizes.array(sizes.rows, HIDDEN) for _ in range(3))
    weight, bias = sizes.array(HIDDEN), sizes.array(HIDDEN)
    dweight, dbias = (aligned(np.zeros(HIDDEN, np.float32)) for _ in range(2))
    mean, rstd = np.ones(sizes.rows, np.float32), np.ones(sizes.rows, np.float32)
    for name, means, biases, dbiases in (("layernorm", mean, bias, dbias), ("rmsnorm", None, None, None)):
        yield Operation(
            f"{name} forward",
            2 * x.nbytes,
            partial(device.norm_forward, y, means, rstd, x, weight, biases, 1e-5, half),
            x.size,
        )
        yield Operation(
            f"{name} backward",
            4 * x.nbytes,
            partial(device.norm_backward, dx, dweight, dbiases, y, means, rstd, x, weight, half),
            x.size,
        )


def activations(device: CpuDevice, sizes: Sizes) -> Iterator[Operation]:
    """GELU, SwiGLU, rotary positions and what goes into the residual stream."""
    half, rows = sizes.half, sizes.rows
    up, active = sizes.array(rows, 4 * HIDDEN), sizes.array(rows, 4 * HIDDEN)
    yield Operation("gelu forward", 2 * up.nbytes, lambda: device.gelu_forward(active, up, half), up.size)
    again = sizes.array(rows, 4 * HIDDEN)
    yield Operation(
        "gelu backward", 4 * up.nbytes, lambda: device.gelu_backward(active, active, up, again, half), up.size
    )
    gate_up, dgate_up = sizes.array(rows, 8 * HIDDEN), sizes.array(rows, 8 * HIDDEN)
    yield Operation("swiglu forward", 3 * up.nbytes, lambda: device.swiglu_forward(active, gate_up, half), up.size)
    yield Operation(
        "swiglu backward",
        6 * up.nbytes,
        lambda: device.swiglu_backward(dgate_up, active, gate_up, again, half),
        up.size,
    )
    x, partial, bias = sizes.array(rows, HIDDEN), sizes.array(rows, HIDDEN), sizes.array(HIDDEN)
    angles = np.random.default_rng(1).standard_normal((LENGTH, HEAD_SIZE // 2))
    table = aligned(np.stack((np.cos(angles), np.sin(angles)), -1).astype(np.float32))
    positions = np.arange(rows, dtype=np.int32) % LENGTH
    yield Operation(
        "rope", 2 * x.nbytes, lambda: device.rope(x, HEADS, HEAD_SIZE, positions, table, False, half), x.size
    )
    yield Operation("residual add", 3 * x.nbytes, lambda: device.residual_add(x, partial, bias, half), x.size)
    dbias = aligned(np.zeros(HIDDEN, np.float32))
    yield Operation("bias backward", x.nbytes, lambda: device.bias_backward(dbias, x, half), x.size)


def ends(device: CpuDevice, sizes: Sizes) -> Iterator[Operation]:
    """The embedding and the loss."""
    half, rows = sizes.half, sizes.rows
    table, out = sizes.array(VOCABULARY, HIDDEN), sizes.array(rows, HIDDEN)
    gradient = aligned(np.zeros((VOCABULARY, HIDDEN), np.float32))
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, rows).astype(np.int32)
    positions = np.zeros(rows, np.int32)
    yield Operation(
        "embedding forward",
        2 * out.nbytes,
        lambda: device.embed_forward(out, table, None, tokens, positions, 0, half),
    )
    yield Operation(
        "embedding backward",
        out.nbytes + 2 * rows * HIDDEN * 4,
        lambda: device.embed_backward(gradient, None, out, tokens, positions, 0, half),
    )
    logits = aligned(np.random.default_rng(1).standard_normal((HEAD_ROWS, VOCABULARY), dtype=np.float32))
    statistics, lse = np.empty((HEAD_ROWS, 3), np.float32), np.full(HEAD_ROWS, 12.0, np.float32)
    targets, scalars = np.zeros(HEAD_ROWS, np.int32), np.ones(6)
    size = logits.size
    yield Operation(
        "head statistics", logits.nbytes, lambda: device.head_statistics(statistics, logits, targets), size
    )
    yield Operation(
        "loss backward", 2 * logits.nbytes, lambda: device.loss_backward(logits, lse, targets, scalars), size
    )
    yield Operation(
        "loss forward and backward",
        2 * logits.nbytes,
        lambda: device.loss_forward_backward(scalars, lse, statistics, logits, targets),
        size,
    )


def updates(device: CpuDevice, sizes: Sizes) -> Iterator[Operation]:
    """What the optimizer does, and plain data."""
    half = sizes.half
    elements = 4096 * sizes.rows
    weights = sizes.array(elements)
    master, m, v, gradient = (aligned(np.full(elements, value, np.float32)) for value in (0.1, 1e-3, 1e-3, 1e-3))
    own = weights if weights.dtype == np.uint16 else master
    scalars, total = np.ones(6), np.zeros(1)
    options = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "step_size": 1e-9, "correction2": 1.0, "decay": 0.0}
    yield Operation(
        "adamw",
        7 * master.nbytes + (own.nbytes if own is not master else 0),
        lambda: device.adamw(own, master, m, v, gradient, scalars, **options, half=half),
        elements,
    )
    yield Operation("sum of squares", gradient.nbytes, lambda: device.sum_squares(total, gradient), elements)
    yield Operation("add", 3 * gradient.nbytes, lambda: device.add(m, v), elements)
    yield Operation("convert", weights.nbytes + gradient.nbytes, lambda: device.convert(weights, gradient, half))
    yield Operation("fill", gradient.nbytes, lambda: device.fill(m, 1e-3))


def memory_bound(device: CpuDevice, sizes: Sizes) -> Iterator[Operation]:
    """Operations whose ceiling is the bandwidth of memory, or of the cache that holds their arrays."""
    for group in (norms, activations, ends, updates):
        yield from group(device, sizes)


def arithmetic_bound(device: CpuDevice, sizes: Sizes) -> Iterator[Operation]:
    """Operations whose ceiling is the rate of multiply-adds; FLOPs of causal attention, halved."""
    half, batch, width = sizes.half, max(1, sizes.rows // LENGTH), HEADS * HEAD_SIZE
    qkv, dqkv = sizes.array(batch, LENGTH, 3 * width), sizes.array(batch, LENGTH, 3 * width)
    out, dout = sizes.array(batch, LENGTH, width), sizes.array(batch, LENGTH, width)
    q, k, v = (qkv[:, :, i * width : (i + 1) * width] for i in range(3))
    dq, dk, dv = (dqkv[:, :, i * width : (i + 1) * width] for i in range(3))
    lse, delta = (np.empty((batch, HEADS, LENGTH), np.float32) for _ in range(2))
    heads: dict[str, Any] = {"heads": HEADS, "kv_heads": HEADS, "half": half}
    flops = 2 * batch * HEADS * LENGTH * LENGTH * HEAD_SIZE
    yield Operation(
        "attention forward",
        qkv.nbytes + out.nbytes,
        lambda: device.attention_forward(out, lse, q, k, v, **heads),
        flops=flops,
    )
    yield Operation(
        "attention backward",
        2 * (qkv.nbytes + out.nbytes),
        lambda: device.attention_backward(dq, dk, dv, delta, dout, out, lse, q, k, v, **heads),
        flops=flops * 5 // 2,
    )
    x, weight, y = sizes.array(sizes.rows, HIDDEN), sizes.array(HIDDEN, HIDDEN), sizes.array(sizes.rows, HIDDEN)
    yield Operation(
        "product x W^T",
        x.nbytes + weight.nbytes + y.nbytes,
        lambda: device.matmul(y, x, weight, transpose_b=True, half=half),
        flops=2 * sizes.rows * HIDDEN * HIDDEN,
    )


def copying(device: CpuDevice, size: int) -> Work:
    """Copies that read and write `size` bytes together."""
    source, destination = (aligned(np.zeros(max(1, size // 8), np.float32)) for _ in range(2))
    device.fill(source, 1.0)  # by the threads that will read it, so that its pages lie near them
    device.fill(destination, 0.0)
    return lambda: device.copy(destination, source)


def compare(devices: list[CpuDevice], sizes: Sizes, rounds: int) -> Iterator[dict[str, Any]]:
    """Time each operation on each device, in turns; the ceiling is measured beside it."""
    for bound, kind in (("memory", memory_bound), ("arithmetic", arithmetic_bound)):
        for operations in zip(*(kind(device, sizes) for device in devices), strict=True):
            calls = {device.isa: operation.work for device, operation in zip(devices, operations, strict=True)}
            name, size, _, elements, flops = operations[0]
            amount = flops or size
            if bound == "memory":
                calls["copy"] = copying(devices[0], size)
            times = _record.alternate(calls, rounds)
            rates = {who: _record.summary([amount / second / 1e9 for second in times[who]]) for who in times}
            for device in devices:
                copied = rates["copy"]["median"] if bound == "memory" else 0.0
                ceiling = copied or peak_gflops(device, sizes.dtype, runs=3)
                yield {
                    "name": name,
                    "isa": device.isa,
                    "bound": bound,
                    "bytes": size,
                    "flops": flops or FLOPS.get(name, 0) * elements,
                    "seconds": _record.summary(times[device.isa]),
                    "rate": rates[device.isa],
                    "unit": "GB/s" if bound == "memory" else "GFLOP/s",
                    "ceiling": ceiling,
                    "share": rates[device.isa]["median"] / ceiling,
                }


@click.command()
@click.option("--rounds", "--runs", default=5, show_default=True, type=click.IntRange(min=1), help="Of taking turns.")
@click.option("--isa", "isas", multiple=True, help="Instruction sets; default: all that this machine has.")
@click.option("--rows", default=ROWS, show_default=True, type=click.IntRange(min=1), help="Tokens at a time.")
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]))
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@_record.json_option
def command(**options: Any) -> None:
    """Time operations of the CPU device."""
    module = native()
    isas = options["isas"] or module.information()["isas_available"]
    devices = [module.CpuDevice(isa=isa, threads=options["threads"]) for isa in isas]
    for device in devices:
        device.reserve(options["rows"], 8 * HIDDEN, HEAD_SIZE)
    print(f"{'operation':<20} {'isa':<12} {'ms':>24} {'rate':>28} {'of ceiling':>11}")
    results = []
    for found in compare(devices, Sizes(options["rows"], options["dtype"]), options["rounds"]):
        results.append(found)
        rate = f"{_record.spread(found['rate'])} {found['unit']}"
        times = _record.spread(found["seconds"], 1e-3, 3)
        print(f"{found['name']:<20} {found['isa']:<12} {times:>24} {rate:>28} {found['share']:>11.1%}", flush=True)
    machine = _record.machine(devices[0].threads)
    _record.write(options["json_path"], "kernels", options, {"machine": machine, "kernels": results})


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench kernels` does."""
    command.main(arguments, prog_name="pytrain bench kernels", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.kernels")
