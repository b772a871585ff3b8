"""The learning rate, as a function of the step alone, so that an interrupted run resumes on the same curve."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a plateau, then a cosine down to `floor` x `peak`."""

    steps: int
    peak: float = 1e-3
    warmup: int = 200
    plateau: float = 0.35
    """Share of the run after which the rate begins to fall."""
    floor: float = 0.02

    def rate(self, step: int) -> float:
        """Learning rate of the 0-based `step`."""
        rising = min(1.0, (step + 1) / self.warmup)
        fallen = max(0.0, (step / self.steps - self.plateau) / (1.0 - self.plateau))
        falling = self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, fallen)))
        return self.peak * rising * falling
