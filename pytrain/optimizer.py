"""AdamW over the flat buckets of a stage, with the global gradient norm and clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytrain.collectives import Group
from pytrain.native import native
from pytrain.stage import Scalar, Stage

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.config.run import OptimizerSection


@dataclass(frozen=True)
class UpdateResult:
    """What the device says of a finished update."""

    gradient_norm: float
    """Before clipping, over all parameters of the model."""
    finite: bool
    """False: the gradient had an infinity or NaN, and the update was left out."""


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) on matrices and embeddings; moments in fp32.

    `master` is what is updated: the weights themselves where the storage types agree, else a copy of its own
    that the weights are rounded from.
    """

    def __init__(self, stage: Stage, settings: OptimizerSection, group: Group) -> None:
        self.stage = stage
        self.settings = settings
        self.group = group
        self.updates = 0
        device, policy = stage.device, stage.policy
        sizes = [bucket.elements for bucket in stage.layout.buckets]
        self.has_master = policy.master != policy.weights
        self.master: list[_native.Buffer] = (
            [native().Buffer(device, size, policy.master, "master") for size in sizes]
            if self.has_master
            else stage.weights
        )
        self.first: list[_native.Buffer]  # moments
        self.second: list[_native.Buffer]
        self.first, self.second = (
            [native().Buffer(device, size, "fp32", "optimizer") for size in sizes] for _ in range(2)
        )
        self._sum = np.zeros(1, np.float64)

    def initialise(self, seed: int) -> None:
        """Draw the initial weights into the master, and round the weights from it."""
        self.stage.initialise(seed, self.master)
        self.round_weights()

    def round_weights(self) -> None:
        """Weights from the master, where they are two things."""
        if self.has_master:
            for weights, master in zip(self.stage.weights, self.master, strict=True):
                self.stage.device.convert(weights.array, master.array, self.stage.half)

    def adopt_weights(self) -> None:
        """Master from the weights, where a checkpoint had weights alone."""
        if self.has_master:
            for weights, master in zip(self.stage.weights, self.master, strict=True):
                self.stage.device.convert(master.array, weights.array, self.stage.half)

    def update(self, learning_rate: float, loss_scale: float = 1.0) -> UpdateResult:
        """Clip by the global norm and take one step; after a gradient that is not finite nothing has changed.

        Args:
            learning_rate: of this step.
            loss_scale: what the gradients were multiplied with.
        """
        stage, settings, device = self.stage, self.settings, self.stage.device
        self._sum[:] = 0.0
        for spec in stage.layout.tensors:
            if spec.owner:
                gradients = stage.gradients[spec.bucket]
                device.sum_squares(self._sum, stage.slice_of(gradients, spec), stage.half)
        self.group.all_reduce(self._sum)
        device.finish_norm(stage.scalars, self._sum, settings.clip, loss_scale)
        count = self.updates + 1
        step_size = learning_rate / (1 - settings.beta1**count)
        correction2 = 1 / math.sqrt(1 - settings.beta2**count)
        for spec in stage.layout.tensors:
            decay = learning_rate * settings.weight_decay if spec.decay else 0.0
            weights, master = stage.weights[spec.bucket], self.master[spec.bucket]
            gradients = stage.gradients[spec.bucket]
            device.adamw(
                stage.slice_of(weights, spec),
                stage.slice_of(master, spec),
                stage.slice_of(self.first[spec.bucket], spec),
                stage.slice_of(self.second[spec.bucket], spec),
                stage.slice_of(gradients, spec),
                stage.scalars,
                beta1=settings.beta1,
                beta2=settings.beta2,
                eps=settings.eps,
                step_size=step_size,
                correction2=correction2,
                decay=decay,
                half=stage.half,
            )
        finite = bool(stage.scalars[Scalar.FINITE])
        if finite:
            self.updates = count
        return UpdateResult(float(stage.scalars[Scalar.GRADIENT_NORM]), finite)
