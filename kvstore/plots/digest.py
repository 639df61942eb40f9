"""What a figure shows of a field: bounded summaries of a range, however long.

A scalar field becomes a line: mean, least and greatest per time bin. A field with a shape
becomes the mean and percentiles of each of its elements over the rows. Up to READ_BYTES_MAX of rows
are all read; of more, batches drawn evenly over time, so that each has the same chance. Means
are of all rows read, percentiles of a sample of these. The random numbers are seeded: the same
range gives the same figure.

NaN, NaT and infinite values count as missing. Pure but for reading; no matplotlib here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore.entries import Entry
from kvstore.errors import DamageError, NoFillError, StoreFormatError
from kvstore.reading import Scan, filled
from kvstore.replay import deadlines
from kvstore.schema import Array, Field, Schema
from kvstore.segment import Segment
from kvstore.survey import Span, Survey, rows_inside

READ_BYTES_MAX: Final = 1 << 30  # a second or two
READ_BATCHES_MAX: Final = 200_000  # of the smallest batches: some seconds
SAMPLE_BYTES_MAX: Final = 64 << 20  # rows kept for percentiles, all fields together
ELEMENTS_MAX: Final = 1 << 22  # of one row, such as 2048 x 2048: sums take 16 bytes each
SEED: Final = 1

OnProgress = Callable[[float], object]


class Line(NamedTuple):
    """A scalar field over time; arrays by bin that has values. seconds: after the start.

    breaks: seconds of bins that have rows, none of which has a value.
    """

    field: Field
    breaks: Array
    seconds: Array
    mean: Array
    low: Array
    high: Array
    missing: int


class Elements(NamedTuple):
    """A field with a shape: arrays of that shape, over the rows. percentiles by their number."""

    field: Field
    mean: Array
    percentiles: dict[float, Array]
    sampled_rows: int
    missing: int


class Digest(NamedTuple):
    """Summaries by field, in the order asked for, of how many rows.

    step: one of so many batches was read; 1 is all.
    """

    fields: tuple[Line | Elements, ...]
    rows: int
    step: float


def plottable(field: Field) -> bool:
    """Whether there is a picture of the field: text, shaped dates and huge rows have none."""
    dated = field.np_dtype.kind in "mM"
    elements = int(np.prod(field.shape, dtype=object))
    return not field.is_text and 0 < elements <= ELEMENTS_MAX and (elements == 1 or not dated)


def is_scalar(field: Field) -> bool:
    """Whether a row has one value."""
    return int(np.prod(field.shape, dtype=object)) == 1


def digest(
    scan: Scan,
    survey: Survey,
    fields: Sequence[Field],
    percentiles: Sequence[float],
    on_progress: OnProgress,
) -> Digest:
    """Read the range, or an even part of it, once."""
    step = _step(scan, survey, fields)
    sums = _start(survey, fields, step)
    rows = 0
    for number, (segment, entry) in _drawn(scan, step):
        on_progress(number / survey.batches)
        found = _fetched(scan, segment, entry, fields)
        if found is None:
            continue
        times, columns = found
        rows += len(times)
        seconds = deadlines(times, survey.span.start_ns)
        for each, column in zip(sums, columns, strict=True):
            if column is None:
                each.add_missing(seconds)
            else:
                each.add(seconds, column)
    return Digest(tuple(each.result(percentiles) for each in sums), rows, step)


def _fetched(
    scan: Scan, segment: Segment, entry: Entry, fields: Sequence[Field]
) -> tuple[Array, list[Array | None]] | None:
    """Times and columns of a batch's rows in the range; None where damaged or there are none."""
    inside = rows_inside(scan, segment, entry)
    if inside is None:
        return None
    try:
        columns = [column_of(scan.info.schema, segment, entry, field) for field in fields]
    except (DamageError, StoreFormatError) as error:
        scan.damaged(entry, error)
        return None
    rows, times = inside
    return times, [None if column is None else column[rows] for column in columns]


def column_of(schema: Schema, segment: Segment, entry: Entry, field: Field) -> Array | None:
    """One field of a whole batch; None where it was added later and has no fill."""
    try:
        return filled(schema, segment, entry, [schema.number(field.name)])[0]
    except NoFillError:
        return None


def _step(scan: Scan, survey: Survey, fields: Sequence[Field]) -> float:
    """Of how many batches one is read; 1.0 is all."""
    row_bytes = sum(field.row_bytes for field in fields) + scan.info.schema.time_field.row_bytes
    wanted = survey.total_rows * row_bytes
    step = max(wanted / READ_BYTES_MAX, survey.batches / READ_BATCHES_MAX, 1.0)
    return min(step, survey.batches)  # one at least


def _start(survey: Survey, fields: Sequence[Field], step: float) -> list[_LineSums | _ElementSums]:
    shaped = [field for field in fields if not is_scalar(field)]
    share = SAMPLE_BYTES_MAX // max(len(shaped), 1)
    rows = survey.total_rows / step
    return [
        _LineSums(field, survey.span)
        if is_scalar(field)
        else _ElementSums(field, max(share // field.row_bytes, 1), rows)
        for field in fields
    ]


def _drawn(scan: Scan, step: float) -> Iterator[tuple[int, tuple[Segment, Entry]]]:
    """Batches to read, numbered: one at random of each run of ``step``."""
    rng = np.random.default_rng(SEED)
    begin, chosen = 0.0, int(rng.random() * step)
    for number, found in enumerate(scan.entries()):
        if number == chosen:
            yield number, found
            begin += step
            chosen = max(number + 1, int(begin + rng.random() * step))


class _LineSums:
    """Sums of a scalar field by time bin."""

    def __init__(self, field: Field, span: Span):
        self._field = field
        self._span = span
        self._count = np.zeros(span.bins, np.int64)
        self._seconds = np.zeros(span.bins)
        self._sum = np.zeros(span.bins)
        self._low = np.full(span.bins, np.inf)
        self._high = np.full(span.bins, -np.inf)
        self._lacking = np.zeros(span.bins, bool)
        self._missing = 0

    def add(self, seconds: Array, column: Array) -> None:
        """Take in rows in the order of time."""
        values = numbers_of(column.reshape(len(column)))
        there = np.isfinite(values)
        if not there.all():
            self.add_missing(seconds[~there])
            seconds, values = seconds[there], values[there]
        if not len(values):
            return
        bins = self._span.bins_of(seconds)
        starts = np.flatnonzero(np.diff(bins, prepend=-1))
        at = bins[starts]
        self._count[at] += np.diff(starts, append=len(bins))
        self._seconds[at] += np.add.reduceat(seconds, starts)
        self._sum[at] += np.add.reduceat(values, starts)
        self._low[at] = np.minimum(self._low[at], np.minimum.reduceat(values, starts))
        self._high[at] = np.maximum(self._high[at], np.maximum.reduceat(values, starts))

    def add_missing(self, seconds: Array) -> None:
        """Take in rows without a value."""
        self._missing += len(seconds)
        self._lacking[self._span.bins_of(seconds)] = True

    def result(self, _: Sequence[float]) -> Line:
        """The line so far."""
        at = np.flatnonzero(self._count)
        edges = self._span.edges_s()
        breaks = ((edges[1:] + edges[:-1]) / 2)[self._lacking & (self._count == 0)]
        count = self._count[at]
        seconds, mean = self._seconds[at] / count, self._sum[at] / count
        ends = self._low[at], self._high[at]
        return Line(self._field, breaks, seconds, mean, *ends, self._missing)


class _ElementSums:
    """Sums of each element of a field, and a sample of its rows."""

    def __init__(self, field: Field, sample_rows: int, rows: float):
        self._field = field
        self._sum = np.zeros(field.shape)
        self._count: Any = 0  # an array once a value is missing
        self._missing = 0
        self._share = min(sample_rows / rows, 1.0)
        self._due = 0.0
        self._sample: list[Array] = []
        self._rng = np.random.default_rng(SEED)

    def add(self, _: Array, column: Array) -> None:
        """Take in rows."""
        self._keep_some(column)
        if column.dtype.kind not in "fc":
            self._sum += column.sum(axis=0, dtype=np.float64)
            self._count = self._count + len(column)
            return
        values = numbers_of(column)
        there = np.isfinite(values)
        self._missing += int(np.count_nonzero(~there))
        self._sum += np.where(there, values, 0).sum(axis=0)
        self._count = self._count + np.count_nonzero(there, axis=0)

    def add_missing(self, seconds: Array) -> None:
        """Take in rows without a value."""
        self._missing += len(seconds) * self._sum.size

    def result(self, percentiles: Sequence[float]) -> Elements:
        """The mean and the percentiles so far."""
        count = np.broadcast_to(np.asarray(self._count), self._sum.shape)
        mean = np.where(count > 0, self._sum / np.maximum(count, 1), np.nan)
        found: dict[float, Array] = {}
        sampled = sum(map(len, self._sample))
        if sampled and self._field.np_dtype.kind != "b":
            found = _percentiles(np.concatenate(self._sample), percentiles)
        return Elements(self._field, mean, found, sampled, self._missing)

    def _keep_some(self, column: Array) -> None:
        self._due += len(column) * self._share
        take = min(int(self._due), len(column))
        if not self._sample:
            take = max(take, 1)  # the first row of all, so that there is one
        self._due = max(self._due - take, 0.0)
        if take == len(column):
            self._sample.append(column)
        elif take:
            self._sample.append(column[self._rng.choice(len(column), take, replace=False)])


def _percentiles(rows: Array, wanted: Sequence[float]) -> dict[float, Array]:
    """The value at each rank, of those that are there; NaN where none is."""
    values = rows if rows.dtype.kind in "iu" else numbers_of(rows)
    if values.dtype.kind == "f":
        values[~np.isfinite(values)] = np.nan  # sorts to the end
    values = np.sort(values, axis=0)
    count = np.count_nonzero(~np.isnan(values), axis=0) if values.dtype.kind == "f" else len(values)
    last = np.maximum(count - 1, 0)
    found = {}
    for each in wanted:
        rank = np.broadcast_to(np.rint(last * (each / 100)).astype(np.intp), values.shape[1:])
        found[each] = np.take_along_axis(values, rank[np.newaxis], axis=0)[0].astype(np.float64)
    return found


def numbers_of(column: Array) -> Array:
    """Values as new float64: a complex one's magnitude, dates in s since 1970, durations by count.

    NaT becomes NaN.
    """
    kind = column.dtype.kind
    if kind == "c":
        return np.abs(column).astype(np.float64)
    if kind not in "mM":
        return column.astype(np.float64)
    missing = np.isnat(column)
    if kind == "M":
        values = column.astype("M8[us]").view(np.int64) / 1e6
    else:
        values = column.view(np.int64).astype(np.float64)
    values[missing] = np.nan
    return values
