"""The telemetry bench still runs and reports every figure. Never: that it is fast."""

from __future__ import annotations

import json
import math
import os

import pytest
from stores import scratch

from bench import __main__ as cli
from bench.figure import Setting
from bench.postgres import binaries
from bench.telemetry import events, run

TINY_BYTES = run.TINY_EVENTS * events.EVENT_BYTES
NAMES = [measurement.name for measurement in run.MEASUREMENTS]


@pytest.mark.slow
@pytest.mark.parametrize("measurement", run.MEASUREMENTS, ids=NAMES)
def test_every_measurement_gives_finite_figures(measurement):
    if measurement.name == "postgres" and binaries() is None and "CI" not in os.environ:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    with scratch() as folder:  # pytest's own is closed to the account that PostgreSQL runs as
        figures = measurement.run(Setting(folder, TINY_BYTES, 1, 1))
    assert figures
    for figure in figures:
        numbers = [figure.value, figure.limit, figure.ratio, *figure.details.values()]
        assert all(math.isfinite(number) for number in numbers), figure
        assert figure.value > 0


@pytest.mark.slow
def test_the_command_writes_json(tmp_path):
    disk, report = tmp_path / "disk", tmp_path / "telemetry.json"
    disk.mkdir()
    arguments = ["telemetry", "validation", "--tiny", "--dir", str(disk), "--json", str(report)]
    assert cli.main(arguments) == 0
    names = [figure["name"] for figure in json.loads(report.read_text())["figures"]]
    assert names == ["validation", "validation-usual", "validation-slow"]
    assert list(disk.iterdir()) == []


def test_the_events_are_as_long_as_they_are_counted():
    found = events.payloads(3000, 1, trouble=False)
    assert sum(map(len, found)) / len(found) == pytest.approx(events.EVENT_BYTES, rel=0.05)
