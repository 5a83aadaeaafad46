"""Proportions with their confidence intervals."""

import math
from dataclasses import dataclass

Z = 1.96  # of 95 %


@dataclass(frozen=True)
class Proportion:
    """`right` of `total`, at least 1, with Wilson's 95 % interval (Wilson 1927)."""

    right: int
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends, in 0..1."""
        n, p = self.total, self.right / self.total
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        reach = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return max(0.0, middle - reach), min(1.0, middle + reach)

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{self.right / self.total:.1%} ({self.right} of {self.total}"
        return f"{share}; 95 % interval {low:.1%} to {high:.1%})"
