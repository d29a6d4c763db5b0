"""PyTorch as a worker of `bench.step`: the same shape, batch and optimizer, the usual way.

    python -m bench._torch '{"model": {...}, "batch": 4, "length": 256, "compile": false, ...}'

bf16 is autocast with fp32 weights, the common practice. AdamW is the fused one, clipping is clip_grad_norm_ to 1.0.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ._torch_model import Transformer
from ._worker import peak_rss_bytes, run, serve, take_over_output

SHOWN_OPS = 20
BATCHES = 8
PRODUCT_RUNS = 8


class TorchSteps:
    """Steps of a PyTorch model on random tokens.

    Args:
        spec: `model` (the keys of a ModelConfig), `batch`, `length`, `accumulate`, `dtype` ("fp32" or "bf16"),
            `compile` and `threads`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.manual_seed(1)
        torch.set_num_threads(spec["threads"])
        self.model = Transformer(spec["model"], spec["length"])
        decayed = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=1e-4,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.loss = torch.compile(self.model) if spec["compile"] else self.model
        self.half = spec["dtype"] == "bf16"
        self.accumulate = spec["accumulate"]
        shape = (BATCHES, spec["batch"], spec["length"] + 1)
        self.tokens = torch.randint(spec["model"]["vocabulary"], shape)
        self.done = 0

    def steps(self, count: int) -> dict[str, Any]:
        """`count` steps: forward, backward, clipping, AdamW."""
        seconds, losses = [], []
        for _ in range(count):
            begin = time.perf_counter()
            losses.append(self._step())
            seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds, "loss": losses, "peak_rss_bytes": peak_rss_bytes()}

    def _step(self) -> float:
        total = 0.0
        for _ in range(self.accumulate):
            batch = self.tokens[self.done % BATCHES]
            self.done += 1
            with self._precision():
                loss = self.loss(batch[:, :-1], batch[:, 1:]) / self.accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.half else nullcontext()

    def profile(self) -> dict[str, Any]:
        """Seconds inside each operator of PyTorch, without those it calls; what is left is Python's."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            begin = time.perf_counter()
            self._step()
            seconds = time.perf_counter() - begin
        entries = sorted(profiler.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
        times = {entry.key: entry.self_cpu_time_total / 1e6 for entry in entries}
        inside = sum(times.values())
        ops = dict(list(times.items())[:SHOWN_OPS])
        ops["other operators"] = inside - sum(ops.values())
        ops["python"] = max(0.0, seconds - inside)
        return {
            "ops": ops,
            "ops_step_seconds": seconds,
            "python_share": ops["python"] / seconds,
            "products_gflops": self.products_gflops(),
        }

    def products_gflops(self) -> float:
        """GFLOP/s of the forward products of a layer alone, in the step's dtype: what its library can do here.

        The weights that the model holds, one micro-batch of random rows; the best of several runs of each.
        """
        dtype = torch.bfloat16 if self.half else torch.float32
        rows = self.tokens.shape[1] * (self.tokens.shape[2] - 1)
        seconds, flops = 0.0, 0
        with torch.no_grad():
            for module in self.model.layers[0].modules():
                if not isinstance(module, torch.nn.Linear):
                    continue
                weight = module.weight.to(dtype)
                x = torch.randn(rows, weight.shape[1], dtype=dtype)
                times = []
                for _ in range(PRODUCT_RUNS):
                    begin = time.perf_counter()
                    torch.nn.functional.linear(x, weight)
                    times.append(time.perf_counter() - begin)
                seconds += min(times)
                flops += 2 * rows * weight.numel()
        return flops / seconds / 1e9


def work(spec: dict[str, Any]) -> None:
    """Build the model of `spec` and serve its steps."""
    answers = take_over_output()
    serve(TorchSteps(spec), answers)


if __name__ == "__main__":
    run(work)
