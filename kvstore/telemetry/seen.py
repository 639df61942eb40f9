"""What is counted of events before a sink decides on them, by device and hour.

Memory is bounded: the newest times are forgotten with the devices' numbers; of unknown fields the
first UNKNOWN_MAX names are told apart, the others share "*".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.telemetry import counts
from kvstore.telemetry.records import Count, Rejection

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.telemetry.contract import Contract
    from kvstore.telemetry.decode import Block
    from kvstore.telemetry.devices import Devices

UNKNOWN_MAX: Final = 100
UNKNOWN_CHARS_MAX: Final = 64

_NEVER: Final = np.iinfo(np.int64).min // 2  # any time is later, also by the limit
_SPREAD_MAX: Final = 8  # cells of a table of counts for each event that is counted


class Seen:
    """Counts what passes, chunk after chunk."""

    def __init__(self, contract: Contract, devices: Devices, *, late_after_us: int) -> None:
        self._late_after_us = late_after_us
        self._latency_us = None if contract.latency_s is None else round(contract.latency_s * 1e6)
        self._devices = devices
        self._newest = np.empty(0, np.int64)  # by device
        self._fields: set[str] = set()

    def counts(
        self,
        block: Block,
        rejections: Sequence[Rejection],
        *,
        appended_us: NDArray[np.int64] | None,
        now_us: int,
    ) -> list[Count]:
        """All counts of one chunk; appended_us: of each event in the block."""
        found = list(self._of_readings(block, appended_us)) if len(block) else []
        if not rejections:
            return found  # each of them once
        return counts.summed([*found, *self._of_rejections(rejections, now_us)])

    def _of_readings(self, block: Block, appended_us: NDArray[np.int64] | None) -> Iterator[Count]:
        self._grow(len(self._devices.names))
        cells = _Cells(self._devices.names, block.device, block.ts_us)
        yield from cells.counts(counts.RECEIVED)
        yield from cells.counts(counts.LATE, self._late(block.device, block.ts_us))
        yield from cells.counts(counts.FINER, block.finer)
        if appended_us is not None and self._latency_us is not None:
            yield from cells.counts(counts.TIMED)
            yield from cells.counts(counts.DELAYED, appended_us - block.ts_us > self._latency_us)
        yield from self._drift(block)

    def forget(self) -> None:
        """The devices have been given other numbers."""
        self._newest = np.empty(0, np.int64)

    def _grow(self, devices: int) -> None:
        if devices > len(self._newest):
            fresh = np.full(2 * devices - len(self._newest), _NEVER)
            self._newest = np.concatenate([self._newest, fresh])

    def _late(self, codes: NDArray[np.int64], ts_us: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which are older than the newest of their device before them, by more than the limit."""
        before = self._newest[codes]
        if ts_us.min() < max(int(before.max()), int(ts_us.max())) - self._late_after_us:
            before = np.maximum(before, _newest_before(codes, ts_us))
        np.maximum.at(self._newest, codes, ts_us)
        return ts_us < before - self._late_after_us

    def _drift(self, block: Block) -> Iterator[Count]:
        if not block.unknown:
            return
        found: Counter[tuple[str, int, str]] = Counter()
        places = np.searchsorted(block.index, list(block.unknown))
        hours_us = block.ts_us[places] // counts.HOUR_US * counts.HOUR_US
        cells = zip(places.tolist(), hours_us.tolist(), block.unknown.values(), strict=True)
        for place, hour_us, names in cells:
            found[block.device_id[place], hour_us, counts.DRIFT] += 1
            for name in {self._told_apart(name) for name in names}:
                found[block.device_id[place], hour_us, counts.unknown(name)] += 1
        yield from (Count(*key, value) for key, value in found.items())

    def _told_apart(self, field: str) -> str:
        if field not in self._fields:
            if len(self._fields) >= UNKNOWN_MAX or len(field) > UNKNOWN_CHARS_MAX:
                return "*"
            self._fields.add(field)
        return field

    def _of_rejections(self, rejections: Sequence[Rejection], now_us: int) -> Iterator[Count]:
        for each in rejections:
            ts_us = now_us if each.ts_us is None else each.ts_us
            hour_us = ts_us // counts.HOUR_US * counts.HOUR_US
            for name in (counts.RECEIVED, counts.REJECTED):
                yield Count(each.device_id, hour_us, name, 1)
            for code in {reason.code for reason in each.reasons}:
                yield Count(each.device_id, hour_us, counts.reason(code), 1)


class _Cells:
    """Readings by device and hour: a cell each."""

    def __init__(
        self, names: Sequence[str], codes: NDArray[np.int64], ts_us: NDArray[np.int64]
    ) -> None:
        hours = ts_us // counts.HOUR_US
        self._first = int(hours.min())
        self._hours = int(hours.max()) - self._first + 1
        self._cells = codes * self._hours + (hours - self._first)
        self._names = names

    def counts(self, name: str, chosen: NDArray[np.bool_] | None = None) -> Iterator[Count]:
        """How many of the chosen ones are in each cell."""
        if chosen is not None and not chosen.any():
            return
        numbers = self._cells if chosen is None else self._cells[chosen]
        if int(numbers.max()) < _SPREAD_MAX * len(numbers):
            found = np.bincount(numbers)
            cells = np.flatnonzero(found)
            values = found[cells]
        else:
            cells, values = np.unique(numbers, return_counts=True)
        for cell, value in zip(cells.tolist(), values.tolist(), strict=True):
            code, hour = divmod(cell, self._hours)
            yield Count(self._names[code], (hour + self._first) * counts.HOUR_US, name, value)


def _newest_before(codes: NDArray[np.int64], ts_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each event the newest time of its device before it within the arrays."""
    small = codes.astype(np.uint16) if codes.max() < 1 << 16 else codes
    order = np.argsort(small, kind="stable")  # of 16 bits it is a radix sort, five times as fast
    firsts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    times = ts_us[order]
    found = np.empty(len(codes), np.int64)
    found[order[1:]] = _running_maxima(times, firsts)[:-1]
    found[order[firsts]] = _NEVER
    return found


def _running_maxima(times: NDArray[np.int64], firsts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest so far, of each stretch from one of ``firsts`` to the next."""
    low = int(times.min())
    width = int(times.max()) - low + 1
    if width * len(firsts) < 1 << 62:  # each stretch lifted above the one before: one pass
        lift = np.repeat(np.arange(len(firsts)) * width, np.diff(firsts, append=len(times)))
        return np.maximum.accumulate(times - low + lift) - lift + low
    found = np.empty_like(times)
    for start, stop in zip(firsts, [*firsts[1:], len(times)], strict=True):
        found[start:stop] = np.maximum.accumulate(times[start:stop])
    return found
