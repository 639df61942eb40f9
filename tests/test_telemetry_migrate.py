"""Migration from the lake: all of it, once, resumable; reconciliation finds what differs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace

import lakes
import numpy as np
import pytest
import telemetry_data as data
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_model import plain, read_all

from kvstore.errors import CommitUnknown, Fenced
from kvstore.telemetry import migrate as migrating
from kvstore.telemetry.migrate import Rendered, Window, migrate, verify
from kvstore.telemetry.reconcile import DAY_US, by_day, differences, reconcile
from kvstore.telemetry.records import Outcome
from kvstore.telemetry.sinks.iceberg_maintain import maintain
from kvstore.telemetry.sinks.stream import StreamSink

pytestmark = pytest.mark.slow  # servers, processes or many files: CI runs it

ROWS = [
    data.row(
        f"d{n % 3}",
        n * 1800,
        offset=n,
        temperature=n / 7,
        pressure=1000.0 + n if n % 2 else None,
        extras='{"site":"ü"}' if n % 5 == 0 else None,
    )
    for n in range(120)
]


@pytest.fixture
def lake():
    with lakes.scratch() as folder, lakes.opened(folder / "lake") as sink:
        made = lakes.first_work(sink, ROWS[:70])
        sink.commit(made)
        sink.commit(data.next_work(made, ROWS[70:]))
        yield sink


@pytest.fixture
def target(tmp_path):
    with StreamSink.open(str(tmp_path / "ops.kv"), data.BRIEF) as sink:
        sink.evolve(data.BRIEF)
        yield sink


ALL = Window()


def move(lake, target, window=ALL, **options):
    return migrate(lake, target, window, contract_version=2, run="migration", **options)


def put(sink, rows, place=data.OTHER):
    return sink.commit(data.work(sink.claim([place]), rows))


def test_all_rows_arrive_with_their_lineage(lake, target):
    moved = move(lake, target, rows_max=50)
    assert (moved.rows, moved.stored, moved.duplicates, moved.is_whole) == (120, 120, 0, True)
    assert moved.commits >= 3
    assert read_all(target) == read_all(lake)
    verdict = verify(lake, target, Window())
    assert (verdict.is_same, verdict.rows, verdict.days) == (True, 120, 3)
    totals = defaultdict(int)
    for count in target.counts():
        totals[count.name] += count.value
    assert totals == {"received": 120, "stored": 120}


def test_only_the_window_is_moved(lake, target):
    window = Window(ROWS[10].ts_us, ROWS[20].ts_us)
    assert move(lake, target, window).stored == 10
    assert verify(lake, target, window).is_same
    assert not verify(lake, target, Window()).is_same


def test_it_goes_on_where_it_was_stopped(lake, target):
    polls = iter([False, False, True])
    moved = move(lake, target, rows_max=25, stopped=lambda: next(polls))
    assert not moved.is_whole
    assert 0 < moved.rows < 120
    rest = move(lake, target, rows_max=25)
    assert rest.resumed
    assert rest.is_whole
    assert rest.rows == 120 - moved.rows
    assert rest.duplicates == 0
    assert verify(lake, target, Window()).is_same


def test_a_second_run_takes_only_what_has_come_since(lake, target):
    move(lake, target)
    late = [data.row("d1", -5, offset=900), data.row("d9", 7, offset=901)]
    put(lake, late)
    moved = move(lake, target)
    assert (moved.rows, moved.stored) == (2, 2)
    assert move(lake, target).rows == 0
    assert verify(lake, target, Window()).is_same


def test_a_snapshot_that_expired_on_the_way_costs_time_alone(lake, target):
    polls = iter([False, True])
    move(lake, target, rows_max=50, stopped=lambda: next(polls))
    put(lake, [data.row("d1", 1, offset=900)])
    maintain(lake._lake, keep_s=0, orphans_s=0, now_s=lambda: 4e9)
    moved = move(lake, target)
    assert moved.is_whole
    assert moved.duplicates > 0
    assert verify(lake, target, Window()).is_same


def test_it_runs_beside_live_ingest(lake, target, monkeypatch):
    """Live events come in between; some of them are in the lake as well."""
    real, live = target.commit, [[data.row("live", 5, place=data.OTHER, offset=1)], ROWS[60:64]]

    def commit(work):
        if work.claims[0].position.place.source.startswith("iceberg:") and live:
            rows = [each._replace(place=data.OTHER) for each in live.pop()]
            real(data.work(target.claim([data.OTHER]), rows))
        return real(work)

    monkeypatch.setattr(target, "commit", commit)
    moved = move(lake, target, rows_max=30)
    assert moved.stored + moved.duplicates == 120
    assert moved.duplicates == 4
    window = Window(ROWS[1].ts_us)
    assert verify(lake, target, window).is_same


def test_two_migrations_of_a_window_fence_each_other(lake, target):
    stop = iter([False, True])

    def other():
        move(lake, target, stopped=lambda: True)
        return next(stop)

    with pytest.raises(Fenced):
        move(lake, target, rows_max=30, stopped=other)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_lost_reply_is_settled(lake, target, monkeypatch, arrived):
    real, lost = target.commit, [1]

    def commit(work):
        if lost:
            lost.pop()
            if arrived:
                real(work)
            raise CommitUnknown("no answer")
        return real(work)

    monkeypatch.setattr(target, "commit", commit)
    if arrived:
        assert move(lake, target).stored == 120
    else:
        with pytest.raises(Exception, match="start the migration again"):
            move(lake, target)
        assert move(lake, target).stored == 120
    assert verify(lake, target, Window()).is_same


def test_a_conflict_is_a_dead_letter_and_a_difference(lake, target):
    other = ROWS[3]._replace(values={**ROWS[3].values, "temperature": -9.0}, place=data.OTHER)
    put(target, [other])
    moved = move(lake, target)
    assert (moved.stored, moved.conflicts) == (119, 1)
    (letter,) = target.dead_letters()
    event = json.loads(letter.rejection.payload)
    assert event["device_id"] == ROWS[3].device_id
    assert event["temperature"] == ROWS[3].values["temperature"]
    found = verify(lake, target, Window()).differences
    assert {each.what for each in found} == {"temperature hash", "temperature minimum"}
    assert {each.device_id for each in found} == {ROWS[3].device_id}


def test_an_event_is_rendered_as_it_could_have_been():
    given = [data.row("a", 0.25, offset=1, pressure=None, extras='{"x":[1,2]}')]
    assert json.loads(Rendered(data.readings(given))[0]) == {
        "device_id": "a",
        "timestamp": "2025-01-20T10:15:30.250000Z",
        "temperature": 21.4,
        "humidity": 68.0,
        "firmware_version": "v1.2.0",
        "x": [1, 2],
    }


def test_a_day_that_differs_is_looked_at_again(lake, target, monkeypatch):
    """A live row reaches the lake first, the target a moment later."""
    move(lake, target)
    late = [data.row("d1", 3, offset=950)]
    put(lake, late)
    real = migrating._compared

    def compared(*args):
        yield from real(*args)
        if late:
            put(target, [late.pop()])

    monkeypatch.setattr(migrating, "_compared", compared)
    assert verify(lake, target, Window()).is_same


# ---- reconciliation ----


def batches(rows, size=7):
    rows = sorted(rows, key=lambda each: each.ts_us)
    return [data.readings(rows[at : at + size]) for at in range(0, len(rows), size)]


def differing(left, right):
    return [each for *_, found in reconcile(batches(left), batches(right)) for each in found]


def test_the_same_rows_in_another_order_and_other_batches_are_the_same():
    again = [ROWS[n] for n in np.random.default_rng(1).permutation(len(ROWS))]
    assert [found for *_, found in reconcile(batches(ROWS, 13), batches(again, 5))] == [[], [], []]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda rows: rows[1:], "count"),
        (lambda rows: [*rows, rows[4]._replace(device_id="new")], "count"),
        (lambda rows: [rows[0]._replace(ts_us=rows[0].ts_us + 1), *rows[1:]], "temperature hash"),
        (lambda rows: [with_value(rows[0], pressure=None), *rows[1:]], None),
        (lambda rows: [with_value(rows[1], pressure=None), *rows[1:]], "pressure nulls"),
        (
            lambda rows: [
                with_value(rows[0], temperature=math.nextafter(0.0, 1)),
                *rows[1:],
            ],
            "temperature hash",
        ),
        (
            lambda rows: [with_value(rows[0], firmware_version="v9"), *rows[1:]],
            "firmware_version maximum",
        ),
        (lambda rows: [rows[0]._replace(extras='{"site":"u"}'), *rows[1:]], "extras hash"),
        (lambda rows: [with_value(rows[0], temperature=-0.0), *rows[1:]], None),
    ],
)
def test_each_kind_of_difference_is_found(spoil, what):
    found = differing(ROWS, spoil(list(ROWS)))
    assert (what in {each.what for each in found}) if what else not found


def with_value(row, **values):
    values = {name: v for name, v in {**row.values, **values}.items() if v is not None}
    return row._replace(values=values)


def test_values_that_change_places_are_found():
    """Count, nulls, minimum, maximum and sum are all the same then."""
    a, b = (with_value(ROWS[n], temperature=float(n), pressure=5.0) for n in (3, 6))
    swapped = [with_value(a, temperature=6.0), with_value(b, temperature=3.0)]
    assert {each.what for each in differing([a, b], swapped)} == {"temperature hash"}


def test_a_column_that_one_side_lacks_is_null_there():
    rows = [with_value(each, pressure=None) for each in ROWS[:9]]
    old = [data.readings(rows, contract=data.BRIEF_1)]
    assert all(not found for *_, found in reconcile(batches(rows), old))
    full = [with_value(rows[0], pressure=2.0), *rows[1:]]
    found = [each for *_, days in reconcile(batches(full), old) for each in days]
    assert {each.what for each in found} == {
        f"pressure {figure}" for figure in ("nulls", "minimum", "maximum", "hash")
    }


EVENTS = st.lists(
    st.builds(
        lambda device, hour, temperature, version: data.row(
            device, hour * 3600, temperature=temperature, firmware_version=version
        ),
        st.sampled_from(["a", "b", "ü"]),
        st.integers(-40, 40),
        st.sampled_from([None, 0.0, -0.0, 1.5, 1e300]),
        st.sampled_from([None, "", "v1", "v2"]),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_figures_are_what_they_say(rows):
    found = {
        (device, day): figures
        for day, devices in by_day(batches(rows))
        for device, figures in devices.items()
    }
    groups = defaultdict(list)
    for each in rows:
        groups[each.device_id, each.ts_us // DAY_US * DAY_US].append(each)
    assert found.keys() == groups.keys()
    for key, members in groups.items():
        assert found[key].rows == len(members)
        for name in ("temperature", "firmware_version"):
            values = [plain(each.values.get(name)) for each in members]
            there = [value for value in values if value is not None]
            column = found[key].columns[name]
            assert column.nulls == len(values) - len(there)
            assert column.minimum == min(there, default=None)
            assert column.maximum == max(there, default=None)


@settings(max_examples=60, deadline=None)
@given(EVENTS, EVENTS)
def test_days_are_the_same_just_where_the_rows_are(left, right):
    def by_group(rows):
        groups = defaultdict(list)
        for each in rows:
            values = tuple(sorted((n, plain(v)) for n, v in each.values.items()))
            groups[each.device_id, each.ts_us // DAY_US].append((each.ts_us, values))
        return {key: sorted(members) for key, members in groups.items()}

    one, other = by_group(left), by_group(right)
    expected = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    found = {(each.device_id, each.day_us // DAY_US) for each in differing(left, right)}
    assert found == expected


def test_an_empty_side_lacks_everything():
    ((_, day),) = by_day(batches(ROWS[:3]))
    assert {each.what for each in differences(0, day, {})} >= {"count"}
    assert Outcome(0, 0, 0, 0) == Outcome(*[0] * 4)
    assert replace(Window(), start_us=1).place("x").source == "iceberg:x/1.."
