"""Means over seeds."""

import statistics
from dataclasses import dataclass

from ssl_dist.results.records import decimals, number


@dataclass(frozen=True)
class Mean:
    """Of one number of several runs. wanted: how many runs there will be; those of `values` are there."""

    values: tuple[float, ...]
    wanted: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Of the sample (n - 1); None: of one run there is none."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """As tables show it; empty where no run is there."""
        if not self.values:
            return ""
        text = number(self.mean, self.std)
        return text if len(self.values) == self.wanted else f"{text} ({len(self.values)} of {self.wanted})"

    def over(self, other: float) -> str:
        """By how much the mean is above `other`, with its sign."""
        return f"{self.mean - other:+.{decimals(self.mean)}f}"
