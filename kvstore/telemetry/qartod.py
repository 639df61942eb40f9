"""Tests on the series of each device, named after QARTOD, IOOS' manuals for real-time sensor data.

- *Timing/gap*: two successive readings further apart than GAP_INTERVALS intervals of the contract.
- *Flat line*: at least FLAT_READINGS successive readings of one value: a sensor that is stuck.
- *Rate of change*: a step from one reading to the next of more than JUMP_FACTOR times the median
  step of that device and field (of steps other than 0, at least STEPS_MIN of them).

(*Syntax* and *gross range* are what validation rejects.) Readings are fed in the order of time, in
any pieces: the outcome is the same. Steps are kept as a histogram in powers of the square root of
2, so that one pass is enough and memory does not grow with it; the limit of a step is rounded up
to the next of these. Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.telemetry.records import Readings

GAP_INTERVALS: Final = 3
FLAT_READINGS: Final = 100  # at 5 s eight minutes; air is rarely that still
JUMP_FACTOR: Final = 8  # 6 standard deviations of Gaussian noise
STEPS_MIN: Final = 20
DEVICES_MAX: Final = 100_000  # some 60 MB for three fields; further ones are not tested
HOUR_US: Final = 3_600_000_000

_BINS: Final = 128
_BINS_DOWN: Final = 64  # the first bin is of steps below 2^-32
_NONE: Final = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True)
class FieldSeries:
    """One numeric field of one device. Times in µs; jump_at_us: of the largest step."""

    flat_runs: int = 0
    flat_readings: int = 0
    longest_run: int = 0
    longest_run_end_us: int | None = None
    jumps: int = 0
    largest_step: float = 0.0
    largest_step_us: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceSeries:
    """What the readings of one device look like; gap_us: together, without the intervals."""

    rows: int
    first_us: int
    last_us: int
    gaps: int
    gap_us: int
    longest_gap_us: int
    longest_gap_end_us: int | None
    fields: dict[str, FieldSeries]


class Series:
    """Takes readings in, in order of time; ``devices()`` says what they look like."""

    def __init__(
        self, fields: list[str], interval_s: float | None, *, flat_readings: int = FLAT_READINGS
    ) -> None:
        self.untested: set[str] = set()
        self.per_hour: dict[tuple[str, int], int] = {}
        self._names: list[str] = []
        self._codes: dict[str, int] = {}
        self._gap_us = None if interval_s is None else round(interval_s * 1e6 * GAP_INTERVALS)
        self._times = _Times(self._gap_us)
        self._fields = {name: _Field(flat_readings) for name in fields}

    def add(self, readings: Readings) -> None:
        """Take in what follows what was taken in before."""
        codes = self._coded(readings.device_id)
        order = np.argsort(codes, kind="stable")
        order = order[np.searchsorted(codes[order], 0) :]  # those without a code are not tested
        codes, ts_us = codes[order], readings.ts_us[order]
        self._count_hours(codes, ts_us)
        self._times.add(codes, ts_us)
        for name, field in self._fields.items():
            column = readings.values.get(name)
            if isinstance(column, np.ndarray):
                values = column[order]
                known = ~np.isnan(values)
                field.add(codes[known], ts_us[known], values[known])

    def devices(self) -> dict[str, DeviceSeries]:
        """Every device that was tested."""
        times = self._times
        found = {}
        jumps = {name: field.jumps(len(self._names)) for name, field in self._fields.items()}
        for code, device in enumerate(self._names):
            longest_us = int(times.longest[code])
            found[device] = DeviceSeries(
                int(times.rows[code]),
                int(times.first[code]),
                int(times.last[code]),
                int(times.gaps[code]),
                int(times.gap_us[code]),
                longest_us,
                int(times.longest_end[code]) if longest_us else None,
                {
                    name: field.of(code, int(jumps[name][code]))
                    for name, field in self._fields.items()
                },
            )
        return found

    def _coded(self, devices: list[str]) -> NDArray[np.int64]:
        for device in dict.fromkeys(devices):
            if device in self._codes:
                continue
            if len(self._names) >= DEVICES_MAX:
                self.untested.add(device)
                continue
            self._codes[device] = len(self._names)
            self._names.append(device)
        count = len(self._names)
        self._times.grow(count)
        for field in self._fields.values():
            field.grow(count)
        codes = self._codes
        return np.fromiter((codes.get(each, -1) for each in devices), np.int64, len(devices))

    def _count_hours(self, codes: NDArray[np.int64], ts_us: NDArray[np.int64]) -> None:
        if not len(codes):
            return
        pairs = np.stack([codes, ts_us // HOUR_US])
        cells, counts = np.unique(pairs, axis=1, return_counts=True)
        for code, hour, count in zip(*cells.tolist(), counts.tolist(), strict=True):
            key = self._names[code], hour * HOUR_US
            self.per_hour[key] = self.per_hour.get(key, 0) + count


class _Grown:
    """Arrays by device code, grown together; attributes that are arrays, with their fill values."""

    _FILL: dict[str, tuple[Any, Any]]

    def __init__(self) -> None:
        for name, (_, dtype) in self._FILL.items():
            setattr(self, name, np.empty(0, dtype))

    def grow(self, count: int) -> None:
        """Make room for so many devices."""
        for name, (fill, dtype) in self._FILL.items():
            old = getattr(self, name)
            if count > len(old):
                fresh = np.full(max(count, 2 * len(old)) - len(old), fill, dtype)
                setattr(self, name, np.concatenate([old, fresh]))


class _Times(_Grown):
    """When each device has readings, and the gaps between them."""

    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    gaps: NDArray[np.int64]
    gap_us: NDArray[np.int64]
    longest: NDArray[np.int64]
    longest_end: NDArray[np.int64]
    _FILL = dict.fromkeys(("rows", "gaps", "gap_us", "longest"), (0, np.int64)) | dict.fromkeys(
        ("first", "last", "longest_end"), (_NONE, np.int64)
    )

    def __init__(self, limit_us: int | None) -> None:
        super().__init__()
        self._limit_us = limit_us

    def add(self, codes: NDArray[np.int64], ts_us: NDArray[np.int64]) -> None:
        """codes: sorted; ts_us: in order of time for each of them."""
        begins, ends = _groups(codes)
        devices = codes[begins]
        before = _shifted(ts_us, begins, self.last[devices])
        self.first[devices] = np.where(
            self.first[devices] == _NONE, ts_us[begins], self.first[devices]
        )
        self.last[devices] = ts_us[ends]
        self.rows[devices] += ends - begins + 1
        if self._limit_us is None:
            return
        wide = np.flatnonzero((before != _NONE) & (ts_us - before > self._limit_us))
        of, width = codes[wide], ts_us[wide] - before[wide]
        np.add.at(self.gaps, of, 1)
        np.add.at(self.gap_us, of, width - self._limit_us // GAP_INTERVALS)
        _keep_largest(self.longest, self.longest_end, of, width, ts_us[wide])


class _Field(_Grown):
    """Runs of one value, and steps from one value to the next, of each device."""

    last: NDArray[np.float64]
    run: NDArray[np.int64]
    flat_runs: NDArray[np.int64]
    flat_readings: NDArray[np.int64]
    longest: NDArray[np.int64]
    longest_end: NDArray[np.int64]
    largest: NDArray[np.float64]
    largest_at: NDArray[np.int64]
    _FILL = dict.fromkeys(("run", "flat_runs", "flat_readings", "longest"), (0, np.int64)) | {
        "longest_end": (_NONE, np.int64),
        "largest_at": (_NONE, np.int64),
        "last": (np.nan, np.float64),
        "largest": (0.0, np.float64),
    }

    def __init__(self, flat_readings: int) -> None:
        super().__init__()
        self._flat_min = flat_readings
        self._steps = np.zeros((0, _BINS), np.int32)

    def grow(self, count: int) -> None:
        """See _Grown."""
        super().grow(count)
        if count > len(self._steps):
            fresh = max(count, 2 * len(self._steps)) - len(self._steps)
            self._steps = np.concatenate([self._steps, np.zeros((fresh, _BINS), np.int32)])

    def add(
        self, codes: NDArray[np.int64], ts_us: NDArray[np.int64], values: NDArray[np.float64]
    ) -> None:
        """codes: sorted; the others in order of time for each of them, without nulls."""
        if not len(codes):
            return
        begins, ends = _groups(codes)
        devices = codes[begins]
        steps = np.abs(values - _shifted(values, begins, self.last[devices]))  # NaN at the first
        self._add_runs(codes, ts_us, steps == 0, begins)
        moved = np.flatnonzero(steps > 0)
        bins = np.floor(np.log2(steps[moved]) * 2) + _BINS_DOWN
        bins = np.clip(bins, 0, _BINS - 1).astype(np.int64)
        np.add.at(self._steps, (codes[moved], bins), 1)
        _keep_largest(self.largest, self.largest_at, codes[moved], steps[moved], ts_us[moved])
        self.last[devices] = values[ends]

    def _add_runs(
        self,
        codes: NDArray[np.int64],
        ts_us: NDArray[np.int64],
        same: NDArray[np.bool_],
        begins: NDArray[np.int64],
    ) -> None:
        """same: the value is that of the reading before, which may be in an earlier piece."""
        starts = ~same
        starts[begins] = True
        at = np.flatnonzero(starts)
        ends = np.append(at[1:], len(codes)) - 1
        of = codes[at]
        carried = np.where(same[at], self.run[of], 0)  # only the first of a device goes on
        total = ends - at + 1 + carried
        is_flat, was_flat = total >= self._flat_min, carried >= self._flat_min
        np.add.at(self.flat_runs, of, is_flat & ~was_flat)
        np.add.at(
            self.flat_readings, of, np.where(is_flat, total, 0) - np.where(was_flat, carried, 0)
        )
        _keep_largest(self.longest, self.longest_end, of, total, ts_us[ends])
        self.run[of] = total  # the last run of a device is assigned last

    def jumps(self, devices: int) -> NDArray[np.int64]:
        """How many steps of each device are beyond its limit."""
        steps = self._steps[:devices].astype(np.int64)
        count = steps.sum(axis=1)
        upwards = steps.cumsum(axis=1)
        median = (upwards * 2 >= count[:, None]).argmax(axis=1)
        limit = np.minimum(median + 1 + 2 * int(np.log2(JUMP_FACTOR)), _BINS - 1)
        beyond = count - np.take_along_axis(upwards, limit[:, None] - 1, axis=1)[:, 0]
        return np.where(count >= STEPS_MIN, beyond, 0)

    def of(self, code: int, jumps: int) -> FieldSeries:
        """One device."""
        moved, ran = int(self.largest_at[code]), int(self.longest_end[code])
        return FieldSeries(
            int(self.flat_runs[code]),
            int(self.flat_readings[code]),
            int(self.longest[code]),
            None if ran == _NONE else ran,
            jumps,
            float(self.largest[code]),
            None if moved == _NONE else moved,
        )


def _groups(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last place of each code among sorted ones."""
    begins = np.flatnonzero(np.diff(codes, prepend=-1))
    return begins, np.append(begins[1:], len(codes)) - 1 if len(begins) else begins


def _shifted(column: NDArray[Any], begins: NDArray[np.int64], first: NDArray[Any]) -> NDArray[Any]:
    """What was before each place; before the first of a device, what was kept of it."""
    before = np.empty_like(column)
    before[1:] = column[:-1]
    before[begins] = first
    return before


def _keep_largest(
    largest: NDArray[Any],
    at: NDArray[np.int64],
    codes: NDArray[np.int64],
    values: NDArray[Any],
    ts_us: NDArray[np.int64],
) -> None:
    """Raise each device's largest value, and note when; of equal ones the first stays."""
    before = largest[codes]
    np.maximum.at(largest, codes, values)
    raised = np.flatnonzero((values > before) & (values == largest[codes]))[::-1]
    at[codes[raised]] = ts_us[raised]
