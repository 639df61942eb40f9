"""Times: exact, monotone, printed so that they come back, and ends that include their rows."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore import timestamps as ts
from kvstore.errors import TimeError

FLOAT64 = np.dtype("float64")
INT64 = np.dtype("int64")
DATETIMES = {unit: np.dtype(f"datetime64[{unit}]") for unit in ("s", "ms", "us", "ns")}
COUNT_NS = {INT64: 1, **dict(zip(DATETIMES.values(), (10**9, 10**6, 10**3, 1), strict=True))}
DTYPES = [FLOAT64, *COUNT_NS]
FLOAT_MAX = 9223372036.854774
SIDES = ("start", "stop")
T0 = 1771342357  # 2026-02-17T15:32:37Z

seconds = st.one_of(
    st.floats(-FLOAT_MAX, FLOAT_MAX),
    st.floats(T0, T0 + 1e5),
    st.integers(-(10**6), 10**6).map(lambda us: T0 + us / 10**6),
    st.floats(-1e-6, 1e-6),
)
ns_counts = st.one_of(
    st.integers(ts.MIN_NS, ts.MAX_NS), st.integers(-5, 5), st.sampled_from([ts.MIN_NS, ts.MAX_NS])
)


def scalar(count: int, dtype: np.dtype) -> np.generic:
    return np.int64(count).view(dtype)


@st.composite
def stored(draw, dtypes=DTYPES):
    """A time dtype and a scalar of it that a stream may hold."""
    dtype = draw(st.sampled_from(list(dtypes)))
    if dtype == FLOAT64:
        return dtype, np.float64(draw(seconds))
    high = ts.MAX_NS // COUNT_NS[dtype]
    return dtype, scalar(draw(st.integers(-high, high)), dtype)


# ---- keys of stored times ----


@given(seconds, seconds)
@example(FLOAT_MAX, math.nextafter(FLOAT_MAX, 0))
@example(-5e-324, 5e-324)
def test_a_later_float_never_has_an_earlier_key(first, second):
    first, second = sorted((first, second))
    assert ts.time_to_ns(first, FLOAT64) <= ts.time_to_ns(second, FLOAT64)


@given(st.floats(-FLOAT_MAX, FLOAT_MAX))
def test_neighbouring_doubles_keep_their_order(x):
    after = min(math.nextafter(x, math.inf), FLOAT_MAX)
    assert ts.time_to_ns(x, FLOAT64) <= ts.time_to_ns(after, FLOAT64)


@given(seconds)
def test_a_floats_key_is_its_shortest_decimal_rounded_half_even(x):
    assert ts.time_to_ns(x, FLOAT64) == round(Fraction(repr(x)) * 10**9)
    assert ts.time_to_ns(np.float64(x), FLOAT64) == ts.time_to_ns(x, FLOAT64)


@pytest.mark.parametrize(
    ("x", "ns"), [(2.5e-9, 2), (3.5e-9, 4), (-2.5e-9, -2), (0.1 + 0.2, 3 * 10**8)]
)
def test_half_a_nanosecond_goes_to_the_even_one(x, ns):
    assert ts.time_to_ns(x, FLOAT64) == ns


def test_microsecond_floats_get_microsecond_keys():
    """`int(t * 1e9)` does not: the figure that DESIGN.md 4.4 starts from."""
    us = [T0 * 10**6 + 80619 + 7 * i for i in range(1000)]
    assert [ts.time_to_ns(n / 10**6, FLOAT64) for n in us] == [n * 1000 for n in us]
    assert [int(n / 10**6 * 1e9) for n in us] != [n * 1000 for n in us]


@given(stored(COUNT_NS))
def test_an_integral_time_keys_as_its_exact_ns(case):
    dtype, value = case
    expected = int(value.view(np.int64)) * COUNT_NS[dtype]
    assert ts.time_to_ns(value, dtype) == expected
    assert ts.time_to_ns(int(value.view(np.int64)), dtype) == expected


def test_the_float_bound_is_the_last_double_that_fits():
    after = math.nextafter(FLOAT_MAX, math.inf)
    assert Decimal(repr(FLOAT_MAX)) * 10**9 <= ts.MAX_NS < Decimal(repr(after)) * 10**9
    for sign in (1, -1):
        assert ts.MIN_NS <= ts.time_to_ns(sign * FLOAT_MAX, FLOAT64) <= ts.MAX_NS
        with pytest.raises(TimeError):
            ts.time_to_ns(sign * after, FLOAT64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_time_bounds_are_the_outermost_times_with_a_key(dtype):
    for bound, sign in zip(ts.time_bounds(dtype), (-1, 1), strict=True):
        ts.time_to_ns(bound, dtype)
        beyond = math.nextafter(bound, sign * math.inf) if dtype == FLOAT64 else bound + sign
        with pytest.raises(TimeError):
            ts.time_to_ns(beyond, dtype)


OUTSIDE = [
    (FLOAT64, math.nan),
    (FLOAT64, math.inf),
    (FLOAT64, -math.inf),
    (FLOAT64, 1771342357250.0),
    (FLOAT64, math.nextafter(FLOAT_MAX, math.inf)),
    (FLOAT64, math.nextafter(-FLOAT_MAX, -math.inf)),
    (FLOAT64, 1.7976931348623157e308),
    (INT64, np.int64(-(2**63))),
    *((dtype, np.datetime64("NaT", unit)) for unit, dtype in DATETIMES.items()),
    (DATETIMES["s"], np.datetime64(9223372037, "s")),
    (DATETIMES["ms"], np.datetime64("2262-04-12", "ms")),
    (DATETIMES["us"], np.datetime64("1677-09-20", "us")),
]


@pytest.mark.parametrize(("dtype", "value"), OUTSIDE)
def test_rows_that_no_key_can_hold_are_refused_by_number(dtype, value):
    with pytest.raises(TimeError, match=r"1677.*2262.*Milliseconds passed as seconds"):
        ts.time_to_ns(value, dtype)
    times = np.zeros(9, INT64).astype(dtype)
    times[[4, 7]] = value
    with pytest.raises(TimeError, match=r"^row 4: "):
        ts.check_times(times, dtype)
    with pytest.raises(TimeError, match=r"^row 2: "):
        ts.check_times(times[::2], dtype)


def test_the_refusal_shows_the_value():
    with pytest.raises(TimeError, match=r"1771342357250\.0"):
        ts.check_times(np.array([1771342357250.0]), FLOAT64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_outermost_times_and_no_times_pass(dtype):
    ts.check_times(np.empty(0, dtype), dtype)
    ends = [ts.to_time(x, dtype, side=side) for x in (-math.inf, math.inf) for side in SIDES]
    ts.check_times(np.array(ends, dtype), dtype)


@given(st.lists(st.one_of(seconds, st.floats()), min_size=1, max_size=5))
def test_check_times_accepts_exactly_what_has_a_key(values):
    def refused(check):
        try:
            check()
        except TimeError:
            return True
        return False

    whole = refused(lambda: ts.check_times(np.array(values), FLOAT64))
    assert whole == any(refused(lambda v=v: ts.time_to_ns(v, FLOAT64)) for v in values)


@pytest.mark.parametrize(
    "dtype", ["float32", "int32", "uint64", "datetime64[D]", "timedelta64[ns]", ">f8"]
)
def test_other_dtypes_are_no_time_fields(dtype):
    dtype = np.dtype(dtype)
    for call in (
        lambda: ts.time_to_ns(0, dtype),
        lambda: ts.check_times(np.zeros(1, dtype), dtype),
        lambda: ts.to_time(0.0, dtype, side="start"),
    ):
        with pytest.raises(TimeError, match="expected float64"):
            call()


def test_values_of_another_time_type_are_refused_not_reinterpreted():
    with pytest.raises(TimeError, match="expected the stream's own"):
        ts.time_to_ns(np.datetime64(5, "ms"), DATETIMES["s"])
    with pytest.raises(TimeError, match="expected the stream's own"):
        ts.check_times(np.zeros(3), INT64)
    with pytest.raises(TypeError):
        ts.time_to_ns(1.5, INT64)


# ---- ends of ranges ----

T0_NS = T0 * 10**9
TEXTS = [
    ("2026-02-17", (T0 - 15 * 3600 - 32 * 60 - 37) * 10**9),
    ("2026-02-17T15:32", T0_NS - 37 * 10**9),
    ("2026-02-17T15:32:37", T0_NS),
    ("2026-02-17 15:32:37", T0_NS),
    ("  2026-02-17t15:32:37z\n", T0_NS),
    ("2026-02-17T15:32:37Z", T0_NS),
    ("2026-02-17T15:32:37 Z", T0_NS),
    ("2026-02-17T15:32:37.1", T0_NS + 10**8),
    ("2026-02-17T15:32:37,000000001", T0_NS + 1),
    ("2026-02-17T15:32:37.250+00:00", T0_NS + 25 * 10**7),
    ("2026-02-17T16:32:37+01:00", T0_NS),
    ("2026-02-17T16:32:37+01", T0_NS),
    ("2026-02-17T21:02:37+0530", T0_NS),
    ("2026-02-17T12:02:37-03:30", T0_NS),
    ("2026-02-18T00:32:37.5+09:00", T0_NS + 5 * 10**8),
    ("2024-02-29", 1709164800 * 10**9),
    ("1970-01-01T00:00:00-00:00", 0),
    ("1969-12-31T23:59:59.75", -25 * 10**7),
    ("1739806357.25", 1739806357250 * 10**6),
    ("-0.5", -5 * 10**8),
    ("+1e3", 1000 * 10**9),
    (".5", 5 * 10**8),
    ("7", 7 * 10**9),
]


@pytest.mark.parametrize(("text", "ns"), TEXTS)
@pytest.mark.parametrize("side", SIDES)
def test_text_is_read_exactly(text, ns, side):
    assert ts.to_time(text, INT64, side=side) == ns
    assert ts.to_time(text, DATETIMES["ns"], side=side) == np.datetime64(ns, "ns")
    assert ts.to_time(text, FLOAT64, side=side) == ns / 10**9


UNREADABLE = [
    "",
    "now",
    "yesterday",
    "nan",
    "inf",
    "2026-2-17",
    "20260217T153237",
    "2026-02-30",
    "2026-13-01",
    "2026-02-17T",
    "2026-02-17T24:00:00",
    "2026-02-17T15",
    "2026-02-17T15:60",
    "2026-02-17T15:32:61",
    "2026-02-17T15:32:37.",
    "2026-02-17T15:32.5",
    "2026-02-17Z",
    "2026-02-17T15:32:37+1",
    "2026-02-17T15:32:37+24:00",
    "2026-02-17T15:32:37+01:60",
    "0000-01-01",
    "12026-01-01",
    "-2026-01-01",
    "1,5",
    "1e9999",
    "0x10",
    "1_000",
    "\u0662\u0660\u0662\u0666-02-17",
    "2026-02-17T15:32:37 CET",
    "2026-02-17T15:32:37\x00",
    "1/3",
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_text_is_refused_with_examples(text):
    with pytest.raises(TimeError, match=r'expected ISO 8601 such as "2026-02-17"'):
        ts.to_time(text, FLOAT64, side="start")


def test_a_leap_second_is_refused_as_one():
    with pytest.raises(TimeError, match="leap second"):
        ts.to_time("2016-12-31T23:59:60Z", FLOAT64, side="start")


def test_text_has_a_bound_on_its_length():
    digits = "0." + "3" * 3900
    assert ts.to_time(digits, FLOAT64, side="start") == 1 / 3
    with pytest.raises(TimeError, match="5002 characters"):
        ts.to_time("0." + "3" * 5000, FLOAT64, side="start")


@given(st.text(alphabet="0123456789-:.,TZ +eE", max_size=40))
def test_any_text_gives_a_time_or_a_time_error(text):
    try:
        end = ts.to_time(text, FLOAT64, side="stop")
    except TimeError:
        return
    ts.time_to_ns(end, FLOAT64)


@given(st.integers(T0 - 10**9, T0 + 10**9), st.text("0123456789", min_size=1, max_size=60))
def test_a_float_end_is_the_nearest_double_of_the_text(whole, digits):
    text = datetime.fromtimestamp(whole, UTC).replace(tzinfo=None).isoformat() + "." + digits
    exact = whole + Fraction(int(digits), 10 ** len(digits))
    end = float(ts.to_time(text, FLOAT64, side="start"))
    error = abs(Fraction(end) - exact)
    for towards in (-math.inf, math.inf):
        assert error <= abs(Fraction(math.nextafter(end, towards)) - exact)


@given(seconds, st.sampled_from(SIDES))
def test_a_float_end_on_a_float_stream_is_that_float(x, side):
    assert ts.to_time(x, FLOAT64, side=side) == x
    assert ts.to_time(np.float64(x), FLOAT64, side=side) == x
    assert ts.to_time(repr(x), FLOAT64, side=side) == x


@given(
    st.sampled_from(list(COUNT_NS)),
    st.decimals(-(10**9), 10**9, places=15) | st.decimals(-1, 1, places=10),
    st.integers(-2, 2),
)
def test_integral_ends_hold_exactly_the_rows_asked_for(dtype, end, nearby):
    """Text finer than the stream against the rows next to it, decided on exact fractions."""
    text, exact = str(end), Fraction(end)
    row = math.floor(exact * 10**9 / COUNT_NS[dtype]) + nearby
    time = Fraction(row * COUNT_NS[dtype], 10**9)
    value = scalar(row, dtype)
    assert (value >= ts.to_time(text, dtype, side="start")) == (time >= exact)
    assert (value <= ts.to_time(text, dtype, side="stop")) == (time <= exact)


@given(stored(), st.sampled_from(SIDES))
def test_a_stored_time_is_included_by_itself_as_an_end(case, side):
    dtype, value = case
    unit = None if dtype == FLOAT64 else "ns"
    given_as = value if dtype != INT64 else int(value)
    assert ts.to_time(given_as, dtype, side=side, unit=unit) == value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_ends_beyond_the_storable_are_clamped(dtype, side):
    low, high = (ts.to_time(x, dtype, side=side) for x in (-math.inf, math.inf))
    ts.check_times(np.array([low, high], dtype), dtype)
    if dtype == FLOAT64:
        assert (low, high) == (-FLOAT_MAX, FLOAT_MAX)
    else:
        bound = ts.MAX_NS // COUNT_NS[dtype]
        assert (low, high) == (scalar(-bound, dtype), scalar(bound, dtype))
    far = ("9999-12-31T23:59:59.9-23:59", "1e20", 1e300, datetime(9999, 12, 31, tzinfo=UTC))
    for end in (*far, np.datetime64(2**62, "Y"), np.datetime64("2262-04-13"), np.inf):
        assert ts.to_time(end, dtype, side=side) == high
    far = ("0001-01-01T00:00:00+23:59", "-1e20", -1e300, datetime(1, 1, 1, tzinfo=UTC))
    for end in (*far, np.datetime64(-(2**62), "M"), np.datetime64("1677-09-20"), -np.inf):
        assert ts.to_time(end, dtype, side=side) == low
    assert ts.to_time(10**30, dtype, side=side, unit="ns") == high


@given(stored())
def test_every_end_has_a_key(case):
    dtype, _ = case
    for side in SIDES:
        for end in (-math.inf, math.inf, 1e10, -1e10, "2262-04-11T23:47:16.8547758079"):
            ts.time_to_ns(ts.to_time(end, dtype, side=side), dtype)


DATETIME_ENDS = [
    datetime(2026, 2, 17, 15, 32, 37),  # noqa: DTZ001 - naive is UTC: the claim
    datetime(2026, 2, 17, 15, 32, 37, tzinfo=UTC),
    datetime(2026, 2, 17, 17, 2, 37, tzinfo=timezone(timedelta(hours=1, minutes=30))),
    datetime(2026, 2, 17, 5, 32, 37, tzinfo=timezone(timedelta(hours=-10))),
    np.datetime64("2026-02-17T15:32:37"),
    np.datetime64(T0 // 7, "7s") + np.timedelta64(T0 % 7, "s"),
    np.datetime64("2026-02-17T15:32:37", "ns"),
]


@pytest.mark.parametrize("value", DATETIME_ENDS)
def test_datetimes_are_converted_exactly(value):
    for dtype in DTYPES:
        assert ts.time_to_ns(ts.to_time(value, dtype, side="start"), dtype) == T0_NS


@pytest.mark.parametrize(
    ("value", "ns"),
    [
        (np.datetime64("2026"), 1767225600 * 10**9),
        (np.datetime64("2026-02"), 1769904000 * 10**9),
        (np.datetime64("1969-12"), -2678400 * 10**9),
        (np.datetime64("2026-02-17"), 1771286400 * 10**9),
        (np.datetime64(10, "W"), 70 * 86400 * 10**9),
        (np.datetime64(5, "25m"), 125 * 60 * 10**9),
        (datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), -1000),
    ],
)
def test_coarse_and_early_datetimes_are_converted_exactly(value, ns):
    assert ts.to_time(value, INT64, side="start") == ns


def test_a_picosecond_end_is_rounded_inwards():
    end = np.datetime64(1500, "ps")
    assert ts.to_time(end, INT64, side="start") == 2
    assert ts.to_time(end, INT64, side="stop") == 1


def test_pandas_timestamps_keep_their_nanoseconds():
    pandas = pytest.importorskip("pandas")
    time = pandas.Timestamp("2026-02-17T16:32:37.000000123+01:00")
    assert ts.to_time(time, INT64, side="start") == T0_NS + 123
    with pytest.raises(TimeError, match="NaT"):
        ts.to_time(pandas.NaT, INT64, side="start")


@pytest.mark.parametrize(
    ("value", "unit", "ns"),
    [
        (T0, "s", T0_NS),
        (T0 * 1000 + 1, "ms", T0_NS + 10**6),
        (np.int32(5), "us", 5000),
        (np.uint64(T0_NS), "ns", T0_NS),
        (T0 * 1000 + 0.5, "ms", T0_NS + 5 * 10**5),
        (0.1, None, 10**8),
        ("1.5", "ms", 1500000),
        ("2026-02-17T15:32:37", "ms", T0_NS),
    ],
)
def test_a_unit_says_what_a_number_counts(value, unit, ns):
    assert ts.to_time(value, INT64, side="start", unit=unit) == ns


@pytest.mark.parametrize("value", [T0, np.int64(T0_NS), 0])
def test_a_bare_integer_is_refused(value):
    with pytest.raises(TimeError, match=r'pass unit="ns".*float for seconds'):
        ts.to_time(value, INT64, side="start")


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        None,
        b"2026-02-17",
        [1.0],
        np.timedelta64(1, "s"),
        1j,
        np.zeros(1),
        timedelta(1),
    ],
)
@pytest.mark.parametrize("unit", [None, "ns"])
def test_what_is_no_time_is_refused_with_what_is(value, unit):
    with pytest.raises(TimeError, match="ISO 8601 text, a datetime"):
        ts.to_time(value, FLOAT64, side="start", unit=unit)


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), np.datetime64("NaT", "ns")])
def test_missing_values_are_no_ends(value):
    with pytest.raises(TimeError, match=r"Na[NT] cannot be an end"):
        ts.to_time(value, FLOAT64, side="start")


def test_an_unknown_unit_is_refused():
    with pytest.raises(TimeError, match="expected one of s, ms, us, ns"):
        ts.to_time(1, INT64, side="start", unit="minutes")


# ---- printing ----


@given(stored(), st.sampled_from(SIDES))
@example((FLOAT64, np.float64(5e-324)), "start")
@example((FLOAT64, np.float64(-5e-324)), "start")
@example((FLOAT64, np.float64(-FLOAT_MAX)), "start")
@example((INT64, np.int64(ts.MIN_NS)), "start")
@example((INT64, np.int64(ts.MAX_NS)), "stop")
def test_a_printed_time_brings_the_same_row_back(case, side):
    dtype, value = case
    assert ts.to_time(ts.format_time(value, dtype), dtype, side=side) == value


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (1771342356.080619, FLOAT64, "2026-02-17T15:32:36.080619+00:00"),
        (1771342356.5, FLOAT64, "2026-02-17T15:32:36.500000+00:00"),
        (1771342356.1234567, FLOAT64, "2026-02-17T15:32:36.1234567+00:00"),
        (1771342356.0, FLOAT64, "2026-02-17T15:32:36+00:00"),
        (-0.0, FLOAT64, "1970-01-01T00:00:00+00:00"),
        (-1e-7, FLOAT64, "1969-12-31T23:59:59.9999999+00:00"),
        (T0_NS + 1, INT64, "2026-02-17T15:32:37.000000001+00:00"),
        (np.datetime64("2026-02-17T15:32:37", "s"), DATETIMES["s"], "2026-02-17T15:32:37+00:00"),
        (np.datetime64(-1, "ms"), DATETIMES["ms"], "1969-12-31T23:59:59.999000+00:00"),
    ],
)
def test_times_are_printed_like_this(value, dtype, text):
    assert ts.format_time(value, dtype) == text


def test_a_time_that_cannot_be_stored_cannot_be_printed():
    with pytest.raises(TimeError):
        ts.format_time(math.nan, FLOAT64)


# ---- durations ----


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("10s", 10 * 10**9),
        ("1.5h", 5400 * 10**9),
        ("250ms", 25 * 10**7),
        ("3d", 259200 * 10**9),
        ("1m", 60 * 10**9),
        ("5us", 5000),
        ("10ns", 10),
        ("2.5", 25 * 10**8),
        (" .5 s ", 5 * 10**8),
        ("0", 0),
        ("2.5ns", 2),
    ],
)
def test_durations_are_read_exactly(text, ns):
    assert ts.parse_duration(text) == ns


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "1 hour", "1h30m", "inf", "nan", "1e3", "10S", "1,5s", "9" * 5000]
)
def test_other_durations_are_refused_with_examples(text):
    with pytest.raises(TimeError, match=r'not negative.*such as "10s"'):
        ts.parse_duration(text)


@given(stored(), st.integers(0, 10**19))
def test_a_duration_is_subtracted_exactly(case, duration_ns):
    dtype, value = case
    start = ts.subtract(value, duration_ns, dtype)
    assert start <= value
    if dtype == FLOAT64:
        exact = Fraction(repr(float(value))) - Fraction(duration_ns, 10**9)
        assert float(start) == max(float(exact), -FLOAT_MAX)
    else:
        exact = ts.time_to_ns(value, dtype) - duration_ns
        low = -(ts.MAX_NS // COUNT_NS[dtype])
        assert int(start.view(np.int64)) == max(-(-exact // COUNT_NS[dtype]), low)


# ---- keys ----


@given(ns_counts, st.integers(0, 2**64 - 1))
def test_a_key_is_16_bytes_and_comes_back(ns, sequence):
    key = ts.encode_key(ns, sequence)
    assert len(key) == 16
    assert ts.decode_key(key) == (ns, sequence)
    assert ts.decode_key(memoryview(key)) == (ns, sequence)


@given(st.lists(st.tuples(ns_counts, st.integers(0, 2**64 - 1)), max_size=20))
def test_keys_sort_as_time_then_arrival(pairs):
    keys = sorted(ts.encode_key(*pair) for pair in pairs)
    assert [ts.decode_key(key) for key in keys] == sorted(pairs)


def test_key_bytes_are_pinned():
    assert ts.encode_key(-1, 258).hex() == "7fffffffffffffff0000000000000102"
    assert ts.encode_key(1, 0).hex() == "80000000000000010000000000000000"


@given(ns_counts, ns_counts)
def test_a_span_class_bounds_the_batchs_span_tightly(first, last):
    first, last = sorted((first, last))
    c = ts.span_class(first, last)
    assert 0 <= c <= 64
    assert last < first + 2**c
    assert c == 0 or last - first >= 2 ** (c - 1)


@given(ns_counts, ns_counts, ns_counts)
def test_a_seek_misses_no_batch_that_reaches_the_start(first, last, start):
    first, last = sorted((first, last))
    if last >= start:
        assert ts.seek_ns(start, ts.span_class(first, last)) <= first


@given(ns_counts, st.integers(0, 64))
def test_a_seek_begins_no_earlier_than_it_must(start, c):
    first = ts.seek_ns(start, c)
    assert ts.MIN_NS <= first <= start
    assert first + 2**c - 1 >= start
    assert first == ts.MIN_NS or first - 1 + 2**c - 1 < start
