"""Several workers of one sink: what dies, sleeps or is taken away, the sink holds each event once.

The matrix is sink x kill point x what comes after it; docs/crash-matrix.md is its table, and a
test holds the two against each other. The model is the input itself: devices send readings, some
twice, some again with other values, and some that are no readings at all.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from telemetry_worker import POINTS, Worker, await_that

from kvstore.telemetry.contract import brief
from kvstore.telemetry.opening import open_sink

SINKS = ("kvstore", "PostgreSQL", "Iceberg")
AFTERWARDS = ("restart", "rebalance", "paused worker")
PARTITIONS = 4
DEVICES = 16
BAD = b'{"device_id": "sensor-0", "timestamp":'


# ---- the model ----


class Fleet:
    """What is sent, by partition and in order, and what has to be there afterwards."""

    def __init__(self):
        self.sent = {partition: [] for partition in range(PARTITIONS)}
        self.rows = {}
        self.letters = set()
        self.fates = Counter()
        self._second = 0

    def send(self, kafka, topic, rounds):
        """Each device sends so many readings; one in 7 twice, one in 11 changed, one in 13 bad."""
        fresh = {partition: [] for partition in range(PARTITIONS)}
        for _ in range(rounds):
            self._second += 1
            for device in range(DEVICES):
                self._event(fresh[device % PARTITIONS], device)
        for partition, events in fresh.items():
            kafka.produce(topic, events, partition=partition)
            self.sent[partition] += events

    def _event(self, events, device):
        partition, number = device % PARTITIONS, self._second * DEVICES + device
        name, when = f"sensor-{device}", f"2025-01-20T{10 + self._second // 3600:02}:"
        when += f"{self._second // 60 % 60:02}:{self._second % 60:02}Z"
        event = {
            "device_id": name,
            "timestamp": when,
            "temperature": number % 50,
            "humidity": 60,
            "firmware_version": "v1",
        }
        self.rows[name, when] = float(number % 50)
        self._put(events, json.dumps(event).encode(), "stored")
        if number % 7 == 0:
            self._put(events, json.dumps(event).encode(), "duplicates")
        if number % 11 == 0:
            self._reject(partition, events)
            self._put(events, json.dumps({**event, "temperature": 51}).encode(), "rejected")
        if number % 13 == 0:
            self._reject(partition, events)
            self._put(events, BAD, "rejected")

    def _put(self, events, event, fate):
        events.append(event)
        self.fates[fate] += 1
        self.fates["received"] += 1

    def _reject(self, partition, events):
        self.letters.add((partition, len(self.sent[partition]) + len(events)))

    @property
    def ends(self):
        return {partition: len(events) for partition, events in self.sent.items() if events}

    def is_complete(self, target):
        with open_sink(target, brief(), mode="r") as sink:
            return {p.place.partition: p.next for p in sink.positions()} == self.ends

    def await_complete(self, target, workers):
        """Looking is not free: a lake is opened for it, beside the workers."""
        await_that(lambda: self.is_complete(target), workers, every_s=0.3)

    def check(self, target):
        """The sink holds exactly this: nothing lost, nothing twice, by its own count as well."""
        with open_sink(target, brief(), mode="r") as sink:
            rows = [
                ((device, f"{when}Z"), value)
                for part in sink.read()
                for device, when, value in zip(
                    part.device_id,
                    part.ts_us.astype("M8[us]").astype("M8[s]").astype(str),
                    part.values["temperature"].tolist(),
                    strict=True,
                )
            ]
            letters = [
                (d.rejection.place.partition, d.rejection.offset) for d in sink.dead_letters()
            ]
            counted = Counter()
            for count in sink.counts():
                counted[count.name] += count.value
        assert len(rows) == len(self.rows)
        assert dict(rows) == self.rows
        assert sorted(letters) == sorted(self.letters)
        assert {name: counted[name] for name in self.fates} == dict(self.fates)


@pytest.fixture
def fleet():
    return Fleet()


@pytest.fixture
def target(request, tmp_path):
    """Where a sink of that name is, empty."""

    def of(name):
        if name == "PostgreSQL":
            return request.getfixturevalue("postgres")
        return str(tmp_path / {"kvstore": "ops.kv", "Iceberg": "lake"}[name])

    return of


@pytest.fixture
def hire(kafka):
    """Start workers; none outlives its test."""
    with ExitStack() as stack:

        def worker(*args, **options):
            hired = Worker(kafka, *args, **options)
            stack.callback(hired.kill)
            return hired

        yield worker


# ---- three workers ----


@pytest.mark.slow
@pytest.mark.parametrize("sink", SINKS[1:])
def test_of_three_workers_one_dies_and_one_sleeps_and_each_event_is_there_once(
    kafka, hire, fleet, target, sink
):
    """One is killed in the middle of a commit; one is stopped before one, through a rebalance."""
    where, topic = target(sink), kafka.create(partitions=PARTITIONS)
    strikes = [
        {"point": "during", "at": 2, "act": "kill"},
        {"point": "before", "at": 2, "act": "stop"},
        None,
    ]
    workers = [hire(topic, where, strike=strike) for strike in strikes]
    dying, sleeping, steady = workers
    await_that(lambda: all(worker.count("assigned") for worker in workers), workers)
    fleet.send(kafka, topic, 30)
    await_that(lambda: dying.process.poll() is not None and sleeping.is_stopped(), workers)
    fleet.await_complete(where, workers)
    fleet.send(kafka, topic, 5)
    fleet.await_complete(where, workers)
    sleeping.go_on()
    await_that(lambda: sleeping.count("fenced") + sleeping.count("revoked"), workers)
    fleet.send(kafka, topic, 5)
    fleet.await_complete(where, workers)
    assert [sleeping.end(), steady.end()] == [0, 0], (sleeping.errors, steady.errors)
    fleet.check(where)


# ---- the matrix ----

WHAT = {
    "before": "before the sink was asked",
    "during": "in the middle of the commit (half of the calls that one makes)",
    "after": "after the commit, before anything else",
    "reply": "after the commit, whose reply was lost: while settling",
}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "crash-matrix.md"
TEXT = """# Crash matrix

Written and checked by tests/test_telemetry_workers.py: `python tests/test_telemetry_workers.py >
docs/crash-matrix.md`. Each ✓ is a test of its own, `test_crash_matrix[…]`, which CI runs with
`pytest -m slow`.

A worker process reads a topic of 4 partitions from a real broker into a real sink, in commits of 64
events, and strikes itself at one point of its third commit. Afterwards the sink has to hold what a
simple model of the input says: every reading once, the first of two that conflict, each bad event
as one dead letter; and its own counts have to be those of the input, each event counted once.

- **restart**: the worker is killed (SIGKILL), and another one started.
- **rebalance**: the worker is killed while another one shares the partitions, and takes over its.
- **paused worker**: the worker is stopped (SIGSTOP) until its session has expired and another one
  has read everything; then it wakes up, in the middle of what it was about to do.

| sink | the worker is struck | {columns} |
|---|---|{rules}|
{rows}

A kvstore sink belongs to one process: a second one is refused by the writer's lock while the first
lives, dead or asleep, so there is nobody to take over (`test_a_second_worker_cannot_open_a_store`).

Beside the matrix: of three workers that share one sink, one is killed in the middle of a commit and
one is stopped through a rebalance; and for each sink four workers in a row die at 10, 35, 65 and
90 % of a commit. What a power cut does to a store is tested elsewhere (tests/powercut).
"""


def page():
    """docs/crash-matrix.md, as the cells are."""

    def row(sink, point):
        marks = ["✓" if (sink, point, each) in CELLS else "one process" for each in AFTERWARDS]
        return f"| {sink} | {WHAT[point]} | {' | '.join(marks)} |"

    return TEXT.format(
        columns=" | ".join(AFTERWARDS),
        rules="|".join(["---"] * len(AFTERWARDS)),
        rows="\n".join(row(sink, point) for sink in SINKS for point in POINTS),
    )


def test_the_page_shows_the_cells_that_are_tested():
    assert PAGE.read_text() == page()


CELLS = [
    (sink, point, afterwards)
    for sink in SINKS
    for point in POINTS
    for afterwards in AFTERWARDS
    if sink != "kvstore" or afterwards == "restart"
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_crash_matrix(kafka, hire, fleet, target, cell):
    sink, point, afterwards = cell
    where, topic = target(sink), kafka.create(partitions=PARTITIONS)
    fleet.send(kafka, topic, 12)
    act = "stop" if afterwards == "paused worker" else "kill"
    struck = hire(topic, where, strike={"point": point, "at": 3, "act": act})
    other = hire(topic, where) if afterwards == "rebalance" else None
    fed = itertools.count(1)

    def is_struck():
        if next(fed) % 40 == 0:  # the other may have been first, and have left it nothing
            fleet.send(kafka, topic, 3)
        return struck.is_stopped() or struck.process.poll() is not None

    await_that(is_struck, [struck])
    other = other or hire(topic, where)
    fleet.await_complete(where, [struck, other])
    if act == "stop":
        struck.go_on()
        await_that(lambda: struck.count("fenced") + struck.count("revoked"), [struck])
        fleet.send(kafka, topic, 4)
        fleet.await_complete(where, [struck, other])
        assert struck.end() == 0, struck.errors
    assert other.end() == 0, other.errors
    fleet.check(where)


@pytest.mark.slow
@pytest.mark.parametrize("sink", SINKS)
def test_a_worker_dies_anywhere_in_a_commit(kafka, hire, fleet, target, sink):
    """One after another, each a bit later in its commit than the one before."""
    where, topic = target(sink), kafka.create(partitions=PARTITIONS)
    for fraction in (0.1, 0.35, 0.65, 0.9):
        fleet.send(kafka, topic, 12)
        strike = {"point": "during", "at": 2, "act": "kill", "fraction": fraction}
        struck = hire(topic, where, strike=strike)
        await_that(lambda struck=struck: struck.process.poll() is not None, [struck])
    other = hire(topic, where)
    fleet.await_complete(where, [other])
    assert other.end() == 0, other.errors
    fleet.check(where)


@pytest.mark.slow
def test_a_second_worker_cannot_open_a_store(hire, kafka, target):
    """Why the embedded sink has no column for a rebalance: one process, held by the lock."""
    where, topic = target("kvstore"), kafka.create()
    first = hire(topic, where)
    await_that(lambda: first.count("assigned"), [first])
    second = hire(topic, where)
    assert second.end() != 0
    assert "StoreLocked" in "".join(second.errors)
    assert first.end() == 0


if __name__ == "__main__":
    print(page(), end="")
