"""Replaying a range: its rows again, at the pace of their times.

Every piece has a deadline counted from the first row of all, so that waits that overrun do not
add up. A batch is cut where the deadlines of its rows differ by a millisecond; rows are merged
strictly by time before. Reads only; clock, sleep and the wish to stop are arguments.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore.errors import KvstoreError
from kvstore.schema import Array, Batch
from kvstore.timestamps import NS_PER_S, time_to_ns

TICK_S: Final = 1e-3  # rows whose deadlines share a tick leave together
SLEEP_S_MAX: Final = 0.1  # of one wait: between two, the wish to stop is asked for
_SPEED_MAX: Final = 1e9


class Lateness(NamedTuple):
    """How long after their deadlines pieces left. p99_s is rounded to two digits."""

    pieces: int = 0
    rows: int = 0
    max_s: float = 0.0
    p99_s: float = 0.0


class Replay:
    """Iterates over batches, each handed out at its deadline; can be iterated once.

    read: opens the range anew, for each round of a loop; its batches are strictly in order.
    drop_time: leave the time field out of what is handed out. rows: handed out so far.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Batch]],
        time_field: str,
        *,
        drop_time: bool,
        speed: float,
        loop: bool,
        stop: Callable[[], bool],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ):
        if not 0 <= speed <= _SPEED_MAX:
            raise KvstoreError(
                f"speed={speed}: use 1.0 for the original pace, 2.0 for twice that, 0 for as "
                "fast as possible"
            )
        self._read = read
        self._time = time_field
        self._drop_time = drop_time
        self._speed = speed
        self._loop = loop
        self._stop = stop
        self._clock = clock
        self._sleep = sleep
        self.rows = 0
        self._late: Counter[float] = Counter()
        self._late_s_max = 0.0

    def __iter__(self) -> Iterator[Batch]:
        begin_s, last_s = math.nan, 0.0
        while True:
            first_ns: int | None = None
            for batch in self._read():
                if first_ns is None:
                    first_ns = time_to_ns(batch[self._time][0], batch[self._time].dtype)
                    # Else a range of one instant, replayed in a loop, would be a flood.
                    begin_s = self._clock() if math.isnan(begin_s) else begin_s + last_s + TICK_S
                for due_s, piece in self._pieces(batch, first_ns):
                    if not self._waited(begin_s + due_s):
                        return
                    last_s = due_s
                    self.rows += len(next(iter(piece.values())))
                    yield piece
            if first_ns is None or not self._loop:
                return

    def lateness(self) -> Lateness:
        """Of what was handed out so far; all zeros but the counts at speed 0."""
        pieces = self._late.total()
        beyond = pieces - math.ceil(pieces * 0.99)
        p99_s = 0.0
        for late_s in sorted(self._late, reverse=True):
            p99_s = late_s
            beyond -= self._late[late_s]
            if beyond < 0:
                break
        return Lateness(pieces, self.rows, self._late_s_max, min(p99_s, self._late_s_max))

    def _pieces(self, batch: Batch, first_ns: int) -> Iterator[tuple[float, Batch]]:
        """Parts of a batch, and when each is due after the first row of all."""
        times = batch[self._time]
        if self._drop_time:
            batch = {name: column for name, column in batch.items() if name != self._time}
        if not self._speed:
            yield 0.0, batch
            return
        due_s = deadlines(times, first_ns) / self._speed
        cuts = np.flatnonzero(np.diff(np.floor(due_s / TICK_S))) + 1
        ends = [0, *cuts.tolist(), len(times)]
        for low, high in pairwise(ends):
            yield float(due_s[low]), {name: column[low:high] for name, column in batch.items()}

    def _waited(self, deadline_s: float) -> bool:
        """Wait for a deadline and note how late it got; False where the wish to stop came."""
        while not self._stop():
            left_s = deadline_s - self._clock() if self._speed else 0.0
            if left_s <= 0:
                self._late[float(f"{-left_s:.1e}")] += 1  # a bounded number of counts
                self._late_s_max = max(self._late_s_max, -left_s)
                return True
            self._sleep(min(left_s, SLEEP_S_MAX))
        return False


def deadlines(times: Array, first_ns: int) -> Any:
    """Seconds of sorted times after the first of all, as float64 of better than 1 µs in a day."""
    begin_s = (time_to_ns(times[0], times.dtype) - first_ns) / NS_PER_S
    if times.dtype.kind == "f":
        return begin_s + (times - times[0])
    counts = times.view(np.uint64)  # unsigned: 300 years apart does not wrap around
    return begin_s + (counts - counts[0]) * (time_to_ns(1, times.dtype) / NS_PER_S)
