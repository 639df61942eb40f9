"""What may be dropped, and when: pure decisions on a store's state.

Whole sealed segments go, in the order they were sealed, all streams together; those that hold
rows of a pinned time range stay. A segment's age is that of its last commit on the store's own
clock, not of its data: a stray stamp in the future keeps nothing, and a clock that jumps drops
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvstore.gaps import Gap
from kvstore.layout import RESERVE_BYTES
from kvstore.segment import Sealed, State, Totals
from kvstore.settings import Settings
from kvstore.timestamps import time_to_ns, typed_time

SEGMENT_BYTES: Final = 2 << 30
SEGMENT_BYTES_LIMITED_MIN: Final = 64 << 20
SEGMENTS_OF_MAX_BYTES: Final = 16
SEGMENTS_OF_MAX_AGE: Final = 8
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


def segment_bytes(settings: Settings, wanted: int | None) -> int:
    """Size at which a segment is sealed. wanted: what the user asked for."""
    size = SEGMENT_BYTES if wanted is None else wanted
    if settings.max_bytes is None:
        return size
    if wanted is None:
        part = settings.max_bytes // SEGMENTS_OF_MAX_BYTES
        size = min(max(part, SEGMENT_BYTES_LIMITED_MIN), SEGMENT_BYTES)
    return min(size, settings.max_bytes // _SEGMENTS_MIN)


def plan(state: State, sizes: Sizes) -> Plan:
    """What has to go before a commit, for the limits of size."""
    settings, rest = state.settings, list(unpinned(state))
    if not settings.drops_oldest:
        rest = []
    drop: list[Sealed] = []
    if settings.max_bytes is not None:
        limit = settings.max_bytes - _BESIDE_BYTES
        total = _total(state) + sizes.active + sizes.needed
        # Early: removing a large file takes long, and writing should not wait for it.
        while rest and total > limit - limit // SEGMENTS_OF_MAX_BYTES:
            drop.append(rest.pop(0))
            total -= drop[-1].file_bytes
        if total > limit:
            return _plan(drop, f"{total} bytes, the store's max_bytes is {settings.max_bytes}")
    if settings.min_free_bytes is not None and not drop:
        short = settings.min_free_bytes + sizes.needed - sizes.free - sizes.leaving
        while rest and short > 0:
            drop.append(rest.pop(0))
            short -= drop[-1].file_bytes
        if short > 0:
            return _plan(drop, f"{sizes.free} bytes free, to be left are {settings.min_free_bytes}")
    return _plan(drop)


def _plan(drop: Sequence[Sealed], missing: str = "") -> Plan:
    return Plan(tuple(each.number for each in drop), missing)


def is_within(state: State, sizes: Sizes) -> bool:
    """Whether the limit of size is kept even before what is leaving has left."""
    if state.settings.max_bytes is None:
        return True
    total = _total(state) + sizes.active + sizes.needed + sizes.leaving
    return total <= state.settings.max_bytes - _BESIDE_BYTES


def _total(state: State) -> int:
    return sum(sealed.file_bytes for sealed in state.sealed.values())


def aged(state: State, clock_ns: int) -> list[int]:
    """Segments whose last commit is longer ago than the store's max_age."""
    max_age_s = state.settings.max_age_s
    if max_age_s is None:
        return []
    limit_ns = clock_ns - int(max_age_s * 1e9)
    return [s.number for s in unpinned(state) if (s.clock_ns or s.last_commit_ns) < limit_ns]


def unpinned(state: State) -> Iterator[Sealed]:
    """Sealed segments that may be dropped, in the order they were sealed."""
    for _, sealed in sorted(state.sealed.items()):
        if not pinned_by(state, sealed):
            yield sealed


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
