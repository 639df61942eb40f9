"""What a writer's commits did: counts and times, for whoever reports on them.

Written by the commit thread alone. Read from other threads without a lock, a figure at a time:
two figures may be one commit apart.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# From an SSD's small commit to a disk that is about to fail; 100 ms is the flush interval.
BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class CommitStats:
    """How many commits there were, and how long they took; a roll counts with its commit."""

    def __init__(self) -> None:
        self.commits = 0
        self.failures = 0
        self.seconds = 0.0
        self.seconds_max = 0.0
        self.buckets = [0] * (len(BOUNDS_S) + 1)  # of commits up to each bound; the rest last
        self.running_since_s: float | None = None  # time.monotonic, while a commit runs

    @contextmanager
    def timed(self, items: int) -> Iterator[None]:
        """Count what the body does as a commit of so many things; of nothing, it is none."""
        if not items:
            yield
            return
        began = self.running_since_s = time.monotonic()
        try:
            yield
        except BaseException:
            self.failures += 1
            raise
        else:
            self._add(time.monotonic() - began)
        finally:
            self.running_since_s = None

    def _add(self, seconds: float) -> None:
        self.commits += 1
        self.seconds += seconds
        self.seconds_max = max(self.seconds_max, seconds)
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1
