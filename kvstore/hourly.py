"""A stream on the grid: its rows as hour files, ``{stream}/{year}/{month}/{day}/{hour}.parquet``.

The same grid, filling and files as those of the day files. Fields of floats become the mean of a
bin's rows; integers, bools and texts the last of them, since a mean of codes is no code. A field
that has the name of a measure is treated as that measure. NaN and None are no values. Fields of
more than one value a row have no place on a grid.

Rows are taken day by day, with what is held from the days before carried along: memory is that
of a few days' bins and one batch, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore import libc
from kvstore.dayfiles import hours, manifest
from kvstore.dayfiles.grid import DAY_NS, Bins, Lattice, Settings, filled
from kvstore.dayfiles.measures import Column, Measure, column
from kvstore.dayfiles.series import escaped
from kvstore.errors import DayfilesError, SchemaError
from kvstore.schema import Batch, Field
from kvstore.stream import Stream
from kvstore.timestamps import time_to_ns, to_time

Floats = npt.NDArray[np.float64]
_NUMBERS: Final = "fiub"


class Written(NamedTuple):
    """What an export did. left_out: fields that have no place on a grid."""

    rows: int
    hours: int
    hours_changed: int
    left_out: tuple[str, ...]


def export(
    stream: Stream,
    root: Path,
    settings: Settings,
    *,
    start: Any = None,
    stop: Any = None,
    fields: Sequence[str] | None = None,
) -> Written:
    """Write all hours of a range of the stream that have rows or values held into them."""
    if (root / manifest.FOLDER).exists():
        raise DayfilesError(
            f"{root} is an output of kvstore dayfiles convert, whose next run removes what it did "
            "not make: give the export a folder of its own"
        )
    chosen, left_out = _fields(stream, fields)
    root.mkdir(parents=True, exist_ok=True)
    columns = [_column(field) for field in chosen]
    dtype = stream.schema.time_dtype
    first = None if start is None else to_time(start, dtype, side="start")
    last = None if stop is None else to_time(stop, dtype, side="stop")
    days = _Days(stream, chosen, columns, settings.checked(), (first, last))
    tree = escaped(stream.name)
    count = changed = 0
    for bins, grid in days.bins(tree):
        whole = filled(bins, grid, settings)
        for hour in hours.hours(whole, grid, columns, days.texts, settings):
            path = hours.path_of(root, tree, hour.start_ns)
            changed += hours.put(path, hours.encoded(hour.table))
            count += 1
    if count:
        libc.sync_filesystem(root)
    return Written(days.rows, count, changed, left_out)


def _fields(stream: Stream, names: Sequence[str] | None) -> tuple[list[Field], tuple[str, ...]]:
    schema = stream.schema
    wanted = [f for f in schema.fields if f.name != schema.time and (not names or f.name in names)]
    unknown = set(names or ()) - set(schema.names)
    if unknown:
        raise SchemaError(f"no field {', '.join(sorted(unknown))} in stream {stream.name!r}")
    chosen = [f for f in wanted if _fits(f)]
    if not chosen:
        has = ", ".join(_described(f) for f in schema.fields if f.name != schema.time)
        raise SchemaError(
            f"stream {stream.name!r}: no field of single numbers or texts for a grid; it has "
            f"{has or 'nothing but times'}. Without --layout hourly all of it can be exported to a "
            f"file, such as -o {escaped(stream.name)}.parquet"
        )
    return chosen, tuple(f.name for f in wanted if not _fits(f))


def _fits(field: Field) -> bool:
    return not field.shape and (field.is_text or field.np_dtype.kind in _NUMBERS)


def _described(field: Field) -> str:
    shape = " x ".join(map(str, field.shape))
    return f"{field.name} ({field.dtype}{f', {shape} a row' if shape else ''})"


def _column(field: Field) -> Column:
    known = column(field.name).measure
    if not known.is_open and known.is_text == field.is_text:
        return Column(field.name, known._replace(unit=field.unit or known.unit))
    is_mean = not field.is_text and field.np_dtype.kind == "f"
    measure = Measure(
        field.name,
        "system",
        field.unit,
        "continuous" if is_mean else "step",
        "mean" if is_mean else "last",
        is_text=field.is_text,
    )
    return Column(field.name, measure)


class _Sums:
    """A day's bins while its rows come in."""

    def __init__(self, columns: int, bins: int) -> None:
        self.totals = np.zeros((columns, bins))
        self.counts = np.zeros((columns, bins), np.int64)
        self.lasts = np.full((columns, bins), np.nan)
        self.last_ns = np.full((columns, bins), np.iinfo(np.int64).min)
        self.seen = np.zeros((columns, bins), np.bool_)

    def add(self, row: int, places: npt.NDArray[np.int64], times: Any, values: Floats) -> None:
        """Rows of one column, in the order of their times."""
        bins = self.totals.shape[1]
        there = ~np.isnan(values)
        places, times, values = places[there], times[there], values[there]
        self.seen[row, places] = True
        # One by one onto the sums so far: else a mean's last bit would tell batches apart.
        np.add.at(self.totals[row], places, values)
        self.counts[row] += np.bincount(places, minlength=bins)
        ends = np.flatnonzero(np.diff(places, append=-1))  # the last row of each bin
        newer = ends[times[ends] >= self.last_ns[row, places[ends]]]
        self.lasts[row, places[newer]] = values[newer]
        self.last_ns[row, places[newer]] = times[newer]

    def values(self, columns: Sequence[Column]) -> Floats:
        """Each bin's value by its measure's rule."""
        is_last = np.array([[c.measure.rule == "last"] for c in columns])
        with np.errstate(invalid="ignore"):
            return np.where(is_last, self.lasts, self.totals / self.counts)


class _Days:
    """The days of a stream, one after the other, each with the bins before and behind it."""

    def __init__(
        self,
        stream: Stream,
        fields: Sequence[Field],
        columns: Sequence[Column],
        settings: Settings,
        span: tuple[Any, Any],
    ) -> None:
        self.rows = 0
        self.texts: list[str] = []
        self._codes: dict[str, int] = {}
        self._stream = stream
        self._fields = fields
        self._columns = columns
        self._settings = settings
        self._span = span

    def bins(self, tree: str) -> Iterator[tuple[Bins, Lattice]]:
        """Each day's bins, with the margins that matter to it."""
        hold_s = max(column.measure.hold_s for column in self._columns)
        margin = self._settings.margin_bins(hold_s)
        tail = margin if self._settings.fill == "linear" else 0
        per_day = DAY_NS // self._settings.every_ns
        # Days are kept as long as a later one needs them, and read as early as one needs them.
        before, behind = -(-margin // per_day), -(-tail // per_day)
        kept: dict[int, Bins] = {}
        for day in self._day_numbers(before):
            for number in range(day - before, day + behind + 1):
                if number not in kept:
                    kept[number] = self._day(tree, number, per_day)
            kept = {number: bins for number, bins in kept.items() if number >= day - before}
            group = [kept[number] for number in range(day - before, day + behind + 1)]
            if not any(bins.seen.any() for bins in group):
                continue
            cut = slice(before * per_day - margin, (before + 1) * per_day + tail)
            values = np.concatenate([bins.values for bins in group], axis=1)[:, cut]
            seen = np.concatenate([bins.seen for bins in group], axis=1)[:, cut]
            grid = Lattice(day * DAY_NS, self._settings.every_ns, margin, per_day, tail)
            yield Bins(tree, self._columns, values, seen), grid

    def _day_numbers(self, reach: int) -> Iterator[int]:
        """Days in which there are rows, or values held from days before."""
        found = self._stream.span()
        if found is None:
            return
        start, stop = self._span
        first = found[0] if start is None else max(found[0], start)
        last = found[1] if stop is None else min(found[1], stop)
        dtype = self._stream.schema.time_dtype
        days = [time_to_ns(end, dtype) // DAY_NS for end in (first, last)]
        yield from range(days[0], days[1] + reach + 1)

    def _day(self, tree: str, day: int, per_day: int) -> Bins:
        sums = _Sums(len(self._columns), per_day)
        for batch in self._batches(day):
            times = _times_ns(batch[self._stream.schema.time])
            places = (times - day * DAY_NS) // self._settings.every_ns
            self.rows += len(times)
            for row, field in enumerate(self._fields):
                sums.add(row, places, times, self._numbers(batch[field.name], field))
        return Bins(tree, self._columns, sums.values(self._columns), sums.seen)

    def _batches(self, day: int) -> Iterator[Batch]:
        start, stop = day * DAY_NS, (day + 1) * DAY_NS
        names = [self._stream.schema.time, *(field.name for field in self._fields)]
        for batch in self._stream.read(
            start, stop, unit="ns", fields=names, inclusive="left", ordered=True
        ):
            times = batch[names[0]]
            kept = self._within(times)
            yield batch if kept.all() else {name: batch[name][kept] for name in names}

    def _within(self, times: Any) -> npt.NDArray[np.bool_]:
        """Which rows are in the range that was asked for."""
        kept = np.ones(len(times), np.bool_)
        start, stop = self._span
        if start is not None:
            kept &= times >= start
        if stop is not None:
            kept &= times <= stop
        return kept

    def _numbers(self, values: Any, field: Field) -> Floats:
        if not field.is_text:
            return np.asarray(values, np.float64)
        return np.array([self._code(text) for text in values], np.float64)

    def _code(self, text: str | None) -> float:
        if text is None:
            return np.nan
        if text not in self._codes:
            self._codes[text] = len(self.texts)
            self.texts.append(text)
        return float(self._codes[text])


def _times_ns(times: Any) -> npt.NDArray[np.int64]:
    """Times of a stream as int64 ns, by the same function as the stream's own keys."""
    if times.dtype.kind == "M":
        found: npt.NDArray[np.int64] = times.astype("<M8[ns]").view(np.int64)
        return found
    if times.dtype.kind == "i":
        return np.asarray(times, np.int64)
    distinct, codes = np.unique(times, return_inverse=True)
    return np.array([time_to_ns(time, distinct.dtype) for time in distinct], np.int64)[codes]
