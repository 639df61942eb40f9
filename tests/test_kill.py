"""kill -9 at random moments, of writers and of readers: nothing reported is lost, no repair.

A child appends numbered rows over tiny segments and says, before each append, how many rows
there will be and, after each flush, how many are durable. However it ends, the store must
open at once and hold a prefix of the appends, at least the durable one, bit for bit.
KVSTORE_KILLS sets the number of kills.
"""

from __future__ import annotations

import os
import random
import threading
import time

import numpy as np
import pytest
from stores import SEED, check_store, run, start

import kvstore
from kvstore.reading import Scan, make_range

QUICK_KILLS = int(os.environ.get("KVSTORE_KILLS", "8"))
LONG_KILLS = int(os.environ.get("KVSTORE_KILLS", "80"))

CONTENT = """
    import os, sys
    import numpy as np
    import kvstore

    def content(v):
        noise = (v[:, None].astype("u8") * np.uint64(0x9E3779B97F4A7C15)) ^ np.arange(8, dtype="u8")
        return {"time": (v + v * 7919 % 101) / 16, "v": v, "noise": noise * noise}
"""
WRITER = (
    CONTENT
    + """
    path, seed = sys.argv[1], int(sys.argv[2])
    random = np.random.default_rng(seed)
    interval_s = [None, 0, 0.003][seed % 3]
    store = kvstore.open(path, "w", segment_bytes=64 << 10, flush_interval_s=interval_s)
    stream = store.stream("s")
    number = len(stream)
    os.write(1, b"open %d\\n" % number)
    while True:
        rows = int(random.choice([1, 5, 60, 500, 5000]))
        os.write(1, b"append %d\\n" % (number + rows))
        batch = content(np.arange(number, number + rows))
        number += rows
        if random.random() < 0.3:
            stream.append(batch, marks={"rows": number})
        else:
            stream.append(batch)
        if random.random() < 0.5:
            store.flush({"flushed": number} if random.random() < 0.5 else None)
            os.write(1, b"durable %d\\n" % number)
"""
)
scope: dict = {}
exec("\n".join(line[4:] for line in CONTENT.splitlines()), scope)  # the same in both processes
content = scope["content"]


class Told:
    """What a child said of itself before it was killed."""

    def __init__(self, lines):
        words = [line.split() for line in lines if line.endswith("\n")]
        numbers = {word: [int(n) for w, n in words if w == word] for word in ("append", "durable")}
        self.appended = numbers["append"]
        self.durable = max(numbers["durable"], default=0)


def killed_writer(path, seed):
    """Start a writer, kill it at a random moment: often while it opens, mostly while it writes."""
    choose = random.Random(seed)
    with start(WRITER, path, seed) as child:
        lines = []
        if choose.random() < 0.2:
            time.sleep(choose.uniform(0.05, 0.4))
        else:
            lines.append(child.stdout.readline())
            assert lines[0].startswith("open")
            while choose.random() < 0.9 and not lines[-1].startswith("durable"):
                lines.append(child.stdout.readline())  # else a slow machine has nothing to lose
            threading.Timer(choose.uniform(0, 0.12), child.kill).start()
            lines += child.stdout.readlines()
        child.kill()
        lines += child.stdout.readlines()
    assert child.returncode == -9
    return Told(lines)


def check_prefix(path, before, told, sequences):
    """All that the store holds, read by a process that did not see the crash: returns the rows."""
    with kvstore.open(path) as store:
        if "s" not in store or len(store["s"]) == 0:  # its schema may come before its rows
            assert told.durable == before == 0
            return 0
        batches = list(store["s"].read())
        found = len(store["s"])
        whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
        order = np.argsort(whole["v"])
        expected = content(np.arange(found))
        for name, values in expected.items():
            assert np.array_equal(whole[name][order], values), name
        assert found >= max(told.durable, before)
        assert found in {before, *told.appended}, "an append is there in part"
        for mark in store.marks.values():
            assert mark <= found
        for sequence, first in first_rows(store["s"]):
            assert sequences.setdefault(sequence, first) == first, "a sequence was given twice"
        assert sorted(sequences) == list(range(len(sequences)))
        return found


def first_rows(stream):
    """(sequence, first row's number) of every batch."""
    state = stream._store.state()
    everything = make_range(stream.schema, None, None, unit=None, inclusive="both")
    scan = Scan(
        state.streams["s"],
        state,
        everything,
        stream._store.open_segment,
        stream._store.is_dropped,
        pytest.fail,
    )
    number = stream.schema.number("v")
    for segment, entry in scan.entries():
        (column,) = segment.fetch(entry, [(number, stream.schema.fields[number])])
        yield entry.sequence, column.min()


def kill_writers(path, kills, seed):
    rows, sequences = 0, {}
    for round_ in range(kills):
        told = killed_writer(path, seed + round_)
        if not (path / "store.msgpack").exists():
            assert not told.appended
            continue
        rows = check_prefix(path, rows, told, sequences)
    return rows


def test_killed_writers_lose_nothing_that_was_durable(path):
    rows = kill_writers(path, QUICK_KILLS, seed=SEED)
    assert rows > 0
    kvstore.open(path, "w").close()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_killed_writers_lose_nothing_in_many_kills(path, tmp_path, where):
    folder = path if where == "memory" else tmp_path / "run.kv"
    per_store = 20
    for number in range(LONG_KILLS // 2 // per_store):
        store = folder.with_name(f"{number}.kv")
        assert kill_writers(store, per_store, SEED + number * 1000) > 0
        kvstore.open(store, "w").close()
        check_store(store)


@pytest.mark.slow
def test_a_reader_lives_through_its_writers(path):
    """One reading handle, kept open while writers come and are killed."""
    kvstore.open(path, "w").close()
    rows = 0
    with kvstore.open(path) as reader:
        for round_ in range(6):
            told = killed_writer(path, SEED + round_)
            if "s" in reader and len(reader["s"]):
                numbers = [batch["v"] for batch in reader["s"].read(fields=["v"])]
                found = np.sort(np.concatenate(numbers))
                assert np.array_equal(found, np.arange(len(found)))
                assert len(found) >= max(told.durable, rows)
                rows = len(found)


READER = """
    import os, sys, random
    import kvstore
    with kvstore.open(sys.argv[1]) as store:
        os.write(1, b"open\\n")
        while True:
            for batch in store["s"].read():
                pass
            store["s"].last()
"""


def kill_readers(path, kills):
    batch = content(np.arange(500))
    stop = threading.Event()
    with kvstore.open(path, "w", segment_bytes=1 << 20, flush_interval_s=0) as store:
        store.stream("s").append(batch)
        store.flush()
        appended = [1]

        def write():
            while not stop.wait(0.001):
                store.stream("s").append(batch)
                store.flush()
                appended[0] += 1

        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(kills):
            with start(READER, path) as child:
                child.stdout.readline()
                time.sleep(random.uniform(0, 0.05))
                child.kill()
        stop.set()
        thread.join()
        run("import sys, kvstore; kvstore.open(sys.argv[1])", path)  # clears their slots
        table = store._active.environment._env.readers()
        pids = {int(line.split()[0]) for line in table.splitlines()[1:] if line.strip()}
        assert pids <= {os.getpid()}
        assert len(store["s"]) == appended[0] * 500


@pytest.mark.slow
def test_killed_readers_do_not_disturb_the_writer(path):
    kill_readers(path, 5)


@pytest.mark.slow
def test_many_killed_readers_do_not_disturb_the_writer(path):
    kill_readers(path, 20)
