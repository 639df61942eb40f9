"""The report: figures that add up and mean what their formulas say, over any sink."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import telemetry_data as data
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import scratch
from typer.testing import CliRunner

from kvstore.cli import app
from kvstore.telemetry import counts, report
from kvstore.telemetry.contract import brief
from kvstore.telemetry.records import (
    Chunk,
    Count,
    DeadLetter,
    LetterChange,
    Place,
    Position,
    Reason,
    Rejection,
    State,
    Work,
)
from kvstore.telemetry.report_html import page, percent
from kvstore.telemetry.simulate import Fleet, Simulation
from kvstore.telemetry.sinks.stream import StreamSink
from kvstore.telemetry.validate import Validator

SECOND, HOUR = data.SECOND_US, counts.HOUR_US
NOW_US = data.NOW_US
TEN = data.BASE_US // HOUR * HOUR
PLACE = Place("file:/x", 0)


class Held:
    """A sink of which everything is said by hand."""

    def __init__(self, rows=(), found=(), letters=(), positions=()):
        self.rows, self.found, self.letters = list(rows), list(found), list(letters)
        self.at = list(positions)

    def read(self, start_us=None, stop_us=None, *, device_id=None):
        kept = [each for each in self.rows if start_us is None or each.ts_us >= start_us]
        for first in range(0, len(kept), 3):
            yield data.readings(sorted(kept, key=lambda each: each.ts_us)[first : first + 3])

    def counts(self, start_us=None, stop_us=None):
        return iter([c for c in self.found if start_us is None or c.hour_us >= start_us])

    def dead_letters(self, **_):
        return iter(self.letters)

    def positions(self, source=None):
        return self.at


def survey(sink, **options):
    return report.survey(sink, brief(), name="held", now_us=lambda: NOW_US, **options)


def fate(device, name, value, hour=TEN):
    return Count(device, hour, name, value)


# ---- the formulas ----


def test_validity_and_consistency_are_shares_of_what_was_received_and_valid():
    found = [
        fate("d", "received", 200), fate("d", "stored", 170), fate("d", "duplicates", 5),
        fate("d", "rejected", 25), fate("d", "reason:range", 20), fate("d", "reason:conflict", 5),
    ]  # fmt: skip
    done = survey(Held(found=found))
    assert done.dimensions["validity"] == 180 / 200
    assert done.dimensions["consistency"] == 1 - 5 / 180
    assert done.dimensions["completeness"] is done.dimensions["timeliness"] is None
    assert done.score == 0.9
    assert done.imbalances == []


def test_timeliness_is_the_share_of_those_whose_arrival_is_known():
    done = survey(Held(found=[fate("d", "timed", 40), fate("d", "delayed", 10)]))
    assert done.dimensions["timeliness"] == 0.75


def test_completeness_is_what_is_there_of_what_was_to_be_expected():
    rows = [data.row("a", 5 * n) for n in range(121)]  # ten minutes, none missing
    rows += [data.row("b", 300 + 5 * n) for n in range(0, 61, 2)]  # from five on, each second
    rows += [data.row("c", 300)]
    done = survey(Held(rows))
    devices = {each.device_id: each for each in done.devices}
    assert (devices["a"].expected, devices["a"].present) == (120, 120)
    assert (devices["b"].expected, devices["b"].present) == (60, 31)
    assert devices["c"].completeness == 1 / 60
    assert done.dimensions["completeness"] == (120 + 31 + 1) / 240
    assert done.grid["b", TEN] == 31 / 60


def test_more_readings_than_expected_do_not_make_up_for_missing_ones():
    rows = [data.row("a", n) for n in range(600)] + [data.row("a", 7200)]
    done = survey(Held(rows))
    (device,) = done.devices
    assert device.expected == 1440
    # 10:15:30 to 10:25:30 at five times the rate, and one of 720 in the hours after.
    assert device.present == pytest.approx(min(600, (TEN + HOUR - data.BASE_US) / SECOND / 5) + 1)


def test_the_interval_may_be_another_than_the_contract_s():
    rows = [data.row("a", 30 * n) for n in range(21)]
    assert survey(Held(rows)).dimensions["completeness"] < 0.2
    assert survey(Held(rows), interval_s=30).dimensions["completeness"] == 1


def test_a_silent_device_does_not_hold_up_what_is_complete():
    rows = [data.row("a", 5 * n) for n in range(100)] + [data.row("b", 5 * n) for n in range(99)]
    rows += [data.row("dead", 0), data.row("slow", 396)]
    done = survey(Held(rows))
    assert [each.device_id for each in done.silent] == ["dead"]
    assert done.newest_us == data.BASE_US + 495 * SECOND
    assert done.complete_through_us == data.BASE_US + 396 * SECOND


def test_silence_of_years_costs_nothing():
    rows = [data.row("old", 0), data.row("new", 50 * 365 * 86400)]
    done = survey(Held(rows))
    assert {each.device_id: each.silent for each in done.devices} == {"old": True, "new": False}


def test_each_test_has_its_verdict():
    rows = [data.row("a", 5 * n, temperature=20.0, humidity=50 + n % 3) for n in range(120)]
    found = [fate("a", "reason:range", 2), fate("a", "reason:json", 1), fate("", "received", 1)]
    done = survey(Held(rows, found))
    devices = {each.device_id: each for each in done.devices}
    assert devices["a"].tests == {
        "syntax": "fail",
        "gross range": "fail",
        "gap": "pass",
        "flat line": "suspect",
        "rate of change": "pass",
    }
    assert set(devices[""].tests.values()) == {"not evaluated"}


def test_the_window_begins_with_an_hour():
    rows = [data.row("a", 0), data.row("a", 3600)]
    found = [fate("a", "received", 1), fate("a", "received", 3, TEN + HOUR)]
    letters = [letter(1, "range", ts_us=TEN), letter(2, "range", ts_us=TEN + HOUR)]
    done = survey(Held(rows, found, letters), since_us=TEN + HOUR + 5)
    assert done.since_us == TEN + HOUR
    assert done.total.received == 3
    assert [each.series.rows for each in done.devices] == [1]
    assert done.reasons[0].states == {State.OPEN: 1}


def letter(offset, *codes, state=State.OPEN, ts_us=TEN, source="file:/x"):
    reasons = tuple(Reason(code, "f", "v") for code in codes)
    rejection = Rejection(Place(source, 0), offset, b"{}", reasons, device_id="d", ts_us=ts_us)
    return DeadLetter(rejection, NOW_US, 2, "r", state)


def test_reasons_name_their_first_letters_and_what_became_of_them():
    letters = [letter(n, "range", "type") for n in range(5)]
    letters += [letter(9, "json", "json", state=State.REPLAYED)]
    done = survey(Held(found=[fate("d", "reason:range", 5)], letters=letters))
    found = {each.code: each for each in done.reasons}
    assert found["range"].events == 5
    assert [each.name for each in found["range"].examples] == [f"file:/x#0@{n}" for n in range(3)]
    assert found["json"].states == {State.REPLAYED: 1}
    assert found["type"].states == {State.OPEN: 5}


def test_what_does_not_add_up_is_found_by_device_and_hour():
    fine = [fate("a", "received", 2), fate("a", "stored", 1), fate("a", "rejected", 1)]
    lost = [fate("b", "received", 1), fate("b", "stored", 1, TEN + HOUR)]
    assert survey(Held(found=fine)).imbalances == []
    assert survey(Held(found=fine + lost)).imbalances == [("b", TEN), ("b", TEN + HOUR)]
    assert survey(Held(found=fine + lost)).total.balanced  # in total alone one would miss it


# ---- received = stored + duplicates + rejected, always ----

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", ""]),
        st.sampled_from(["2025-01-20T10:59:59Z", "2025-01-20T11:00:00Z", "later"]),
        st.sampled_from([20, 20.0, 21, 99, None]),
    ),
    max_size=12,
)


@settings(max_examples=12, deadline=None)
@given(st.lists(EVENTS, max_size=4), st.data())
def test_whatever_comes_is_stored_or_a_duplicate_or_rejected(chunks, draw):
    with scratch() as folder, StreamSink.open(folder / "run.kv", brief()) as sink:
        sink.evolve(brief())
        total, first = 0, 1
        for events in chunks:
            payloads = [event(*each) for each in events]
            commit(sink, payloads, first)
            total, first = total + len(payloads), first + len(payloads)
        open_letters = list(sink.dead_letters(state=State.OPEN))
        if open_letters:
            chosen = draw.draw(st.sampled_from(open_letters)).rejection
            sink.change_letters([LetterChange(chosen.place, chosen.offset, State.DISCARDED, 0)])
        done = survey(sink)
        assert done.imbalances == []
        assert done.total.received == total
        assert done.total.balanced
        assert done.total.stored == sum(len(each) for each in sink.read())
        assert done.total.rejected == len(list(sink.dead_letters()))


def event(device, at, temperature):
    values = {"device_id": device, "timestamp": at, "humidity": 50, "firmware_version": "v"}
    return json.dumps(values | {"temperature": temperature}).encode()


def commit(sink, payloads, first=1):
    offsets = np.arange(first, first + len(payloads))
    after = Position(PLACE, first + len(payloads))
    validator = Validator(brief(), now_us=lambda: NOW_US)
    done = validator.validate(Chunk(PLACE, offsets, payloads, after), run="r")
    sink.commit(
        Work(
            commit_id=f"c{first}",
            run="r",
            committed_us=NOW_US,
            claims=tuple(sink.claim([PLACE])),
            after=(after,),
            readings=done.readings,
            raw=done.raw,
            rejections=done.rejections,
            seen=done.seen,
            contract_version=2,
        )
    )


# ---- a whole fleet ----


@pytest.fixture(scope="module")
def fleet():
    """A store of a simulated fleet, and what was made of each kind."""
    with scratch() as folder:
        path = folder / "ops.kv"
        made = simulated(path)
        yield path, made


def simulated(path, events=8000):
    simulation = Simulation(
        Fleet(
            devices=12, events=events, start_us=data.BASE_US, bad=0.02, duplicates=0.02, late=0.01
        )
    )
    with StreamSink.open(path, brief()) as sink:
        sink.evolve(brief())
        commit(sink, list(simulation))
    return simulation.made


def test_the_simulated_fleet_s_sick_devices_are_found_and_no_other(fleet):
    path, made = fleet
    with StreamSink.open(path, brief(), mode="r") as sink:
        done = survey(sink)
    assert done.total.received == 8000
    assert done.total.duplicates == made["duplicates"]
    assert done.total.conflicts == made["conflicts"]
    assert done.total.rejected == made["bad"] + made["conflicts"]
    assert done.unknown_fields == {"battery": made["extras"]}
    verdicts = {
        each.device_id: {test for test in report.TESTS[2:] if each.tests[test] != "pass"}
        for each in done.devices
        if each.device_id
    }
    assert verdicts.pop("sensor-003") == {"gap", "rate of change"}
    assert "flat line" in verdicts.pop("sensor-002")
    assert set().union(*verdicts.values()) <= {"gap"}  # a reading that was spoilt leaves one
    assert [each.device_id for each in done.silent] == ["sensor-001"]
    assert done.versions == {2: done.total.stored}
    assert done.fields[3].nulls == pytest.approx(done.total.stored / 2, rel=0.1)


def run(*words):
    return CliRunner().invoke(app, ["telemetry", "quality", *map(str, words)])


def test_the_command_prints_for_people_and_for_programs(fleet, tmp_path):
    path, _ = fleet
    html = tmp_path / "report.html"
    shown = run(path, "--html", html)
    assert shown.exit_code == 0, shown.exception
    assert "8,000 received =" in shown.stdout
    assert "sensor-003" in shown.stdout
    assert "<svg" in html.read_text()
    plain = json.loads(run(path, "--json").stdout)
    assert plain["balanced"] is True
    assert plain["total"]["received"] == 8000
    assert plain["silent"] == ["sensor-001"]
    assert sum(each["received"] for each in plain["hours"]) == 8000
    assert sum(each["received"] for each in plain["devices"]) == 8000
    assert set(plain["dimensions"]) == set(report.DIMENSIONS)


def test_a_reject_leads_from_the_report_to_its_bytes_and_its_replay(fleet):
    path, _ = fleet
    reasons = json.loads(run(path, "--json").stdout)["reasons"]
    name = next(each for each in reasons if each["reason"] == "range")["examples"][0]["name"]
    shown = CliRunner().invoke(app, ["telemetry", "rejects", "show", str(path), name, "--json"])
    assert shown.exit_code == 0, shown.exception
    assert "humidity" in json.loads(shown.stdout)["payload"]
    dry = ["telemetry", "rejects", "replay", str(path), "--reason", "range", "--dry-run"]
    assert CliRunner().invoke(app, dry).exit_code == 0


def test_too_low_a_score_has_its_exit_code(fleet):
    path, _ = fleet
    assert run(path, "--fail-under", "99.9").exit_code == 3
    assert run(path, "--fail-under", "50%").exit_code == 0
    assert run(path, "--fail-under", "101").exit_code == 2
    later = run(path, "--since", "1h", "--fail-under", "1")
    assert later.exit_code == 3
    assert "nothing to score" in later.stderr
    assert run(path, "--since", "2025-01-20T10:00").exit_code == 0
    assert run(path, "--since", "yesterday").exit_code == 2


@pytest.mark.slow
def test_a_lake_and_a_store_of_the_same_events_have_the_same_report(tmp_path):
    iceberg = pytest.importorskip("kvstore.telemetry.sinks.iceberg")
    fleet = Fleet(devices=12, events=2000, start_us=data.BASE_US, bad=0.05, conflicts=0.01)
    events, found = list(Simulation(fleet)), []
    sinks = (
        StreamSink.open(tmp_path / "ops.kv", brief()),
        iceberg.IcebergSink.open(str(tmp_path / "lake"), brief()),
    )
    for sink in sinks:
        with sink:
            sink.evolve(brief())
            commit(sink, events[:1200])
            commit(sink, events[1200:], first=1201)
            found.append(survey(sink))
    assert found[0] == found[1]
    assert found[0].total.conflicts > 0


# ---- the page ----


class Page(HTMLParser):
    """Whether tags are closed, and what the page would load."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], Counter()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.loads += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "onload", "onclick")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        if tag in ("td", "tr", "th", "li", "p"):
            while self.open[-1] != tag:
                self.open.pop()
        assert self.open.pop() == tag


def parsed(text):
    found = Page()
    found.feed(text)
    assert found.open == []
    assert found.loads == []
    assert found.tags["script"] == 0
    assert not re.search(r"https?:|url\(|@import", text)
    return found


def test_the_page_needs_nothing_else_and_its_tags_match(fleet):
    with StreamSink.open(fleet[0], brief(), mode="r") as sink:
        found = parsed(page(survey(sink)))
    assert found.tags["svg"] > 3
    assert found.tags["rect"] > 40


def test_an_empty_sink_has_a_page_too():
    parsed(page(survey(Held())))
    parsed(page(survey(Held(found=[fate("", "received", 1), fate("", "rejected", 1)]))))


def test_what_events_say_stays_text():
    evil = "<script>alert('x')</script>"
    rows = [data.row(evil, 5 * n) for n in range(30)]
    found = [fate(evil, "received", 1), fate(evil, f"unknown:{evil}", 1)]
    letters = [letter(1, "range", source=evil)]
    text = page(survey(Held(rows, found, letters, [Position(Place(evil, 0), 1)])))
    parsed(text)
    assert evil not in text
    assert text.count("&lt;script&gt;") >= 5


def test_long_lists_are_cut_and_say_so():
    rows = [data.row(f"d{n:03}", n % 7) for n in range(300)]
    text = page(survey(Held(rows)))
    assert "100 of 300, those with most trouble" in text
    assert re.search(r"40 of 2[0-9]{2} devices", text)


def test_a_share_is_never_rounded_to_all():
    assert percent(0.999999) == "99.99 %"
    assert percent(1.0) == "100 %"
    assert percent(None) == "not measured"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser to look with")
def test_a_browser_draws_it(fleet, tmp_path):
    html, drawn = tmp_path / "report.html", tmp_path / "report.png"
    assert run(fleet[0], "--html", html).exit_code == 0
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2400"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={drawn}"]
    command = ["chromium", *options, html.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert drawn.stat().st_size > 50_000  # an empty page has 5,000
