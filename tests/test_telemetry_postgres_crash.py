"""The sink on PostgreSQL when things break: replies lost, sessions ended, workers killed or paused.

Where a worker has to be caught at a point inside of its commit, a trigger waits there for a lock
that the test holds: no sleeps, and the point is exact. What is stored at the end is held against
the model, fed with the same events once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import postgres_worker as worker
import psycopg
import pytest
import telemetry_data as data
from postgres_proxy import proxy
from stores import scratch
from telemetry_model import Model, read_all, state_of
from test_telemetry_postgres import Target, fresh_target

from kvstore.errors import CommitUnknown, Fenced, SinkError
from kvstore.telemetry.records import Outcome
from kvstore.telemetry.sinks.postgres import PostgresSink, session

pytestmark = pytest.mark.slow  # servers, processes or many files: CI runs it

WAIT_S = 60
EVENTS = 100

# What waits for the gate: the first of it inside of a transaction, the second inside of COMMIT.
GATES = {
    "before COMMIT": "CREATE TRIGGER gate AFTER INSERT ON {s}.commits",
    "during COMMIT": "CREATE CONSTRAINT TRIGGER gate AFTER INSERT ON {s}.commits "
    "DEFERRABLE INITIALLY DEFERRED",
}


@pytest.fixture
def target(postgres_server):
    with fresh_target(postgres_server) as target:
        yield target


@pytest.fixture
def sink(target):
    with target.open() as sink:
        sink.evolve(data.BRIEF)
        yield sink


class Gate:
    """Holds commits up at a point while it is shut."""

    def __init__(self, target: Target, point: str):
        self._target = target
        self._number = uuid.uuid4().int % 2**62
        target.ask(
            "CREATE FUNCTION {s}.gate() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0 AS "
            f"$$ BEGIN PERFORM pg_advisory_lock_shared({self._number}); "
            f"PERFORM pg_advisory_unlock_shared({self._number}); RETURN NULL; END $$"
        )
        target.ask(f"{GATES[point]} FOR EACH ROW EXECUTE FUNCTION {{s}}.gate()")
        self._holder = psycopg.connect(target.url, autocommit=True)
        self._holder.execute(f"SELECT pg_advisory_lock({self._number})")

    def wait(self) -> str:
        """Until somebody waits for it; gives the worker's name."""
        query = (
            "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE "
            "locktype = 'advisory' AND NOT granted "
            f"AND (classid::int8 << 32 | objid::int8) = {self._number}"
        )
        return poll(lambda: self._target.ask(query))[0][0]

    def open(self) -> None:
        """Let everybody through, from now on."""
        self._holder.close()


@contextmanager
def gate(target, point):
    made = Gate(target, point)
    try:
        yield made
    finally:
        made.open()


def poll(ask):
    deadline = time.monotonic() + WAIT_S
    while not (found := ask()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return found


def warm_up(sink):
    """A first commit, so that the next has no day and no lineage to make: a work to go on from."""
    made = data.work(sink.claim([data.PLACE]), [data.row("first", offset=0)])
    sink.commit(made)
    return made


def is_over(target, name):
    """Whether the server has no session of that worker any more."""
    query = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = %s"
    return target.ask(query, name)[0][0]


def state_expected(partitions=(0,)):
    """What the model holds of the whole feed."""
    model = Model()
    for partition in partitions:
        (claim,) = model.claim([worker.place(partition)])
        for work in worker.works(partition, claim, EVENTS):
            model.commit(work)
    return model.state()


# ---- replies that are lost ----


@pytest.fixture
def cut(target):
    """A proxy in front of the server, and a sink behind it."""
    with (
        scratch() as folder,
        proxy(target.url, folder) as proxy_,
        PostgresSink(proxy_.url, schema=target.schema) as sink,
    ):
        sink.evolve(data.BRIEF)
        yield proxy_, sink


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lost_reply_to_a_commit_is_settled(cut, when):
    proxy_, sink = cut
    made = data.next_work(warm_up(sink), [data.row()], [data.rejection(2)])
    proxy_.cut = when
    with pytest.raises(CommitUnknown, match="settle before going on"):
        sink.commit(made)
    assert proxy_.cuts == 1
    done = Outcome(1, 0, 1, 0)
    if when == "before":
        assert sink.settle(made) is None
        assert sink.commit(made) == done
    assert sink.settle(made) == done
    with pytest.raises(Fenced):
        sink.commit(made)
    assert len(read_all(sink)) == 2
    again = data.next_work(made, [data.row(offset=3)])
    assert sink.commit(again).duplicates == 1


def test_settling_waits_for_a_commit_that_is_under_way(cut, target):
    """Else it would say "not there", and a moment later it would be."""
    proxy_, sink = cut
    made = data.next_work(warm_up(sink), [data.row()])
    with gate(target, "during COMMIT") as held, ThreadPoolExecutor() as pool:
        proxy_.cut = "at once"
        with pytest.raises(CommitUnknown):
            sink.commit(made)
        held.wait()
        settling = pool.submit(sink.settle, made)
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s "
            "AND wait_event = 'transactionid'"
        )
        poll(lambda: target.ask(query, sink.worker)[0][0])
        assert not settling.done()
        held.open()
        assert settling.result(WAIT_S) == Outcome(1, 0, 0, 0)


def test_a_session_ended_in_its_commit_is_settled(target, sink):
    made = data.work(sink.claim([data.PLACE]), [data.row()])
    with gate(target, "during COMMIT") as held, ThreadPoolExecutor() as pool:
        committing = pool.submit(sink.commit, made)
        name = held.wait()
        assert name == sink.worker
        target.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            name,
        )
        with pytest.raises(CommitUnknown):
            committing.result(WAIT_S)
        held.open()
    assert sink.settle(made) is None
    assert sink.commit(made).stored == 1


def test_a_session_ended_before_its_commit_is_replaced(target, sink):
    """Nothing can have been kept: the sink connects and does it again."""
    made = data.work(sink.claim([data.PLACE]), [data.row()])
    with gate(target, "before COMMIT") as held, ThreadPoolExecutor() as pool:
        committing = pool.submit(sink.commit, made)
        name = held.wait()
        target.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            name,
        )
        held.open()
        assert committing.result(WAIT_S) == Outcome(1, 0, 0, 0)
    assert len(read_all(sink)) == 1


def test_a_claim_survives_a_lost_connection(cut):
    proxy_, sink = cut
    proxy_.cut = "after"
    assert sink.claim([data.PLACE])[0].epoch == 2  # the first one was made, unknown to us
    assert proxy_.cuts == 1
    assert sink.commit(data.work(sink.claim([data.PLACE]), [data.row()])).stored == 1


# ---- others in the way ----


def test_a_deadlock_is_tried_again(target, sink):
    made = data.work(sink.claim([data.PLACE]), [data.row()])
    with psycopg.connect(target.url) as other, ThreadPoolExecutor() as pool:
        name = psycopg.sql.Identifier(target.schema).as_string(None)
        other.execute(f"LOCK TABLE {name}.commits IN EXCLUSIVE MODE")
        committing = pool.submit(sink.commit, made)
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s "
            "AND wait_event_type = 'Lock'"
        )
        poll(lambda: target.ask(query, sink.worker)[0][0])
        other.execute("SET deadlock_timeout = '1h'")  # the sink is to be the one that loses
        other.execute(f"UPDATE {name}.places SET token = token")
        other.rollback()
        assert committing.result(WAIT_S).stored == 1


def test_a_lock_that_is_never_given_up_ends_in_an_error(target, sink, monkeypatch):
    monkeypatch.setattr(session, "TRY_S", 0.5)
    sink._session.connection.execute("SET lock_timeout = 100")
    made = data.work(sink.claim([data.PLACE]), [data.row()])
    with psycopg.connect(target.url) as other:
        name = psycopg.sql.Identifier(target.schema).as_string(None)
        other.execute(f"LOCK TABLE {name}.commits IN EXCLUSIVE MODE")
        with pytest.raises(SinkError, match="pg_stat_activity shows who holds the lock"):
            sink.commit(made)
    assert sink.commit(made).stored == 1


def test_a_server_that_is_not_there_ends_in_an_error(monkeypatch, cut, target):
    proxy_, sink = cut
    monkeypatch.setattr(session, "TRY_S", 0.5)
    made = data.work(sink.claim([data.PLACE]), [data.row()])
    proxy_.close()
    sink._session.close()
    with pytest.raises(SinkError, match="see that the server runs"):
        sink.commit(made)


# ---- workers that are killed, paused, overtaken ----


class Worker:
    """A process that runs postgres_worker.py."""

    def __init__(self, target: Target, partition: int = 0):
        command = [sys.executable, worker.__file__, target.url, target.schema]
        self.process = subprocess.Popen(
            [*command, str(partition), str(EVENTS)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(worker.__file__).parent)},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, word, count=1):
        poll(lambda: sum(line.startswith(word) for line in list(self.lines)) >= count)

    def signal(self, number):
        self.process.send_signal(number)

    def end(self):
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        self.process.stdout.close()
        return code


@contextmanager
def running(target, partition=0):
    made = Worker(target, partition)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
        made.end()


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("point", [*GATES, "after COMMIT"])
def test_a_worker_killed_at_any_point_is_continued_exactly(target, point):
    with target.open() as first:
        first.evolve(data.BRIEF)
    with ExitStack() as stack:
        killed = stack.enter_context(running(target))
        if point == "after COMMIT":
            killed.wait_for("committed", 2)
            killed.signal(signal.SIGKILL)
        else:
            killed.wait_for("claimed")
            held = stack.enter_context(gate(target, point))
            name = held.wait()
            killed.signal(signal.SIGKILL)
            assert killed.end() == -signal.SIGKILL
            held.open()
            poll(lambda: is_over(target, name))
        with running(target) as again:
            assert again.end() == 0
            assert "done\n" in again.lines
    with target.open() as sink:
        assert state_of(sink) == state_expected()


@pytest.mark.slow  # starts processes
def test_a_paused_worker_is_overtaken_and_does_no_harm(target, monkeypatch):
    """It stands still in the middle of a commit, with its place locked; then it goes on."""
    monkeypatch.setattr(session, "TRY_S", 0.5)
    with target.open() as first:
        first.evolve(data.BRIEF)
    with running(target) as paused, gate(target, "before COMMIT") as held:
        paused.wait_for("claimed")
        name = held.wait()
        paused.signal(signal.SIGSTOP)
        held.open()
        query = "SELECT state FROM pg_stat_activity WHERE application_name = %s"
        poll(lambda: target.ask(query, name) == [("idle in transaction",)])
        with target.open() as sink:
            sink._session.connection.execute("SET lock_timeout = 100")
            (claim,) = sink.claim([worker.place(0)])
            assert claim.epoch == 2
            for work in worker.works(0, claim, EVENTS):
                sink.commit(work)
            paused.signal(signal.SIGCONT)
            assert paused.end() == 0
            assert paused.lines[-1] == "fenced\n"
            assert state_of(sink) == state_expected()


@pytest.mark.slow  # starts processes
def test_workers_share_the_places_and_fence_each_other(target):
    """Three at once; one place is claimed by two of them: one ends fenced, all is there once."""
    with target.open() as first:
        first.evolve(data.BRIEF)
    with ExitStack() as stack:
        held = stack.enter_context(gate(target, "before COMMIT"))
        old = stack.enter_context(running(target, 0))
        old.wait_for("claimed")
        held.wait()
        held.open()
        others = [stack.enter_context(running(target, partition)) for partition in (0, 1, 2)]
        assert [each.end() for each in [old, *others]] == [0, 0, 0, 0]
        ends = [each.lines[-1] for each in [old, *others]]
        assert "done\n" in (ends[0], ends[1])
        assert ends[2:] == ["done\n", "done\n"]
    with target.open() as sink:
        assert state_of(sink) == state_expected((0, 1, 2))


def test_of_two_claims_the_older_is_fenced(target, sink):
    with target.open() as other:
        (old,) = sink.claim([data.PLACE])
        (new,) = other.claim([data.PLACE])
        with pytest.raises(Fenced, match="claimed or moved it"):
            sink.commit(data.work(old, [data.row()]))
        assert other.commit(data.work(new, [data.row()])).stored == 1
        assert target.ask("SELECT worker FROM {s}.places") == [(other.worker,)]
