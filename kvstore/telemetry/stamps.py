"""Timestamps of events: RFC 3339 with an offset -> int64 µs since 1970, UTC.

Digits finer than a microsecond are cut off, never rounded: a reading must not move into its
neighbour's microsecond, or ahead of the clock. Years 1678 to 2261, what every sink can hold. No
leap seconds: 23:59:60 is refused. Pure.

``parse`` decides; ``parse_all`` is for speed, and says of each text whether it is sure. Where it
is, both agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

YEAR_MIN: Final = 1678  # int64 nanoseconds, the store's keys, reach from 1677-09 to 2262-04
YEAR_MAX: Final = 2261
FRACTION_DIGITS_MAX: Final = 30  # of a second: attoseconds and then some

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_US: Final = timedelta(microseconds=1)
_RFC3339: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([0-9]{2}):([0-9]{2}):([0-9]{2})"
    rf"(?:\.([0-9]{{1,{FRACTION_DIGITS_MAX}}}))?(?:([Zz])|([+-])([0-9]{{2}}):([0-9]{{2}}))?"
)


class Stamp(NamedTuple):
    """A time; finer: it had digits below the microsecond other than 0, now cut off."""

    us: int
    finer: bool


Fault = Literal["timestamp", "offset"]


def parse(text: str) -> Stamp | Fault:
    """The time, or what is wrong: no valid one, or one without its offset from UTC."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        return "timestamp"
    year, month, day, hour, minute, second, hours, minutes = (
        int(match[group] or 0) for group in (1, 2, 3, 4, 5, 6, 10, 11)
    )
    fraction = (match[7] or "").ljust(6, "0")
    ahead = timedelta(hours=hours, minutes=minutes) * (-1 if match[9] == "-" else 1)
    try:
        zone = timezone(ahead)
        local = datetime(year, month, day, hour, minute, second, int(fraction[:6]), zone)
    except ValueError:  # the 30th of February, hour 24, an offset of a day
        return "timestamp"
    if minutes >= 60:  # noqa: PLR2004
        return "timestamp"
    if not YEAR_MIN <= local.year <= YEAR_MAX:
        return "timestamp"
    if not (match[8] or match[9]):
        return "offset"
    return Stamp((local - _EPOCH) // _US, finer=bool(fraction[6:].strip("0")))


class Stamps(NamedTuple):
    """Of n texts: µs, whether that is sure (else ask ``parse``), and whether digits were cut."""

    us: NDArray[np.int64]
    sure: NDArray[np.bool_]
    finer: NDArray[np.bool_]


def parse_all(texts: Sequence[str]) -> Stamps:
    """Many at once, 60 to 100 ns each.

    Seconds stand at the same places in all; what follows them is read for each length that occurs.
    """
    count = len(texts)
    found = Stamps(np.zeros(count, np.int64), np.zeros(count, bool), np.zeros(count, bool))
    joined = "\n".join(texts) + "\n" + " " * _SECONDS_END
    raw = np.frombuffer(joined.encode("utf-8", "replace"), np.uint8)
    ends = np.flatnonzero(raw == ord("\n"))
    if not count or len(ends) != count:  # a line break within a text
        return found
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    seconds, sure = _seconds(_windows(raw, starts, _SECONDS_END))
    found.us[:] = seconds * 1_000_000
    in_utc = raw[ends - 1] == ord("Z")
    np.logical_and(in_utc, lengths == _SHORTEST, out=found.sure)
    of_length = np.bincount(np.minimum(lengths, _LONGEST + 1), minlength=_LONGEST + 2)
    for length in np.flatnonzero(of_length[: _LONGEST + 1]).tolist():
        if length > _SHORTEST:
            rows = np.flatnonzero(lengths == length)
            down = _windows(raw, starts[rows] + _SECONDS_END, length - _SECONDS_END)
            _add_tails(down, in_utc[rows], rows, found)
    np.logical_and(found.sure, sure, out=found.sure)
    return found


def _windows(raw: NDArray[np.uint8], starts: NDArray[Any], width: int) -> NDArray[np.uint8]:
    """So many bytes from each start on, one text a column."""
    windows: NDArray[np.uint8] = np.lib.stride_tricks.sliding_window_view(raw, width)[starts].T
    return windows


# Which characters of 2025-01-20T10:15:30 are digits, and what the others have to be.
_DIGITS: Final = np.array([0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18])
_MARKS: Final = np.array([4, 7, 10, 13, 16])
_MARK_BYTES: Final = np.frombuffer(b"--T::", np.uint8)[:, None]
_SECONDS_END: Final = 19
_OFFSET: Final = 6  # characters of +01:00
_SHORTEST: Final = _SECONDS_END + 1
_LONGEST: Final = _SECONDS_END + 1 + FRACTION_DIGITS_MAX + _OFFSET

_PLACES: Final = 10.0 ** np.arange(5, -1, -1)  # of a microsecond's digits

_MONTHS: Final = np.arange(f"{YEAR_MIN}-01", f"{YEAR_MAX + 1}-02", dtype="datetime64[M]")
_MONTH_STARTS: Final[NDArray[np.int64]] = _MONTHS.astype("datetime64[D]").astype(np.int64)
_MONTH_DAYS: Final = np.diff(_MONTH_STARTS)


def _add_tails(
    down: NDArray[np.uint8], in_utc: NDArray[np.bool_], rows: NDArray[Any], found: Stamps
) -> None:
    """down: what follows the seconds, all of one length: those in UTC, those with an offset."""
    if in_utc.all():
        _add_alike(down, 1, rows, found)
        return
    if in_utc.any():
        _add_alike(down[:, in_utc], 1, rows[in_utc], found)
    if len(down) >= _OFFSET:
        _add_alike(down[:, ~in_utc], _OFFSET, rows[~in_utc], found)


def _add_alike(down: NDArray[np.uint8], tail: int, rows: NDArray[Any], found: Stamps) -> None:
    """tail: the length of Z, or of an offset; before it is nothing, or a point and digits."""
    fraction = down[:-tail]
    if len(fraction) == 1:
        return
    sure = np.ones(len(rows), bool)
    micros: NDArray[np.int64] | int = 0
    if len(fraction):
        micros, found.finer[rows], sure = _fraction(fraction)
    if tail > 1:
        ahead, offset_sure = _offset_seconds(down[-tail:])
        micros, sure = micros - ahead * 1_000_000, sure & offset_sure
    found.us[rows] += micros
    found.sure[rows] = sure


def _seconds(down: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Seconds since 1970 of 2025-01-20T10:15:30, in whatever zone."""
    digits = down[_DIGITS] - np.uint8(ord("0"))
    marks = (down[_MARKS] == _MARK_BYTES).all(axis=0)
    number = digits.astype(np.int32)
    year = number[0] * 1000 + number[1] * 100 + number[2] * 10 + number[3]
    month, day, hour, minute, second = number[4::2] * 10 + number[5::2]
    sure = marks & (digits.max(axis=0) <= 9)  # noqa: PLR2004
    sure &= (year >= YEAR_MIN) & (year <= YEAR_MAX) & (month >= 1) & (month <= 12)  # noqa: PLR2004
    sure &= (day >= 1) & (hour < 24) & (minute < 60) & (second < 60)  # noqa: PLR2004
    at = np.where(sure, (year - YEAR_MIN) * 12 + month - 1, 0)
    sure &= day <= _MONTH_DAYS[at]
    return (_MONTH_STARTS[at] + day - 1) * 86_400 + hour * 3600 + minute * 60 + second, sure


def _fraction(
    down: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Microseconds of .25, whether anything finer than them was cut, whether that is sure."""
    digits = down[1:] - np.uint8(ord("0"))
    first = digits[:6]
    micros = (_PLACES[: len(first)] @ first.astype(np.float64)).astype(np.int64)  # exact
    sure: NDArray[np.bool_] = (down[0] == ord(".")) & (digits.max(axis=0) <= 9)  # noqa: PLR2004
    finer: NDArray[np.bool_] = digits[6:].max(axis=0, initial=0) > 0
    return micros, finer, sure


def _offset_seconds(down: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Seconds ahead of UTC of +01:00."""
    digits = down[[1, 2, 4, 5]] - np.uint8(ord("0"))
    number = digits.astype(np.int64)
    hours, minutes = number[0] * 10 + number[1], number[2] * 10 + number[3]
    behind = down[0] == ord("-")
    sure = (behind | (down[0] == ord("+"))) & (down[3] == ord(":"))
    sure &= (digits.max(axis=0) <= 9) & (hours < 24) & (minutes < 60)  # noqa: PLR2004
    return np.where(behind, -1, 1) * (hours * 3600 + minutes * 60), sure
