"""One store as it grows to 1 % of the size, 10 %, and all of it: what does a look at it cost?

Three layouts: in one segment, in hundreds, and as a store is by default. The writer stays open,
and waits, while other processes look: open, info, the first row of a range, 1 % ranges, each in
a process of its own whose memory is watched. Limits are the same in the store at 1 % of its size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

import kvstore
from bench import process
from bench.capture import STREAM, compress_seconds
from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import GB, scratch
from bench.scale.rows import BATCH_ROWS, Numbered, file_bytes
from bench.scale.worker import Answer, alone
from bench.workload import PARTICLE_BYTES
from kvstore.writer import SEGMENT_BYTES_MIN

if TYPE_CHECKING:
    from kvstore.schema import Batch

SHARES: Final = (0.01, 0.1, 1.0)
RATIO: Final = 135  # raw to stored, of numbered rows
SEGMENTS: Final = 300  # in the layout of many
STORED_SHARE: Final = 1 / 90  # room to ask for: RATIO, with a margin
PLACES: Final = 50  # where open, info and first row are measured
COMPRESSED_BATCHES: Final = 200  # for the limit of the write rate

# "The cost must not grow": looks at either size are minutes apart on a machine in another mood.
GROWTH_MAX: Final = 1.5


class Stage(NamedTuple):
    """What was found at one size, an entry a pair."""

    rows: int
    looks: list[Answer]
    info_cli: list[process.Pipeline]
    file_bytes: int
    segments: int
    write_s: float


class Quantity(NamedTuple):
    """One figure of a stage: its name, unit, and how it is taken from pair n."""

    name: str
    unit: str
    of: Callable[[Stage, int], float]


QUANTITIES: Final = (
    Quantity("open", "ms", lambda stage, n: stage.looks[n]["open_s"] * 1e3),
    Quantity("info", "ms", lambda stage, n: stage.looks[n]["info_s"] * 1e3),
    Quantity("info-cli", "ms", lambda stage, n: stage.info_cli[n].wall_s * 1e3),
    Quantity("first-row", "ms", lambda stage, n: stage.looks[n]["first_s"] * 1e3),
    Quantity("range", "ns/row", lambda stage, n: stage.looks[n]["row_s"] * 1e9),
    Quantity("memory", "MB", lambda stage, n: stage.looks[n]["anon_mb"]),
    Quantity("memory-cli", "MB", lambda stage, n: stage.info_cli[n].ended[0].anon_bytes_max / 1e6),
)


def one_segment(setting: Setting) -> list[Figure]:
    """Write everything in one go, into a single segment."""
    return _grown(setting, "one", max(1 << 30, int(setting.size_bytes * 2 * STORED_SHARE)))


def many_segments(setting: Setting) -> list[Figure]:
    """Write the same into hundreds of segments."""
    return _grown(setting, "many", max(SEGMENT_BYTES_MIN, setting.size_bytes // RATIO // SEGMENTS))


def default_segments(setting: Setting) -> list[Figure]:
    """Write the same with the segments that a store has by default."""
    return _grown(setting, "default", None)


def _grown(setting: Setting, layout: str, segment_bytes: int | None) -> list[Figure]:
    with scratch(setting.folder, bytes_needed=int(setting.size_bytes * STORED_SHARE)) as folder:
        stages = list(_stages(folder / "run.kv", setting, segment_bytes))
    raw_gb = [stage.rows * PARTICLE_BYTES / GB for stage in stages]
    last = stages[-1]
    limit = _compress_gb_s(stages[0].rows)
    write = Figure(
        name=f"{layout}-write",
        unit="GB/s",
        limit_name="2 cores' Blosc",
        values=[raw_gb[-1] / last.write_s],
        limits=[limit],
        details={
            "raw_gb": raw_gb[-1],
            "rows": last.rows,
            "write_s": last.write_s,
            "stored_gb": last.file_bytes / GB,
            "segments": last.segments,
            **{
                f"at_{gb:.3g}_gb_gb_s": gb / s.write_s for gb, s in zip(raw_gb, stages, strict=True)
            },
        },
    )
    return [write, *(_figure(layout, quantity, stages, raw_gb) for quantity in QUANTITIES)]


def _figure(layout: str, quantity: Quantity, stages: list[Stage], raw_gb: list[float]) -> Figure:
    pairs = range(len(stages[0].looks))
    values = [[quantity.of(stage, n) for n in pairs] for stage in stages]
    return Figure(
        name=f"{layout}-{quantity.name}",
        unit=quantity.unit,
        limit_name=f"the same at {raw_gb[0]:.3g} GB",
        values=values[-1],
        limits=values[0],
        rules=(Rule("ratio", "<", GROWTH_MAX),),
        details={
            f"at_{gb:.3g}_gb": median(found)
            for gb, found in zip(raw_gb[1:-1], values[1:-1], strict=True)
        },
    )


def _stages(path: Path, setting: Setting, segment_bytes: int | None) -> Iterator[Stage]:
    """Write up to each size, then look; the time of looking is not the writer's."""
    numbered, written, write_s = Numbered(), 0, 0.0
    with kvstore.open(path, mode="w", segment_bytes=segment_bytes) as store:
        for share in SHARES:
            rows = _rows(setting.size_bytes * share)
            write_s += _append_seconds(store, numbered.batches(written, rows))
            written = rows
            yield _looked(path, store, rows, write_s, setting)


def _rows(size_bytes: float) -> int:
    """Whole batches of about that many bytes."""
    return max(1, round(size_bytes / PARTICLE_BYTES / BATCH_ROWS)) * BATCH_ROWS


def _append_seconds(store: kvstore.Store, batches: Iterator[Batch]) -> float:
    stream = store.stream(STREAM)
    started = time.perf_counter_ns()
    for batch in batches:
        stream.append(batch)
    store.flush()
    return (time.perf_counter_ns() - started) / 1e9


def _looked(path: Path, store: kvstore.Store, rows: int, write_s: float, setting: Setting) -> Stage:
    info = store.info()
    if info.streams[0].rows != rows:
        raise BenchError(f"{path} holds {info.streams[0].rows} rows after {rows} were written")
    ranges = max(1, round(setting.size_bytes / PARTICLE_BYTES / rows))  # as many bytes at each size
    looks, shown = [], []
    for number in range(setting.pairs):
        asked = {"rows": rows, "ranges": ranges, "places": PLACES, "seed": setting.seed + number}
        looks.append(alone("look", store=path, **asked))
        shown.append(process.run(process.kvstore("info", path), watched=0))
    stage = Stage(rows, looks, shown, file_bytes(path), info.segments, write_s)
    said = ", ".join(f"{q.name} {q.of(stage, 0):.3g} {q.unit}" for q in QUANTITIES)
    gb = rows * PARTICLE_BYTES / GB
    print(f"  {gb:.3g} GB in {write_s:.1f} s, {info.segments} segments: {said}", file=sys.stderr)
    return stage


def _compress_gb_s(rows: int) -> float:
    """What two cores compress of the same rows, with nothing else to do."""
    numbered = Numbered().batches(0, rows)
    copies = [
        {name: array.copy() for name, array in batch.items()}
        for batch in islice(numbered, COMPRESSED_BATCHES)
    ]
    size = sum(array.nbytes for batch in copies for array in batch.values())
    return median(size / GB / compress_seconds(copies, threads=2) for _ in range(3))


MEASUREMENTS: Final = tuple(
    Measurement(name, f"a store as it grows to 1 TB, {about}", run)
    for name, about, run in (
        ("terabyte-one", "in one segment", one_segment),
        ("terabyte-many", "in hundreds of segments", many_segments),
        ("terabyte-default", "in segments of 2 GiB", default_segments),
    )
)
