"""One writer and any number of readers: what processes see of each other."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import pytest
from stores import BATCH_ROWS, append_batches, rows_of, run, start

import kvstore
from kvstore import Schema, StoreError, StoreLocked, environment, layout

TINY = {"segment_bytes": 64 << 10}
WRITER = """
    import sys, time
    import numpy as np
    import kvstore

    path, count, first, pause = sys.argv[1], *map(int, sys.argv[2:5])
    with kvstore.open(path, "w", segment_bytes=64 << 10, flush_interval_s=0) as store:
        print("open", flush=True)
        stream = store.stream("s")
        for batch in range(first, first + count):
            rows = np.arange(batch * 50, batch * 50 + 50)
            noise = np.random.default_rng(batch).integers(0, 2**62, (50, 10))
            stream.append({"time": np.full(50, float(batch)), "v": rows, "noise": noise})
            store.flush()
            if pause > 0:
                time.sleep(pause / 1000)
        print("done", flush=True)
        if pause < 0:
            sys.stdin.read()
"""


@contextmanager
def writing(path, *, batches, first=0, pause_ms=0):
    """A child that writes numbered batches, one commit each, over many segments."""
    child = start(WRITER, path, batches, first, pause_ms, stdin=subprocess.PIPE)
    with child:
        assert child.stdout.readline() == "open\n"
        try:
            yield child
            if pause_ms >= 0:
                assert child.wait(120) == 0
        finally:
            child.kill()


def wait_for_rows(stream, rows):
    deadline = time.monotonic() + 120
    while (found := rows_of(stream)) < rows:
        assert time.monotonic() < deadline, f"{found} of {rows} rows"
    return found


# ---- the writer lock ----


def test_a_second_writer_is_refused_and_told_the_pid(path):
    with kvstore.open(path, "w"):
        message = f"process {os.getpid()} is writing"
        with pytest.raises(StoreLocked, match=message):
            kvstore.open(path, "w")
        assert message in run(
            """
            import sys, kvstore
            try:
                kvstore.open(sys.argv[1], "w")
            except kvstore.StoreLocked as error:
                print(error)
            """,
            path,
        )
    kvstore.open(path, "w").close()


def test_the_lock_ends_with_its_process(path):
    with writing(path, batches=2, pause_ms=-1) as child:
        assert child.stdout.readline() == "done\n"
        with pytest.raises(StoreLocked, match=f"process {child.pid} "):
            kvstore.open(path, "w")
        child.kill()
        child.wait()
        with kvstore.open(path, "w") as store:
            assert rows_of(store["s"]) == 2 * BATCH_ROWS


def test_a_store_that_could_not_be_opened_is_not_locked(path, monkeypatch):
    kvstore.open(path, "w").close()
    for name in ("tidy", "store_id"):
        with monkeypatch.context() as patch:
            patch.setattr(layout.Layout, name, lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                kvstore.open(path, "w")
        kvstore.open(path, "w").close()


def test_a_reader_that_meets_a_reopening_does_not_take_writing_away(path):
    """It saw the file closed for a moment, and opens it as it was: for reading."""
    kvstore.open(path, "w").close()
    with kvstore.open(path) as reader, kvstore.open(path, "w") as store:
        reader._active.environment._reopen("shared")
        append_batches(store, [0])
        assert rows_of(reader["s"]) == BATCH_ROWS


# ---- readers during writing ----


@pytest.mark.slow
def test_readers_see_whole_batches_in_order_over_rolls(path):
    """One in this process, several in others, opened before and during the writing."""
    reader_code = """
        import sys, numpy as np, kvstore
        with kvstore.open(sys.argv[1]) as store:
            last = -1
            while last < int(sys.argv[2]):
                rows = [batch["v"] for batch in store["s"].read(fields=["v"])]
                found = np.concatenate(rows) if rows else np.zeros(0, int)
                assert np.array_equal(found, np.arange(len(found))), found
                assert len(found) % 50 == 0 and len(found) >= last, (len(found), last)
                assert all(len(each) == 50 for each in rows)
                last = len(found)
    """
    kvstore.open(path, "w").close()
    with kvstore.open(path, "w") as store:
        append_batches(store, range(1))
    early = kvstore.open(path)
    assert rows_of(early["s"]) == BATCH_ROWS
    wanted = 200 * BATCH_ROWS
    with writing(path, batches=199, first=1):
        children = [start(reader_code, path, wanted) for _ in range(2)]
        with kvstore.open(path) as late:
            assert wait_for_rows(early["s"], wanted) == wait_for_rows(late["s"], wanted) == wanted
        for child in children:
            with child:
                assert child.wait(120) == 0
    assert early.info().segments > 10
    early.close()


def test_a_read_is_a_snapshot_however_long_it_pauses(path):
    with writing(path, batches=20):
        pass
    with kvstore.open(path) as reader:
        batches = reader["s"].read()
        rows = [next(batches)["v"]]
        with writing(path, batches=80, first=20):
            pass
        rows += [batch["v"] for batch in batches]
        assert np.array_equal(np.concatenate(rows), np.arange(20 * BATCH_ROWS))
        assert rows_of(reader["s"]) == 100 * BATCH_ROWS


def test_a_reader_notices_the_writer_that_comes_after_it(path):
    """Opened alone it takes no slot; next to a writer it must, or its pages are reused."""
    with kvstore.open(path, "w") as store:
        append_batches(store, range(3))
    with kvstore.open(path) as reader:
        assert reader._active.environment.mode == "alone"
        assert rows_of(reader["s"]) == 3 * BATCH_ROWS
        with writing(path, batches=2, first=3, pause_ms=-1) as child:
            assert child.stdout.readline() == "done\n"
            assert rows_of(reader["s"]) == 5 * BATCH_ROWS
            assert reader._active.environment.mode == "shared"


def test_a_reader_that_looks_before_the_lock_file_is_there(path):
    """A copied store has none: whoever read between lock and open stayed alone for ever."""
    slow_writer = """
        import sys, numpy as np, kvstore
        from kvstore.layout import Layout

        def wait(self, tidy=Layout.tidy):
            tidy(self)
            print("locked", flush=True)
            sys.stdin.readline()

        Layout.tidy = wait
        with kvstore.open(sys.argv[1], "w") as store:
            batch = {"time": np.full(50, 3.0), "v": np.arange(150, 200)}
            store["s"].append(batch | {"noise": np.zeros((50, 10), int)})
            store.flush()
            print("done", flush=True)
            sys.stdin.readline()
    """
    with kvstore.open(path, "w") as store:
        append_batches(store, range(3))
    for lock_file in [*(path / "segments").glob("*-lock"), path / "writer.lock"]:
        lock_file.unlink()
    early = kvstore.open(path)
    with start(slow_writer, path, stdin=subprocess.PIPE) as child:
        assert child.stdout.readline() == "locked\n"
        assert rows_of(early["s"]) == 3 * BATCH_ROWS
        assert early._active.environment.mode == "alone"
        print(file=child.stdin, flush=True)
        assert child.stdout.readline() == "done\n"
        assert rows_of(early["s"]) == 4 * BATCH_ROWS
        assert early._active.environment.mode == "shared"
        print(file=child.stdin, flush=True)
    early.close()


def test_a_writer_that_starts_while_a_reader_opens_is_noticed(path, monkeypatch):
    """The lock's content is looked at first: read after the probe, it was the new writer's."""
    with kvstore.open(path, "w") as store:
        append_batches(store, range(3))
    writers = []
    probe = layout.Layout.has_writer

    def probe_then_start(self):
        found = probe(self)
        if not writers:
            writers.append(start(WRITER, path, 2, 3, -1, stdin=subprocess.PIPE))
            assert writers[0].stdout.readline() == "open\n"
        return found

    monkeypatch.setattr(layout.Layout, "has_writer", probe_then_start)
    with kvstore.open(path) as reader:
        with writers[0] as child:
            assert child.stdout.readline() == "done\n"
            assert rows_of(reader["s"]) == 5 * BATCH_ROWS
            assert reader._active.environment.mode == "shared"
        assert writers[0].returncode == 0


def test_the_lock_says_something_new_once_its_file_is_there(path):
    with kvstore.open(path, "w") as store:
        held = layout.Layout(path)
        before = held.writer()
        store._writer._lock.announce()
        assert held.writer() != before
        assert held.writer().split()[0] == str(os.getpid()).encode()


# ---- reading changes nothing ----


def fingerprint(path):
    """Name, content, mode and times of everything in the store."""
    return {
        each.relative_to(path).as_posix(): (
            hashlib.sha256(each.read_bytes()).hexdigest() if each.is_file() else "",
            each.stat().st_mode,
            each.stat().st_mtime_ns,
        )
        for each in [path, *path.rglob("*")]
    }


def read_in_every_way(store):
    stream = store["s"]
    rows_of(stream)
    list(stream.read(3.0, 7.0, ordered=True))
    assert stream.count(2.5, 3.5) == BATCH_ROWS
    assert all([stream.first(), stream.last(), stream.span(), store.info(), store.state()])


def test_reading_never_changes_a_byte(path):
    with writing(path, batches=30):
        pass
    before = fingerprint(path)
    assert len(before) > 6
    with kvstore.open(path) as store:
        read_in_every_way(store)
        run("import sys, kvstore; list(kvstore.open(sys.argv[1])['s'].read())", path)
        assert fingerprint(path) == before
    assert fingerprint(path) == before


def test_reading_next_to_a_writer_changes_no_segment(path):
    with writing(path, batches=30, pause_ms=-1) as child:
        assert child.stdout.readline() == "done\n"
        before = fingerprint(path)
        with kvstore.open(path) as store:
            read_in_every_way(store)
        after = fingerprint(path)
        changed = {name for name in before if before[name] != after[name]}
        assert before.keys() == after.keys()
        assert not [name for name in changed if not name.endswith("-lock")]


AS_NOBODY = """
    import os, sys
    import kvstore, numcodecs.blosc  # while they can be found: nobody may not enter all folders
    os.setgid(65534)
    os.setuid(65534)
    with kvstore.open(sys.argv[1]) as store:
        rows = sum(len(batch["v"]) for batch in store["s"].read())
        print(rows, store["s"].count(2.5, 3.5), len(store["s"].first()["v"]))
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: setuid to nobody")


@needs_root
def test_a_store_can_be_read_without_any_right_to_write(path):
    with writing(path, batches=30):
        pass
    path.parent.chmod(0o755)
    for each in [path, *path.rglob("*")]:
        each.chmod(0o555 if each.is_dir() else 0o444)
    before = fingerprint(path)
    assert run(AS_NOBODY, path).split() == ["1500", "50", "1"]
    (path / "writer.lock").unlink()
    assert run(AS_NOBODY, path).split() == ["1500", "50", "1"]
    before.pop("writer.lock")
    after = fingerprint(path)
    assert {name: after[name][0] for name in after} == {name: before[name][0] for name in before}


@needs_root
def test_reading_next_to_a_writer_needs_the_lock_file(path):
    with writing(path, batches=6, pause_ms=-1) as child:
        assert child.stdout.readline() == "done\n"
        path.parent.chmod(0o755)
        for each in path.rglob("*"):
            each.chmod(0o755 if each.is_dir() else 0o644)
        with start(AS_NOBODY, path, stderr=subprocess.PIPE) as reader:
            _, errors = reader.communicate(timeout=180)
        assert reader.returncode == 1
        lock_file = re.search(r"write permission for the lock file (\d{8}\.mdb-lock)", errors)
        (path / "segments" / lock_file[1]).chmod(0o666)
        assert run(AS_NOBODY, path).split() == ["300", "50", "1"]


# ---- readers that are killed ----


def test_slots_of_killed_readers_are_cleared(path):
    reader_code = """
        import sys, time, kvstore
        store = kvstore.open(sys.argv[1])
        with store._active.environment.read() as txn:
            print("holding", flush=True)
            time.sleep(600)
    """
    with kvstore.open(path, "w") as store:
        append_batches(store, range(2))
        children = [start(reader_code, path) for _ in range(3)]
        for child in children:
            assert child.stdout.readline() == "holding\n"
        held = {child.pid for child in children}
        for child in children:
            child.kill()
            child.communicate()
        assert slots(store) >= held
        append_batches(store, range(2, 4))
        run("import sys, kvstore; kvstore.open(sys.argv[1])", path)
        assert not slots(store) & held
        append_batches(store, range(4, 6))
        assert rows_of(store["s"]) == 6 * BATCH_ROWS


def slots(store):
    """Processes in the active segment's reader table."""
    table = store._active.environment._env.readers()
    return {int(line.split()[0]) for line in table.splitlines() if re.match(r"\s+\d", line)}


def test_handles_in_one_process_share_the_file(path):
    with kvstore.open(path, "w") as store, kvstore.open(path) as first:
        append_batches(store, range(3))
        with kvstore.open(path) as second:
            assert second._active.environment is first._active.environment
            assert rows_of(second["s"]) == rows_of(first["s"]) == 3 * BATCH_ROWS
        store.stream("t", Schema.infer({"time": [1.0]})).append({"time": [1.0]})
        store.flush()
        assert len(first["t"]) == 1
        opened = [each for each in environment._opened.values() if path in each.path.parents]
        assert opened == [first._active.environment]
    with pytest.raises(StoreError, match="was closed"):
        len(first["t"])
