"""Two sides hold the same readings, or where they do not: by device and day.

For each device and day: the count, and for each column the nulls, the minimum, the maximum and a
hash. The hash of a column is the sum, modulo 2**64, of a hash of (time, value) of each row: it
does not depend on order, takes doubles bit for bit (-0.0 is 0.0, NaN is null), counts a row twice
that is there twice, and sees a value that has moved to another time. Minimum and maximum are for
people, who want to see at once what is wrong. A column that one side lacks is all null there.

Both sides are read in order of time, once, in bounded batches; a day's figures are in memory.
Pure: who reads, decides of what (see migrate.py).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.telemetry.records import Readings

if TYPE_CHECKING:
    from numpy.typing import NDArray

DAY_US: Final = 86_400_000_000
EXTRAS: Final = "extras"
_WRAP: Final = (1 << 64) - 1
_TEXTS_MAX: Final = 1_000_000  # whose hashes are remembered

Value = float | str


class Column(NamedTuple):
    """Figures of one column of one device and day."""

    nulls: int
    minimum: Value | None = None
    maximum: Value | None = None
    hash: int = 0

    def plus(self, other: Column) -> Column:
        """The figures of both."""
        lows = [each for each in (self.minimum, other.minimum) if each is not None]
        highs = [each for each in (self.maximum, other.maximum) if each is not None]
        return Column(
            self.nulls + other.nulls,
            min(lows, default=None),
            max(highs, default=None),
            (self.hash + other.hash) & _WRAP,
        )


class Figures(NamedTuple):
    """Figures of one device and day."""

    rows: int
    columns: dict[str, Column]

    def column(self, name: str) -> Column:
        """A column's; all null where it is not there."""
        return self.columns.get(name, Column(self.rows))

    def plus(self, other: Figures) -> Figures:
        """The figures of both."""
        names = self.columns.keys() | other.columns.keys()
        columns = {name: self.column(name).plus(other.column(name)) for name in names}
        return Figures(self.rows + other.rows, columns)


Day = dict[str, Figures]  # by device


class Difference(NamedTuple):
    """One thing in which the sides differ. what: ``count``, or a column and a figure of it."""

    device_id: str
    day_us: int
    what: str
    left: Value | None
    right: Value | None


def reconcile(
    left: Iterable[Readings], right: Iterable[Readings]
) -> Iterator[tuple[int, int, list[Difference]]]:
    """For each day that either side has: its begin, the left side's rows, what differs."""
    sides = by_day(left), by_day(right)
    heads = [next(side, None) for side in sides]
    while any(heads):
        day_us = min(head[0] for head in heads if head)
        found: list[Day] = [{}, {}]
        for number, head in enumerate(heads):
            if head and head[0] == day_us:
                found[number] = head[1]
                heads[number] = next(sides[number], None)
        rows = sum(each.rows for each in found[0].values())
        yield day_us, rows, differences(day_us, *found)


def differences(day_us: int, left: Day, right: Day) -> list[Difference]:
    """What differs on a day."""
    none = Figures(0, {})
    found = []
    for device in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(device, none), right.get(device, none)
        if ours.rows != theirs.rows:
            found.append(Difference(device, day_us, "count", ours.rows, theirs.rows))
        for name in sorted(ours.columns.keys() | theirs.columns.keys()):
            one, other = ours.column(name), theirs.column(name)
            found += [
                Difference(device, day_us, f"{name} {figure}", a, b)
                for figure, a, b in zip(Column._fields, one, other, strict=True)
                if a != b
            ]
    return found


def by_day(batches: Iterable[Readings]) -> Iterator[tuple[int, Day]]:
    """Figures of each day, of readings in order of time."""
    hashes = Hashes()
    day_us, found = None, Day()
    for batch in batches:
        days = batch.ts_us // DAY_US * DAY_US
        cuts = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), len(batch)]
        for start, stop in itertools.pairwise(cuts):
            if start == stop:
                continue
            if day_us is not None and days[start] != day_us:
                yield day_us, found
                found = Day()
            day_us = int(days[start])
            for device, figures in of_batch(batch, slice(start, stop), hashes).items():
                found[device] = found[device].plus(figures) if device in found else figures
    if day_us is not None:
        yield day_us, found


# ---- one batch ----


class Hashes:
    """Hashes of texts, each computed once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, texts: list[str]) -> NDArray[np.uint64]:
        """Of each text, 64 bits."""
        if len(self._known) > _TEXTS_MAX:
            self._known.clear()
        for text in texts:
            if text not in self._known:
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                self._known[text] = int.from_bytes(digest, "little")
        return np.array([self._known[text] for text in texts], np.uint64)


def of_batch(batch: Readings, part: slice, hashes: Hashes) -> Day:
    """Figures by device of a part of a batch that lies in one day."""
    names, codes = factors(batch.device_id[part])
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    ts_us = batch.ts_us[part][order]
    counts = np.diff([*starts.tolist(), len(order)])
    columns = {}
    for name, values in {**batch.values, EXTRAS: batch.extras}.items():
        if isinstance(values, np.ndarray):
            columns[name] = _numbers(values[part][order], ts_us, starts)
        else:
            columns[name] = _texts(values[part], order, ts_us, starts, hashes)
    return {
        device: Figures(int(counts[at]), {name: found[at] for name, found in columns.items()})
        for at, device in enumerate(names)
    }


def factors(texts: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The different texts in their order, and for each text the number of its own."""
    names = sorted(set(texts))
    number = {name: at for at, name in enumerate(names)}
    return names, np.fromiter(map(number.__getitem__, texts), np.int64, len(texts))


def _numbers(
    values: NDArray[np.float64], ts_us: NDArray[np.int64], starts: NDArray[np.intp]
) -> list[Column]:
    values = values + 0.0
    null = np.isnan(values)
    hashed = _mixed(values.view(np.uint64), ts_us)
    hashed[null] = 0
    nulls, sums = np.add.reduceat(null, starts, dtype=np.int64), np.add.reduceat(hashed, starts)
    lows, highs = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    return [
        Column(n, None if low != low else low, None if high != high else high, h)  # noqa: PLR0124
        for n, low, high, h in zip(*(x.tolist() for x in (nulls, lows, highs, sums)), strict=True)
    ]


def _texts(
    values: list[str | None],
    order: NDArray[np.intp],
    ts_us: NDArray[np.int64],
    starts: NDArray[np.intp],
    hashes: Hashes,
) -> list[Column]:
    names = sorted({value for value in values if value is not None})
    number: dict[str | None, int] = {name: at for at, name in enumerate(names)}
    number[None] = len(names)
    codes = np.fromiter(map(number.__getitem__, values), np.int64, len(values))[order]
    null = codes == len(names)
    hashed = _mixed(np.append(hashes.of(names), np.uint64(0))[codes], ts_us)
    hashed[null] = 0
    nulls, sums = np.add.reduceat(null, starts, dtype=np.int64), np.add.reduceat(hashed, starts)
    lows = np.minimum.reduceat(codes, starts)
    highs = np.maximum.reduceat(np.where(null, -1, codes), starts)
    return [
        Column(n, None if high < 0 else names[low], None if high < 0 else names[high], h)
        for n, low, high, h in zip(*(x.tolist() for x in (nulls, lows, highs, sums)), strict=True)
    ]


def _mixed(values: NDArray[np.uint64], ts_us: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of value and time: the finalizer of splitmix64, twice, so that neither cancels."""
    return _final(_final(values) ^ (ts_us.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))


def _final(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return found
