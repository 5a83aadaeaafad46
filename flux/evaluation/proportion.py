"""Proportions with their confidence intervals."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Proportion:
    """`right` of `total`, with Wilson's 95 % interval (Wilson 1927)."""

    right: int
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        """The interval's bounds, 0 to 1."""
        z, n, p = 1.96, self.total, self.right / self.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - reach), min(1.0, middle + reach)

    def __str__(self) -> str:
        low, high = self.interval
        text = f"{self.right / self.total:.1%} ({self.right} of {self.total}"
        return f"{text}; 95 % interval {low:.1%} to {high:.1%})"
