"""Gaps: what is missing or doubtful in a store, as the store itself records it.

    dropped        rows that retention removed                   data time
    damaged        blocks that cannot be read any more           data time
    rejected       packets that were refused                     wall clock
    clock_back     time went back by more than a limit           data time, or the host's clock
    clock_ahead    time went ahead by more than passed           data time, or the host's clock
    silence        no rows for longer than a limit               data time
    unclean_stop   a writer ended without closing                wall clock

What touches the newest gap of its kind and stream is told as one with it, and of each kind at
most GAPS_MAX are kept apart: no input, however broken, fills a store with gaps. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore.errors import StoreError
from kvstore.schema import Array
from kvstore.settings import Settings
from kvstore.timestamps import MAX_NS, MIN_NS, ticks_per_second, time_to_ns, typed_time

KINDS: Final = (
    "dropped", "damaged", "rejected", "clock_back", "clock_ahead", "silence", "unclean_stop",
)  # fmt: skip
GAPS_MAX: Final = 256  # of each kind; later ones are told with the newest
TOUCHING_NS: Final = 1_000_000_000
DETAIL_CHARS_MAX: Final = 300
_OF_A_BATCH_MAX: Final = 16  # steps of one batch told apart


class Gap(NamedTuple):
    """One known hole or fault. stream: "" where it concerns all of them.

    start_ns, stop_ns: ns since 1970, on the clock that the kind names. rows: how many are known
    to be missing. occurrences: how many events are told as this one. recorded_ns: wall clock.
    """

    kind: str
    start_ns: int
    stop_ns: int
    stream: str = ""
    rows: int = 0
    occurrences: int = 1
    detail: str = ""
    recorded_ns: int = 0


def checked(gap: Gap) -> Gap:
    """The gap within bounds; StoreError for a kind that there is not."""
    if gap.kind not in KINDS:
        raise StoreError(f"a gap of kind {gap.kind!r}: there are {', '.join(KINDS)}")
    start, stop = (min(max(int(end), MIN_NS), MAX_NS) for end in (gap.start_ns, gap.stop_ns))
    detail = gap.detail[:DETAIL_CHARS_MAX]
    return gap._replace(start_ns=min(start, stop), stop_ns=max(start, stop), detail=detail)


def placed(known: Mapping[int, Gap], gap: Gap) -> tuple[int, Gap]:
    """Where a gap goes among those known, and as what: under a new number, or told with one."""
    same = [number for number, each in known.items() if each.kind == gap.kind]
    mine = [number for number in same if known[number].stream == gap.stream]
    newest = max(mine, default=0)
    if mine and _is_one(known[newest], gap):
        return newest, _told_together(known[newest], gap)
    if len(same) >= GAPS_MAX:
        newest = newest or max(same)
        return newest, _told_together(known[newest], gap)
    return max(known, default=0) + 1, gap


def _is_one(old: Gap, new: Gap) -> bool:
    if new.kind == "silence":  # one reading between two silences keeps them apart
        return old.start_ns == new.start_ns
    if new.kind == "unclean_stop":
        return False
    near = TOUCHING_NS
    return old.start_ns - near <= new.stop_ns and new.start_ns <= old.stop_ns + near


def _told_together(old: Gap, new: Gap) -> Gap:
    goes_on = new.kind == "silence" and old.start_ns == new.start_ns
    return new._replace(
        start_ns=min(old.start_ns, new.start_ns),
        stop_ns=max(old.stop_ns, new.stop_ns),
        stream=old.stream if old.stream == new.stream else "",
        rows=old.rows + new.rows,
        occurrences=old.occurrences if goes_on else old.occurrences + new.occurrences,
    )


class Watch:
    """Sees a stream's times in the order of their arrival; tells of silence and clock steps."""

    def __init__(self, stream: str, dtype: np.dtype[Any]):
        self._stream = stream
        self._dtype = dtype
        self._second = ticks_per_second(dtype)
        self._last: Any = None  # the latest time seen, as a plain number
        self._seen_s = 0.0
        self._is_told = False  # that silence has lasted too long by now

    def see(self, times: Array, now_s: float, settings: Settings) -> Iterator[Gap]:
        """Gaps that these times show. now_s: of a clock that never steps.

        times: of the stream's time dtype, as they arrived.
        """
        if settings.gap_after_s is None and settings.clock_step_s is None:
            self._last = None
            return
        if not len(times):
            return
        plain = times.view(np.int64) if times.dtype.kind == "M" else times
        before = plain[:1] if self._last is None else self._last
        elapsed_s = now_s - self._seen_s if self._last is not None else 0.0
        self._last, self._seen_s, self._is_told = plain[-1:].copy(), now_s, False
        # Ends of the int64 range lie further apart than an int64 says.
        steps = np.diff(plain.astype(np.float64), prepend=before.astype(np.float64)) / self._second
        if steps.min() >= -_or_inf(settings.clock_step_s) and steps.max() <= min(
            _or_inf(settings.gap_after_s), _or_inf(settings.clock_step_s)
        ):
            return
        waits = np.zeros(len(steps))
        waits[0] = elapsed_s
        ends = np.concatenate([before, plain])
        for kind, is_one in _judged(steps, waits, settings):
            places = np.flatnonzero(is_one)
            for place in places[:_OF_A_BATCH_MAX]:
                yield self._told(kind, ends[place : place + 2], steps[place], waits[place])
            if rest := places[_OF_A_BATCH_MAX:].tolist():
                yield self._rest(kind, ends, rest)

    def overdue(self, now_s: float, settings: Settings) -> Gap | None:
        """The silence that goes on now, once it is longer than the limit; told once."""
        if self._last is None or self._is_told or settings.gap_after_s is None:
            return None
        silent_s = now_s - self._seen_s
        if silent_s <= settings.gap_after_s:
            return None
        self._is_told = True
        start_ns = self._ns(self._last[0])
        stop_ns = start_ns + int(silent_s * 1e9)
        return Gap("silence", start_ns, stop_ns, self._stream, detail="not ended when recorded")

    def _told(self, kind: str, ends: Array, step_s: float, waited_s: float) -> Gap:
        first, last = sorted(self._ns(end) for end in ends)
        detail = f"times {step_s:+.3f} s apart arrived {waited_s:.3f} s apart"
        return Gap(kind, first, last, self._stream, detail=detail)

    def _rest(self, kind: str, ends: Array, places: list[int]) -> Gap:
        last = max(self._ns(end) for end in (ends[places[-1]], ends[places[-1] + 1]))
        first = min(self._ns(end) for end in (ends[places[0]], ends[places[0] + 1]))
        return Gap(kind, first, last, self._stream, occurrences=len(places), detail="more of them")

    def _ns(self, plain: Any) -> int:
        return time_to_ns(typed_time(plain, self._dtype), self._dtype)


def _judged(steps: Array, waits: Array, settings: Settings) -> Iterator[tuple[str, Array]]:
    """Which steps are of which kind; each is of one at most.

    A pause in a recording that is read faster than it was made looks as a clock that jumps:
    where the user has a limit for silence, it is called that.
    """
    silent = steps > _or_inf(settings.gap_after_s)
    yield "silence", silent
    yield "clock_back", steps < -_or_inf(settings.clock_step_s)
    yield "clock_ahead", (steps > waits + _or_inf(settings.clock_step_s)) & ~silent


def _or_inf(limit: float | None) -> float:
    return np.inf if limit is None else limit
