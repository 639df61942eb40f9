"""The sink on a real TimescaleDB: what every sink has to do, with chunks instead of partitions.

.ci/timescaledb starts one and runs this module; without KVSTORE_TEST_TIMESCALEDB it skips.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest
import telemetry_data as data
from sink_conformance import SinkConformance
from telemetry_model import read_all
from test_telemetry_postgres import DAY_S, EXTREMES_US, fresh_target, putter

URL = os.environ.get("KVSTORE_TEST_TIMESCALEDB", "")

pytestmark = pytest.mark.skipif(
    not URL, reason="no TimescaleDB: .ci/timescaledb starts one and sets KVSTORE_TEST_TIMESCALEDB"
)


class TestTimescaleDBSink(SinkConformance):
    examples = 5  # a hypertable takes its time to be made

    @pytest.fixture
    def fresh(self):
        @contextmanager
        def fresh():
            with fresh_target(URL) as target:
                yield target.open

        return fresh


@pytest.fixture
def target():
    with fresh_target(URL) as target:
        yield target


@pytest.fixture
def sink(target):
    with target.open() as sink:
        sink.evolve(data.BRIEF)
        yield sink


def test_the_readings_are_a_hypertable_of_days(target, sink):
    putter(sink)([data.row(second=n * DAY_S, offset=n) for n in range(3)])
    assert sink.is_hypertable
    found = target.ask(
        "SELECT (range_end - range_start)::text FROM timescaledb_information.chunks "
        "WHERE hypertable_schema = %s",
        target.schema,
    )
    assert found == [("1 day",)] * 3
    indexes = target.ask(
        "SELECT count(*) FROM pg_indexes WHERE schemaname = %s AND tablename = 'readings'",
        target.schema,
    )
    assert indexes == [(2,)]  # the key and the BRIN: none of the extension's own


def test_old_chunks_are_dropped_whole(target, sink):
    put = putter(sink)
    put([data.row(second=n * DAY_S / 2, offset=n) for n in range(6)])
    before_us = data.BASE_US + 2 * DAY_S * data.SECOND_US
    assert len(sink.drop_before(before_us)) == 2
    assert [(ts - data.BASE_US) / 1e6 / DAY_S for (_, ts), *_ in read_all(sink)] == [2.0, 2.5]
    assert put([data.row(offset=20)]).stored == 1


def test_extreme_times_are_exact(sink):
    times = EXTREMES_US[1:-1]  # chunks reach neither end of what timestamptz holds
    rows = [data.row()._replace(ts_us=us, offset=n) for n, us in enumerate(times)]
    assert putter(sink)(rows, seen=[]).stored == len(rows)
    assert [ts for (_, ts), *_ in read_all(sink)] == times


def test_a_contract_grows_and_the_views_with_it(target, sink):
    put = putter(sink)
    rng = np.random.default_rng(1)
    rows = [
        data.row(f"d{n % 3}", int(rng.integers(2 * DAY_S)), offset=n, temperature=float(n))
        for n in range(60)
    ]
    put(rows)
    latest = {each.device_id: each for each in sorted(rows, key=lambda each: each.ts_us)}
    found = target.ask("SELECT device_id, temperature FROM {s}.latest ORDER BY 1")
    assert found == [(name, each.values["temperature"]) for name, each in sorted(latest.items())]
    ((total,),) = target.ask("SELECT sum(readings)::int FROM {s}.rollup_5m")
    assert total == 60


def test_a_wrong_guess_is_put_right_by_the_key(target, sink):
    put = putter(sink)
    put([data.row(second=0)])
    with target.open() as other:
        ahead = [data.row(second=n, offset=n) for n in range(1, 9)]
        putter(other, data.OTHER)(ahead)
    mixed = [data.row(second=n, offset=20 + n, temperature=21.4 + (n == 3)) for n in range(1, 12)]
    assert put(mixed) == (3, 7, 1, 1)
