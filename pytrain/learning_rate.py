"""The learning rate of each step: pure functions of the step's number.

Steps are counted from 1, so that the first step of a warm-up already moves the weights, and the last step
of a run of `steps` steps has exactly the minimum (cosine, linear, wsd).
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytrain.config import RunConfig


def warmup(step: int, peak: float, warmup_steps: int) -> float:
    """Straight rise to `peak`, reached at step `warmup_steps`; `peak` from there on."""
    return peak * step / warmup_steps if step < warmup_steps else peak


def linear(progress: float, peak: float, minimum: float) -> float:
    """Straight fall from `peak` (progress 0) to `minimum` (progress 1)."""
    return peak + (minimum - peak) * progress


def cosine(progress: float, peak: float, minimum: float) -> float:
    """Half a cosine from `peak` (progress 0) to `minimum` (progress 1)."""
    return peak + (minimum - peak) * 0.5 * (1.0 - math.cos(math.pi * progress))


def learning_rate(
    step: int,
    *,
    schedule: str,
    peak: float,
    minimum: float,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
) -> float:
    """Learning rate of step `step`.

    Args:
        step: number of the optimizer step, from 1.
        schedule: "cosine", "linear", "wsd" (warm-up, stable, decay: arXiv 2404.06395, here with a straight
            decay over the last `decay_steps`) or "constant".
        peak: highest learning rate.
        minimum: learning rate of step `steps` and after; not used by "constant".
        steps: number of steps of the run.
        warmup_steps: length of the rise before.
        decay_steps: length of the fall of "wsd".
    """
    if step < warmup_steps or schedule == "constant":
        return warmup(step, peak, warmup_steps)
    start = steps - decay_steps if schedule == "wsd" else warmup_steps
    if step >= steps > warmup_steps:
        return minimum
    progress = min(max(step - start, 0) / max(steps - start, 1), 1.0)
    return (cosine if schedule == "cosine" else linear)(progress, peak, minimum)


def of_run(config: "RunConfig", step: int) -> float:
    """Learning rate of step `step` (from 1) of a configured run."""
    settings = config.learning_rate
    return learning_rate(
        step,
        schedule=settings.schedule,
        peak=settings.peak,
        minimum=settings.minimum,
        steps=config.run.steps,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.decay_steps,
    )
