"""A file of events into a store, beside the least that could be done: decode, append, commit.

Rates are events for each second of the processor, all threads of the process together: other
processes count little, and on an idle machine with two cores the clock on the wall shows no more.
The limit reads the same file, decodes each line into a struct, appends the columns and commits as
often. It checks nothing, takes times without their fractions and offsets, knows no identities,
keeps no lineage, counts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

import kvstore
from bench.figure import Figure, Measurement, Rule, Setting
from bench.measure import interleaved, scratch
from bench.telemetry.events import START_US, count_of, payloads
from kvstore.telemetry.contract import brief
from kvstore.telemetry.pipeline import ROWS_MAX, Pipeline
from kvstore.telemetry.progress import Progress
from kvstore.telemetry.sinks.stream import StreamSink
from kvstore.telemetry.source import Source
from kvstore.telemetry.sources.files import FilesSource
from kvstore.telemetry.sources.stream import StreamSource

TARGET: Final = 300_000  # rows/s, of the issue
LIMIT: Final = "decode, append, commit"
YEAR_US: Final = 31_536_000_000_000


class _Event(msgspec.Struct, gc=False):
    device_id: str
    timestamp: str
    temperature: float
    humidity: float
    firmware_version: str
    pressure: float | None = None


def embedded(setting: Setting) -> list[Figure]:
    """Fresh events; the same ones again; the simulation's usual mix; on to another store."""
    events = count_of(setting)
    good = _written(setting, "good.jsonl", trouble=False)
    usual = _written(setting, "usual.jsonl", trouble=True)
    walls: list[float] = []

    def fresh() -> float:
        with scratch(setting.folder) as place:
            began = time.perf_counter()
            rate = _rate(events, lambda: _ingest(good, place / "ops.kv"))
            walls.append(events / (time.perf_counter() - began))
        return rate

    def again() -> float:
        with scratch(setting.folder) as place:
            _ingest(good, place / "ops.kv")
            copy = place / "copy.jsonl"
            copy.write_bytes(good.read_bytes())
            return _rate(events, lambda: _ingest(copy, place / "ops.kv"))

    def mixed() -> float:
        with scratch(setting.folder) as place:
            return _rate(events, lambda: _ingest(usual, place / "ops.kv"))

    def forward() -> float:
        with scratch(setting.folder) as place:
            _ingest(good, place / "ops.kv")
            return _rate(events, lambda: _forward(place / "ops.kv", place / "centre.kv"))

    def bare() -> float:
        with scratch(setting.folder) as place:
            return _rate(events, lambda: _bare(good, place / "bare.kv"))

    limits, *rows = interleaved(setting.pairs, bare, fresh, again, mixed, forward)
    good.unlink()
    usual.unlink()
    names = ("file-kvstore", "file-kvstore-again", "file-kvstore-usual", "kvstore-kvstore")
    return [
        Figure(
            name=name,
            unit="events/s",
            limit_name=LIMIT,
            values=values,
            limits=limits,
            rules=(Rule("value", ">=", TARGET),) if name == names[0] else (),
            details={"wall_events_s": float(np.median(walls))} if name == names[0] else {},
        )
        for name, values in zip(names, rows, strict=True)
    ]


def _written(setting: Setting, name: str, *, trouble: bool) -> Path:
    path = setting.folder / name
    found = payloads(count_of(setting), setting.seed, trouble=trouble)
    path.write_bytes(b"".join(payload + b"\n" for payload in found))
    return path


def _rate(events: int, act: Callable[[], object]) -> float:
    began = time.process_time_ns()
    act()
    return events / max((time.process_time_ns() - began) / 1e9, 1e-9)


def _run(open_source: Callable[[], Source], sink: Path) -> Progress:
    with StreamSink.open(sink, brief()) as opened:
        clock = lambda: START_US + YEAR_US  # noqa: E731
        return Pipeline(open_source, opened, brief(), clock=clock).run()


def _ingest(file: Path, sink: Path) -> None:
    progress = _run(lambda: FilesSource([file], run="bench"), sink)
    assert progress.received == progress.stored + progress.duplicates + progress.rejected


def _forward(store: Path, sink: Path) -> None:
    progress = _run(lambda: StreamSource(store), sink)
    assert progress.stored == progress.received > 0


def _bare(file: Path, path: Path) -> None:
    decode = msgspec.json.Decoder(_Event).decode
    with kvstore.open(path, "w", flush_interval_s=None) as store, file.open("rb") as lines:
        stream = store.stream("readings", time="timestamp")
        while block := lines.readlines(ROWS_MAX * 135):
            events = [decode(line) for line in block]
            pressure = [np.nan if e.pressure is None else e.pressure for e in events]
            stream.append(
                {
                    "timestamp": np.array([e.timestamp[:19] for e in events], "M8[us]"),
                    "device_id": np.array([e.device_id for e in events], object),
                    "temperature": np.array([e.temperature for e in events]),
                    "humidity": np.array([e.humidity for e in events]),
                    "firmware_version": np.array([e.firmware_version for e in events], object),
                    "pressure": np.array(pressure),
                }
            )
            store.flush()


MEASUREMENTS: Final = (
    Measurement("embedded", "a file of events into a store, and on to another", embedded),
)
