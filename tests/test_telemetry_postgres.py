"""The sink on a real PostgreSQL: what every sink has to do, and what only this can get wrong."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from subprocess import run
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np
import psycopg
import pytest
import telemetry_data as data
from postgres_server import PASSWORD
from psycopg import sql
from sink_conformance import SinkConformance
from telemetry_model import read_all

from kvstore.errors import SinkError
from kvstore.telemetry.contract import Contract, ContractField
from kvstore.telemetry.records import Outcome, Reason
from kvstore.telemetry.sinks.postgres import PostgresSink, preflight
from kvstore.telemetry.sinks.postgres.readings import Store

DAY_S = 86_400


class Target(NamedTuple):
    """A schema of its own, with a name that needs quoting; open: a sink on it."""

    url: str
    schema: str
    open: Callable[..., PostgresSink]

    def ask(self, query, *parameters):
        """Rows of a query; {s} is the schema."""
        with psycopg.connect(self.url, autocommit=True) as admin:
            name = sql.SQL(sql.Identifier(self.schema).as_string(None).replace("%", "%%"))
            cursor = admin.execute(sql.SQL(query).format(s=name), parameters)
            return cursor.fetchall() if cursor.description else []


@contextmanager
def fresh_target(url) -> Iterator[Target]:
    schema = f'Te"l {{}}%s {uuid.uuid4().hex[:8]}'
    target = Target(
        url, schema, lambda _=None, **options: PostgresSink(url, schema=schema, **options)
    )
    yield target
    if "KVSTORE_TEST_POSTGRES" in os.environ:  # a private server goes as a whole
        target.ask("DROP SCHEMA IF EXISTS {s} CASCADE")


class TestPostgresSink(SinkConformance):
    @pytest.fixture
    def fresh(self, postgres_server):
        @contextmanager
        def fresh():
            with fresh_target(postgres_server) as target:
                yield target.open

        return fresh


@pytest.fixture
def target(postgres_server):
    with fresh_target(postgres_server) as target:
        yield target


@pytest.fixture
def sink(target):
    with target.open() as sink:
        sink.evolve(data.BRIEF)
        yield sink


@pytest.fixture
def put(sink):
    """Commit rows, one commit after the other, under one claim."""
    return putter(sink)


def putter(sink, place=data.PLACE):
    claims = sink.claim([place])

    def put(rows, rejections=(), **options):
        work = data.work(claims, rows, rejections, **options)
        outcome = sink.commit(work)
        claims[:] = data.next_work(work).claims
        return outcome

    return put


# ---- what PostgreSQL holds, and what not ----

EXTRAS = [
    '{"a":1e22}',
    '{"a":1e400}',
    '{"a":1e-7,"b":1E5}',
    '{"a":1e200000}',
    '{"a":-0.0,"b":-0}',
    '{"a":1.50,"b":2.0}',
    '{"a":123456789.123456789}',
    '{"a":12345678901234567890}',
    '{"a":0.00001}',
    '{"a":"\\u0000"}',
    '{"a":"\\ud800"}',
    '{"a":"\\\\ \\" \\n"}',
    '{"aa":1,"b":{"cc":[1,null,true],"d":{}}}',
    '{"a":"x: y, z"}',
    '{"a":' + "9" * 600 + "}",
    '{"":{"":""}}',
]


@pytest.mark.parametrize("mode", ["staged", "straight"])
def test_extras_come_back_letter_for_letter(target, sink, put, mode):
    if mode == "straight":  # behind the newest reading of each device
        put([data.row(f"d{n}", -1, offset=n) for n in range(len(EXTRAS))])
    rows = [data.row(f"d{n}", offset=50 + n, extras=text) for n, text in enumerate(EXTRAS)]
    assert put(rows).stored == len(rows)
    found = {device: extras for (device, _), (_, extras), _ in read_all(sink, data.BASE_US)}
    assert found == {each.device_id: each.extras for each in rows}
    with target.open() as other:
        again = [each._replace(offset=100 + each.offset) for each in rows]
        changed = [each._replace(extras=each.extras[:-1] + ',"zz":0}') for each in again]
        made = data.work(other.claim([data.OTHER]), [*again, *changed])
        assert other.commit(made) == Outcome(0, len(rows), len(rows), len(rows))


def test_extras_can_be_asked_for_in_sql(target, put):
    put([data.row(extras='{"battery":{"volt":3.7}}'), data.row("b", offset=2)])
    query = "SELECT (extras -> 'battery' ->> 'volt')::float8 FROM {s}.readings ORDER BY device_id"
    assert target.ask(query) == [(None,), (3.7,)]


@pytest.mark.parametrize(
    ("where", "text"),
    [("device_id", "a\0b"), ("firmware_version", "a\0b"), ("firmware_version", "a\ud800b")],
)
def test_a_text_that_cannot_be_held_is_refused_by_name(sink, put, text, where):
    bad = (
        data.row(text, offset=7)
        if where == "device_id"
        else data.row(offset=7, firmware_version=text)
    )
    with pytest.raises(SinkError, match=f"event 7 of .*: its {where} cannot be held"):
        put([data.row("fine"), bad])
    assert read_all(sink) == []
    assert put([data.row("fine")]).stored == 1


def test_dead_letters_hold_what_text_cannot(sink, put):
    odd = data.rejection(
        1,
        payload=b"\0\xff",
        reasons=[Reason("nul_character", "de\0vice", "a\0b\ud800")],
        device_id="a\0b",
        ts_us=data.BASE_US,
    )
    odd = replace(odd, headers=(("h\0\ud800", b"\0"),), key=b"\0")
    put([], [odd])
    (letter,) = sink.dead_letters()
    assert letter.rejection == replace(odd, device_id="a\ufffdb")
    assert {count.device_id for count in sink.counts()} == {"a\ufffdb"}


EXTREMES_US = [
    -210_866_803_200_000_000,  # the first that PostgreSQL has
    -62_135_596_800_000_000,  # 0001-01-01
    0,
    946_684_799_999_999,  # the last of 1999
    946_684_800_000_000,
    4_102_444_799_999_999,  # the last of 2099
    4_102_444_800_000_000,
    253_402_300_799_999_999,  # the last of 9999
    2**63 - 1,
]


def test_extreme_times_are_exact_and_cost_two_partitions(target, sink, put):
    rows = [data.row()._replace(ts_us=us, offset=n) for n, us in enumerate(EXTREMES_US)]
    assert put(rows, seen=[]).stored == len(rows)
    assert [ts for (_, ts), *_ in read_all(sink)] == EXTREMES_US
    assert [ts for (_, ts), *_ in read_all(sink, 0, 946_684_800_000_000)] == EXTREMES_US[2:4]
    partitions = target.ask(
        "SELECT relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid "
        "WHERE inhparent::regclass = (SELECT c.oid FROM pg_class c JOIN pg_namespace n "
        "ON n.oid = relnamespace WHERE relname = 'readings' AND nspname = %s) ORDER BY 1",
        target.schema,
    )
    assert [name for (name,) in partitions] == [
        "readings_20000101",
        "readings_20991231",
        "readings_before_2000",
        "readings_from_2100",
    ]


def test_a_time_before_all_times_is_refused(sink, put):
    with pytest.raises(SinkError, match=r"event 3 of .*before 4714 BC"):
        put([data.row()._replace(ts_us=EXTREMES_US[0] - 1, offset=3)], seen=[])


ODD_NAMES = [
    'temp "°C"',
    "select",
    "a.b",
    "%s",
    "{schema}",
    "Größe",
    "x" * 59,
    "offset",
    "'",
    "a%b",
]


def test_fields_may_have_any_name(target, sink):
    fields = [ContractField(name, "number") for name in ODD_NAMES]
    odd = Contract(3, (*data.BRIEF.values, *fields, ContractField("%(text)s", "string")))
    sink.evolve(odd)
    rows = [
        data.row(offset=n, second=n)._replace(values={name: 1.5, "%(text)s": "x"})
        for n, name in enumerate(ODD_NAMES)
    ]
    claim = sink.claim([data.PLACE])[0]
    made = data.work(claim, rows, contract=odd)
    assert sink.commit(made).stored == len(rows)
    assert [dict(values) for _, (values, _), _ in read_all(sink)] == [dict(r.values) for r in rows]
    again = data.work(sink.claim([data.OTHER]), rows, contract=odd)
    with target.open() as other:
        assert other.commit(again).duplicates == len(rows)
    assert target.ask("SELECT count(*) FROM {s}.rollup_5m") == [(1,)]


@pytest.mark.parametrize("name", ["ts", "device_id", "xmin", "extras", "_own", "", "x" * 60, "\0"])
def test_names_that_cannot_be_columns_are_refused(sink, name):
    with pytest.raises(SinkError, match=r"a column for the field .* cannot be made"):
        sink.evolve(Contract(3, (*data.BRIEF.values, ContractField(name, "number"))))


def test_a_field_that_became_text_is_refused(sink):
    with pytest.raises(SinkError, match="'temperature' is of type double precision"):
        sink.evolve(Contract(3, (ContractField("temperature", "string"),)))


def test_readings_without_a_column_are_refused(target):
    with target.open() as sink, pytest.raises(SinkError, match="no column for firmware_version, h"):
        sink.commit(data.work(sink.claim([data.PLACE]), [data.row()]))


# ---- secrets ----


def addresses(server):
    """URLs that cannot be connected to, each with the password somewhere."""
    parts = urlsplit(server)
    yield f"postgresql://locked:{PASSWORD}@{parts.netloc.rpartition('@')[2]}/nowhere?{parts.query}"
    yield f"postgresql://u:{PASSWORD}@127.0.0.1:1/db"
    yield f"postgresql://u:x@{PASSWORD}@127.0.0.1:1/db"
    yield f"postgresql://u:{PASSWORD}@127.0.0.1:port/db"
    yield f"postgresql://u@127.0.0.1:1/db?password={PASSWORD}&nonsense=1"
    yield f"postgresql://u:{PASSWORD}%zz@127.0.0.1:1/db"
    yield f"host=127.0.0.1 port=1 password={PASSWORD} nonsense"


@pytest.mark.parametrize("number", range(7))
def test_no_password_is_shown(postgres_server, number, caplog):
    url = list(addresses(postgres_server))[number]
    with caplog.at_level(logging.DEBUG), pytest.raises(SinkError) as raised:
        PostgresSink(url).__enter__()
    error, seen = raised.value, []
    while error is not None:
        seen += [str(error), repr(error)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    seen += [caplog.text, *preflight(url, data.BRIEF)]
    assert not [text for text in seen if PASSWORD in text]
    assert len(seen) > 3


def test_a_password_in_the_servers_words_is_struck_out(postgres_server):
    with pytest.raises(SinkError, match=r"role \"\*\*\*\""):
        PostgresSink(f"postgresql://secret:secret@/x?{urlsplit(postgres_server).query}").__enter__()


# ---- the tables ----


def test_the_schema_may_stand_in_the_url(target, sink):
    url = f"{target.url}{'&' if '?' in target.url else '?'}schema=other%20{uuid.uuid4().hex[:6]}"
    with PostgresSink(url) as other:
        other.claim([data.PLACE])
        assert other._tables._schema.startswith("other ")
        target.ask(f'DROP SCHEMA "{other._tables._schema}" CASCADE')


def test_opening_to_read_makes_nothing(target):
    with pytest.raises(SinkError, match="there is no telemetry in the schema"):
        target.open(mode="r").__enter__()
    assert target.ask("SELECT 1 FROM pg_namespace WHERE nspname = %s", target.schema) == []


def test_days_are_made_ahead_of_the_batch_and_bounded(sink, put):
    rows = [data.row(second=n * DAY_S, offset=n) for n in range(501)]
    with pytest.raises(SinkError, match="lie on 501 days, expected are 500 at most"):
        put(rows)
    assert sink._tables.spans() == []
    assert put(rows[:120]).stored == 120
    assert len(sink._tables.spans()) == 120


def test_old_days_are_dropped_whole(target, sink, put):
    put([data.row(second=n * DAY_S / 2, offset=n) for n in range(6)])
    before_us = data.BASE_US + 2 * DAY_S * data.SECOND_US
    assert sink.drop_before(before_us) == ["readings_20250120", "readings_20250121"]
    assert [(ts - data.BASE_US) / 1e6 / DAY_S for (_, ts), *_ in read_all(sink)] == [2.0, 2.5]
    assert sink.drop_before(before_us) == []
    assert put([data.row(offset=20)]).stored == 1  # its day is made again
    assert target.ask("SELECT count(*) FROM {s}.commits") == [(2,)]
    sink.drop_before(data.NOW_US + 1)
    assert target.ask("SELECT count(*) FROM {s}.commits") == [(0,)]


def test_the_command_drops_days_and_says_which(target, sink, put):
    put([data.row(second=n * DAY_S, offset=n) for n in range(2)])
    command = [sys.executable, "-m", "kvstore", "telemetry", "drop"]
    joint = "&" if "?" in target.url else "?"
    where = {**os.environ, "TARGET": f"{target.url}{joint}schema={quote(target.schema, safe='')}"}
    done = run(
        [*command, "${TARGET}", "--before", "2025-01-21", "--json"],
        capture_output=True,
        env=where,
        check=False,
    )
    assert json.loads(done.stdout) == {"dropped": ["readings_20250120"]}, done.stderr
    assert len(list(read_all(sink))) == 1
    refused = run([*command, "ops.kv", "--before", "2025-01-21"], capture_output=True, check=False)
    assert refused.returncode == 2


def test_a_day_that_somebody_dropped_is_made_again(target, sink, put):
    put([data.row()])
    with target.open() as other:
        other.drop_before(data.BASE_US + DAY_S * data.SECOND_US)
    assert put([data.row(offset=5, second=1)]).stored == 1


def test_columns_that_somebody_added_count_in_comparisons(target, sink, put):
    """A worker of before the upgrade: it must not take a fuller reading for a repeat of its own."""
    put([data.row(second=9)])
    grown = Contract(3, (*data.BRIEF.values, ContractField("battery", "number")))
    with target.open() as other:
        other.evolve(grown)
        rows = [data.row(offset=1, battery=5.0), data.row("b", offset=2)]
        other.commit(data.work(other.claim([data.OTHER]), rows, contract=grown))
    again = [data.row(offset=10), data.row("b", offset=11)]
    assert put(again) == Outcome(0, 1, 1, 1)


def test_a_role_that_may_only_write_can_commit(target, sink, put):
    put([data.row()])
    role = f"writer_{uuid.uuid4().hex[:8]}"
    target.ask(f"CREATE ROLE {role} LOGIN")
    target.ask(f"GRANT USAGE ON SCHEMA {{s}} TO {role}")
    url = target.url.replace("//postgres@", f"//{role}@")
    assert url != target.url
    try:
        found = preflight(f"{url}&schema={target.schema.replace('%', '%25')}", data.BRIEF)
        assert any(
            "no right to SELECT, INSERT, UPDATE, DELETE on readings" in each for each in found
        )
        target.ask(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {{s}} TO {role}")
        with PostgresSink(url, schema=target.schema) as writer:
            rows = [data.row(offset=2), data.row(offset=3, second=5)]
            writer.evolve(data.BRIEF)
            assert writer.commit(data.work(writer.claim([data.OTHER]), rows)) == Outcome(1, 1, 0, 0)
            with pytest.raises(SinkError, match="grant the role"):
                writer.commit(
                    data.work(writer.claim([data.OTHER]), [data.row(second=DAY_S, offset=9)])
                )
    finally:
        target.ask(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_commits_are_durable_whatever_the_role_says(target):
    target.ask("ALTER ROLE postgres SET synchronous_commit = off")
    try:
        with target.open() as sink:
            assert sink._session.read("SHOW synchronous_commit") == [("on",)]
    finally:
        target.ask("ALTER ROLE postgres RESET synchronous_commit")


def test_preflight_finds_nothing_wrong_where_all_is_well(target, sink):
    schema = target.schema.replace("%", "%25")
    assert preflight(f"{target.url}&schema={schema}", data.BRIEF) == []
    assert preflight(f"{target.url}&schema=not_there_yet", data.BRIEF) == []
    assert target.ask("SELECT 1 FROM pg_namespace WHERE nspname = 'not_there_yet'") == []


# ---- the guess ----


@pytest.fixture
def looks(monkeypatch):
    """How many rows each look into the table was about."""
    found = []
    look_up = Store._look_up

    def spy(self, connection, batch, columns, rows):
        found.append(len(rows))
        return look_up(self, connection, batch, columns, rows)

    monkeypatch.setattr(Store, "_look_up", spy)
    return found


def test_only_rows_that_may_be_there_are_looked_up(put, looks):
    def rows(start):
        return [data.row(f"d{n % 3}", start + n, offset=start + n) for n in range(30)]

    put(rows(0))
    put(rows(30))
    assert looks == [30]  # the first ever of each device
    late = [data.row("d0", 33, offset=70), data.row("d1", 22.5, offset=71)]
    assert put([*rows(80), *late]) == Outcome(31, 1, 0, 0)
    assert looks == [30, 2]


def test_a_wrong_guess_is_put_right_by_the_key(target, put, looks):
    put([data.row(second=0)])
    with target.open() as other:
        ahead = [data.row(second=n, offset=n) for n in range(1, 9)]
        putter(other, data.OTHER)(ahead)
    looks.clear()
    mixed = [data.row(second=n, offset=20 + n, temperature=21.4 + (n == 3)) for n in range(1, 12)]
    assert put(mixed) == Outcome(stored=3, duplicates=7, rejected=1, conflicts=1)
    assert looks == [11]
    assert put([data.row(second=8, offset=40), data.row(second=20, offset=41)]).duplicates == 1


def test_workers_that_store_the_same_readings_at_once_store_each_once(target, sink):
    """Whoever comes second waits for the key, looks again, and finds duplicates."""

    def feed(number):
        rng = np.random.default_rng(number)
        with target.open() as worker:
            put = putter(worker, data.PLACE._replace(partition=number))
            for start in range(0, 60, 20):
                order = rng.permutation(np.arange(start, start + 20))
                rows = [
                    data.row(f"d{n % 4}", n, offset=int(start + i)) for i, n in enumerate(order)
                ]
                outcomes.append(put(rows))

    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=feed, args=[n]) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 9
    assert sum(outcome.stored for outcome in outcomes) == 60
    assert sum(outcome.duplicates for outcome in outcomes) == 120
    assert len(read_all(sink)) == 60


# ---- what operations look at ----


def test_the_views_say_what_the_readings_say(target, put):
    rng = np.random.default_rng(1)
    rows = [
        data.row(
            f"d{rng.integers(4)}",
            int(rng.integers(3 * DAY_S)),
            offset=n,
            temperature=float(rng.integers(40)),
            pressure=None if rng.integers(2) else 1000.0,
        )
        for n in range(300)
    ]
    put(rows[:150])
    put(rows[150:])
    latest = {each.device_id: each for each in sorted(rows, key=lambda each: each.ts_us)}
    found = target.ask(
        "SELECT device_id, extract(epoch FROM ts)::int8, temperature FROM {s}.latest"
    )
    assert sorted(found) == [
        (device, each.ts_us // 10**6, each.values["temperature"])
        for device, each in sorted(latest.items())
    ]
    of_d0 = [each for each in rows if each.device_id == "d0"]
    buckets = {}
    for each in of_d0:
        buckets.setdefault(each.ts_us // 300_000_000 * 300, []).append(each.values["temperature"])
    found = target.ask(
        "SELECT extract(epoch FROM bucket)::int8, readings, temperature_min, temperature_max, "
        "temperature_avg FROM {s}.rollup_5m WHERE device_id = 'd0' ORDER BY bucket"
    )
    assert found == [
        (at, len(v), min(v), max(v), pytest.approx(sum(v) / len(v)))
        for at, v in sorted(buckets.items())
    ]
    traced = target.ask("SELECT DISTINCT _source, _partition, _run FROM {s}.traced")
    assert traced == [(*data.PLACE, "run-1")]


def test_the_views_touch_the_asked_hours_alone(target, put):
    """Else they would be slow exactly when they are needed: after months."""
    put([data.row(second=n * DAY_S, offset=n) for n in range(20)])
    plan = target.ask(
        "EXPLAIN (ANALYZE, COSTS OFF) SELECT * FROM {s}.rollup_5m WHERE device_id = 'sensor-1' "
        "AND hour >= '2025-02-05T00:00Z'"
    )
    scans = [line for (line,) in plan if "readings_2025" in line]
    ran = [line for line in scans if "never executed" not in line]
    assert len(ran) == 4, plan  # days of the 5th to the 8th


def test_a_reader_that_pauses_holds_no_transaction(target, sink, put, monkeypatch):
    monkeypatch.setattr("kvstore.telemetry.sinks.postgres.read.PAGE_ROWS", 2)
    put([data.row(second=n, offset=n) for n in range(7)])
    reading, other = sink.read(), sink.read()
    next(reading)
    next(other)
    query = "SELECT state, xact_start FROM pg_stat_activity WHERE application_name = %s"
    assert target.ask(query, sink.worker) == [("idle", None)]
    assert put([data.row(second=20, offset=20)]).stored == 1  # in the middle of it
    assert sum(map(len, reading)) == 5
    other.close()
