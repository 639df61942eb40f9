"""Files of events into the lake: an empty one, and one whose day holds ten million rows already.

All of the pipeline: reading, validating, the anti-join, Parquet files and manifests synced, the
catalog's swap. Rates are events for each second of the processor, all threads together, as in
embedded.py: an idle machine with two cores writes several files at once, and waits some
milliseconds a commit for the disk. By the clock on the wall: in the details.

Limits: the same columns, ready in memory, written by pyarrow as Parquet and synced (the least
that can be called a lake), and pyiceberg's own append of them, which syncs nothing and asks
neither for duplicates nor for positions. The full lake's limit is the empty one beside it.

The rows that are there lie within the very time of the new ones, so that no statistics of files
help: all keys of the day are read once and looked up for each commit.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.figure import Figure, Measurement, Rule, Setting
from bench.measure import interleaved
from bench.telemetry.events import DEVICES, PLACE, START_US, count_of, payloads
from kvstore.events import Event
from kvstore.telemetry.contract import brief
from kvstore.telemetry.pipeline import BEST, Pipeline
from kvstore.telemetry.records import Claim, Lineage, Position, Readings, Work
from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks.iceberg import IcebergSink
from kvstore.telemetry.sources.files import FilesSource

FILLED: Final = 10  # rows that are there for each one that comes, but no more than
FILLED_ROWS_MAX: Final = 10_000_000  # as the issue has it; their keys are read once a run
COMMIT_ROWS: Final = 250_000


def lake(setting: Setting) -> list[Figure]:
    """Events per second, into an empty lake and into a full one."""
    count = count_of(setting)
    path = setting.folder / "events.jsonl"
    path.write_bytes(b"\n".join(payloads(count, setting.seed, trouble=False)) + b"\n")
    full = _full(setting.folder, count, span_us=_span_us(path))
    table = _columns(count, setting.seed)
    walls: dict[str, list[float]] = {"empty": [], "full": []}
    measured = interleaved(
        setting.pairs,
        lambda: _bare(setting.folder / "bare.parquet", table),
        lambda: _append(setting.folder / "appended", table),
        lambda: _rate(path, setting.folder / "empty", count, walls["empty"]),
        lambda: _rate(path, setting.folder / "copy", count, walls["full"], like=full),
    )
    by_wall = {name: {"wall_events_s": float(np.median(each))} for name, each in walls.items()}
    return [
        Figure(
            name="lake-empty",
            unit="events/cpu-s",
            limit_name="pyarrow, one file, fsync",
            values=measured[2],
            limits=measured[0],
            rules=(Rule("value", ">=", 250_000),),
            details=by_wall["empty"],
        ),
        Figure(
            name="lake-append",
            unit="events/cpu-s",
            limit_name="pyiceberg append",
            values=measured[2],
            limits=measured[1],
        ),
        Figure(
            name="lake-full",
            unit="events/cpu-s",
            limit_name=f"an empty lake; {_filled(count):,} rows are there",
            values=measured[3],
            limits=measured[2],
            rules=(Rule("ratio", ">=", 0.8),),
            details=by_wall["full"],
        ),
    ]


def _filled(count: int) -> int:
    return min(FILLED * count, FILLED_ROWS_MAX)


# ---- the pipeline ----


def _rate(
    path: Path, folder: Path, count: int, walls: list[float], *, like: Path | None = None
) -> float:
    with _lake(folder, like) as sink:
        source = FilesSource([str(path)], run="bench", follow=False, report=_silent)
        pipeline = Pipeline(
            lambda: source,
            sink,
            brief(),
            limits=replace(BEST["lake"], wait_s=float("inf")),
            validator={"future_limit_s": float(10**9)},
        )
        began = time.perf_counter()
        rate = _per_second(count, pipeline.run)
        walls.append(count / (time.perf_counter() - began))
        done = pipeline.progress
    assert done.received == count
    assert done.stored > count * 0.9
    return rate


@contextmanager
def _lake(folder: Path, like: Path | None) -> Iterator[IcebergSink]:
    """A fresh lake; or one that is rolled back to what it was, as a lake cannot be copied."""
    shutil.rmtree(folder, ignore_errors=True)
    with IcebergSink.open(str(like or folder), brief()) as sink:
        sink.evolve(brief())
        before = sink._lake.table().metadata_location if like else None  # noqa: SLF001
        catalog = sink._lake.catalog  # noqa: SLF001
        yield sink
    if before:
        catalog.drop_table(("telemetry", "readings"))
        catalog.register_table(("telemetry", "readings"), before)


def _silent(_event: Event) -> None: ...


def _span_us(path: Path) -> int:
    """How much time the events take, about: they come in order of time."""
    lines = path.read_bytes().count(b"\n")
    return max(lines // DEVICES, 1) * 5_000_000


def _full(folder: Path, count: int, *, span_us: int) -> Path:
    """A lake with many rows of other devices, each file over the whole time."""
    path, wanted = folder / "full", _filled(count)
    rng = np.random.default_rng(7)
    with IcebergSink.open(str(path), brief()) as sink:
        sink.evolve(brief())
        claim = sink.claim([PLACE])[0]
        for first in range(0, wanted, COMMIT_ROWS):
            size = min(COMMIT_ROWS, wanted - first)
            after = Position(PLACE, first + size)
            readings = _readings(rng, first, size, span_us)
            work = Work(f"fill-{first}", "fill", START_US, (claim,), (after,), readings, ())
            outcome = sink.commit(work)
            assert outcome.stored + outcome.duplicates + outcome.conflicts == size
            claim = Claim(after, claim.epoch)
    return path


def _readings(rng: np.random.Generator, first: int, size: int, span_us: int) -> Readings:
    number = np.arange(first, first + size)
    return Readings(
        [f"old-{n % DEVICES}" for n in range(size)],
        START_US + (number * 7919) % span_us // 1000 * 1000 + number // 1000 % 1000,
        {
            "temperature": np.round(rng.normal(20, 5, size), 1),
            "humidity": np.round(rng.normal(60, 5, size)),
            "firmware_version": ["v1.2.0"] * size,
            "pressure": np.round(rng.normal(1000, 5, size), 1),
        },
        [None] * size,
        Lineage(
            ["bench:fill"] * size,
            np.zeros(size, np.int32),
            number,
            np.full(size, START_US),
            np.full(size, 2, np.int16),
            ["fill"] * size,
        ),
    )


# ---- the limits ----


def _columns(count: int, seed: int) -> pa.Table:
    """As many rows, in the lake's columns, ready in memory."""
    schema = rows.readings_schema(brief())
    readings = _readings(np.random.default_rng(seed), 0, count, 10**10)
    found = rows.to_arrow(readings, schema)
    return found.cast(schema.as_arrow())


def _per_second(count: int, act: Callable[[], object]) -> float:
    worked = time.process_time()
    act()
    return count / max(time.process_time() - worked, 1e-9)


def _bare(path: Path, table: pa.Table) -> float:
    def write() -> None:
        with path.open("wb") as file:
            pq.write_table(table, file, compression="zstd", compression_level=1)
            file.flush()
            os.fsync(file.fileno())

    return _per_second(len(table), write)


def _append(folder: Path, table: pa.Table) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    with IcebergSink.open(str(folder), brief()) as sink:
        opened: Any = sink._lake.table()  # noqa: SLF001
        parts = [table.slice(at, COMMIT_ROWS) for at in range(0, len(table), COMMIT_ROWS)]
        return _per_second(len(table), lambda: [opened.append(part) for part in parts])


MEASUREMENTS: Final = (
    Measurement("lake", "files of events into Iceberg, empty and with ten times as much", lake),
)
