"""Power cuts while segments are dropped and time ranges pinned.

As in test_powercut.py: a recorded run is rebuilt into states that a power cut may leave. In each,
what was appended is still there or was dropped by a drop that had been asked for by then; pinned
rows stay; and what is left of a drop is finished by the next writer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from powercut import checker, disk, recorder
from test_powercut import warm_up

import kvstore
from kvstore.active import Active
from kvstore.layout import Layout

SEGMENT_BYTES = 64 << 10
APPENDS = 60
PINNED = (6.0, 9.0)
DROP_EVERY, KEPT = 12, 16
STATES = 48


def batch(number: int) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(number).integers(0, 2**62, (20, 80))
    return {"time": np.full(20, float(number)), "number": np.full(20, number), "noise": noise}


def drops() -> Iterator[tuple[int, float]]:
    """(after how many appends, everything before which time)."""
    for number in range(DROP_EVERY, APPENDS + 1, DROP_EVERY):
        if number > KEPT:
            yield number, float(number - KEPT)


def write_store(root: Path) -> None:
    """Two sessions of appends, with a pin at first, and drops in between."""
    due = dict(drops())
    for session in (range(APPENDS // 2), range(APPENDS // 2, APPENDS)):
        with kvstore.open(root / "run.kv", "w", segment_bytes=SEGMENT_BYTES) as store:
            if session.start == 0:
                store.pin(*PINNED, "door")
            for number in session:
                store.stream("s").append(batch(number), marks={"appends": number + 1})
                store.flush()
                if number + 1 in due:
                    store.drop(due[number + 1])
                recorder.mark(str(number + 1))


def check_store(folder: Path, state: disk.State) -> str:
    path = folder / "run.kv"
    try:
        with kvstore.open(path) as store:
            count, dropped = check_rows(store)
    except kvstore.StoreNotFound:
        if state.promised:
            raise
        return "no store"
    promised = int(state.promised[-1]) if state.promised else 0
    if count < promised:
        raise AssertionError(f"{count} appends, and {promised} were promised")
    with kvstore.open(path, "w", segment_bytes=SEGMENT_BYTES) as store:
        store.stream("s").append(batch(count), marks={"appends": count + 1})
        store.flush()
        if check_rows(store) != (count + 1, dropped):
            raise AssertionError("writing on changed what is there")
        now = store.state()
        if set(Layout(path).numbers()) != {*now.sealed, now.number}:
            raise AssertionError(f"{Layout(path).numbers()}, known are {sorted(now.sealed)}")
    return "with drops" if dropped else "without drops"


def check_rows(store: kvstore.Store) -> tuple[int, int]:
    """Appends made, and batches dropped."""
    count = int(store.marks.get("appends", 0))
    if not count:
        return 0, 0
    found = []
    for each in store["s"].read(ordered=True):
        for begin in range(0, len(each["number"]), 20):
            found.append(int(each["number"][begin]))
            whole = batch(found[-1])
            if any(each[f][begin : begin + 20].tobytes() != whole[f].tobytes() for f in whole):
                raise AssertionError(f"batch {found[-1]} is not what was appended")
    before = max((before for number, before in drops() if number <= count + 1), default=0.0)
    must = {n for n in range(count) if n >= before or PINNED[0] <= n <= PINNED[1]}
    missing = set(range(count)) - set(found)
    if missing & must or found != sorted(set(found)):
        raise AssertionError(f"of {count} appends there are {found}")
    gone = sum(gap.rows for gap in store.gaps() if gap.kind == "dropped")
    if gone != 20 * len(missing):
        raise AssertionError(f"{len(missing)} batches are missing, dropped are {gone} rows")
    return count, len(missing)


def unlink_first() -> None:
    dropped = Active.drop

    def drop(self: Active, numbers: list[int]) -> None:
        self.layout.remove(numbers)
        dropped(self, numbers)

    Active.drop = drop


def test_drops_and_pins_survive_power_cuts(record):
    report = checker.check_log(
        record("nothing"), check_store, count=STATES, seed=1, warm_up=warm_up
    )
    assert not report.failures, report
    assert set(report.met) == {"no store", "with drops", "without drops"}


@pytest.mark.slow
def test_a_drop_that_is_removed_before_it_is_recorded_is_caught(record):
    assert checker.is_caught(record("order"), check_store, count=STATES // 2, warm_up=warm_up)


@pytest.mark.slow
def test_drops_and_pins_survive_many_power_cuts(record):
    report = checker.check_log(record("nothing"), check_store, count=300, seed=2, warm_up=warm_up)
    assert not report.failures, report


if __name__ == "__main__":
    if sys.argv[2] == "order":
        unlink_first()
    write_store(Path(sys.argv[1]))
