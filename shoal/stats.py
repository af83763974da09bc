"""Plain numbers: percentiles, summaries and histograms, for benchmarks, logs and metrics. No numpy, no torch."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, interpolated linearly between neighbours.

    `values` need not be sorted. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("percentile of no values")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1; got {share}")
    return _percentile_of_sorted(sorted(values), share)


def _percentile_of_sorted(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values: Sequence[float]) -> float:
    """The middle value; the mean of the two middle ones for an even number."""
    return percentile(values, 0.5)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a table of measurements shows of one series, in the series' own unit."""

    count: int
    mean: float
    minimum: float
    p50: float
    p90: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Raises ValueError for no values."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("summary of no values")
        p50, p90, p99 = (_percentile_of_sorted(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(len(ordered), math.fsum(ordered) / len(ordered), ordered[0], p50, p90, p99, ordered[-1])


class Histogram:
    """Counts of values in fixed buckets. `bounds`: upper bounds, inclusive, rising; one more bucket takes the rest."""

    def __init__(self, bounds: Sequence[float]) -> None:
        if not bounds or any(low >= high for low, high in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"bounds must rise; got {list(bounds)}")
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.count = 0
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.count += 1
        self.total += value

    @property
    def mean(self) -> float:
        """NaN while it is empty."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The upper bound of the bucket that holds the quantile: inf for the last one, NaN while it is empty."""
        if not self.count:
            return math.nan
        seen = 0
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            seen += count
            if seen >= share * self.count and seen:
                return bound
        return math.inf
