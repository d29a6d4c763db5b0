"""A whole training step (forward, backward, clipping, AdamW) of the product's own trainer, and the peak for it.

    python -m bench.step --preset gpt2-124m --batch 4 --length 256

The peak is that of products of this type (dot products of pairs for bf16, where the instruction set has them), probed
before and after in the same process; MFU is model FLOPs (`pytrain.flops`) over it.
"""

import statistics
import tempfile
from pathlib import Path

import click

from pytrain.config import parameter_count
from pytrain.flops import model_flops
from pytrain.metrics import resident_gigabytes
from pytrain.native import native
from pytrain.presets import PRESETS
from pytrain.progress import NoProgress, compact

from ._synthetic import synthetic_run
from .peak import peak_gflops


@click.command()
@click.option("--preset", default="gpt2-124m", show_default=True, type=click.Choice(sorted(PRESETS)))
@click.option("--batch", default=4, show_default=True, type=click.IntRange(min=1), help="Sequences at a time.")
@click.option("--length", default=256, show_default=True, type=click.IntRange(min=1), help="Tokens per sequence.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Steps that are timed.")
@click.option("--accumulate", default=1, show_default=True, type=click.IntRange(min=1), help="Micro-batches a step.")
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]))
@click.option("--recompute", default="none", show_default=True, type=click.Choice(["none", "selective", "full"]))
def command(preset: str, batch: int, length: int, steps: int, accumulate: int, dtype: str, recompute: str) -> None:
    """Time training steps on random tokens."""
    from pytrain.train import Trainer

    device = native().CpuDevice()
    before = peak_gflops(device, dtype)
    with tempfile.TemporaryDirectory() as name:
        config = synthetic_run(
            Path(name),
            preset,
            batch=batch,
            length=length,
            steps=steps + 1,
            global_batch=batch * accumulate,
            dtype=dtype,
            recompute=recompute,
        )
        with Trainer(config, progress=NoProgress()) as trainer:
            print(
                f"{preset}: {parameter_count(config.model):,} parameters, "
                f"{batch} x {length} tokens x {accumulate}, {dtype}, recompute {recompute}, "
                f"{device.isa}, {device.threads} threads",
                flush=True,
            )
            trainer.step()  # touches all memory
            times, shares = [], []
            for _ in range(steps):
                metrics = trainer.step()
                assert trainer.last_result is not None
                times.append(metrics.step_s)
                shares.append(1 - trainer.last_result.native_seconds / metrics.step_s)
            kinds = {kind: trainer.device.bytes_in_use(kind) for kind in trainer.device.memory_kinds}
    after = peak_gflops(device, dtype)
    seconds = statistics.median(times)
    rate = batch * accumulate * length / seconds
    flops = model_flops(config.model, length) * rate
    peak = statistics.mean((before, after)) * 1e9
    print(
        f"step       {seconds * 1e3:.1f} ms median of {steps} "
        f"({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f})\n"
        f"speed      {compact(rate)} tokens/s, {flops / 1e9:.1f} GFLOP/s\n"
        f"peak       {before:.1f} GFLOP/s before, {after:.1f} after\n"
        f"MFU        {100 * flops / peak:.1f} % of their mean\n"
        f"Python     {100 * statistics.median(shares):.2f} % of the step\n"
        f"memory     {resident_gigabytes():.2f} GB resident: "
        + ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in kinds.items() if size)
    )


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench step` does."""
    command.main(arguments, prog_name="pytrain bench step", standalone_mode=False)


if __name__ == "__main__":
    command(prog_name="python -m bench.step")
