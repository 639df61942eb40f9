"""Forks: a child may not use what it inherits, may open anew, and leaves its parent alone."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest
from stores import BATCH_ROWS, append_batches, rows_of

import kvstore
from kvstore import StoreClosed, StoreLocked

TINY = {"segment_bytes": 64 << 10}


def in_child(act):
    """Exit code of a forked child that does this: 0 if it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException as error:  # noqa: BLE001  # whatever it is, the parent must see it
            print(f"child: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_handles_are_refused_in_a_forked_child(path):
    store = kvstore.open(path, "w")
    append_batches(store, range(3))
    stream, batches = store["s"], store["s"].read()
    next(batches)
    row = {"time": 1.0, "v": 1, "noise": np.zeros(10, int)}

    def child():
        uses = [
            store.flush, store.info, lambda: store["s"], lambda: stream.append(row), stream.read,
            stream.first, lambda: len(stream), lambda: list(batches),
            lambda: store.stream("new").append(row),
        ]  # fmt: skip
        for use in uses:
            with pytest.raises(StoreClosed, match="forked"):
                use()
        store.close()

    assert in_child(child) == 0
    append_batches(store, range(3, 6))
    assert rows_of(stream) == 6 * BATCH_ROWS
    store.close()


@pytest.mark.slow
def test_a_child_may_open_anew_while_the_parent_goes_on(path):
    store = kvstore.open(path, "w", **TINY)
    append_batches(store, range(20))
    reader = kvstore.open(path)

    def child():
        with kvstore.open(path) as mine:
            assert rows_of(mine["s"]) >= 20 * BATCH_ROWS
        with pytest.raises(StoreLocked):
            kvstore.open(path, "w")

    for round_ in range(2):
        assert in_child(child) == 0
        append_batches(store, range(20 + round_ * 4, 24 + round_ * 4))
        assert rows_of(reader["s"]) == (24 + round_ * 4) * BATCH_ROWS
        with pytest.raises(StoreLocked):
            kvstore.open(path, "w")
    reader.close()
    store.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking with threads
def test_forks_while_threads_write_and_read(path):
    """The child closes what it inherited: never in the middle of a parent's transaction."""
    stop = threading.Event()
    store = kvstore.open(path, "w", **TINY)
    append_batches(store, range(2))
    written = [2]
    failures = []

    def write():
        while not stop.wait(0.002):
            append_batches(store, [written[0]])
            written[0] += 1

    def read():
        with kvstore.open(path) as reader:
            while not stop.is_set():
                rows_of(reader["s"])

    def guarded(act):
        try:
            act()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(act,)) for act in (write, read, read)]
    for thread in threads:
        thread.start()

    def child():
        with pytest.raises(StoreClosed):
            store.stream("s").append({"time": 1.0})
        with kvstore.open(path) as mine:
            assert rows_of(mine["s"]) >= 2 * BATCH_ROWS

    codes = [in_child(child) for _ in range(20)]
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert codes == [0] * 20
    assert rows_of(store["s"]) == written[0] * BATCH_ROWS
    store.close()


def test_a_child_does_not_keep_the_lock_of_its_parent(path):
    store = kvstore.open(path, "w")
    ready, gate = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(gate[1])  # its parent's end is the only one: closed however the test ends
        os.write(ready[1], b".")
        os.read(gate[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(StoreLocked):
        kvstore.open(path, "w")
    store.close()
    kvstore.open(path, "w").close()
    os.write(gate[1], b".")
    os.waitpid(pid, 0)
    for fd in (*ready, *gate):
        os.close(fd)
