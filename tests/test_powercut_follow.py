"""A power cut takes back nothing that a follower has: no sequence is given to other rows.

Recorded are sessions of writers whose last commit is visible and on no disk, as a kill -9 in
the middle of a commit may leave it, each followed before the next writer begins; then a writer
that rolls and, in a thread, its follower. What was delivered is marked; every batch carries its
number, which is its sequence, so a store that holds fewer than were delivered gives a sequence
twice.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest
from powercut import checker, disk, recorder

import kvstore
from kvstore.environment import Environment

BATCHES = 40
SESSIONS = 7  # of writers that leave a commit which is not durable
STATES = 40
OPTIONS = {"segment_bytes": 1 << 17, "flush_interval_s": None}


def append(store: kvstore.Store, number: int) -> None:
    noise = np.random.default_rng(number).integers(0, 1 << 60, (20, 60))
    store.stream("s").append({"time": np.full(20, 0.5), "n": np.full(20, number), "noise": noise})
    store.flush()


def write_and_follow(root: Path, *, sessions_only: bool) -> None:
    path = root / "run.kv"
    with kvstore.open(path, "w", segment_bytes=1 << 30) as store:  # the sessions never roll:
        append(store, 0)  # that comes after a commit that is durable
    for number in range(1, SESSIONS):
        follow_a_commit_that_is_not_durable(path, number)
    if sessions_only:
        return
    with kvstore.open(path, "w", **OPTIONS) as store:
        begin = kvstore.Cursor(store_id(path), "s", SESSIONS)
        follower = threading.Thread(target=deliver, args=(path, begin, BATCHES))
        follower.start()
        for number in range(SESSIONS, BATCHES):
            append(store, number)
        follower.join()


def deliver(path: Path, begin: kvstore.Cursor, count: int) -> None:
    """Follow until so many were delivered in all; mark each."""
    with kvstore.open(path) as store:
        for cursor, batch in store["s"].follow(begin):
            if batch["n"][0] != cursor.sequence - 1:
                raise AssertionError(f"{batch['n'][0]} delivered as {cursor.sequence - 1}")
            recorder.mark(str(cursor.sequence))
            if cursor.sequence == count:
                return


def follow_a_commit_that_is_not_durable(path: Path, number: int) -> None:
    opened = lmdb.open
    lmdb.open = lambda *args, **options: opened(*args, **{**options, "metasync": False})
    try:
        with kvstore.open(path, "w", segment_bytes=1 << 30) as store:
            append(store, number)
            deliver(path, kvstore.Cursor(store_id(path), "s", number), number + 1)
    finally:
        lmdb.open = opened


def store_id(path: Path) -> str:
    with kvstore.open(path) as store:
        return store.info().store_id


def check_delivered(folder: Path, state: disk.State) -> str:
    """All that was delivered is there, under its sequence; and the next writer goes on behind."""
    path = folder / "run.kv"
    delivered = int(state.promised[-1]) if state.promised else 0
    try:
        found = numbers_in(path)
    except kvstore.StoreNotFound:
        if delivered:
            raise
        return "no store"
    if found != list(range(len(found))) or len(found) < delivered:
        raise AssertionError(f"{len(found)} batches, {delivered} were delivered: {found}")
    with kvstore.open(path, "w", **OPTIONS) as store:
        append(store, len(found))
    if numbers_in(path) != list(range(len(found) + 1)):
        raise AssertionError("the next batch has not the next sequence")
    return "delivered" if len(found) == delivered else "more"


def numbers_in(path: Path) -> list[int]:
    """The batches' numbers, by sequence."""
    idle: list[float] = []
    with kvstore.open(path) as store:
        if "s" not in store:
            return []
        follower = store["s"].follow(stop=lambda: bool(idle), sleep=idle.append)
        return [int(each.batch["n"][0]) for each in follower]


def test_what_was_delivered_survives_a_power_cut(record):
    report = checker.check_log(record("nothing"), check_delivered, count=STATES, seed=1)
    assert not report.failures, report
    assert set(report.met) == {"no store", "delivered", "more"}


@pytest.mark.slow
def test_what_was_delivered_survives_many_power_cuts(record):
    report = checker.check_log(record("nothing"), check_delivered, count=300, seed=2)
    assert not report.failures, report


@pytest.mark.slow
def test_a_follower_that_does_not_wait_for_the_disk_is_caught(record):
    assert checker.is_caught(record("waiting"), check_delivered, count=STATES)


if __name__ == "__main__":
    broken = sys.argv[2] == "waiting"
    if broken:
        Environment.wait_until_durable = lambda _, commit: None
    write_and_follow(Path(sys.argv[1]), sessions_only=broken)
