"""The readings of one commit by identity: which is the first of its kind, which repeats it. Pure.

Rows are taken by device, then time, then arrival. So the first in order wins; B-tree pages are
filled one after the other; and all workers insert in the same order: none waits for another
that waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstore.telemetry.records import Column, Fate, Readings

Rows: TypeAlias = NDArray[np.intp]
Flags: TypeAlias = NDArray[np.bool_]

# What a look into the table says of a row: not there, there with other values, there with the same.
ABSENT: Final = 0
OTHER: Final = 1
SAME: Final = 2

_UNKNOWN: Final = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Batch:
    """n readings. devices: each once, sorted; device: its number there, one per row.

    order: all rows by identity. leader: the first row of the same identity. same: whether a
    row has its leader's values.
    """

    devices: list[str]
    device: NDArray[np.int64]
    ts_us: NDArray[np.int64]
    order: Rows
    leader: Rows
    same: Flags

    def suspects(self, newest_us: dict[str, int]) -> Rows:
        """Rows that may be there already: not behind the newest that is known of their device."""
        newest = [newest_us.get(device, _UNKNOWN) for device in self.devices]
        suspect = self.ts_us <= np.array(newest, np.int64)[self.device]
        return self._in_order(suspect)

    def fates(self, found: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What becomes of each row. found: what the table says of each, ABSENT if not asked."""
        rows = np.arange(len(self.ts_us))
        in_table = found[self.leader]  # repeats of a row are looked for together with it
        same = np.where(in_table == ABSENT, self.same, found == SAME)
        fates = np.where(same, Fate.DUPLICATE, Fate.CONFLICT).astype(np.uint8)
        fates[(self.leader == rows) & (in_table == ABSENT)] = Fate.STORED
        return fates

    def fresh(self, fates: NDArray[np.uint8]) -> Rows:
        """The rows to be stored, in order."""
        return self._in_order(fates == Fate.STORED)

    def _in_order(self, wanted: Flags) -> Rows:
        return np.asarray(self.order[wanted[self.order]])

    def latest(self) -> Rows:
        """The first row of the latest identity of each device, in the order of ``devices``."""
        last = np.flatnonzero(np.diff(self.device[self.order], append=-1))
        return np.asarray(self.leader[self.order[last]])


def batch(readings: Readings) -> Batch:
    """Sort out the readings of a commit."""
    devices = sorted(set(readings.device_id))
    number = {device: i for i, device in enumerate(devices)}
    count = len(readings)
    device = np.fromiter(map(number.__getitem__, readings.device_id), np.int64, count)
    order = np.lexsort((readings.ts_us, device))
    by_device, by_time = device[order], readings.ts_us[order]
    leads = np.ones(count, bool)
    leads[1:] = (by_device[1:] != by_device[:-1]) | (by_time[1:] != by_time[:-1])
    leader = np.empty(count, np.intp)
    leader[order] = order[np.flatnonzero(leads)[np.cumsum(leads) - 1]]
    return Batch(devices, device, readings.ts_us, order, leader, _same(readings, leader))


def _same(readings: Readings, leader: Rows) -> Flags:
    """Whether each row has the values of its leader."""
    same = np.ones(len(leader), bool)
    repeats = np.flatnonzero(leader != np.arange(len(leader)))
    if len(repeats):
        for column in (*readings.values.values(), readings.extras):
            same[repeats] &= _equal(column, repeats, leader[repeats])
    return same


def _equal(column: Column | Sequence[str | None], rows: Rows, others: Rows) -> Flags:
    if isinstance(column, np.ndarray):
        a, b = column[rows], column[others]
        return np.asarray((a == b) | (np.isnan(a) & np.isnan(b)))
    pairs = zip(rows.tolist(), others.tolist(), strict=True)
    return np.fromiter((column[i] == column[j] for i, j in pairs), bool, len(rows))
