"""A power cut at any moment of a backup leaves the earlier one, a later one, or none at first."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from powercut import checker, disk, recorder
from test_powercut import replace_sync_of

import kvstore
from kvstore.backup import backup
from kvstore.verify import verify

ROUNDS = 4
BATCHES = 9  # in each round
STATES = 48
GUARDS = ("/segments", ".copying", "/backup.kv", "/root")


def grow(source: Path, round_: int) -> None:
    with kvstore.open(source, "w", segment_bytes=1 << 17) as store:
        for number in range(round_ * BATCHES, (round_ + 1) * BATCHES):
            x = np.random.default_rng(number).integers(0, 1 << 60, (20, 200))
            store.stream("s").append({"time": np.full(20, float(number)), "x": x})
            store.flush()


def make_backups(root: Path) -> None:
    source = root.parent / "source.kv"
    for round_ in range(ROUNDS):
        grow(source, round_)
        backup(source, root / "backup.kv")
        recorder.mark(str((round_ + 1) * BATCHES))


def check_backup(folder: Path, state: disk.State) -> str:
    """All that a backup said it holds, sound, as a prefix of the batches; or not yet a store."""
    promised = int(state.promised[-1]) if state.promised else 0
    path = folder / "backup.kv"
    try:
        with kvstore.open(path) as store:
            found = [batch["time"][0] for batch in store["s"].read()]
    except kvstore.StoreNotFound:
        if promised:
            raise
        return "no store"
    if found != [float(number) for number in range(len(found))] or len(found) < promised:
        raise AssertionError(f"{len(found)} batches where {promised} were promised: {found}")
    if damages := verify(path).damages:
        raise AssertionError(f"damage: {damages}")
    return "promised" if len(found) == promised else "more"


def test_a_backup_survives_a_power_cut(record):
    report = checker.check_log(record("nothing"), check_backup, count=STATES, seed=1)
    assert not report.failures, report
    assert set(report.met) == {"no store", "promised", "more"}


@pytest.mark.slow
@pytest.mark.parametrize("broken", GUARDS)
def test_a_backup_without_one_of_its_syncs_is_caught(record, broken):
    assert checker.is_caught(record(broken), check_backup, count=50)


if __name__ == "__main__":
    if sys.argv[2] in GUARDS:
        replace_sync_of(sys.argv[2])
    make_backups(Path(sys.argv[1]))
