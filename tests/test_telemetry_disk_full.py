"""A full disk under a store or a lake: waited for or given up; nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import telemetry_data as data
from stores import check_store
from telemetry_model import read_all
from test_disk_full import ballast, volume  # noqa: F401  # a fixture

from kvstore.errors import SinkError, StoreError
from kvstore.telemetry.pipeline import Limits, Pipeline
from kvstore.telemetry.sinks.iceberg import IcebergSink
from kvstore.telemetry.sinks.stream import StreamSink
from kvstore.telemetry.sources.files import FilesSource

EVENTS = 20_000  # some 900 kB as they are stored
LEFT_BYTES = 600_000


@pytest.fixture
def path(volume):  # noqa: F811
    yield volume / "ops.kv"
    shutil.rmtree(volume / "ops.kv")


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "events.jsonl"
    with file.open("w") as out:
        for n in range(EVENTS):
            noise = (n * 2654435761) % 2**32 / 7
            event = {
                "device_id": f"d{n % 9}",
                "timestamp": f"2025-01-20T10:15:00.{n:06}Z",
                "temperature": 1,
                "humidity": 1,
                "firmware_version": f"{noise:.17}",
            }
            out.write(json.dumps(event) + "\n")
    return file


def ingest(file, path, *, retry_s, sleep=lambda _: None, kind=StreamSink):
    with kind.open(path, data.BRIEF) as sink:
        limits = Limits(rows_max=2000, wait_s=1000.0, retry_s=retry_s)
        source = lambda: FilesSource([file], run="r")  # noqa: E731
        return Pipeline(source, sink, data.BRIEF, limits=limits, sleep=sleep).run()


def check(path):
    with StreamSink.open(path, data.BRIEF, mode="r") as sink:
        assert len(read_all(sink)) == EVENTS
        totals = {}
        for count in sink.counts():
            totals[count.name] = totals.get(count.name, 0) + count.value
    assert (totals["received"], totals["stored"]) == (EVENTS, EVENTS)
    check_store(path)


def test_it_goes_on_once_there_is_room(file, path, volume):  # noqa: F811
    with ballast(volume, leaving=LEFT_BYTES):
        made_room = []

        def make_room(_):
            os.truncate(volume / "ballast", 0)
            made_room.append(1)

        progress = ingest(file, path, retry_s=1000.0, sleep=make_room)
        assert made_room
        assert progress.received == progress.stored == EVENTS
    check(path)


def test_or_it_ends_with_an_error_and_a_later_run_has_the_rest(file, path, volume):  # noqa: F811
    with ballast(volume, leaving=LEFT_BYTES), pytest.raises((SinkError, StoreError)):
        ingest(file, path, retry_s=0.0)
    assert ingest(file, path, retry_s=0.0).received < EVENTS
    check(path)


def test_a_lake_says_so_and_a_later_run_has_the_rest(file, volume):  # noqa: F811
    lake = str(volume / "lake")
    with IcebergSink.open(lake, data.BRIEF) as sink:
        sink.evolve(data.BRIEF)
    with ballast(volume, leaving=LEFT_BYTES), pytest.raises(SinkError, match="no room on the disk"):
        ingest(file, lake, retry_s=0.0, kind=IcebergSink)
    ingest(file, lake, retry_s=0.0, kind=IcebergSink)
    with IcebergSink.open(lake, data.BRIEF, mode="r") as sink:
        assert len(read_all(sink)) == EVENTS
    shutil.rmtree(lake)
