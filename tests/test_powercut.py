"""A power cut at any moment leaves every row that was reported durable (DESIGN.md section 5).

One run of a writer is recorded: creating a store, two sessions on it, many rolls. The harness
(tests/powercut) rebuilds what a disk may hold after a cut at any point of it, and each such disk
is opened in a process of its own. The same check must fail where LMDB, or the store, does not sync.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numcodecs.blosc
import numpy as np
import pytest
from powercut import checker, disk, recorder

import kvstore
from kvstore import libc

SEGMENT_BYTES = 1 << 16  # a roll every few commits
APPENDS = 60  # in each session
STREAMS = ("particles", "readings", "log")
NEW_FIELD_AT = 75  # append that first has one more field
STATES = 520
WRITTEN_TO_SHARE = 3  # one state in so many is also opened for writing


# ---- the recorded program, and what it promises ------------------------------------------------


@functools.cache  # by each worker once, not for every state
def appended(number: int) -> tuple[str, dict[str, Any]]:
    """The stream and the rows of an append; all rows carry its number."""
    rng = np.random.default_rng(number)
    name = STREAMS[number % len(STREAMS)]
    rows = int(rng.integers(1, 8))
    batch: dict[str, Any] = {"number": np.full(rows, number)}
    if name == "particles":
        batch["timestamps"] = number + np.arange(rows) / 16
        batch["spectral"] = rng.integers(-(2**31), 2**31, (rows, 32, 16), dtype=np.int32)
    elif name == "readings":
        batch["time"] = np.datetime64("2026-01-01", "ns") + 1000 * number + np.arange(rows)
        batch["level"] = rng.random((rows, 8)).astype(np.float32)
    else:
        batch["timestamp"] = number * 1000 + np.arange(rows)
        batch["text"] = [f"entry {number}.{row}" * int(rng.integers(9)) for row in range(rows)]
    if number >= NEW_FIELD_AT and name == "readings":
        batch["extra"] = rng.random(rows)
    return name, batch


def write_store(root: Path) -> None:
    """Two sessions; after each flush, a mark in the log says how many appends are durable."""
    path = root / "run.kv"
    libc.APPEND_BYTES_MIN = 1  # as commits of megabytes are written
    leave_an_interrupted_creation(path)
    with kvstore.open(path, mode="w", segment_bytes=SEGMENT_BYTES) as store:
        recorder.mark("0")
        for number in range(APPENDS):  # commits by time and by size come in between
            name, batch = appended(number)
            store.stream(name).append(batch, marks={"appends": number + 1})
            if number % 5 == 4:
                store.flush()
                recorder.mark(str(number + 1))
    recorder.mark(str(APPENDS))
    leave_an_interrupted_roll(path)
    with kvstore.open(path, "w", segment_bytes=SEGMENT_BYTES, flush_interval_s=None) as store:
        for number in range(APPENDS, 2 * APPENDS):
            name, batch = appended(number)
            if "extra" in batch and "extra" not in field_names(store):
                store[name].add_fields(kvstore.Field("extra", "float64"))
            store.stream(name).append(batch)
            if number % 3 == 2:
                store.flush(marks={"appends": number + 1})
                recorder.mark(str(number + 1))


def leave_an_interrupted_creation(path: Path) -> None:
    """All but the identity file, and beside it what an earlier power cut may have left."""
    synced = os.fsync
    replace_sync_of("/store.msgpack.tmp", instead=fail)
    with contextlib.suppress(kvstore.StoreError):
        kvstore.open(path, mode="w", segment_bytes=SEGMENT_BYTES).close()
        raise AssertionError("the creation was to fail")
    os.fsync = synced
    (path / "segments/00000001.tmp").write_bytes(bytes(8192))


def fail() -> None:
    raise OSError(errno.EIO, "a bad disk")


def leave_an_interrupted_roll(path: Path) -> None:
    last = max((path / "segments").glob("*.mdb"))
    last.with_name(f"{int(last.stem) + 1:08d}.tmp").write_bytes(b"half a segment" * 999)
    last.with_name("00000001.mdb-lock").write_bytes(b"")


def check_store(folder: Path, state: disk.State) -> str:
    """Everything promised is there, as a prefix of whole appends; and writing can go on."""
    path = folder / "run.kv"
    try:
        with kvstore.open(path) as store:
            count = appends_in(store)
    except kvstore.StoreNotFound:
        if state.promised:
            raise
        write_on(path, 0)
        return "no store"
    promised = int(state.promised[-1]) if state.promised else 0
    if count < promised:
        raise AssertionError(f"{count} appends, and {promised} were promised")
    if state.point % WRITTEN_TO_SHARE == 0:
        write_on(path, count)
    return "all that was promised" if count == promised else "more than was promised"


def write_on(path: Path, count: int) -> None:
    """The next append, by a new writer."""
    with kvstore.open(path, mode="w", segment_bytes=SEGMENT_BYTES) as store:
        name, batch = appended(count)
        if "extra" in batch and "extra" not in field_names(store):
            store[name].add_fields(kvstore.Field("extra", "float64"))
        store.stream(name).append(batch, marks={"appends": count + 1})
    with kvstore.open(path) as store:
        if (found := appends_in(store)) != count + 1:
            raise AssertionError(f"{found} appends after one more than {count}")


def field_names(store: kvstore.Store) -> list[str]:
    return [field.name for field in store["readings"].schema.fields]


def appends_in(store: kvstore.Store) -> int:
    """How many appends the store holds; raises unless they are the first ones, whole and equal."""
    count = int(store.marks.get("appends", 0))
    expected = [appended(number) for number in range(count)]
    for name in STREAMS:
        batches = [batch for stream, batch in expected if stream == name]
        rows = sum(len(batch["number"]) for batch in batches)
        found = list(store[name].read(ordered=True)) if name in store else []
        counts = (len(store[name]), store[name].count()) if name in store else (0, 0)
        if counts != (rows, rows):
            raise AssertionError(f"{name}: counts {counts} where {count} appends give {rows}")
        require_equal(name, found, batches)
    return count


def warm_up() -> None:
    """What each of a thousand children would do anew: Blosc's semaphore, what to expect."""
    numcodecs.blosc.compress(bytes(64), b"lz4", 5, 1, 0)
    for number in range(2 * APPENDS + 1):
        appended(number)


def require_equal(name: str, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    fields = {field for batch in found + expected for field in batch}
    for field in sorted(fields):
        got = np.concatenate([batch[field] for batch in found]) if found else np.empty(0)
        want = np.concatenate([np.asarray(column_of(batch, field)) for batch in expected])
        same = got.tolist() == want.tolist() if field == "text" else got.tobytes() == want.tobytes()
        if not same:
            raise AssertionError(f"{name}.{field}: {len(got)} rows where {len(want)} belong")


def column_of(batch: dict[str, Any], field: str) -> Any:
    """A field of an expected batch; the later one reads as NaN in the earlier batches."""
    return batch[field] if field in batch else np.full(len(batch["number"]), np.nan)


# ---- the guards, and how to take each away -----------------------------------------------------


def open_lmdb_with(**broken: bool) -> None:
    opened = lmdb.open
    lmdb.open = lambda *args, **options: opened(*args, **{**options, **broken})


def replace_sync_of(name: str, instead: Callable[[], object] = int) -> None:
    """Of the folder or file whose path ends so; by default with doing nothing."""
    synced = os.fsync

    def fsync(fd: int) -> None:
        if str(Path(f"/proc/self/fd/{fd}").readlink()).endswith(name):
            instead()
        else:
            synced(fd)

    os.fsync = fsync


GUARDS = {
    "LMDB's sync": lambda: open_lmdb_with(sync=False),
    "LMDB's metasync": lambda: open_lmdb_with(metasync=False),
    "sync of the folder of segments": lambda: replace_sync_of("/segments"),
    "sync of the store's folder": lambda: replace_sync_of("/run.kv"),
    "sync of the folder above": lambda: replace_sync_of("/root"),
    "sync of the identity": lambda: replace_sync_of("/store.msgpack.tmp"),
}


# ---- the claims --------------------------------------------------------------------------------


def test_every_promise_survives_a_power_cut(record):
    log = record("nothing")
    rolls = [event for event in recorder.load(log) if event.other.endswith(".mdb")]
    assert len(rolls) > 5
    report = checker.check_log(log, check_store, count=STATES, seed=1, warm_up=warm_up)
    assert not report.failures, report
    assert report.count >= 500
    assert set(report.met) == {"no store", "all that was promised", "more than was promised"}


@pytest.mark.slow
def test_every_promise_survives_many_power_cuts(record):
    report = checker.check_log(record("nothing"), check_store, count=1000, seed=2, warm_up=warm_up)
    assert not report.failures, report


@pytest.mark.slow
@pytest.mark.parametrize("broken", GUARDS)
def test_a_store_without_one_of_its_syncs_is_caught(record, broken):
    assert checker.is_caught(record(broken), check_store, count=60, warm_up=warm_up)


@pytest.mark.slow
def test_a_disk_that_lies_is_caught(record):
    log_path = record("nothing", lying=True)
    assert checker.is_caught(log_path, check_store, count=60, warm_up=warm_up)


if __name__ == "__main__":
    if sys.argv[2] in GUARDS:
        GUARDS[sys.argv[2]]()
    write_store(Path(sys.argv[1]))
