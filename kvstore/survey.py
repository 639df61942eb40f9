"""How the rows of a range lie in time: rows per bin and silences, from the index.

The index is enough for a batch inside one bin; of one that straddles bins or the range's ends
the time column is read, so the counts are exact. ``rough_rates`` is the quick one, for `info`:
it reads the index alone, and of a long stream only a little of that. Memory is a few arrays of
bins, however long the range. Reads only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise, takewhile
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore.entries import Entry
from kvstore.errors import DamageError, StoreFormatError
from kvstore.reading import Scan
from kvstore.replay import deadlines
from kvstore.schema import Array
from kvstore.segment import OnDamage, Segment
from kvstore.state import Totals
from kvstore.stream import Stream
from kvstore.timestamps import NS_PER_S, TimeLike, Unit, time_to_ns

BINS: Final = 1024  # a power of two: halved until each bin has something to show
SILENT_AFTER: Final = 10  # so many rows in a row missing are no accident
_EVENTS_A_BIN: Final = 8  # fewer, and a regular stream looks ragged
_BINS_MIN: Final = 8
_RATES: Final = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "day"))
_ROUGH_BATCHES: Final = 4000  # index records that a rough look reads of one segment: about 15 ms


def rate_unit(per_s: float) -> tuple[float, str]:
    """The unit in which a rate is a number of one or more, if there is one: (its seconds, name)."""
    return next((each for each in _RATES if per_s * each[0] >= 1), _RATES[-1])


class Span(NamedTuple):
    """A stretch of time cut into bins of equal width; both ends are included."""

    start_ns: int
    stop_ns: int
    bins: int

    @property
    def length_s(self) -> float:
        """From the first to the last instant, in seconds."""
        return (self.stop_ns - self.start_ns) / NS_PER_S

    def bin_of(self, ns: int) -> int:
        """The bin of a time, for times outside the first or last."""
        at = (ns - self.start_ns) * self.bins // (self.stop_ns - self.start_ns + 1)
        return min(max(at, 0), self.bins - 1)

    def bins_of(self, seconds: Array) -> Array:
        """The bins of seconds after the start; in order if these are."""
        scaled = seconds * (self.bins / max(self.length_s, 1e-9))
        return np.clip(scaled, 0, self.bins - 1).astype(np.intp)

    def edges_s(self) -> Array:
        """Seconds after the start at which bins begin, and the end."""
        return np.linspace(0, self.length_s, self.bins + 1)


class Survey(NamedTuple):
    """Rows of a range by bin. events: of equal times in a batch, as in a packet, one counts."""

    span: Span
    rows: Array
    events: Array
    batches: int

    @property
    def total_rows(self) -> int:
        """All rows of the range."""
        return int(self.rows.sum())

    def coarser(self, bins_max: int) -> Survey:
        """Bins joined by twos, until the typical one that is not empty has some events."""
        found = self
        while found.span.bins > _BINS_MIN and (
            found.span.bins > bins_max or found.typical_events() < _EVENTS_A_BIN
        ):
            rows, events = (a.reshape(-1, 2).sum(axis=1) for a in (found.rows, found.events))
            span = found.span._replace(bins=found.span.bins // 2)
            found = Survey(span, rows, events, self.batches)
        return found

    def typical_events(self) -> float:
        """The median of the bins that are not empty."""
        there = self.events[self.events > 0]
        return float(np.median(there)) if len(there) else 0.0

    def silences(self) -> list[tuple[float, float]]:
        """Stretches without rows where about SILENT_AFTER or more were to be expected.

        In seconds after the start, as exact as the bins are narrow.
        """
        edges = self.span.edges_s()
        return [(float(edges[low]), float(edges[high])) for low, high in self._silent_bins()]

    def is_empty(self, start_s: float, stop_s: float) -> bool:
        """Whether no whole bin between these has a row."""
        low, high = self.span.bins_of(np.array([start_s, stop_s]))
        return not self.rows[low + 1 : high].any()

    def steps(self, bins_max: int) -> tuple[Array, Array]:
        """Edges in seconds after the start, and the rows between them: coarser bins.

        Silences have bins of their own, so that none is half in one.
        """
        width = self.span.bins / self.coarser(bins_max).span.bins
        ends = [0, *(end for silent in self._silent_bins() for end in silent), self.span.bins]
        cuts = [0]
        for number, (low, high) in enumerate(pairwise(ends)):
            is_silent = number % 2 == 1
            pieces = 1 if is_silent else max(round((high - low) / width), 1)
            cuts += np.rint(np.linspace(low, high, pieces + 1)[1:]).astype(int).tolist()
        at = np.unique(cuts)
        return self.span.edges_s()[at], np.add.reduceat(self.rows, at[:-1])

    def _silent_bins(self) -> list[tuple[int, int]]:
        coarse = self.coarser(self.span.bins)
        expected = coarse.typical_events() * coarse.span.bins / self.span.bins
        there = [-1, *np.flatnonzero(self.events).tolist(), self.span.bins]
        return [
            (before + 1, after)
            for before, after in pairwise(there)
            if (after - before - 1) * expected >= SILENT_AFTER
        ]


def scan_of(
    stream: Stream,
    start: TimeLike | None = None,
    stop: TimeLike | None = None,
    *,
    unit: Unit | None = None,
    on_damage: OnDamage | None = None,
) -> Scan:
    """The range of a stream as of now, both ends included; the arguments of ``Stream.read``."""
    return stream._scan(start, stop, unit=unit, inclusive="both", on_damage=on_damage)  # noqa: SLF001  # ranges are decided in one place


def survey(scan: Scan) -> Survey | None:
    """Count a range's rows by bin; None where there are none. Damaged batches go to on_damage."""
    span = span_of(scan, BINS)
    if span is None:
        return None
    found = Survey(span, np.zeros(BINS, np.int64), np.zeros(BINS, np.int64), 0)
    batches = 0
    for segment, entry in scan.entries():
        batches += 1
        _count(scan, found, segment, entry)
    found = found._replace(batches=batches)
    return found if found.total_rows else None


def span_of(scan: Scan, bins: int) -> Span | None:
    """The part of the range between the stream's first and last row; None if there is none."""
    totals = scan.state.stream_totals(scan.info.stream_id)
    if not totals.rows or not scan.range.overlaps(totals.first, totals.last):
        return None
    dtype = scan.info.schema.time_dtype
    start = time_to_ns(max(totals.first, scan.range.start), dtype)
    return Span(start, time_to_ns(min(totals.last, scan.range.stop), dtype), bins)


def rows_inside(scan: Scan, segment: Segment, entry: Entry) -> tuple[slice, Array] | None:
    """Which rows of a batch lie in the range, and their times; None where damaged or none do."""
    try:
        times = scan.times(segment, entry)
    except (DamageError, StoreFormatError) as error:
        scan.damaged(entry, error)
        return None
    inside = scan.range.rows(times)
    return (inside, times[inside]) if inside.start < inside.stop else None


def _count(scan: Scan, found: Survey, segment: Segment, entry: Entry) -> None:
    dtype, span = scan.info.schema.time_dtype, found.span
    low, high = (span.bin_of(time_to_ns(end, dtype)) for end in (entry.first, entry.last))
    if low == high and scan.range.covers(entry.first, entry.last):
        found.rows[low] += entry.rows
        found.events[low] += 1 if entry.first == entry.last else entry.rows
        return
    inside = rows_inside(scan, segment, entry)
    if inside is None:
        return
    bins = span.bins_of(deadlines(inside[1], span.start_ns))
    found.rows[:] += np.bincount(bins, minlength=span.bins)
    fresh = np.r_[True, inside[1][1:] != inside[1][:-1]]
    found.events[:] += np.bincount(bins[fresh], minlength=span.bins)


# ---- at a glance ----


def rough_rates(stream: Stream, bins: int, *, is_late: Callable[[], bool] = lambda: False) -> Array:
    """About how many rows a second each bin has; none where there is no stretch of time.

    A batch that straddles bins is taken as even. A segment narrower than a bin is taken
    from its summary; one of very many batches by the sequence at which each bin begins.
    Once ``is_late()``, all that is left is taken from summaries: a cold disk takes seconds.
    """
    scan = scan_of(stream, on_damage=_ignore)
    span = span_of(scan, bins)
    if span is None or not span.length_s:
        return np.zeros(0)
    rows = np.zeros(bins)
    for number, totals in scan.state.per_segment(scan.info.stream_id):
        found = None
        if totals.batches > 1 and len(_bins_between(scan, span, totals)) > 1 and not is_late():
            # If it is damaged, or was just dropped: a glance goes by its summary, too.
            with suppress(StoreFormatError):
                found = _by_index(scan, span, number, totals, is_late)
        rows += _spread(scan, span, [totals]) if found is None else found
    return rows / (span.length_s / bins)


def _by_index(
    scan: Scan, span: Span, number: int, totals: Totals, is_late: Callable[[], bool]
) -> Array | None:
    """Rows by bin of one segment; None where it got late."""
    segment = scan.open_segment(number)
    try:
        if totals.batches > _ROUGH_BATCHES:
            found = _by_sequence(scan, span, segment, totals, is_late)
        else:
            ends = span.start_ns, span.stop_ns
            entries = segment.entries(scan.info.stream_id, *ends, on_damage=_ignore)
            found = _spread(scan, span, takewhile(lambda _: not is_late(), entries))
        return None if is_late() else found
    finally:
        segment.close()


def _by_sequence(
    scan: Scan, span: Span, segment: Segment, totals: Totals, is_late: Callable[[], bool]
) -> Array:
    """Batches between the starts of two bins: the difference of their sequences."""
    inside = _bins_between(scan, span, totals)
    width_ns = (span.stop_ns - span.start_ns + 1) / span.bins
    starts = [span.start_ns + int(width_ns * each) for each in inside]
    found = [
        None if is_late() else _first_sequence(scan, segment, ns, span.stop_ns) for ns in starts
    ]
    ends = [totals.next_sequence if each is None else each for each in found]
    batches = np.maximum(np.diff([*ends, totals.next_sequence]), 0)
    rows = np.zeros(span.bins)
    rows[inside.start : inside.stop] = batches * (totals.rows / totals.batches)
    return rows


def _first_sequence(scan: Scan, segment: Segment, start_ns: int, stop_ns: int) -> int | None:
    dtype = scan.info.schema.time_dtype
    for entry in segment.entries(scan.info.stream_id, start_ns, stop_ns, on_damage=_ignore):
        if time_to_ns(entry.last, dtype) >= start_ns:
            return entry.sequence
    return None


def _bins_between(scan: Scan, span: Span, part: Entry | Totals) -> range:
    dtype = scan.info.schema.time_dtype
    low, high = (span.bin_of(time_to_ns(end, dtype)) for end in (part.first, part.last))
    return range(low, high + 1)


def _spread(scan: Scan, span: Span, parts: Iterable[Entry | Totals]) -> Array:
    """Rows of parts by bin, each taken as even over its time."""
    dtype = scan.info.schema.time_dtype
    edges, rows = span.edges_s(), np.zeros(span.bins)
    for part in parts:
        first, last = (time_to_ns(end, dtype) for end in (part.first, part.last))
        low, high = span.bin_of(first), span.bin_of(last)
        if low == high:
            rows[low] += part.rows
            continue
        ends = [(each - span.start_ns) / NS_PER_S for each in (first, last)]
        share = np.diff(np.interp(edges[low : high + 2], ends, [0, 1]))
        rows[low : high + 1] += part.rows * share
    return rows


def _ignore(_: Any) -> None:
    """A glance names no damage: reading and verify do."""
