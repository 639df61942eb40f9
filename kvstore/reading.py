"""From a time range to batches of arrays: merge segments, cut at the ends, fill, order.

    range -> segments that overlap it -> index entries in key order -> blocks -> batches

A read is a snapshot: batches committed after it began are left out. Memory is bounded by one
batch (and, with ordered=True, by those that overlap it). Nothing is held between two batches
but open files: a reader may pause for hours and pins no space in the active segment.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from kvstore.entries import Entry
from kvstore.errors import DamageError, KvstoreError, SchemaError, StoreFormatError
from kvstore.schema import Array, Batch, Schema
from kvstore.segment import OnDamage, Segment
from kvstore.state import State, StreamInfo, Totals
from kvstore.timestamps import (
    TimeLike,
    Unit,
    beyond,
    encode_key,
    format_time,
    plain_time,
    time_bounds,
    time_to_ns,
    to_time,
    typed_time,
)

Inclusive = Literal["both", "left"]
_SOON_BYTES: Final = 1 << 20  # less is all decompressed in the time that a second piece costs


class Range(NamedTuple):
    """[start, stop] in the stream's own time type, as plain numbers; open_end leaves out stop."""

    start: Any
    stop: Any
    start_ns: int
    stop_ns: int
    open_end: bool

    def overlaps(self, first: Any, last: Any) -> bool:
        """Whether rows from first to last can lie in the range."""
        return bool(last >= self.start) and self.below(first)

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
    low, high = first, last = [typed_time(end, dtype) for end in time_bounds(dtype)]
    starts = stops = 0  # 1 after, -1 before all that the stream can hold
    if start is not None:
        low = to_time(start, dtype, side="start", unit=unit)
        starts = beyond(start, dtype, unit=unit)
    if stop is not None:
        side: Literal["start", "stop"] = "start" if inclusive == "left" else "stop"
        high = to_time(stop, dtype, side=side, unit=unit)
        stops = beyond(stop, dtype, unit=unit)
    if starts > 0 or stops < 0:
        low, high = last, first  # empty: the outermost row, where the end was clamped to, is out
    return Range(
        plain_time(low),
        plain_time(high),
        time_to_ns(low, dtype),
        time_to_ns(high, dtype),
        inclusive == "left" and stop is not None and stops <= 0,
    )


class Scan(NamedTuple):
    """What a read works on: one stream of a store as of one commit."""

    info: StreamInfo
    state: State
    range: Range
    open_segment: Callable[[int], Segment]
    is_dropped: Callable[[int], bool]
    on_damage: OnDamage

    def entries(self) -> Iterator[tuple[Segment, Entry]]:
        """The index entries that overlap the range, in key order over all segments.

        A segment is opened only when its first batch may be next, closed after its last.
        """
        end = self.state.next_sequence(self.info.stream_id)
        candidates = self._candidates()
        coming = next(candidates, None)
        heap: list[Any] = []
        try:
            while heap or coming:
                while coming and (not heap or coming[0] <= heap[0][0]):
                    first, number, totals = coming
                    heapq.heappush(
                        heap, (first, number, None, self._of_segment(number, totals, end))
                    )
                    coming = next(candidates, None)
                _, number, found, rest = heap[0]
                if found is not None:
                    yield found
                found = next(rest, None)
                if found is None:
                    heapq.heappop(heap)
                else:
                    heapq.heapreplace(heap, (found[1].order, number, found, rest))
        finally:
            for _, _, _, rest in heap:
                rest.close()

    def _candidates(self) -> Iterator[tuple[bytes, int, Totals]]:
        """The segments that may have such entries, by their first time; no key comes before it.

        Each one's key is made only once it is its turn: there may be thousands.
        """
        dtype = self.info.schema.time_dtype
        found = [
            (totals.first, number, totals)
            for number, totals in self.state.per_segment(self.info.stream_id)
            if self.range.overlaps(totals.first, totals.last)
        ]
        for first, number, totals in sorted(found):
            yield encode_key(time_to_ns(first, dtype), 0), number, totals

    def _of_segment(self, number: int, totals: Totals, end: int) -> Iterator[tuple[Segment, Entry]]:
        """One segment's entries; what is wrong with the segment as a whole goes to on_damage."""
        seen = 0

        def unreadable(error: DamageError) -> None:
            nonlocal seen
            seen += 1
            self._report(str(error), error)

        try:
            segment = self.open_segment(number)
        except StoreFormatError as error:
            if not self.is_dropped(number):  # else it is as if the read had begun later
                self._report(self._rows(totals) + f" cannot be read: {error}", error)
            return
        try:
            for entry in segment.entries(
                self.info.stream_id, self.range.start_ns, self.range.stop_ns, on_damage=unreadable
            ):
                if entry.sequence < end and self.range.overlaps(entry.first, entry.last):
                    seen += 1
                    yield segment, entry
        except StoreFormatError as error:
            self._report(self._rows(totals) + f" cannot all be read: {error}", error)
        else:
            if seen != totals.batches and self.range.covers(totals.first, totals.last):
                self._report(
                    self._rows(totals) + f" cannot all be read: the index of segment {number} "
                    f"shows {seen} batches, expected {totals.batches}"
                )
        finally:
            segment.close()

    def damaged(self, entry: Entry, error: KvstoreError, given: int = 0) -> None:
        """Report a batch that cannot be read, with all that is known of it.

        given: how many of its rows have been handed out before.
        """
        self.on_damage(damage(self.info.name, self.info.schema, entry, error, given))

    def _rows(self, part: Entry | Totals) -> str:
        return rows_text(self.info.schema, part)

    def _report(self, message: str, cause: KvstoreError | None = None) -> None:
        report = DamageError(f"stream {self.info.name!r}, {message}")
        report.__cause__ = cause
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
            for _, columns in _columns(scan, numbers, verify=verify, soon=True)
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
        except (DamageError, StoreFormatError) as error:
            scan.damaged(entry, error)
        else:
            rows += inside.stop - inside.start
    return rows


def _columns(
    scan: Scan, numbers: Sequence[int], *, verify: bool, soon: bool = False
) -> Iterator[tuple[Entry, list[Array]]]:
    """The columns of batch after batch. soon: of the first one, a short piece comes first."""
    for segment, entry in scan.entries():
        given = 0
        try:
            for columns in _pieces(scan, segment, entry, numbers, verify=verify, soon=soon):
                yield entry, columns
                given, soon = given + len(columns[0]), False
        except (DamageError, StoreFormatError) as error:
            scan.damaged(entry, error, given)


def _pieces(
    scan: Scan, segment: Segment, entry: Entry, numbers: Sequence[int], *, verify: bool, soon: bool
) -> Iterator[list[Array]]:
    """The columns of one batch, cut at the range's ends: nothing, all at once, or in two pieces."""
    schema = scan.info.schema
    inside, times = slice(0, entry.rows), None
    if not scan.range.covers(entry.first, entry.last):
        times = scan.times(segment, entry, verify=verify)
        inside = scan.range.rows(times)
    time = schema.number(schema.time)
    others = [number for number in numbers if times is None or number != time]
    middle = _first_stop(entry, numbers, inside) if soon else inside.start
    for part in (slice(inside.start, middle), slice(middle, inside.stop)):
        if part.start < part.stop:
            columns = iter(filled(schema, segment, entry, others, part=part, verify=verify))
            # Times asked for twice (ordered=True) are two arrays, as of whole batches: cut and
            # copied, so that a few rows do not hold the memory of all.
            yield [
                next(columns) if times is None or number != time else times[part].copy()
                for number in numbers
            ]


def _first_stop(entry: Entry, numbers: Sequence[int], inside: slice) -> int:
    """Where the frame ends that rows begin in, if much more than it is asked for."""
    wanted = [number for number in numbers if number < len(entry.blocks)]
    if sum(entry.blocks[number][1] for number in wanted) <= _SOON_BYTES:
        return int(inside.start)
    ends = [accumulate(rows for rows, *_ in entry.frames_of(number)) for number in wanted]
    later = [end for each in ends for end in each if inside.start < end < inside.stop]
    return min(later, default=int(inside.start))


def filled(
    schema: Schema,
    segment: Segment,
    entry: Entry,
    numbers: Sequence[int],
    *,
    part: slice = slice(None),
    verify: bool = True,
) -> list[Array]:
    """The columns of a batch, or part of its rows; fields that it does not have are filled."""
    there = [number for number in numbers if number < len(entry.blocks)]
    wanted = [(number, schema.fields[number]) for number in there]
    found = dict(zip(there, segment.fetch(entry, wanted, part=part, verify=verify), strict=True))
    rows = len(range(entry.rows)[part])
    return [
        found[number] if number in found else schema.fields[number].filled(rows)
        for number in numbers
    ]


def damage(
    stream: str, schema: Schema, entry: Entry, error: KvstoreError, given: int = 0
) -> DamageError:
    """The report of a batch that cannot be read, with all that is known of it."""
    rows = (f"all but the first {given} of " if given else "") + rows_text(schema, entry)
    report = DamageError(f"stream {stream!r}, {rows} cannot be read: {error}")
    report.__cause__ = error
    return report


def rows_text(schema: Schema, part: Entry | Totals) -> str:
    """How many rows a batch or segment has, and their span."""
    dtype = schema.time_dtype
    ends = [format_time(typed_time(t, dtype), dtype) for t in (part.first, part.last)]
    return f"{part.rows} rows from {ends[0]} to {ends[1]}"


def _merged(
    scan: Scan, names: Sequence[str], numbers: Sequence[int], *, verify: bool
) -> Iterator[Batch]:
    """Rows strictly by time, then arrival: hold back what a later batch may still precede.

    What overlaps is sorted anew only once as much has arrived as was held back: sorting at
    each batch took time quadratic in the number of batches that overlap.
    """
    time = scan.info.schema.number(scan.info.schema.time)
    held: list[Array] = []  # sequence and time of each row, then the fields asked for; sorted
    arrived: list[list[Array]] = []
    for entry, columns in _columns(scan, [time, *numbers], verify=verify):
        safe_until = _safe_until(typed_time(entry.first, scan.info.schema.time_dtype))
        if held and not arrived and held[1][-1] < safe_until:
            yield dict(zip(names, held[2:], strict=True))
            held = []
        sequences = np.full(len(columns[0]), entry.sequence, np.uint64)
        arrived.append([sequences, *columns])
        if held and sum(len(part[0]) for part in arrived) < len(held[0]):
            continue
        held, arrived = _in_order([held, *arrived]), []
        ready = int(np.searchsorted(held[1], safe_until, "left"))
        if ready:
            yield dict(zip(names, (column[:ready] for column in held[2:]), strict=True))
            held = [column[ready:] for column in held]
    if held:
        yield dict(zip(names, _in_order([held, *arrived])[2:], strict=True))


def _in_order(parts: Sequence[list[Array]]) -> list[Array]:
    """Columns of sequence, time and more, joined and sorted by time, then sequence."""
    parts = [part for part in parts if part]
    if len(parts) == 1:
        return parts[0]
    joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    order = np.lexsort((joined[0], joined[1]))
    return [column[order] for column in joined]


def _safe_until(first: Any) -> Any:
    """The time before which rows can be handed out, as no later batch begins earlier.

    first: where the batch begins, which may be before the range, and its rows inside far later.
    Batches come in the order of their keys: of floats that share a ns, the later may be less.
    """
    return first - 2e-9 if first.dtype.kind == "f" else first


def limited(batches: Iterator[Batch], rows: int) -> Iterator[Batch]:
    """The first rows of a read."""
    for batch in batches:
        length = len(next(iter(batch.values())))
        yield batch if length <= rows else {name: a[:rows] for name, a in batch.items()}
        rows -= length
        if rows <= 0:
            return
