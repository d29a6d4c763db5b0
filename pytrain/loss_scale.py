"""Dynamic loss scaling: fp16 gradients are kept in range by a power of two that follows what overflows."""

from dataclasses import dataclass

GROWTH_INTERVAL = 1000  # steps


@dataclass
class LossScale:
    """The factor on the loss, and how many steps in a row it was not too large (arXiv 1710.03740).

    A scale that is not dynamic stays as it is.
    """

    value: float
    dynamic: bool
    good_steps: int = 0

    def after(self, finite: bool) -> None:
        """Halve after a gradient that was not finite; double after GROWTH_INTERVAL good steps."""
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == GROWTH_INTERVAL:
            self.value *= 2
            self.good_steps = 0
