"""Times as users give them, as streams store them, and as keys sort them.

A stream stores its time field as float64 epoch seconds, int64 epoch nanoseconds or
datetime64[s|ms|us|ns]. `time_to_ns` is the one function from a stored time to the int64
nanoseconds of a key, for writing and for seeking alike: two different roundings of
``t * 1e9`` differ for nearly every epoch float and lose rows at the ends of ranges.

Rules: a float stands for its shortest decimal (the one `repr` prints), never for its binary
expansion. Everything in between is exact (integers and fractions); rounding happens once, at
the end. Naive times are UTC. What a key cannot hold is refused in rows and clamped in range ends.

Pure: no files, no clocks, and never a guess at the unit of a bare integer.
"""

from __future__ import annotations

import math
import operator
import re
import struct
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeGuard

import numpy as np

from kvstore.errors import TimeError

if TYPE_CHECKING:
    from typing import Any

    import numpy.typing as npt

TimeLike: TypeAlias = "float | int | str | datetime | np.datetime64 | np.floating | np.integer"
Side: TypeAlias = Literal["start", "stop"]
Unit: TypeAlias = Literal["s", "ms", "us", "ns"]

MIN_NS: Final = -(2**63) + 1  # int64's own minimum is the bit pattern of NaT
MAX_NS: Final = 2**63 - 1
NS_PER_S: Final = 10**9

# The outermost doubles whose shortest decimals, in ns, still fit: the next ones overflow.
_FLOAT_MAX: Final = 9223372036.854774
# Long enough for the smallest double written out, short enough for int()'s 4300-digit limit.
_TEXT_LENGTH_MAX: Final = 4000
# An own context: the caller's may round to fewer digits or trap.
_EXACT: Final = Context(prec=40, traps=[])

_UNIT_NS: Final[dict[str, int]] = {"s": NS_PER_S, "ms": 10**6, "us": 10**3, "ns": 1}
_FLOAT64: Final = np.dtype(np.float64)
# Nanoseconds in one count of each integral time dtype.
_COUNT_NS: Final[dict[np.dtype[Any], int]] = {
    np.dtype(np.int64): 1,
    **{np.dtype(f"datetime64[{unit}]"): ns for unit, ns in _UNIT_NS.items()},
}
_EPOCH_DAY: Final = date(1970, 1, 1).toordinal()
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_HELD: Final = "a store holds times from 1677-09-21 to 2262-04-11"
_EXAMPLES: Final = (
    'expected ISO 8601 such as "2026-02-17", "2026-02-17T15:32:37.25", '
    '"2026-02-17 16:32:37+01:00", or epoch seconds such as "1771342357.25"'
)
_ISO: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[Tt ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.,]([0-9]+))?)?"
    r" ?(Z|z|[+-][0-9]{2}(?::?[0-9]{2})?)?)?"
)
# Three digits of exponent bound the size of the fraction it stands for.
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_DURATION: Final = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+) ?(ns|us|ms|s|m|h|d)?")
_DURATION_NS: Final[dict[str, int]] = {
    **_UNIT_NS,
    "m": 60 * NS_PER_S,
    "h": 3600 * NS_PER_S,
    "d": 86400 * NS_PER_S,
}
_DATETIME64_NS: Final[dict[str, Fraction]] = {
    "W": Fraction(7 * 86400 * NS_PER_S),
    "D": Fraction(86400 * NS_PER_S),
    "h": Fraction(3600 * NS_PER_S),
    "m": Fraction(60 * NS_PER_S),
    **{unit: Fraction(ns) for unit, ns in _UNIT_NS.items()},
    "ps": Fraction(1, 10**3),
    "fs": Fraction(1, 10**6),
    "as": Fraction(1, 10**9),
}
_KEY: Final = struct.Struct(">QQ")


# ---- stored times -> keys ----


def time_to_ns(value: Any, dtype: np.dtype[Any]) -> int:
    """The int64 ns under which a stored time is keyed; for seeking, the same function.

    value: a scalar of the stream's time dtype, numpy's or Python's (for datetime64 also its
    integer count). A float goes through its shortest decimal, half-even to ns; as shortest
    decimals are ordered like their doubles, so are the keys. Raises TimeError for NaN, inf,
    NaT and times outside MIN_NS..MAX_NS.
    """
    if dtype == _FLOAT64:
        return _float_to_ns(float(value))
    ns = _count(value, dtype) * _count_ns(dtype)
    if not MIN_NS <= ns <= MAX_NS:
        raise _refused(value)
    return ns


def plain_time(value: Any) -> float | int:
    """A stored time as index records hold it: float seconds, or the count of its unit."""
    if isinstance(value, np.datetime64):
        return int(value.astype(np.int64))
    plain: float | int = value.item()
    return plain


def typed_time(plain: float, dtype: np.dtype[Any]) -> np.generic:
    """The inverse of plain_time: a scalar of the stream's time dtype."""
    if dtype == _FLOAT64:
        return np.float64(plain)
    typed: np.generic = np.int64(plain).view(dtype)
    return typed


def check_times(times: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
    """Raise TimeError naming the first row that `time_to_ns` would refuse.

    times: one-dimensional, of the stream's time dtype exactly.
    """
    if times.dtype != dtype:
        raise TimeError(f"times of dtype {times.dtype}, expected the stream's own, {dtype}")
    low, high = time_bounds(dtype)
    stored = times if dtype == _FLOAT64 else times.view(np.int64)
    # NaN survives min and max and fails both comparisons; NaT is the least integer.
    if times.size == 1:  # a tenth of the cost of min and max, which one-row packets would feel
        fits = low <= stored.item() <= high
    else:
        fits = not times.size or bool(stored.min() >= low and stored.max() <= high)
    if fits:
        return
    row = int(np.argmin((stored >= low) & (stored <= high)))
    raise _refused(times[row], where=f"row {row}: ")


def _float_to_ns(seconds: float) -> int:
    if not -_FLOAT_MAX <= seconds <= _FLOAT_MAX:
        raise _refused(seconds)
    scaled = Decimal(repr(seconds)).scaleb(9, _EXACT)
    return int(scaled.to_integral_value(ROUND_HALF_EVEN, _EXACT))


def _count(value: Any, dtype: np.dtype[Any]) -> int:
    if not isinstance(value, np.datetime64):
        return operator.index(value)
    if value.dtype != dtype:
        raise TimeError(f"a time of dtype {value.dtype}, expected the stream's own, {dtype}")
    return int(value.view(np.int64))


def _count_ns(dtype: np.dtype[Any]) -> int:
    try:
        return _COUNT_NS[dtype]
    except KeyError:
        raise TimeError(
            f"a time field of dtype {dtype}, expected float64 (epoch seconds), int64 (epoch ns) "
            "or datetime64[s], [ms], [us] or [ns]"
        ) from None


def time_bounds(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The first and last time that fits a key, as stored (float64) or as a count."""
    if dtype == _FLOAT64:
        return -_FLOAT_MAX, _FLOAT_MAX
    highest = MAX_NS // _count_ns(dtype)
    return -highest, highest


def ticks_per_second(dtype: np.dtype[Any]) -> int:
    """Counts of a time dtype in a second; 1 for float64."""
    return 1 if dtype == _FLOAT64 else NS_PER_S // _count_ns(dtype)


def _refused(value: object, where: str = "") -> TimeError:
    return TimeError(
        f"{where}time {value} cannot be stored: {_HELD}. Milliseconds passed as seconds "
        "land outside: check the unit; remove rows whose time is missing (NaN, NaT)"
    )


# ---- a user's times -> a stream's own ----


def to_time(
    value: TimeLike, dtype: np.dtype[Any], *, side: Side, unit: Unit | None = None
) -> np.generic:
    """An end of a range in the stream's own time type, a scalar of `dtype`.

    Both ends are included, so on an int64 or datetime64 stream an end finer than the stream's
    resolution is rounded inwards: a start up, a stop down. On a float64 stream it is the
    nearest double. An end outside 1677-2262, inf included, becomes the outermost time that
    the stream can hold.

    unit: what a number counts since the epoch. A float or a decimal text without it counts
    seconds; an int without it is refused, since seconds and nanoseconds are both common.
    Times that are not numbers ignore it. Raises TimeError for what cannot be read, NaN and NaT.
    """
    if _is_stored_as_it_is(value, dtype, unit):
        return np.float64(value)
    return _from_ns(_exact_ns(value, unit), dtype, side)


def range_ns(
    start: TimeLike | None, stop: TimeLike | None, *, unit: Unit | None = None
) -> tuple[int, int]:
    """Both ends of a range in ns, where no stream gives the type; None is the outermost."""
    int64 = np.dtype(np.int64)
    first = MIN_NS if start is None else int(to_time(start, int64, side="start", unit=unit))
    last = MAX_NS if stop is None else int(to_time(stop, int64, side="stop", unit=unit))
    return first, last


def beyond(value: TimeLike, dtype: np.dtype[Any], *, unit: Unit | None = None) -> int:
    """1 where an end lies after all that a stream can hold, -1 where before, 0 elsewhere.

    `to_time` makes such an end the outermost time, at which there may be a row.
    """
    if isinstance(value, (float, np.floating)) and math.isinf(value):
        return 1 if value > 0 else -1
    if _is_stored_as_it_is(value, dtype, unit):
        return 0
    ns = _exact_ns(value, unit)
    low, high = (_stored_ns(typed_time(end, dtype), dtype) for end in time_bounds(dtype))
    return int(ns > high) - int(ns < low)


def _is_stored_as_it_is(
    value: TimeLike, dtype: np.dtype[Any], unit: Unit | None
) -> TypeGuard[float]:
    """Float seconds for a stream of such: fractions would take 0.1 ms to say the same."""
    if type(value) is not float or dtype != _FLOAT64 or unit not in (None, "s"):
        return False
    return -_FLOAT_MAX <= value <= _FLOAT_MAX


def subtract(value: Any, duration_ns: int, dtype: np.dtype[Any]) -> np.generic:
    """A stored time minus a duration, as the start of a range in the stream's own type."""
    time_to_ns(value, dtype)
    return _from_ns(_stored_ns(value, dtype) - duration_ns, dtype, "start")


def _stored_ns(value: Any, dtype: np.dtype[Any]) -> Fraction:
    """What a stored time stands for, without rounding."""
    if dtype == _FLOAT64:
        return Fraction(repr(float(value))) * NS_PER_S
    return Fraction(_count(value, dtype) * _count_ns(dtype))


def _from_ns(ns: Fraction, dtype: np.dtype[Any], side: Side) -> np.generic:
    # Clamped before the conversion, so that no float or int64 overflows in it.
    ns = min(max(ns, Fraction(MIN_NS)), Fraction(MAX_NS))
    low, high = time_bounds(dtype)
    if dtype == _FLOAT64:
        # int / int is correctly rounded in Python, so this is the nearest double.
        seconds = ns.numerator / (ns.denominator * NS_PER_S)
        return np.float64(min(max(seconds, low), high))
    counts = ns / _count_ns(dtype)
    count = math.ceil(counts) if side == "start" else math.floor(counts)
    end: np.generic = np.int64(min(max(count, low), high)).view(dtype)
    return end


def _exact_ns(value: TimeLike, unit: Unit | None) -> Fraction:
    if unit is not None and unit not in _UNIT_NS:
        raise TimeError(f"unit {unit!r}, expected one of {', '.join(_UNIT_NS)}")
    number_ns = _UNIT_NS[unit or "s"]
    if isinstance(value, str):
        return _text_ns(value.strip(), number_ns)
    if isinstance(value, datetime):
        return _datetime_ns(value)
    if isinstance(value, np.datetime64):
        return _datetime64_ns(value)
    if isinstance(value, (float, np.floating)):
        return _float_ns(float(value), number_ns)
    if isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64)):
        if unit is None:
            raise TimeError(
                f"time {value}: a bare integer could count seconds or nanoseconds; pass "
                f'unit="ns" (or "us", "ms", "s"), or a float for seconds'
            )
        return Fraction(int(value) * number_ns)
    raise TimeError(
        f"time {value!r} of type {type(value).__name__}: pass a float (epoch seconds), an int "
        "with a unit, ISO 8601 text, a datetime or a numpy datetime64"
    )


def _float_ns(value: float, number_ns: int) -> Fraction:
    if math.isnan(value):
        raise TimeError("time NaN cannot be an end of a range; pass inf or None for an open end")
    if math.isinf(value):
        return Fraction(MAX_NS if value > 0 else MIN_NS)
    return Fraction(repr(value)) * number_ns


def _datetime_ns(value: datetime) -> Fraction:
    if value != value:  # noqa: PLR0124 - pandas.NaT is a datetime, and unequal to itself
        raise _missing()
    seconds = _seconds(value.toordinal(), value.hour, value.minute, value.second)
    # pandas.Timestamp is a datetime that also counts nanoseconds.
    ns = value.microsecond * 1000 + int(getattr(value, "nanosecond", 0))
    offset = value.utcoffset() or timedelta(0)
    return Fraction(seconds * NS_PER_S + ns - (offset // timedelta(microseconds=1)) * 1000)


def _datetime64_ns(value: np.datetime64) -> Fraction:
    if np.isnat(value):
        raise _missing()
    unit, multiple = np.datetime_data(value.dtype)
    count = int(value.view(np.int64)) * multiple
    if unit in _DATETIME64_NS:
        return count * _DATETIME64_NS[unit]
    # Years and months have no fixed length.
    years, month = divmod(count * 12 if unit == "Y" else count, 12)
    first = date(min(max(1970 + years, 1), 9999), month + 1, 1)
    return Fraction(_seconds(first.toordinal()) * NS_PER_S)


def _missing() -> TimeError:
    return TimeError("time NaT cannot be an end of a range; pass None for an open end")


def _seconds(ordinal: int, hour: int = 0, minute: int = 0, second: int = 0) -> int:
    return (ordinal - _EPOCH_DAY) * 86400 + hour * 3600 + minute * 60 + second


# ---- text ----


def _text_ns(text: str, number_ns: int) -> Fraction:
    if len(text) > _TEXT_LENGTH_MAX:
        raise TimeError(f"a time of {len(text)} characters, at most {_TEXT_LENGTH_MAX}")
    if _NUMBER.fullmatch(text):
        return Fraction(text) * number_ns
    match = _ISO.fullmatch(text)
    if match is None:
        raise TimeError(f"time {text!r} cannot be read: {_EXAMPLES}")
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    if second == 60:  # noqa: PLR2004 - the leap second
        raise TimeError(
            f"time {text!r} is a leap second, which epoch time does not count; "
            "use second 59 or the next minute's 00"
        )
    try:
        ordinal = datetime(year, month, day, hour, minute, second, tzinfo=UTC).toordinal()
    except ValueError as error:
        raise TimeError(f"time {text!r} cannot be read: {error}; {_EXAMPLES}") from error
    seconds = _seconds(ordinal, hour, minute, second) - _offset_s(match[8], text)
    return (seconds + Fraction(f"0.{match[7] or 0}")) * NS_PER_S


def _offset_s(offset: str | None, text: str) -> int:
    if offset is None or offset in "Zz":
        return 0
    hours, minutes = int(offset[1:3]), int(offset[3:].lstrip(":") or 0)
    if hours > 23 or minutes > 59:  # noqa: PLR2004 - a clock's
        raise TimeError(f"time {text!r} has an offset beyond 23:59; {_EXAMPLES}")
    seconds = hours * 3600 + minutes * 60
    return -seconds if offset[0] == "-" else seconds


def format_time(value: Any, dtype: np.dtype[Any]) -> str:
    """A stored time as ISO 8601 in UTC, such as "2026-02-17T15:32:36.080619+00:00".

    Whole seconds have no fraction; others have at least six digits, and as many as bring the
    very same stored value back through `to_time` (hundreds for doubles next to zero).
    """
    time_to_ns(value, dtype)
    digits = 9
    if dtype == _FLOAT64:
        digits = max(-int(Decimal(repr(float(value))).as_tuple().exponent), 0)
    scaled = int(_stored_ns(value, dtype) * 10**digits / NS_PER_S)
    whole, fraction = divmod(scaled, 10**digits)
    text = (_EPOCH + timedelta(seconds=whole)).replace(tzinfo=None).isoformat()
    if fraction:
        text += "." + str(fraction).zfill(digits).rstrip("0").ljust(6, "0")
    return text + "+00:00"


def parse_duration(text: str) -> int:
    """Nanoseconds of "10s", "1.5h", "250ms", "3d", "5us", "10ns" or "1m", which is a minute.

    A number without a unit counts seconds. Rounded half-even; TimeError if it is negative.
    """
    match = _DURATION.fullmatch(text.strip()) if len(text) <= _TEXT_LENGTH_MAX else None
    if match is None:
        raise TimeError(
            f"duration {text[:100]!r} cannot be read: expected a number, not negative, with one of "
            f'{", ".join(_DURATION_NS)} (m is minutes), such as "10s", "1.5h" or "250ms"'
        )
    return round(Fraction(match[1]) * _DURATION_NS[match[2] or "s"])


# ---- keys ----


def encode_key(ns: int, sequence: int) -> bytes:
    """16 bytes that sort as (ns, sequence): int64 with its sign bit flipped, uint64, big-endian."""
    return _KEY.pack(ns + 2**63, sequence)


def decode_key(data: bytes) -> tuple[int, int]:
    """The (ns, sequence) of a key."""
    ns, sequence = _KEY.unpack(data)
    return ns - 2**63, sequence


def span_class(first_ns: int, last_ns: int) -> int:
    """The class, 0..64, of a batch's time span: of class c, last_ns < first_ns + 2**c."""
    assert first_ns <= last_ns, (first_ns, last_ns)
    return (last_ns - first_ns).bit_length()


def seek_ns(start_ns: int, span_class: int) -> int:
    """The least first_ns at which a batch of that class can still reach start_ns."""
    return max(start_ns - (1 << span_class) + 1, MIN_NS)
