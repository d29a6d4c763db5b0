"""Operations other than products, per instruction set: milliseconds, and the bytes or FLOPs that bind them.

    python -m bench.kernels

Sizes are those of a GPT-2 124M step of 1024 tokens. GB/s count each array once per pass over it.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
import numpy as np

from pytrain.native import native

from .peak import best_seconds

if TYPE_CHECKING:
    from pytrain._native import CpuDevice

ROWS, HIDDEN, HEADS, HEAD_SIZE, LENGTH, VOCABULARY = 1024, 768, 12, 64, 256, 50257
Work = Callable[[], object]


def array(*shape: int) -> np.ndarray:
    """Random float32."""
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def memory_bound(device: "CpuDevice") -> Iterator[tuple[str, int, Work]]:
    """(name, bytes moved, call) of operations whose ceiling is memory or cache bandwidth."""
    x, y, dx = (array(ROWS, HIDDEN) for _ in range(3))
    weight, bias = array(HIDDEN), array(HIDDEN)
    mean, rstd = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    device.norm_forward(y, mean, rstd, x, weight, bias, 1e-5)
    yield "layernorm forward", 2 * x.nbytes, lambda: device.norm_forward(y, mean, rstd, x, weight, bias, 1e-5)
    dweight, dbias = np.zeros_like(weight), np.zeros_like(bias)
    yield (
        "layernorm backward",
        4 * x.nbytes,
        lambda: device.norm_backward(dx, dweight, dbias, y, mean, rstd, x, weight),
    )
    up, active = array(ROWS, 4 * HIDDEN), array(ROWS, 4 * HIDDEN)
    yield "gelu forward", 2 * up.nbytes, lambda: device.gelu_forward(active, up)
    yield "gelu backward", 3 * up.nbytes, lambda: device.gelu_backward(active, active, up)
    gate_up = array(ROWS, 8 * HIDDEN)
    yield "swiglu forward", 3 * up.nbytes, lambda: device.swiglu_forward(active, gate_up)
    logits = array(256, VOCABULARY)
    statistics, lse = np.empty((256, 3), np.float32), np.full(256, 12.0, np.float32)
    targets, scalars = np.zeros(256, np.int32), np.ones(6)
    yield "head statistics", logits.nbytes, lambda: device.head_statistics(statistics, logits, targets)
    yield "loss backward", 2 * logits.nbytes, lambda: device.loss_backward(logits, lse, targets, scalars)
    master, m, v, gradient = (array(1 << 22) for _ in range(4))
    np.abs(v, out=v)
    yield (
        "adamw",
        7 * master.nbytes,
        lambda: device.adamw(
            master, master, m, v, gradient, scalars,
            beta1=0.9, beta2=0.95, eps=1e-8, step_size=1e-9, correction2=1.0, decay=0.0,
        ),
    )  # fmt: skip


def arithmetic_bound(device: "CpuDevice") -> Iterator[tuple[str, int, Work]]:
    """(name, FLOPs, call) of operations whose ceiling is the FMA rate; FLOPs of causal attention, halved."""
    batch, width = ROWS // LENGTH, HEADS * HEAD_SIZE
    qkv, out, dout = array(batch, LENGTH, 3 * width), array(batch, LENGTH, width), array(batch, LENGTH, width)
    q, k, v = (qkv[:, :, i * width : (i + 1) * width] for i in range(3))
    lse, delta = (np.empty((batch, HEADS, LENGTH), np.float32) for _ in range(2))
    flops = 2 * batch * HEADS * LENGTH * LENGTH * HEAD_SIZE

    def forward() -> None:
        device.attention_forward(out, lse, q, k, v, heads=HEADS, kv_heads=HEADS)

    yield "attention forward", flops, forward
    gradients = np.empty_like(qkv)
    dq, dk, dv = (gradients[:, :, i * width : (i + 1) * width] for i in range(3))
    yield (
        "attention backward",
        flops * 5 // 2,
        lambda: device.attention_backward(dq, dk, dv, delta, dout, out, lse, q, k, v, heads=HEADS, kv_heads=HEADS),
    )


@click.command()
@click.option("--runs", default=5, show_default=True, type=click.IntRange(min=1), help="Best of so many.")
@click.option("--isa", "isas", multiple=True, help="Instruction sets; default: all that this machine has.")
def command(runs: int, isas: tuple[str, ...]) -> None:
    """Time operations of the CPU device."""
    module = native()
    print(f"{'operation':<20} {'isa':<8} {'ms':>8} {'rate':>14}")
    for isa in isas or module.information()["isas_available"]:
        device = module.CpuDevice(isa=isa)
        device.reserve(ROWS, HIDDEN, HEAD_SIZE)
        for unit, operations in (("GB/s", memory_bound(device)), ("GFLOP/s", arithmetic_bound(device))):
            for name, amount, work in operations:
                seconds = best_seconds(work, runs)
                rate = f"{amount / seconds / 1e9:.1f} {unit}"
                print(f"{name:<20} {isa:<8} {seconds * 1e3:>8.3f} {rate:>14}", flush=True)


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench kernels` does."""
    command.main(arguments, prog_name="pytrain bench kernels", standalone_mode=False)


if __name__ == "__main__":
    command(prog_name="python -m bench.kernels")
