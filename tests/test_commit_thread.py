"""The commit thread outlives whatever happens on it: nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

import kvstore
from kvstore import StoreError, operations
from kvstore.active import Active
from kvstore.errors import DiskFull

PATIENCE_S = 20


def put(store, *numbers):
    for number in numbers:
        store.stream("s").append({"time": float(number), "v": number})


def in_time(act):
    """What ``act`` gives; fails where it takes for ever."""
    found = Future()

    def run():
        try:
            found.set_result(act())
        except BaseException as error:  # noqa: BLE001  # the caller's
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(PATIENCE_S)


def test_an_error_between_commits_is_told_and_writing_goes_on(path, monkeypatch):
    failed = threading.Event()

    def fail(active):
        failed.set()
        raise ZeroDivisionError("odd")

    with kvstore.open(path, "w") as store:
        put(store, 0)
        with monkeypatch.context() as patch:
            patch.setattr(Active, "keep_in_order", fail)
            assert failed.wait(PATIENCE_S)
            with store.writer().committer.lock, pytest.raises(StoreError, match="odd"):
                store.writer().committer.raise_error()
        in_time(store.flush)
        put(store, 1)
        in_time(store.flush)
        assert len(store["s"]) == 2


def test_calls_are_served_where_staged_rows_cannot_be_queued(path, monkeypatch):
    with kvstore.open(path, "w", flush_interval_s=None) as store:
        put(store, 0)
        committer = store.writer().committer
        seal = committer._seal

        def fail():
            monkeypatch.setattr(committer, "_seal", seal)
            raise MemoryError

        monkeypatch.setattr(committer, "_seal", fail)
        done = Future()
        with committer.lock:  # both at once
            committer._calls.append((done, lambda active: active.state.number))
            committer._asked += 1
            committer._work.notify()
        assert done.result(PATIENCE_S) == 1
        in_time(store.flush)
        assert len(store["s"]) == 1


def test_a_flush_beside_close_is_answered(path, monkeypatch):
    """Asked for after the last commit, before the handle counts as closed."""
    store = kvstore.open(path, "w")
    writer = store.writer()
    flush, committer = writer.flush, writer.committer

    def flush_and_ask():
        flush()
        with committer.lock:
            committer._asked += 1

    put(store, 0)
    monkeypatch.setattr(writer, "flush", flush_and_ask)
    in_time(store.close)
    assert committer._answered == committer._asked


def test_a_store_whose_settings_cannot_be_kept_is_let_go(path, monkeypatch):
    def fail(active, **changes):
        raise DiskFull("no room")

    with monkeypatch.context() as patch:
        patch.setitem(operations._OPERATIONS, "set", fail)
        with pytest.raises(DiskFull):
            kvstore.open(path, "w", settings=kvstore.Settings(max_age_s=1.0))
    kvstore.open(path, "w").close()
    assert not [t for t in threading.enumerate() if t.name == "kvstore-commit"]


def test_a_gap_that_cannot_be_stored_as_told_holds_up_nothing(path):
    with kvstore.open(path, "w") as store:
        store.note_gap("rejected", "s", start_ns=0, stop_ns=1, rows=10**30, detail="a\udc80b")
        store.note_gap("rejected", "s", start_ns=0, stop_ns=1, rows=10**30, occurrences=2**63)
        put(store, 0)
        store.flush()
        (gap,) = store.gaps()
        assert gap.rows == gap.occurrences == 2**63 - 1
