"""The embedded sink's crash matrix: kill -9 before, in and after a commit, a reply that is lost.

Whatever happened before, a last run leaves exactly what one run without a fault leaves: the same
readings with the same lineage, dead letters, counts and positions. And each line of the input has
exactly one fate.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import telemetry_data as data
from stores import check_store, scratch, start
from telemetry_model import state_of

from kvstore.errors import StoreLocked
from kvstore.telemetry import counts
from kvstore.telemetry.audit import audit
from kvstore.telemetry.pipeline import Limits, Pipeline
from kvstore.telemetry.simulate import Fleet, Simulation
from kvstore.telemetry.sinks.stream import StreamSink
from kvstore.telemetry.sources.files import FilesSource

pytestmark = pytest.mark.slow  # servers, processes or many files: CI runs it

EVENTS = 1500
ROWS = 100  # of a commit
POINTS = ("before", "during", "after", "claim", "lost, made", "lost, not made", "never")
WORKER = """
    import os, signal, sys, threading, time
    sys.path.insert(0, "tests")
    from test_telemetry_kill import ingest
    from kvstore.errors import StoreError
    from kvstore.store import Store
    point, number, delay_s = sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
    flush, calls = Store.flush, [0]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def killed(store, marks=None):
        is_commit = marks and "telemetry/commits" in marks
        calls[0] += bool(is_commit)
        if point == "claim" and marks and not is_commit:
            flush(store, marks)
            die()
        if not is_commit or calls[0] != number:
            return flush(store, marks)
        if point == "stop":
            os.write(1, b"stopped\\n")
            os.kill(os.getpid(), signal.SIGSTOP)
        if point == "before":
            die()
        if point == "during":
            threading.Thread(target=lambda: (time.sleep(delay_s), die())).start()
        if point != "lost, not made":
            flush(store, marks)
        if point == "after":
            die()
        if point.startswith("lost"):
            raise StoreError("the reply is lost")

    Store.flush = killed
    ingest(sys.argv[1], sys.argv[2])
    os.write(1, b"done\\n")
"""


def ingest(file, store):
    """One run, under a clock that stands still: so that runs can be compared."""
    with StreamSink.open(store, data.BRIEF) as sink:
        source = lambda: FilesSource([file], run="r")  # noqa: E731
        limits = Limits(rows_max=ROWS, wait_s=1000.0)
        pipeline = Pipeline(source, sink, data.BRIEF, limits=limits, run="r",
                            clock=lambda: data.NOW_US, sleep=lambda _: None)  # fmt: skip
        pipeline.run()


def held(store):
    """What a store holds; but whether a reading was late, which depends on those before it."""
    with StreamSink.open(store, data.BRIEF, mode="r") as sink:
        found = state_of(sink)
    found["counts"] = [count for count in found["counts"] if count.name != counts.LATE]
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    fleet = Fleet(devices=20, events=EVENTS, bad=0.05, duplicates=0.05, conflicts=0.02,
                  start_us=data.NOW_US - 3 * 3_600_000_000)  # fmt: skip
    path.write_bytes(b"".join(payload + b"\n" for payload in Simulation(fleet)))
    return path


@pytest.fixture(scope="module")
def undisturbed(file):
    with scratch() as folder:
        ingest(file, folder / "ops.kv")
        return held(folder / "ops.kv")


def faulty_run(file, store, point, rng):
    number = rng.randrange(1, EVENTS // ROWS)
    with start(WORKER, file, store, point, number, rng.uniform(0, 0.01)) as child:
        out, _ = child.communicate(timeout=120)
    assert child.returncode in {0, -signal.SIGKILL}
    return out


def check(file, store, undisturbed):
    ingest(file, store)
    assert held(store) == undisturbed
    check_store(store)
    with StreamSink.open(store, data.BRIEF, mode="r") as sink:
        found = audit(Path(file), sink, data.BRIEF, now_us=data.NOW_US)
    assert found.is_sound
    assert found.lines == found.stored + found.duplicates + found.rejected == len_of(file)
    assert found.unread == 0


def len_of(file):
    return sum(1 for line in Path(file).read_bytes().split(b"\n") if line)


@pytest.mark.parametrize("point", POINTS)
def test_a_run_after_a_fault_leaves_what_one_without_leaves(file, undisturbed, point):
    with scratch() as folder:
        out = faulty_run(file, folder / "ops.kv", point, random.Random(point))
        assert ("done" in out) == (point.startswith("lost") or point == "never")
        check(file, folder / "ops.kv", undisturbed)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_after_many_faults_leaves_what_one_without_leaves(file, undisturbed, seed):
    rng = random.Random(seed)
    with scratch() as folder:
        for _ in range(8):
            faulty_run(file, folder / "ops.kv", rng.choice(POINTS[:-1]), rng)
        check(file, folder / "ops.kv", undisturbed)


def test_a_paused_worker_keeps_others_out_and_then_goes_on(file, undisturbed):
    with scratch() as folder:
        store = folder / "ops.kv"
        with start(WORKER, file, store, "stop", 3, 0) as child:
            assert child.stdout.readline() == "stopped\n"
            wait_until_stopped(child.pid)
            with pytest.raises(StoreLocked, match=str(child.pid)):
                StreamSink.open(store, data.BRIEF)
            os.kill(child.pid, signal.SIGCONT)
            assert child.stdout.readline() == "done\n"
        check(file, store, undisturbed)


def wait_until_stopped(pid):
    until_s = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_half_a_commit_is_given_up_when_its_process_ends_in_order(file):
    """A signal's SystemExit between the rows and their marks: closing must not commit them."""
    with scratch() as folder:
        with pytest.raises(SystemExit):
            commit_half(folder / "ops.kv")
        assert held(folder / "ops.kv") == {"positions": [], "rows": [], "letters": [], "counts": []}


def commit_half(path):
    with StreamSink.open(path, data.BRIEF) as sink:
        claim = sink.claim([data.PLACE])[0]
        sink.store.flush = lambda marks=None: sys.exit(1)
        sink.commit(data.work(claim, [data.row()], [data.rejection(2)]))
