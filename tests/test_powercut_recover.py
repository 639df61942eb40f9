"""A power cut at any moment of a recovery leaves no new store, or the whole of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from powercut import checker, disk, recorder
from test_damage import flip
from test_powercut import open_lmdb_with, replace_sync_of

import kvstore
from kvstore import recover, verify

BATCHES = 20
ROWS = 20
STATES = 60
GUARDS = {
    "LMDB's sync": lambda: open_lmdb_with(sync=False),
    "sync of the folder of segments": lambda: replace_sync_of("/segments"),
    "sync of the folder above": lambda: replace_sync_of("/root"),
}


def make_broken(source: Path) -> None:
    with kvstore.open(source, "w", segment_bytes=1 << 17) as store:
        for number in range(BATCHES):
            x = np.random.default_rng(number).integers(0, 1 << 60, (ROWS, 200))
            store.stream("s").append({"time": np.full(ROWS, float(number)), "x": x})
            store.flush(marks={"batches": number + 1})
    flip(source / "store.msgpack", 9)
    flip(min((source / "segments").glob("*.mdb")), 10)


def recover_it(root: Path) -> None:
    make_broken(root.parent / "broken.kv")
    report = recover(root.parent / "broken.kv", root / "new.kv")
    recorder.mark(str(report.rows))


def check_recovered(folder: Path, state: disk.State) -> str:
    """Nothing, or everything; and nothing that stands in the way of another recovery."""
    try:
        with kvstore.open(folder / "new.kv") as store:
            found = [time for batch in store["s"].read() for time in batch["time"][::ROWS]]
            marks = store.marks
    except kvstore.StoreNotFound:
        if state.promised or (folder / "new.kv").exists():
            raise
        return "no store"
    if found != [float(number) for number in range(BATCHES)] or marks != {"batches": BATCHES}:
        raise AssertionError(f"{len(found)} batches, {marks}")
    if damages := verify(folder / "new.kv").damages:
        raise AssertionError(f"damage: {damages}")
    return "all of it"


def test_a_recovery_survives_a_power_cut(record):
    report = checker.check_log(record("nothing"), check_recovered, count=STATES, seed=1)
    assert not report.failures, report
    assert set(report.met) == {"no store", "all of it"}


@pytest.mark.slow
@pytest.mark.parametrize("broken", GUARDS)
def test_a_recovery_without_one_of_its_syncs_is_caught(record, broken):
    assert checker.is_caught(record(broken), check_recovered, count=STATES)


if __name__ == "__main__":
    if sys.argv[2] in GUARDS:
        GUARDS[sys.argv[2]]()
    recover_it(Path(sys.argv[1]))
