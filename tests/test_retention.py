"""Limits, pins and drops: what goes, what stays, and that the limits hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ROOT, SEED, start

import kvstore
from kvstore import DiskFull, Settings, StoreError, layout, requests, retention
from kvstore.layout import Layout
from kvstore.schema import Schema
from kvstore.settings import Pin
from kvstore.state import Sealed, State, StreamInfo, Totals

MIB = 1 << 20
ROWS = 500
TINY = {"segment_bytes": 64 << 10}


def content(number):
    """500 rows of noise, about 84 kB stored; batch ``number`` lies in second ``number``."""
    noise = np.random.default_rng(number).random((ROWS, 20))
    rows = np.arange(number * ROWS, (number + 1) * ROWS)
    return {"time": rows / ROWS, "row": rows, "noise": noise}


def put(store, numbers):
    for number in numbers:
        store.stream("s").append(content(number))
        store.flush()


def numbers_in(store):
    """Which batches are there; each must be whole and as it was appended."""
    found = []
    for batch in store["s"].read():
        for begin in range(0, len(batch["row"]), ROWS):
            number = int(batch["row"][begin]) // ROWS
            for name, values in content(number).items():
                assert np.array_equal(batch[name][begin : begin + ROWS], values)
            found.append(number)
    return found


def used(path):
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # dropped just now
            total += file.stat().st_size if file.is_file() else 0
    return total


def dropped_rows(store):
    return sum(gap.rows for gap in store.gaps() if gap.kind == "dropped")


# ---- the limit of size ----


def test_the_size_limit_holds_and_the_oldest_go(path):
    limit, most = 4 * MIB, 0
    done = threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, used(path))

    with kvstore.open(path, "w", settings=Settings(max_bytes=limit)) as store:
        watcher = threading.Thread(target=watch)
        watcher.start()
        for number in range(150):  # three times the limit, not waiting for anything
            store.stream("s").append(content(number))
        store.flush()
        done.set()
        watcher.join()
        found = numbers_in(store)
        assert found == list(range(found[0], 150))
        assert 15 < len(found) < 50  # neither too much was kept nor too little
        assert dropped_rows(store) == found[0] * ROWS
        assert len(store["s"]) == len(found) * ROWS
    assert limit // 2 < most <= limit


def test_limits_stay_with_the_store(path):
    wanted = Settings(max_bytes=4 * MIB, max_age_s=3600.0, clock_step_s=None)
    with kvstore.open(path, "w", settings=wanted) as store:
        assert store.settings == wanted
    with kvstore.open(path, "w") as store:
        assert store.set(max_age_s=None) == wanted._replace(max_age_s=None)
        put(store, range(100))
    assert used(path) <= 4 * MIB
    with kvstore.open(path) as store:
        assert store.settings == wanted._replace(max_age_s=None)


def test_a_full_store_can_be_helped_by_a_drop(path):
    options = Settings(max_bytes=3 * MIB, when_full="stop")
    with kvstore.open(path, "w", settings=options, **TINY) as store:
        with pytest.raises(DiskFull):
            put(store, range(100))
        assert store.drop(10.0)["segments"] == 10
        store.flush()  # what was waiting
        assert numbers_in(store)[0] == 10


def test_a_lower_limit_holds_at_once(path):
    """Also where nobody writes, and though all rows are in the active segment."""
    with kvstore.open(path, "w") as store:
        put(store, range(40))
    kvstore.configure(path, max_bytes=3 * MIB)
    assert used(path) <= 3 * MIB
    with kvstore.open(path, "w", **TINY) as store:
        put(store, range(40, 60))
        kept = numbers_in(store)
    kvstore.configure(path, max_bytes=2 * MIB)
    assert used(path) <= 2 * MIB
    with kvstore.open(path) as reader:
        found = numbers_in(reader)
    assert 10 < len(found) < len(kept)
    assert found[-1] == 59


def test_a_full_store_that_is_to_stop_stops_and_goes_on_with_room(path):
    options = Settings(max_bytes=3 * MIB, when_full="stop")
    with kvstore.open(path, "w", settings=options) as store:
        with pytest.raises(DiskFull, match=r"full by its own limit: .*kvstore set"):
            put(store, range(100))
        kept = numbers_in(store)
        assert kept == list(range(len(kept)))
        assert 20 < len(kept) < 40
        assert used(path) <= 3 * MIB
        store.set(max_bytes=20 * MIB)
        store.flush()  # what was waiting
        assert numbers_in(store) == list(range(len(kept) + 1))
        assert store.gaps() == ()


def test_a_commit_that_can_never_fit_costs_no_rows(path):
    with kvstore.open(path, "w", settings=Settings(max_bytes=4 * MIB)) as store:
        put(store, range(15))
        large = {"time": np.full(70_000, 99.0), "row": np.zeros(70_000, int)}
        noise = np.random.default_rng(1).random((70_000, 20))
        with suppress(DiskFull):
            store.stream("s").append(large | {"noise": noise}, marks={"a": 1})
        with pytest.raises(DiskFull, match="full by its own limit"):
            store.flush()
        assert numbers_in(store) == list(range(15))
        with pytest.raises(DiskFull):
            store.close()
    with kvstore.open(path, "w") as store:
        put(store, range(15, 60))
        assert numbers_in(store)[-1] == 59


def test_marks_count_for_the_limit(path):
    with kvstore.open(path, "w", settings=Settings(max_bytes=3 * MIB)) as store:
        with pytest.raises(DiskFull):  # noqa: PT012
            for number in range(100):
                store.flush(marks={f"mark {number}": bytes(60_000)})
        assert used(path) <= 3 * MIB
        assert len(store.marks) > 20
        store.set(max_bytes=20 * MIB)


def test_when_only_pinned_segments_are_left_writing_stops(path):
    with kvstore.open(path, "w", settings=Settings(max_bytes=3 * MIB)) as store:
        pin = store.pin(0, 1e9, "all of it", unit="s")
        with pytest.raises(DiskFull, match="kvstore unpin"):
            put(store, range(100))
        count = len(numbers_in(store))
        store.unpin(pin)
        store.flush()
        put(store, range(count + 1, 100))
        assert numbers_in(store)[-1] == 99
        assert used(path) <= 3 * MIB


def test_pinned_segments_stay_and_the_others_go(path):
    with kvstore.open(path, "w", settings=Settings(max_bytes=8 * MIB)) as store:
        put(store, range(10))
        store.pin(3.0, 4.5, "door opened")
        store.pin(60.0, 61.0, "to come")
        put(store, range(10, 250))
        found = numbers_in(store)
        assert {3, 4, 60, 61} <= set(found)
        assert not {30, 100, 150} & set(found)
        assert found[-20:] == list(range(230, 250))
        assert [pin.label for pin in store.pins()] == ["door opened", "to come"]
        assert dropped_rows(store) + len(store["s"]) == 250 * ROWS
    with kvstore.open(path, "w") as store:
        for pin in store.pins():
            store.unpin(pin.pin_id)
        put(store, range(250, 330))
        assert min(numbers_in(store)) > 200


@pytest.mark.parametrize("drops", [True, False])
def test_space_is_left_on_the_disk(path, monkeypatch, drops):
    """As the disk fills with other things, the oldest segments go, or writing stops."""
    others = 0
    monkeypatch.setattr(Layout, "free_bytes", lambda self: 8 * MIB - used(self.path) - others)
    when_full = "" if drops else "stop"
    options = Settings(min_free_bytes=2 * MIB, when_full=when_full)
    with kvstore.open(path, "w", settings=options, **TINY) as store:
        put(store, range(40))
        others = 3 * MIB  # now it keeps a byte over 3 MiB
        if drops:
            put(store, range(40, 80))
            assert used(path) <= 3 * MIB
            assert numbers_in(store)[-1] == 79
        else:
            with pytest.raises(DiskFull, match="to be left"):
                put(store, range(40, 80))
            assert numbers_in(store)[:40] == list(range(40))
            others = 0
            store.flush()


def test_space_is_left_though_a_reader_holds_what_was_dropped(path, monkeypatch):
    held, remove, at_once = 0, Layout.remove, threading.Lock()

    def hold(self, numbers):
        nonlocal held
        sizes = [self.segment_path(number).stat().st_size for number in numbers]
        with at_once:
            remove(self, numbers)
            held = min(held + sum(sizes), 4 * MIB)

    def free_bytes(self):
        with at_once:
            return 14 * MIB - used(self.path) - held

    monkeypatch.setattr(Layout, "remove", hold)
    monkeypatch.setattr(Layout, "free_bytes", free_bytes)
    wanted = Settings(min_free_bytes=2 * MIB)
    with kvstore.open(
        path, "w", flush_interval_s=None, settings=wanted, segment_bytes=MIB
    ) as store:
        for number in range(240):
            store.stream("s").append(content(number))
            if number % 10 == 9:
                store.flush()
            assert Layout(path).free_bytes() >= 2 * MIB - layout.RESERVE_BYTES
        assert held == 4 * MIB
        assert len(numbers_in(store)) > 30


# ---- age ----


def test_old_segments_go_even_when_no_rows_come(path):
    with kvstore.open(path, "w", settings=Settings(max_age_s=0.8)) as store:
        put(store, range(3))
        deadline = time.monotonic() + 120
        while len(store["s"]):  # sealed at an eighth of the age, gone a while later
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert dropped_rows(store) == 3 * ROWS
        store.set(max_age_s=3600.0)  # else a machine that stands still drops this, too
        put(store, [3])
        assert numbers_in(store) == [3]


def test_data_time_does_not_matter_for_age(path):
    """A stray stamp in the far future pins nothing."""
    with kvstore.open(path, "w", settings=Settings(max_age_s=0.5)) as store:
        store.stream("s").append({**content(1), "time": np.full(ROWS, 9e9)})
        store.flush()
        deadline = time.monotonic() + 120
        while len(store["s"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("years", [-50, 50])
def test_a_clock_that_jumps_while_writing_drops_nothing(path, monkeypatch, years):
    """A device without a battery wakes in 1970, and is set right a while later."""
    real, shift_ns = time.time_ns, 0
    monkeypatch.setattr(time, "time_ns", lambda: real() + shift_ns)
    with kvstore.open(path, "w", settings=Settings(max_age_s=86400.0), **TINY) as store:
        put(store, range(5))
        shift_ns = years * 365 * 86400 * 10**9
        put(store, range(5, 10))
        assert numbers_in(store) == list(range(10))
        (gap,) = store.gaps()
        assert gap.kind == ("clock_ahead" if years > 0 else "clock_back")
        assert "this machine's clock was set by" in gap.detail
    if years < 0:
        with kvstore.open(path, "w") as store:  # still in 1976
            put(store, range(10, 12))
            assert numbers_in(store) == list(range(12))


def test_time_between_sessions_counts(path, monkeypatch):
    real = time.time_ns
    with kvstore.open(path, "w", settings=Settings(max_age_s=86400.0), **TINY) as store:
        put(store, range(5))
    monkeypatch.setattr(time, "time_ns", lambda: real() + 2 * 86400 * 10**9)
    with kvstore.open(path, "w") as store:
        put(store, [5])
        found = numbers_in(store)
        assert found[-1] == 5
        assert 0 not in found


def test_segments_of_short_sessions_grow_old(path, monkeypatch):
    """An hourly job that writes a little each time."""
    real, shift_ns = time.time_ns, 0
    monkeypatch.setattr(time, "time_ns", lambda: real() + shift_ns)
    with kvstore.open(path, "w", settings=Settings(max_age_s=86400.0)) as store:
        put(store, [0])
    for hour in range(1, 40):
        shift_ns = hour * 3600 * 10**9
        with kvstore.open(path, "w") as store:
            put(store, [hour])
    with kvstore.open(path) as store:
        found = numbers_in(store)
    assert 8 <= found[0] <= 16
    assert found[-1] == 39


def test_a_session_before_the_clock_was_set_makes_nothing_old(path, monkeypatch):
    """A device without a battery wakes in 1970, writes a while, and next time knows the time."""
    real, shift_ns = time.time_ns, 0
    monkeypatch.setattr(time, "time_ns", lambda: real() + shift_ns)
    with kvstore.open(path, "w", settings=Settings(max_age_s=86400.0), **TINY) as store:
        put(store, range(5))
    shift_ns = -real()
    with kvstore.open(path, "w", **TINY) as store:
        put(store, range(5, 8))
    shift_ns = 0
    with kvstore.open(path, "w", **TINY) as store:
        put(store, [8])
        assert numbers_in(store) == list(range(9))


# ---- drop --before ----


def test_drop_goes_by_data_time_and_says_what_it_kept(path):
    with kvstore.open(path, "w", **TINY) as store:
        put(store, range(20))
        store.pin(2.5, 2.5, "door")
        files = {n: sealed.file_bytes for n, sealed in store.state().sealed.items()}
        done = store.drop(10.0)
        assert {5, 8} & set(numbers_in(store)) == set()
        assert {2, *range(10, 20)} <= set(numbers_in(store))
        assert done["rows"] == 20 * ROWS - len(store["s"])
        assert done["bytes"] == sum(files[n] for n in files.keys() - store.state().sealed.keys())
        assert any(kept["why"] == "pinned: door" for kept in done["kept"])
        assert store.drop(10.0)["segments"] == 0
        assert store.drop(1e6)["rows"] > 0  # the active one, too, as all of it is older
        assert set(numbers_in(store)) <= {2, 3}
        put(store, [30])
        assert numbers_in(store)[-1] == 30


def test_all_streams_go_together(path):
    with kvstore.open(path, "w", **TINY) as store:
        for number in range(20):
            store.stream("other").append({"time": 100.0 + number, "v": number})
            put(store, [number])
        assert store.drop(50.0)["segments"] == 0  # each holds rows of the other stream
        kept = store.drop(50.0)["kept"]
        assert {each["why"] for each in kept[:-1]} == {"it holds later rows"}
        assert store.drop(110.0)["segments"] > 3
        assert {gap.stream for gap in store.gaps()} == {"s", "other"}


def test_a_stream_that_lost_all_its_rows_goes_on(path):
    with kvstore.open(path, "w", **TINY) as store:
        put(store, range(3))
        store.drop(1e6)
        assert len(store["s"]) == 0
        assert store["s"].first() is None
        put(store, range(3, 5))
        assert numbers_in(store) == [3, 4]
    with kvstore.open(path) as store:
        assert numbers_in(store) == [3, 4]
        assert store.info().streams[0].rows == 2 * ROWS


# ---- readers ----


def test_a_reader_inside_a_dropped_segment_finishes_what_it_holds(path):
    with kvstore.open(path, "w", **TINY) as store, kvstore.open(path) as reader:
        store.stream("s").append(content(0))
        store.stream("s").append(content(1))
        store.flush()
        put(store, range(2, 12))
        batches = reader["s"].read()
        first = next(batches)
        store.drop(1e6)
        assert reader.info().streams[0].rows == 0  # it sees the drop, too
        rest = list(batches)  # no error: what was not begun is gone
        assert first["row"][0] == 0
        assert all(len(batch["row"]) == ROWS for batch in rest)
        assert len(rest) < 11


def test_a_reader_that_slept_through_drops_behind_a_pin_finds_the_new_rows(path):
    """The segment that it knows as the active one is still there, the next one is not."""
    with kvstore.open(path, "w", **TINY) as store, kvstore.open(path) as reader:
        store.pin(0.0, 0.5, "first")
        put(store, range(6))
        assert store.drop(5.0)["segments"] > 0
        deadline = time.monotonic() + 120
        while 2 in Layout(path).numbers():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert 1 in Layout(path).numbers()
        assert numbers_in(reader) == [0, 5]


def test_dropped_segments_are_not_kept_open(path):
    """Else their space would not be free."""
    with kvstore.open(path, "w", settings=Settings(max_bytes=3 * MIB)) as store:
        put(store, range(2))
        assert numbers_in(store) == [0, 1]  # opened for reading in the writing process
        for number in range(2, 100):
            store.stream("s").append(content(number))
        store.flush()
        store.drop(1.0)  # waits until the removal before is done
        with kvstore.open(path) as reader:
            assert len(numbers_in(reader)) > 5
            store.set(max_age_s=1e9)
        files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert not [name for name in files if name.endswith(".mdb (deleted)")]


def test_at_exit_no_thread_is_needed_to_drop(path, monkeypatch):
    start_thread = threading.Thread.start

    def refuse(thread):
        if thread.name == "kvstore-unlink":
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start_thread(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with kvstore.open(path, "w", settings=Settings(max_bytes=3 * MIB)) as store:
        put(store, range(100))
        assert used(path) <= 3 * MIB
    with kvstore.open(path) as store:
        assert numbers_in(store)[-1] == 99


def test_a_store_that_nobody_has_any_more_closes_while_files_are_removed(path, monkeypatch):
    """Its end waits for the thread that removes them, and must not be brought about there."""
    removing, may_go_on = threading.Event(), threading.Event()
    remove = Layout.remove

    def wait(self, numbers):
        removing.set()
        assert may_go_on.wait(180)
        remove(self, numbers)

    store = kvstore.open(path, "w", **TINY)
    put(store, range(5))
    monkeypatch.setattr(Layout, "remove", wait)
    store.drop(4.0)
    assert removing.wait(180)
    ended = weakref.finalize(store, lambda: None)
    threading.Timer(0.2, may_go_on.set).start()
    del store
    assert not ended.alive
    kvstore.open(path, "w").close()


# ---- crashes between record and removal ----


def test_a_drop_cut_short_is_finished_at_the_next_opening(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "remove", lambda *_: None)
        with kvstore.open(path, "w", **TINY) as store:
            put(store, range(10))
            before = len(list(path.glob("segments/*.mdb")))
            store.drop(5.0)
            assert len(list(path.glob("segments/*.mdb"))) == before
    with kvstore.open(path) as reader:
        expected = numbers_in(reader)
    kvstore.open(path, "w").close()
    assert len(list(path.glob("segments/*.mdb"))) < before
    with kvstore.open(path) as reader:
        assert numbers_in(reader) == expected


def test_nothing_is_removed_before_the_drop_is_durable(path, monkeypatch):
    removed = []
    real = Layout.remove

    def remove(self, numbers):
        numbers = list(numbers)
        for number in numbers:
            with kvstore.open(path) as reader:
                assert number not in reader.state().sealed
        removed.extend(numbers)
        real(self, numbers)

    monkeypatch.setattr(Layout, "remove", remove)
    with kvstore.open(path, "w", **TINY) as store:
        put(store, range(10))
        store.drop(5.0)
    assert removed


def test_a_change_in_the_middle_of_a_failed_roll_is_not_lost(path, monkeypatch):
    """The next segment is there by its name already, and carries what was before."""

    def fail(folder):
        raise OSError(5, "a bad disk")

    with kvstore.open(path, "w", **TINY) as store:
        put(store, [0])
        with monkeypatch.context() as patch:
            patch.setattr(layout, "sync_folder", fail)
            put(store, [1])
            with pytest.raises(StoreError):
                store.pin(0.0, 1.0, "now")
        assert store.pin(0.0, 1.0, "later") == 1
        put(store, [2])
    with kvstore.open(path) as store:
        assert [pin.label for pin in store.pins()] == ["later"]
        assert numbers_in(store) == [0, 1, 2]


# ---- sessions ----


CRASH = """
    import os, sys
    import numpy as np
    import kvstore
    store = kvstore.open(sys.argv[1], "w", flush_interval_s=0.25)
    store.stream("s").append({"time": 1.5, "v": 1})
    store.flush()
    print(store.info().last_commit_ns, flush=True)
    store.stream("s").append({"time": 2.5, "v": 2})
    os.kill(os.getpid(), 9)
"""


def test_an_unclean_stop_is_recorded_with_the_last_durable_time(path):
    with start(CRASH, path) as child:
        durable_ns = int(child.stdout.read())
    assert child.returncode == -9
    for _ in range(2):  # once, however often it is opened
        with kvstore.open(path, "w") as store:
            (gap,) = store.gaps()
            assert (gap.kind, gap.start_ns) == ("unclean_stop", durable_ns)
            assert "within 0.25 s" in gap.detail
            assert time.time_ns() >= gap.stop_ns >= durable_ns


def test_a_closed_store_has_no_such_gap(path):
    for number in range(3):
        with kvstore.open(path, "w") as store:
            put(store, [number])
            last_commit_ns = store.info().last_commit_ns
    with kvstore.open(path) as store:
        assert store.gaps() == ()
        assert store.info().last_commit_ns == last_commit_ns  # opening and closing bring no data
        assert store.state().session.closed_ns


OPERATE = """
    import sys
    import numpy as np
    import kvstore
    first, settings = int(sys.argv[2]), kvstore.Settings(max_bytes=3 << 20)
    with kvstore.open(sys.argv[1], "w", settings=settings, segment_bytes=64 << 10) as store:
        for number in range(first, first + 10_000):
            noise = np.random.default_rng(number).random((500, 20))
            rows = np.arange(number * 500, number * 500 + 500)
            store.stream("s").append({"time": rows / 500, "row": rows, "noise": noise})
            store.flush(marks={"appended": number + 1})
            print(number + 1, flush=True)
            if number % 5 == 0:
                pin = store.pin(float(number), float(number), "now")
            elif number % 5 == 3:
                store.unpin(pin)
                store.drop(float(number - 20))
"""


def kill_operators(path, kills):
    """Kill a writer that pins, unpins and drops; what it said to be durable must be there."""
    rng = np.random.default_rng(SEED)
    durable = 0
    for _ in range(kills):
        with start(OPERATE, path, durable) as child:
            durable = int(child.stdout.readline())
            time.sleep(rng.random() * 0.3)
            child.kill()
            durable = max([durable, *(int(line) for line in child.stdout if line.endswith("\n"))])
        with kvstore.open(path, "w") as store:
            assert store.marks["appended"] >= durable
            durable = store.marks["appended"]
            found = numbers_in(store)
            assert found == sorted(found)
            assert found[-10:] == list(range(durable - len(found[-10:]), durable))
            assert dropped_rows(store) + len(store["s"]) == durable * ROWS
            now = store.state()
            assert set(Layout(path).numbers()) == {*now.sealed, now.number}
            assert [gap for gap in store.gaps() if gap.kind == "unclean_stop"]
            for pin in store.pins():
                store.unpin(pin.pin_id)


@pytest.mark.slow
def test_killed_in_the_middle_of_drops_and_pins(path):
    kill_operators(path, 4)


@pytest.mark.slow
def test_killed_often_in_the_middle_of_drops_and_pins(path):
    kill_operators(path, 25)


# ---- asked by other processes ----


WRITER = """
    import sys, time
    import numpy as np
    import kvstore
    with kvstore.open(sys.argv[1], "w", segment_bytes=64 << 10) as store:
        for number in range(10):
            noise = np.random.default_rng(number).random((500, 20))
            rows = np.arange(number * 500, number * 500 + 500)
            store.stream("s").append({"time": rows / 500, "row": rows, "noise": noise})
            store.flush()
        print("ready", flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
def test_others_can_set_pin_drop_and_unpin_while_a_process_writes(path):
    with start(WRITER, path, stdin=subprocess.PIPE) as child:
        assert child.stdout.readline() == "ready\n"
        assert kvstore.configure(path, max_bytes=9 * MIB).max_bytes == 9 * MIB
        pin = kvstore.pin(path, 2.5, 2.5, "door")
        done = kvstore.drop(path, 5.0)
        assert done["segments"] >= 2
        with pytest.raises(StoreError, match="no pin 77: there are 1"):
            kvstore.unpin(path, 77)
        with kvstore.open(path) as reader:
            assert reader.settings.max_bytes == 9 * MIB
            assert reader.pins()[0].label == "door"
            assert set(numbers_in(reader)) >= {2, 5, 6, 7, 8, 9}
            assert 1 not in numbers_in(reader)
        kvstore.unpin(path, pin)
        assert list((path / "requests").iterdir()) == []
        child.stdin.close()
    assert child.returncode == 0


def test_the_same_without_a_writer(path):
    with kvstore.open(path, "w", **TINY) as store:
        put(store, range(10))
    pin = kvstore.pin(path, 2.5, 2.5, "door")
    kvstore.drop(path, 5.0)
    kvstore.unpin(path, pin)
    assert kvstore.configure(path, max_age_s=7.0).max_age_s == 7.0
    assert not (path / "requests").exists()
    with kvstore.open(path) as reader:
        assert 1 not in numbers_in(reader)


def test_a_request_outlives_both_processes_and_is_done_once(path):
    with kvstore.open(path, "w", **TINY) as store:
        put(store, range(3))
    asked = {"start_ns": 0, "stop_ns": 10**9, "label": "door"}
    posted = requests.post(Layout(path), "pin", asked)
    kept = posted.read_bytes()
    kvstore.open(path, "w").close()
    assert requests.claim(posted) == (False, {"pin_id": 1, "pinned_segments": 2})
    posted.write_bytes(kept)  # as a crash between commit and reply would leave it
    kvstore.open(path, "w").close()
    assert requests.claim(posted)[1]["pin_id"] == 1
    with kvstore.open(path) as store:
        assert len(store.pins()) == 1


@pytest.mark.parametrize("hostile", [b"", b"\x00" * 100, b"garbage", b"x" * (1 << 17), "link"])
def test_what_is_no_request_is_answered_and_does_no_harm(path, hostile):
    kvstore.open(path, "w").close()
    folder = path / "requests"
    folder.mkdir()
    file = folder / "1.request"
    if hostile == "link":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(hostile)
    with kvstore.open(path, "w") as store:
        put(store, range(2))
    is_error, text = requests.claim(file)
    assert is_error
    assert "request 1" in text
    assert not file.exists()


@pytest.mark.parametrize(
    ("what", "arguments"),
    [("rm", {}), ("set", {"max_bytes": 1}), ("set", {"color": 1}), ("pin", {}), ("unpin", {"x": 1}),
     ("pin", {"start_ns": 2, "stop_ns": 1}), ("set", {"max_age_s": float("nan")}),
     ("set", {"when_full": "explode"}), ("set", {"max_bytes": "many"}),
     ("set", {"max_age_s": 1e300}), ("set", {"max_bytes": float("nan")}),
     ("set", {"max_bytes": float("inf")}), ("set", {"min_free_bytes": 1 << 70}),
     ("pin", {"start_ns": "a", "stop_ns": "b"}), ("pin", {"start_ns": 0, "stop_ns": 1 << 64}),
     ("pin", {"start_ns": 0.0, "stop_ns": 1.0}), ("unpin", {"pin_id": 1.0}),
     ("drop", {"before_ns": "now"})],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(path, what, arguments):
    with kvstore.open(path, "w") as store:
        store.pin(0, 1, unit="ns")
        before = store.state()
        with pytest.raises(StoreError):
            store.writer().perform(what, arguments)
        put(store, [0])
        assert store.settings == before.settings
        assert store.state().pins == before.pins


@pytest.mark.parametrize("odd", [{"max_bytes": 10**30}, {"color": 1}, {"max_age_s": -1.0}])
def test_an_odd_setting_is_not_even_asked_for(path, odd):
    with kvstore.open(path, "w"), pytest.raises(StoreError, match=next(iter(odd))):
        kvstore.configure(path, **odd)
    assert not (path / "requests").exists()


def test_bytes_may_be_given_as_a_float(path):
    with kvstore.open(path, "w", settings=Settings(max_bytes=5e9), **TINY) as store:
        assert repr(store.set(max_bytes=4e9).max_bytes) == "4000000000"
        put(store, range(3))
        assert numbers_in(store) == [0, 1, 2]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_no_request(path, make):
    """The writer neither waits for a FIFO nor stumbles over a folder."""
    with kvstore.open(path, "w") as store:
        (path / "requests").mkdir()
        make(path / "requests" / "1.request")
        posted = requests.post(Layout(path), "set", {"max_age_s": 7.0})
        deadline = time.monotonic() + 120
        while not (answer := requests.claim(posted)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not answer[0]
        put(store, [0])
    assert [file.name for file in (path / "requests").iterdir()] == ["1.request"]


def test_many_requests_are_carried_out_a_few_at_a_time(path):
    kvstore.open(path, "w").close()
    for _ in range(requests.AT_ONCE_MAX + 5):
        requests.post(Layout(path), "unpin", {"pin_id": 1})
    kvstore.open(path, "w").close()
    left = [file.suffix for file in (path / "requests").iterdir()]
    assert left.count(".request") == 5
    assert left.count(".reply") == requests.AT_ONCE_MAX


def test_bad_settings_make_no_store(path):
    with pytest.raises(StoreError, match="max_bytes=5"):
        kvstore.open(path, "w", settings=Settings(max_bytes=5))
    assert not path.exists()


# ---- the command line ----


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kvstore", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=180,
    )  # fmt: skip


def test_the_commands(path):
    with kvstore.open(path, "w", **TINY) as store:
        put(store, range(10))
    done = command("set", path, "--max-bytes", "80MB", "--max-age", "7d", "--json")
    assert json.loads(done.stdout) | {"max_bytes": 80_000_000, "max_age_s": 604800.0} == json.loads(
        done.stdout
    )
    assert "max_age_s\tnone" in command("set", path, "--max-age", "none").stdout
    pin = command("pin", path, "--start", "2.5", "--stop", "2.5", "--label", "door opened")
    assert pin.stdout == "1\n"
    done = command("drop", path, "--before", "1970-01-01T00:00:05")
    assert done.stdout == ""
    assert "Dropped" in done.stderr
    assert "pinned: door opened" in done.stderr
    gaps = command("gaps", path).stdout.split("\t")
    assert gaps[2:4] == ["dropped", "s"]
    (gap,) = json.loads(command("gaps", path, "--json").stdout)
    assert gap["rows"] == int(gaps[4]) > 0
    assert command("unpin", path, "1").returncode == 0
    assert command("unpin", path, "1").returncode == 1
    assert command("pin", path).returncode == 2
    assert command("set", path, "--max-bytes", "lots").returncode == 2
    assert command("set", path.with_name("none.kv"), "--max-age", "1d").returncode == 1
    assert not path.with_name("none.kv").exists()


# ---- the decisions, without a disk ----


def state_of(sizes):
    state = State(b"", len(sizes) + 1, 0)
    for number, size in enumerate(sizes, start=1):
        state.sealed[number] = Sealed(number, size, number, {}, number)
    return state


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5 * MIB), max_size=12),
    limit=st.integers(2 * MIB, 30 * MIB),
    needed=st.integers(0, 5 * MIB),
    stop=st.booleans(),
)
def test_a_plan_drops_from_the_oldest_no_more_than_it_takes(sizes, limit, needed, stop):
    state = state_of(sizes)
    state.settings = Settings(max_bytes=limit, when_full="stop" if stop else "")
    plan = retention.plan(state, retention.Sizes(0, needed, 0, 0))
    assert list(plan.drop) == list(range(1, len(plan.drop) + 1))
    left = sum(sizes[len(plan.drop) :]) + needed
    beside = retention._BESIDE_BYTES
    if not plan.missing:
        assert left <= limit - beside
    elif stop:
        assert sum(sizes) + needed > limit - beside
    else:
        assert plan.drop == ()  # it would be for nothing
        assert needed > limit - beside
    if stop:
        assert plan.drop == ()
    elif plan.drop:  # the last one had to go
        early = (limit - beside) - (limit - beside) // 16
        assert left + sizes[len(plan.drop) - 1] > early


@settings(max_examples=200, deadline=None)
@given(
    pins=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=6),
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=6),
)
def test_what_a_pin_touches_is_pinned(pins, spans):
    """Both ends included; the quick way for many says what the plain one says."""
    state = state_of([1] * len(spans))
    schema = Schema.infer({"time": np.int64(1), "v": 1}, "")
    state.streams["s"] = StreamInfo(1, "s", schema, (2,))
    for number, (first, length) in enumerate(spans, start=1):
        totals = {1: Totals(1, 1, 1, 1, first, first + length, 1)}
        state.sealed[number] = state.sealed[number]._replace(totals=totals)
    for number, (first, length) in enumerate(pins):
        state.pins[number] = Pin(number, first, first + length, "", 0)
    free = [sealed.number for sealed in retention.unpinned(state)]
    expected = [
        number
        for number, (first, length) in enumerate(spans, start=1)
        if not any(a <= first + length and first <= a + more for a, more in pins)
    ]
    assert free == expected
    assert free == [s.number for s in state.sealed.values() if not retention.pinned_by(state, s)]


def test_room_counts_once_the_files_are_removed():
    state = state_of([MIB])
    for limits in (Settings(min_free_bytes=4 * MIB), Settings(max_bytes=7 * MIB)):
        state.settings = limits
        assert retention.is_within(state, retention.Sizes(0, MIB, 0, 5 * MIB))
        assert not retention.is_within(state, retention.Sizes(0, MIB, 5 * MIB, 4 * MIB))


def test_both_limits_of_size_are_kept_at_once():
    state = state_of([MIB] * 6)
    state.settings = Settings(max_bytes=6 * MIB, min_free_bytes=4 * MIB)
    plan = retention.plan(state, retention.Sizes(0, 0, 0, MIB))
    assert plan == retention.Plan((1, 2, 3, 4))  # and a sixteenth early


def test_segment_sizes_suit_the_limit():
    def size(settings, wanted):
        return retention.segment_bytes(settings, wanted, 4 << 30)

    assert size(Settings(), None) == 2 << 30
    assert size(Settings(min_free_bytes=1 << 30), None) == 256 << 20  # of a small disk a sixteenth
    assert size(Settings(when_full="drop-oldest"), None) == 256 << 20
    assert size(Settings(min_free_bytes=1 << 30, when_full="stop"), None) == 2 << 30
    assert size(Settings(max_bytes=800 * 10**9), None) == 2 << 30
    assert size(Settings(max_bytes=16 << 30), None) == 1 << 30
    assert size(Settings(max_bytes=512 << 20), None) == 64 << 20
    assert size(Settings(max_bytes=64 << 20), None) == 16 << 20
    assert size(Settings(max_bytes=64 << 20), 1 << 30) == 16 << 20
    assert size(Settings(max_bytes=64 << 20), 1 << 20) == 1 << 20
    assert size(Settings(), 1 << 20) == 1 << 20


def test_age_is_that_of_the_store_s_own_clock():
    state = state_of([1, 1, 1])
    state = replace(state, settings=Settings(max_age_s=1.0))
    assert retention.aged(state, 10**9 + 2) == [1]
    assert retention.aged(state, 10**9 + 1) == []
