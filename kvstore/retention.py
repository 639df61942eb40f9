"""What may be dropped, and when: pure decisions on a store's state.

Whole sealed segments go, in the order they were sealed, all streams together; those that hold
rows of a pinned time range stay. A segment's age is that of its last commit on the store's own
clock, not of its data: a stray stamp in the future keeps nothing, and a clock that jumps drops
nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from kvstore.gaps import Gap
from kvstore.layout import RESERVE_BYTES
from kvstore.settings import Settings
from kvstore.state import Sealed, State, Totals
from kvstore.timestamps import time_to_ns, typed_time

SEGMENT_BYTES: Final = 2 << 30
SEGMENT_BYTES_LIMITED_MIN: Final = 64 << 20
SEGMENTS_OF_MAX_BYTES: Final = 16
SEGMENTS_OF_MAX_AGE: Final = 8
_EARLY_PART: Final = 16  # of a limit
_SEGMENTS_MIN: Final = 4  # what is dropped at once stays a part of the whole
_BESIDE_BYTES: Final = RESERVE_BYTES + (256 << 10)  # lock file, identity, a fresh segment


class Sizes(NamedTuple):
    """Bytes at the moment. leaving: of segments dropped whose files are still being removed.

    needed: what the next commit will add at most. free: on the disk.
    """

    active: int
    needed: int
    leaving: int
    free: int


class Plan(NamedTuple):
    """drop: segments to be dropped now. missing: why the commit does not fit even then, or ""."""

    drop: tuple[int, ...] = ()
    missing: str = ""


def segment_bytes(settings: Settings, wanted: int | None, disk_bytes: int) -> int:
    """Size at which a segment is sealed. wanted: what the user asked for.

    disk_bytes: the limit of a store that drops its oldest segments and has no other.
    """
    size = SEGMENT_BYTES if wanted is None else wanted
    if settings.max_bytes is None and not settings.drops_oldest:
        return size
    limit = disk_bytes if settings.max_bytes is None else settings.max_bytes
    if wanted is None:
        part = limit // SEGMENTS_OF_MAX_BYTES
        size = min(max(part, SEGMENT_BYTES_LIMITED_MIN), SEGMENT_BYTES)
    return min(size, limit // _SEGMENTS_MIN)


def plan(state: State, sizes: Sizes) -> Plan:
    """What has to go before a commit, for the limits of size; nothing where it were too little."""
    over, over_early = _over(state, sizes)
    short, short_early = _short(state, sizes)
    drop: list[int] = []
    dropped = 0
    candidates = unpinned(state) if state.settings.drops_oldest else iter(())
    while dropped < max(over_early, short_early) and (sealed := next(candidates, None)):
        drop.append(sealed.number)
        dropped += sealed.file_bytes
    if dropped < over:
        most = state.settings.max_bytes
        return Plan((), f"{over + _limit(state)} bytes, the store's max_bytes is {most}")
    if dropped < short:
        least = state.settings.min_free_bytes
        return Plan((), f"{sizes.free} bytes free, to be left are {least}")
    return Plan(tuple(drop))


# Both early: removing a large file takes long, and writing should not wait for it.


def _over(state: State, sizes: Sizes) -> tuple[int, int]:
    """Bytes beyond the limit of size; and beyond what is to be kept below it."""
    if state.settings.max_bytes is None:
        return 0, 0
    over = _total(state) + sizes.active + sizes.needed - _limit(state)
    return over, over + _limit(state) // _EARLY_PART


def _short(state: State, sizes: Sizes) -> tuple[int, int]:
    """Bytes that the disk has too little; and too little for what is to be kept above that."""
    least = state.settings.min_free_bytes
    if least is None:
        return 0, 0
    short = least + sizes.needed - sizes.free - sizes.leaving
    return short, short + least // _EARLY_PART


def _limit(state: State) -> int:
    return (state.settings.max_bytes or 0) - _BESIDE_BYTES


def is_within(state: State, sizes: Sizes) -> bool:
    """Whether the limits of size are kept even before what is leaving has left."""
    over = _over(state, sizes._replace(needed=sizes.needed + sizes.leaving))[0]
    short = _short(state, sizes._replace(leaving=0))[0]
    return over <= 0 and short <= 0


def _total(state: State) -> int:
    return sum(sealed.file_bytes for sealed in state.sealed.values())


def aged(state: State, clock_ns: int) -> list[int]:
    """Segments whose last commit is longer ago than the store's max_age."""
    max_age_s = state.settings.max_age_s
    if max_age_s is None:
        return []
    limit_ns = clock_ns - int(max_age_s * 1e9)
    old = [s for s in state.sealed.values() if (s.clock_ns or s.last_commit_ns) < limit_ns]
    return [s.number for s in _unpinned(state, old)]


def unpinned(state: State) -> Iterator[Sealed]:
    """Sealed segments that may be dropped, in the order they were sealed."""
    return _unpinned(state, state.sealed.values())


def _unpinned(state: State, some: Iterable[Sealed]) -> Iterator[Sealed]:
    starts, stops = _pinned_times(state)
    for sealed in sorted(some):
        for first, last in spans_ns(state, sealed.totals) if starts else ():
            before = bisect_right(starts, last)
            if before and stops[before - 1] >= first:
                break
        else:
            yield sealed


def _pinned_times(state: State) -> tuple[list[int], list[int]]:
    """Starts and stops of all pins together, ascending, none touching another."""
    starts: list[int] = []
    stops: list[int] = []
    for start, stop in sorted((pin.start_ns, pin.stop_ns) for pin in state.pins.values()):
        if stops and start <= stops[-1]:
            stops[-1] = max(stops[-1], stop)
        else:
            starts.append(start)
            stops.append(stop)
    return starts, stops


def pinned_by(state: State, sealed: Sealed) -> str:
    """The label of a pin whose range has rows in the segment, or may have; else ""."""
    if not state.pins:
        return ""
    spans = list(spans_ns(state, sealed.totals))
    for pin in state.pins.values():
        if any(first <= pin.stop_ns and pin.start_ns <= last for first, last in spans):
            return pin.label or f"pin {pin.pin_id}"
    return ""


def spans_ns(state: State, totals: dict[int, Totals]) -> Iterator[tuple[int, int]]:
    """First and last time of each stream that has rows there, in ns."""
    for info in state.streams.values():
        mine = totals.get(info.stream_id, Totals())
        if mine.rows:
            dtype = info.schema.time_dtype
            first, last = (time_to_ns(typed_time(t, dtype), dtype) for t in (mine.first, mine.last))
            yield first, last


def dropped_gaps(state: State) -> Iterator[Gap]:
    """What has been dropped of each stream, as one gap; it may overlap rows that are still here."""
    for info in state.streams.values():
        mine = state.dropped.get(info.stream_id)
        if mine is not None:
            spans = list(spans_ns(state, {info.stream_id: mine.totals}))
            segments = f"of {mine.segments} segment{'s'[: mine.segments > 1]}"
            rows, batches = mine.totals.rows, mine.totals.batches
            for first, last in spans:
                yield Gap(
                    "dropped", first, last, info.name, rows, batches, segments, mine.recorded_ns
                )


def is_due(begun_ns: int, clock_ns: int, settings: Settings) -> bool:
    """Whether a segment begun then, on the store's clock, is to be sealed for its age."""
    if settings.max_age_s is None:
        return False
    return clock_ns - begun_ns > settings.max_age_s * 1e9 / SEGMENTS_OF_MAX_AGE
