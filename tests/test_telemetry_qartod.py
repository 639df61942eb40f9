"""Tests on devices' series: what a plain loop over all readings finds, in whatever pieces."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median_low

import numpy as np
import pytest
import telemetry_data as data
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.telemetry import qartod
from kvstore.telemetry.qartod import DeviceSeries, FieldSeries, Series

SECOND = data.SECOND_US
FLAT = 4


def row(second, value=20.0, device="d", **more):
    return data.row(device, second, temperature=value, **more)


def series(rows, pieces=1, interval_s=5.0):
    found = Series(["temperature"], interval_s, flat_readings=FLAT)
    for piece in np.array_split(np.arange(len(rows)), pieces):
        found.add(data.readings([rows[at] for at in piece]))
    return found


# ---- a plain loop ----


def plain(rows, interval_us):
    """The same, written down as one would by hand."""
    found = {}
    for device in dict.fromkeys(each.device_id for each in rows):
        mine = [each for each in rows if each.device_id == device]
        times = [each.ts_us for each in mine]
        apart = [(b - a, b) for a, b in pairwise(times)]
        gaps = [each for each in apart if each[0] > 3 * interval_us]
        longest = max(gaps, key=lambda each: each[0], default=(0, None))
        found[device] = DeviceSeries(
            len(mine),
            times[0],
            times[-1],
            len(gaps),
            sum(width - interval_us for width, _ in gaps),
            *longest,
            {"temperature": plain_field([e for e in mine if "temperature" in e.values])},
        )
    return found


def plain_field(rows):
    if not rows:
        return FieldSeries()
    values = [each.values["temperature"] for each in rows]
    runs, length = [], 1
    for at, value in enumerate(values[1:], 1):
        if value == values[at - 1]:
            length += 1
        else:
            runs.append((length, rows[at - 1].ts_us))
            length = 1
    runs.append((length, rows[-1].ts_us))
    longest = max(length for length, _ in runs)
    steps = [
        (abs(b - a), each.ts_us)
        for a, b, each in zip(values, values[1:], rows[1:], strict=False)
        if a != b
    ]
    largest = max(steps, key=lambda each: each[0], default=(0.0, None))
    flat = [length for length, _ in runs if length >= FLAT]
    return FieldSeries(
        len(flat), sum(flat), longest, 0, plain_jumps([step for step, _ in steps]), *largest
    )


def plain_jumps(steps):
    if len(steps) < qartod.STEPS_MIN:
        return 0
    halves = [math.floor(math.log2(step) * 2) for step in steps]
    return sum(each >= median_low(halves) + 1 + 6 for each in halves)


ROWS = st.lists(
    st.tuples(
        st.sampled_from([5, 5, 5, 5, 15, 16, 300]),
        st.sampled_from([20.0, 20.0, 20.5, 21.0, 29.0, 60.0, None]),
        st.sampled_from("dde"),
    ),
    max_size=70,
)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(1, 9))
def test_the_outcome_is_a_plain_loop_s_in_whatever_pieces(steps, pieces):
    rows, second = [], 0
    for step, value, device in steps:
        second += step
        rows.append(row(second, value, device))
    found = series(rows, pieces)
    devices = found.devices()
    expected = plain(rows, 5 * SECOND)
    assert devices.keys() == expected.keys()
    for device, each in devices.items():
        field, wanted = each.fields["temperature"], expected[device].fields["temperature"]
        for name in ("flat_runs", "flat_readings", "longest_run", "jumps", "largest_step"):
            assert getattr(field, name) == getattr(wanted, name), name
        assert field.largest_step_us == wanted.largest_step_us
        for name in ("rows", "first_us", "last_us", "gaps", "gap_us", "longest_gap_us"):
            assert getattr(each, name) == getattr(expected[device], name), name
        assert each.longest_gap_end_us == expected[device].longest_gap_end_us
    assert sum(found.per_hour.values()) == len(rows)


def test_hours_are_counted_by_device():
    found = series([row(0), row(3600), row(3601), row(3602, device="e")], pieces=2).per_hour
    ten = data.BASE_US // qartod.HOUR_US * qartod.HOUR_US
    eleven = ten + qartod.HOUR_US
    assert found == {("d", ten): 1, ("d", eleven): 2, ("e", eleven): 1}


# ---- each test, once ----


def test_a_gap_is_wider_than_three_intervals():
    (found,) = series([row(0), row(15), row(31)]).devices().values()
    assert (found.gaps, found.gap_us) == (1, 11 * SECOND)
    assert (found.longest_gap_us, found.longest_gap_end_us) == (
        16 * SECOND,
        data.BASE_US + 31 * SECOND,
    )


def test_without_an_interval_there_are_no_gaps():
    (found,) = series([row(0), row(10_000)], interval_s=None).devices().values()
    assert (found.gaps, found.longest_gap_end_us) == (0, None)


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_a_stuck_value_is_a_run_of_one_value(pieces):
    values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    (found,) = series([row(5 * n, v) for n, v in enumerate(values)], pieces).devices().values()
    field = found.fields["temperature"]
    assert (field.flat_runs, field.flat_readings, field.longest_run) == (1, 5, 5)
    assert field.longest_run_end_us == data.BASE_US + 25 * SECOND


def test_a_jump_is_far_beyond_the_usual_step():
    values = [20 + 0.25 * (n % 2) for n in range(60)]
    values[40] = 50.25
    assert values[41] == 20.25
    (found,) = series([row(5 * n, v) for n, v in enumerate(values)], 3).devices().values()
    field = found.fields["temperature"]
    assert (field.jumps, field.largest_step) == (2, 30.0)  # there and back
    assert field.largest_step_us == data.BASE_US + 200 * SECOND


def test_nulls_end_no_run_and_make_no_step():
    rows = [row(5 * n, 20.0 if n % 2 else None) for n in range(10)]
    (found,) = series(rows, 4).devices().values()
    assert found.fields["temperature"].flat_readings == 5
    assert found.fields["temperature"].largest_step == 0


def test_memory_is_bounded_and_what_was_left_out_is_said(monkeypatch):
    monkeypatch.setattr(qartod, "DEVICES_MAX", 3)
    found = series([row(n, device=f"d{n}") for n in range(10)], pieces=2)
    assert list(found.devices()) == ["d0", "d1", "d2"]
    assert found.untested == {f"d{n}" for n in range(3, 10)}
