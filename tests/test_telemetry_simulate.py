"""The made-up fleet: the same bytes for the same arguments, and of each kind what was asked for."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import datetime

import numpy as np
import pytest
import telemetry_data as data
import typer
from typer.testing import CliRunner

from kvstore.cli import app
from kvstore.cli.telemetry.simulate import share
from kvstore.telemetry.contract import brief
from kvstore.telemetry.records import Chunk, Place, Position
from kvstore.telemetry.simulate import SPOILT, Fleet, Simulation
from kvstore.telemetry.validate import Validator

PLACE = Place("x", 0)


def fleet(**more):
    return Simulation(Fleet(**{"events": 6000, "devices": 12, "start_us": data.BASE_US} | more))


def validated(payloads, contract=None):
    validator = Validator(contract or brief(), now_us=lambda: data.NOW_US)
    offsets = np.arange(len(payloads))
    return validator.validate(Chunk(PLACE, offsets, payloads, Position(PLACE, 0)), run="r")


def test_the_same_seed_and_start_give_the_same_bytes():
    found = [list(fleet(events=1500, seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_a_fleet_without_trouble_is_valid_and_in_order():
    simulation = fleet(bad=0, duplicates=0, conflicts=0, late=0, extras=0)
    done = validated(list(simulation))
    assert len(done.readings) == 6000 == simulation.made["good"]
    identities = set(zip(done.readings.device_id, done.readings.ts_us.tolist(), strict=True))
    assert len(identities) == 6000
    assert not {count.name for count in done.seen} - {"received", "finer"}


def test_each_kind_is_there_as_often_as_it_is_said_to_be():
    simulation = fleet(bad=0.03, duplicates=0.03, conflicts=0.01, late=0.02, extras=0.02)
    payloads = list(simulation)
    done = validated(payloads)
    made = simulation.made
    assert len(payloads) == 6000
    assert len(done.rejections) == made["bad"] == pytest.approx(180, rel=0.3)
    totals = Counter()
    for count in done.seen:
        totals[count.name] += count.value
    assert totals["drift"] >= made["extras"] > 50  # repeats have them as well
    assert totals["late"] >= made["late"] > 50
    readings = done.readings
    columns = zip(*(_plain(column) for column in readings.values.values()), strict=True)
    seen = {}
    again = Counter()
    for identity, values in zip(
        zip(readings.device_id, readings.ts_us.tolist(), strict=True),
        zip(columns, readings.extras, strict=True),
        strict=True,
    ):
        first = seen.setdefault(identity, values)
        again[first is values, first == values] += 1
    assert again[False, True] == made["duplicates"] == pytest.approx(180, rel=0.3)
    assert again[False, False] == made["conflicts"] > 20


def _plain(column):
    return [None if v is None or v != v else v for v in list(column)]  # noqa: PLR0124


def test_every_way_to_spoil_an_event_comes_in_turns():
    done = validated(list(fleet(bad=0.05)))
    found = Counter(reason.code for each in done.rejections for reason in each.reasons)
    assert len(done.rejections) > len(SPOILT)
    assert len(found) == 14
    assert min(found.values()) >= len(done.rejections) // len(SPOILT)


def test_pressure_comes_up_where_it_was_asked_for():
    lines = list(fleet(bad=0, late=0, duplicates=0, conflicts=0, evolve_after=0.25))
    versions = [json.loads(line)["firmware_version"] for line in lines]
    assert versions == sorted(versions)
    assert versions.count("v1.2.0") == pytest.approx(1500, abs=60)
    for line in lines:
        event = json.loads(line)
        assert ("pressure" in event) == (event["firmware_version"] == "v1.3.0")
    assert validated(lines, brief(1)).rejections == []  # the old contract keeps it in extras


def run(*words):
    return CliRunner().invoke(app, ["telemetry", "simulate", *map(str, words)])


def test_the_command_writes_lines_and_says_what_it_made():
    done = run("--events", 500, "--devices", 5, "--start", "2025-01-20T10:15:30", "--bad", "10%")
    assert done.exit_code == 0, done.exception
    lines = done.stdout_bytes.split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == 500
    assert "500 events: " in done.stderr
    again = run("--events", 500, "--devices", 5, "--start", "2025-01-20T10:15:30", "--bad", "10%")
    assert again.stdout_bytes == done.stdout_bytes


def test_without_a_start_the_last_event_is_from_now():
    lines = run("--events", 100, "--devices", 4, "--bad", 0.0).stdout_bytes.splitlines()
    newest = max(datetime.fromisoformat(json.loads(line)["timestamp"]) for line in lines)
    assert newest.timestamp() == pytest.approx(time.time(), abs=60)


def test_a_rate_spaces_the_events_as_the_fleet_would():
    done = run("--events", 40, "--devices", 4, "--rate", 1000, "--bad", "0%", "--late", "0%")
    lines = done.stdout_bytes.splitlines()
    assert len(lines) == 40
    times = [json.loads(line)["timestamp"] for line in lines]
    assert len(set(times)) >= 1


def test_shares_are_read_with_a_sign_and_without():
    assert share("1%") == share("0.01") == share(0.01) == 0.01
    for text in ("101%", "-1%", "1.5", "one", "nan"):
        with pytest.raises(typer.BadParameter, match="expected 0% to 100%"):
            share(text)
