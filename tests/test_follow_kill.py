"""kill -9 of writers and of followers, at random moments: nothing lost, no sequence given twice.

Each writer marks its batches with its own number, so that a batch written again after its
sequence was delivered would be seen. The follower keeps its cursor in a file.
"""

from __future__ import annotations

import os
import random
import time

import pytest
from stores import ROOT, SEED, start

import kvstore

ROUNDS = int(os.environ.get("KVSTORE_KILLS", "15"))

WRITER = """
    import sys, time
    import numpy as np
    import kvstore
    path, mine = sys.argv[2], int(sys.argv[3])
    noise = np.random.default_rng(mine).integers(0, 2**62, (200, 10))
    with kvstore.open(path, "w", segment_bytes=64 << 10, flush_interval_s=0.002) as store:
        print("open", flush=True)
        while True:
            store.stream("s").append({"time": np.full(200, float(mine)), "noise": noise})
            time.sleep(0.0005)  # else most of the test is reading a GB that is like any other
"""
FOLLOWER = """
    import sys
    from pathlib import Path
    import kvstore
    kept = kvstore.CursorFile(Path(sys.argv[3]))
    with kvstore.open(sys.argv[2]) as store:
        print("open", flush=True)
        for cursor, batch in store["s"].follow(kept.cursor or "start"):
            assert len(set(batch["time"])) == 1, "parts of two writers' batches"
            print(cursor.sequence - 1, int(batch["time"][0]), flush=True)
            kept.note(cursor)
"""


def lines_of(child):
    """(sequence, writer) of what a killed follower said, whole lines only."""
    lines = [line.split() for line in child.stdout.readlines() if line.endswith("\n")]
    return [tuple(map(int, line)) for line in lines if len(line) == 2]


def killed_in_turns(path, kept, rounds, seed):
    """What all followers were given, by sequence."""
    chance, given, next_one = random.Random(seed), {}, 0
    kvstore.open(path, "w").close()
    for turn in range(rounds):
        with start(WRITER, ROOT, path, turn) as writer:
            assert writer.stdout.readline() == "open\n"
            with kvstore.open(path) as store:
                while "s" not in store or not len(store["s"]):
                    time.sleep(0.01)
            with start(FOLLOWER, ROOT, path, kept) as follower:
                assert follower.stdout.readline() == "open\n"
                one = follower.stdout.readline()
                time.sleep(chance.random() * 0.3)
                first, second = chance.sample([writer, follower], 2)
                first.kill()
                time.sleep(chance.random() * 0.1)
                second.kill()
                seen = [tuple(map(int, one.split())), *lines_of(follower)]
        for sequence, number in seen:
            assert sequence <= next_one, "lost"
            next_one = max(next_one, sequence + 1)
            assert given.setdefault(sequence, number) == number, "a sequence was given twice"
    return given


def check(path, kept, rounds):
    seed = SEED
    given = killed_in_turns(path, kept, rounds, seed)
    with kvstore.open(path, "w") as store:
        kept_cursor = kvstore.CursorFile(kept).cursor
        begin = kept_cursor.sequence if kept_cursor else 0
        assert begin <= len(given), f"seed {seed}: the cursor is ahead of what was handed over"
        idle = []
        every = store["s"].follow(stop=lambda: bool(idle), sleep=idle.append)  # GB, if kept
        stored = {each.cursor.sequence - 1: int(each.batch["time"][0]) for each in every}
        assert given.items() <= stored.items(), f"seed {seed}: what was delivered is not there"
        assert sorted(stored) == list(range(len(stored)))
        assert len(given) > 1


@pytest.mark.slow
def test_kills_of_writer_and_follower_lose_nothing(path, tmp_path):
    check(path, tmp_path / "cursor", ROUNDS)
