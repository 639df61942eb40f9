"""From a time range to batches of arrays: merge segments, cut at the ends, fill, order.

    range -> segments that overlap it -> index entries in key order -> blocks -> batches

A read is a snapshot: batches committed after it began are left out. Memory is bounded by one
batch (and, with ordered=True, by those that overlap it). Nothing is held between two batches
but open files: a reader may pause for hours and pins no space in the active segment.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from kvstore.errors import DamageError, SchemaError
from kvstore.schema import Array, Batch, Schema
from kvstore.segment import Entry, OnDamage, Segment, State, StreamInfo, Totals
from kvstore.timestamps import (
    TimeLike,
    Unit,
    encode_key,
    format_time,
    plain_time,
    time_bounds,
    time_to_ns,
    to_time,
)

Inclusive = Literal["both", "left"]
_BEFORE_ALL: Final = b""


class Range(NamedTuple):
    """[start, stop] in the stream's own time type, as plain numbers; open_end leaves out stop."""

    start: Any
    stop: Any
    start_ns: int
    stop_ns: int
    open_end: bool

    def overlaps(self, first: Any, last: Any) -> bool:
        """Whether rows from first to last can lie in the range."""
        return bool(last >= self.start and (first < self.stop if self.open_end else self.below(first)))

    def below(self, time: Any) -> bool:
        """Whether a time is not past the end."""
        return bool(time < self.stop if self.open_end else time <= self.stop)

    def covers(self, first: Any, last: Any) -> bool:
        """Whether all rows from first to last lie in the range."""
        return bool(first >= self.start and self.below(last))

    def rows(self, times: Array) -> slice:
        """Which of these sorted times lie in the range."""
        plain = times.view(np.int64) if times.dtype.kind == "M" else times
        low = int(np.searchsorted(plain, self.start, "left"))
        high = int(np.searchsorted(plain, self.stop, "left" if self.open_end else "right"))
        return slice(low, max(low, high))


def make_range(
    schema: Schema,
    start: TimeLike | None,
    stop: TimeLike | None,
    *,
    unit: Unit | None,
    inclusive: Inclusive,
) -> Range:
    """A user's range ends, exact in the stream's own time type; None is the very end."""
    if inclusive not in ("both", "left"):
        raise SchemaError(f"inclusive={inclusive!r}: use 'both' for [start, stop], 'left' for [)")
    dtype = schema.time_dtype
    low, high = (np.array(end).astype(dtype)[()] for end in time_bounds(dtype))
    if start is not None:
        low = to_time(start, dtype, side="start", unit=unit)
    if stop is not None:
        high = to_time(stop, dtype, side="stop", unit=unit)
    return Range(
        plain_time(low),
        plain_time(high),
        time_to_ns(low, dtype),
        time_to_ns(high, dtype),
        inclusive == "left" and stop is not None,
    )


class Scan(NamedTuple):
    """What a read works on: one stream of a store as of one commit."""

    info: StreamInfo
    state: State
    range: Range
    open_segment: Callable[[int], Segment]
    on_damage: OnDamage

    def entries(self) -> Iterator[tuple[Segment, Entry]]:
        """The index entries that overlap the range, in key order over all segments.

        A segment is opened only when its first batch may be next, closed after its last.
        """
        stream_id = self.info.stream_id
        end = self.state.stream_totals(stream_id).next_sequence
        heap: list[Any] = [
            (first, number, None, None, None) for first, number in self._candidates()
        ]
        heapq.heapify(heap)
        try:
            while heap:
                _, number, segment, entry, rest = heapq.heappop(heap)
                if segment is None:
                    segment = self.open_segment(number)
                    rest = segment.entries(
                        stream_id, self.range.start_ns, self.range.stop_ns,
                        on_damage=self.on_damage,
                    )  # fmt: skip
                elif entry.sequence < end and self.range.overlaps(entry.first, entry.last):
                    yield segment, entry
                following = next(rest, None)
                if following is None:
                    segment.close()
                else:
                    heapq.heappush(heap, (following.order, number, segment, following, rest))
        finally:
            for _, _, segment, _, _ in heap:
                if segment is not None:
                    segment.close()

    def _candidates(self) -> Iterator[tuple[bytes, int]]:
        stream_id, dtype = self.info.stream_id, self.info.schema.time_dtype
        held = [(number, sealed.totals) for number, sealed in self.state.sealed.items()]
        for number, per_stream in [*held, (self.state.number, self.state.totals)]:
            totals = per_stream.get(stream_id, Totals())
            if totals.rows and self.range.overlaps(totals.first, totals.last):
                first = np.array(totals.first).astype(dtype)[()]
                yield encode_key(time_to_ns(first, dtype), 0), number

    def damaged(self, entry: Entry, error: DamageError) -> None:
        """Report a batch that cannot be read, with all that is known of it."""
        dtype = self.info.schema.time_dtype
        ends = [format_time(np.array(t).astype(dtype)[()], dtype) for t in (entry.first, entry.last)]
        message = (
            f"stream {self.info.name!r}, {entry.rows} rows from {ends[0]} to {ends[1]} "
            f"cannot be read: {error}"
        )
        report = DamageError(message)
        report.__cause__ = error
        self.on_damage(report)

    def times(self, segment: Segment, entry: Entry, *, verify: bool = True) -> Array:
        """The time column of a batch."""
        number = self.info.schema.number(self.info.schema.time)
        wanted = [(number, self.info.schema.fields[number])]
        return segment.fetch(entry, wanted, verify=verify)[0]


def read(
    scan: Scan, fields: Sequence[str] | None, *, ordered: bool, verify: bool
) -> Iterator[Batch]:
    """The batches of a scan, with these fields, in key order or strictly merged by row."""
    names = scan.info.schema.names if fields is None else tuple(fields)
    numbers = [scan.info.schema.number(name) for name in names]
    if not ordered:
        return (
            dict(zip(names, columns, strict=True))
            for _, columns in _columns(scan, numbers, verify=verify)
        )
    return _merged(scan, names, numbers, verify=verify)


def count(scan: Scan) -> int:
    """Rows in the range: index entries, and the time column where a batch straddles an end."""
    rows = 0
    for segment, entry in scan.entries():
        if scan.range.covers(entry.first, entry.last):
            rows += entry.rows
            continue
        try:
            inside = scan.range.rows(scan.times(segment, entry))
        except DamageError as error:
            scan.damaged(entry, error)
        else:
            rows += inside.stop - inside.start
    return rows


def _columns(
    scan: Scan, numbers: Sequence[int], *, verify: bool
) -> Iterator[tuple[Entry, list[Array]]]:
    for segment, entry in scan.entries():
        try:
            columns = _fetch(scan, segment, entry, numbers, verify=verify)
        except DamageError as error:
            scan.damaged(entry, error)
        else:
            if columns is not None:
                yield entry, columns


def _fetch(
    scan: Scan, segment: Segment, entry: Entry, numbers: Sequence[int], *, verify: bool
) -> list[Array] | None:
    """The columns of one batch, cut at the range's ends; None where no row is inside."""
    fields, inside = scan.info.schema.fields, slice(None)
    if not scan.range.covers(entry.first, entry.last):
        inside = scan.range.rows(scan.times(segment, entry, verify=verify))
        if inside.start == inside.stop:
            return None
    there = [(number, fields[number]) for number in numbers if number < len(entry.blocks)]
    found = dict(zip(there, segment.fetch(entry, there, verify=verify), strict=True))
    return [
        found[number, fields[number]][inside]
        if number < len(entry.blocks)
        else fields[number].filled(entry.rows)[inside]
        for number in numbers
    ]


def _merged(
    scan: Scan, names: Sequence[str], numbers: Sequence[int], *, verify: bool
) -> Iterator[Batch]:
    """Rows strictly by time, then arrival: hold back what a later batch may still precede."""
    time = scan.info.schema.number(scan.info.schema.time)
    held: list[Array] | None = None  # sequence and time of each row, then the fields asked for
    for entry, columns in _columns(scan, [time, *numbers], verify=verify):
        times, sequences = columns[0], np.full(len(columns[0]), entry.sequence, np.uint64)
        arrived = [sequences, *columns]
        if held is None:
            held = arrived
            continue
        ready = int(np.searchsorted(held[1], times[0], "left"))
        if ready:
            yield dict(zip(names, (column[:ready] for column in held[2:]), strict=True))
        rest = [
            np.concatenate([old[ready:], new]) for old, new in zip(held, arrived, strict=True)
        ]
        order = np.lexsort((rest[0], rest[1]))
        held = [column[order] for column in rest]
    if held is not None:
        yield dict(zip(names, held[2:], strict=True))


def limited(batches: Iterator[Batch], rows: int) -> Iterator[Batch]:
    """The first rows of a read."""
    for batch in batches:
        length = len(next(iter(batch.values())))
        yield batch if length <= rows else {name: a[:rows] for name, a in batch.items()}
        rows -= length
        if rows <= 0:
            return


