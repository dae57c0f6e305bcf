"""How often values of each size were seen: a few numbers in place of all values. Thread-safe."""

import threading
from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 300.0)
"""Bounds that suit anything from a copy of an adapter to a long answer."""


class Counted(NamedTuple):
    """A histogram at one time.

    Attributes:
      buckets: each upper bound with how many values were at most that large; the last bound is infinite.
      total: of all values.
    """

    buckets: tuple[tuple[float, int], ...]
    total: float


class Histogram:
    """Counts values by size.

    Args:
      bounds: upper bounds of the buckets, increasing; one without a bound is added.
    """

    def __init__(self, bounds: tuple[float, ...] = SECONDS):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def add(self, values: Iterable[float]) -> None:
        """Counts some values."""
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
                self._total += value

    def read(self) -> Counted:
        """What was counted so far."""
        with self._lock:
            counts, total = list(self._counts), self._total
        seen, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            seen += count
            buckets.append((bound, seen))
        return Counted(tuple(buckets), total)
