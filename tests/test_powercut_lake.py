"""A power cut at any moment leaves every commit of a lake that was reported done, whole.

As in test_powercut.py: a recorded run (two sessions, and an upkeep between them) is rebuilt into
states that a power cut may leave. In each the lake opens, holds a prefix of the commits with their
letters and counts, and takes the next one. A lake names its files by absolute paths, so the lake
is opened relative to the folder here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import telemetry_data as data
from powercut import checker, disk, recorder
from telemetry_model import read_all

from kvstore.errors import SinkError
from kvstore.telemetry.records import Claim
from kvstore.telemetry.sinks import iceberg_files
from kvstore.telemetry.sinks.iceberg import IcebergSink
from kvstore.telemetry.sinks.iceberg_lake import open_lake
from kvstore.telemetry.sinks.iceberg_maintain import maintain

pytestmark = pytest.mark.slow

CATALOG = {"warehouse": "lake", "uri": "sqlite:///lake/catalog.db"}
COMMITS = 8
STATES = 36


def opened() -> IcebergSink:
    sink = IcebergSink.open("lake", data.BRIEF, catalog=CATALOG)
    sink.evolve(data.BRIEF)
    return sink


def rows_of(number: int) -> list[data.Row]:
    return [data.row(f"d{n}", number, offset=10 * number + n) for n in range(2)]


def commit(sink: IcebergSink, claim: Claim, number: int) -> Claim:
    made = data.work(claim, rows_of(number), [data.rejection(10 * number + 5)])
    sink.commit(made)
    return Claim(made.after[0], claim.epoch)


def write_lake(root: Path) -> None:
    os.chdir(root)
    for session in (range(COMMITS // 2), range(COMMITS // 2, COMMITS)):
        with opened() as sink:
            claim = sink.claim([data.PLACE])[0]
            for number in session:
                claim = commit(sink, claim, number)
                recorder.mark(str(number + 1))
        lake = open_lake("lake", catalog=CATALOG)
        maintain(lake, keep_s=0, orphans_s=0, now_s=lambda: 4e9)
        lake.close()


def check_lake(folder: Path, state: disk.State) -> str:
    os.chdir(folder)
    iceberg_files._durable.clear()
    promised = int(state.promised[-1]) if state.promised else 0
    try:
        with IcebergSink.open("lake", mode="r", catalog=CATALOG) as sink:
            count = commits_in(sink)
    except SinkError:
        if promised:
            raise
        count = 0
    if count < promised:
        raise AssertionError(f"{count} commits, and {promised} were promised")
    with opened() as sink:
        commit(sink, sink.claim([data.PLACE])[0], count)
        if commits_in(sink) != count + 1:
            raise AssertionError("writing on changed what is there")
    return "all that was promised" if count == promised else "more than was promised"


def commits_in(sink: IcebergSink) -> int:
    """How many commits the lake holds; raises unless they are the first ones, whole."""
    positions = sink.positions()
    count = (positions[0].next + 4) // 10 if positions else 0
    rows = sorted(lineage[2] for _, _, lineage in read_all(sink))
    letters = [each.rejection.offset for each in sink.dead_letters()]
    received = sum(each.value for each in sink.counts() if each.name == "received")
    expected = [10 * number + n for number in range(count) for n in range(2)]
    if (rows, letters) != (expected, [10 * number + 5 for number in range(count)]):
        raise AssertionError(f"at {positions} there are {rows} and {letters}")
    if received != 3 * count:
        raise AssertionError(f"{received} received in {count} commits")
    return count


def test_every_commit_survives_a_power_cut(record):
    report = checker.check_log(record("nothing"), check_lake, count=STATES, seed=1)
    assert not report.failures, report
    assert report.met["all that was promised"]


def test_a_lake_whose_files_are_not_synced_is_caught(record):
    assert checker.is_caught(record("files"), check_lake, count=12)


if __name__ == "__main__":
    if sys.argv[2] == "files":
        iceberg_files.os = type("os", (), {**vars(os), "fsync": staticmethod(lambda _fd: None)})
    write_lake(Path(sys.argv[1]))
