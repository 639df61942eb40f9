"""A tenth of the packets arrives up to an hour late: what do ranges cost then?

The same rows in two stores of 20 segments that together span ten hours, in order and late, read
in turns. Late rows go to the active segment, so a range is in up to three of them. Particles
come in packets that are batches of their own; readings ten together, which the store gathers:
their batches mix rows of now with rows of an hour ago. All values are checked once, before; each
read checks which rows it gave, and their times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

import kvstore
from bench.capture import STREAM
from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import interleaved, removed, scratch
from bench.scale.rows import check_store, file_bytes, part_bytes, put_numbers
from bench.scale.scalars import TOGETHER, columns, pieces
from bench.workload import START_S, Workload
from kvstore.writer import SEGMENT_BYTES_MIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.schema import Batch

LATE_SHARE: Final = 0.1
LATE_S_MAX: Final = 3600.0
SPAN_S: Final = 36_000.0
SEGMENTS: Final = 20
FLUSHES: Final = 8 * SEGMENTS  # a segment is only sealed between two commits
PLACES: Final = 50
RANGES: Final = 20
READING_SHARE_BYTES: Final = 500  # one reading per so many bytes
READINGS_MAX: Final = 4_000_000
SLOWER_MAX: Final = 2.0


class Feed(NamedTuple):
    """Packets in the order of their times. times: of all rows; number: gives rows' numbers."""

    packets: Sequence[Batch]
    times: NDArray[Any]
    numbers: Callable[[Batch], NDArray[Any]]


class Stores(NamedTuple):
    """The same feed stored twice."""

    feed: Feed
    in_order: Path
    late: Path


def particles(setting: Setting) -> list[Figure]:
    """Compare stores of detector-like particles, 1 to 1,000 a packet."""
    work = Workload.of("counts", part_bytes(setting), setting.seed)
    times = START_S + np.arange(work.rows) * (SPAN_S / work.rows)
    first = 0
    for batch in work.batches:
        put_numbers(batch, first)
        stop = first + len(batch["timestamps"])
        batch["timestamps"][:] = times[first:stop]
        first = stop
    feed = Feed(work.batches, times, lambda batch: batch["scattering"][:, 0, 0])
    return _compared("particles", feed, setting, 2 * len(work.raw))


def readings(setting: Setting) -> list[Figure]:
    """Compare stores of readings of three numbers, ten together."""
    rows = min(READINGS_MAX, part_bytes(setting) // READING_SHARE_BYTES)
    made = columns(rows)
    made["timestamps"] = START_S + np.arange(rows) * (SPAN_S / rows)
    feed = Feed(list(pieces(made)), made["timestamps"], lambda batch: batch["number"])
    return _compared("readings", feed, setting, 100 * rows)


def _compared(kind: str, feed: Feed, setting: Setting, bytes_needed: int) -> list[Figure]:
    with scratch(setting.folder, bytes_needed=bytes_needed) as folder:
        stores = Stores(feed, folder / "in-order.kv", folder / "late.kv")
        segment_bytes = _segment_bytes(folder / "probe.kv", feed)
        in_order = _write(stores.in_order, feed, range(len(feed.packets)), segment_bytes)
        arrival = _arrival(feed, random.Random(setting.seed))
        details = _write(stores.late, feed, arrival, segment_bytes)
        details |= {f"in_order_{name}": value for name, value in in_order.items()}
        return _figures(kind, stores, setting, details)


def _figures(
    kind: str, stores: Stores, setting: Setting, details: dict[str, float]
) -> list[Figure]:
    asked: tuple[tuple[str, str, Callable[..., float], dict[str, float]], ...] = (
        ("first-row", "ms", partial(_first_row_ms, ordered=False), details),
        ("range", "ns/row", partial(_row_ns, ordered=False), {}),
        ("range-ordered", "ns/row", partial(_row_ns, ordered=True), {}),
    )
    figures = []
    for name, unit, measured, more in asked:
        sides = [partial(measured, store, stores.feed, setting.seed) for store in stores[1:]]
        for side in sides:
            side()
        limits, values = interleaved(setting.pairs, *sides)
        figures.append(
            Figure(
                name=f"late-{kind}-{name}",
                unit=unit,
                limit_name="the same rows in order",
                values=values,
                limits=limits,
                rules=(Rule("ratio", "<", SLOWER_MAX),),
                details=more,
            )
        )
    return figures


def _arrival(feed: Feed, rng: random.Random) -> list[int]:
    """Put packets in the order of their arrival."""
    arrives = [
        float(packet["timestamps"][0])
        + (rng.uniform(0, LATE_S_MAX) if rng.random() < LATE_SHARE else 0.0)
        for packet in feed.packets
    ]
    return sorted(range(len(arrives)), key=arrives.__getitem__)


def _segment_bytes(probe: Path, feed: Feed) -> int:
    """Find the size that makes 20 segments, from what one store of all rows takes."""
    with removed(probe):
        _write(probe, feed, range(len(feed.packets)), None)
        return max(SEGMENT_BYTES_MIN, file_bytes(probe) // SEGMENTS)


def _write(
    path: Path, feed: Feed, order: Sequence[int], segment_bytes: int | None
) -> dict[str, float]:
    """Append the packets in that order; what the store is like then."""
    settings = kvstore.Settings(clock_step_s=None)  # as NOTES.md has it for late data
    each = max(1, len(order) // FLUSHES)
    with kvstore.open(path, mode="w", segment_bytes=segment_bytes, settings=settings) as store:
        stream = store.stream(STREAM)
        for place, number in enumerate(order):
            stream.append(feed.packets[number])
            if place % each == each - 1:
                store.flush()
        store.flush()
        info = store.info()
    (stats,) = info.streams
    if stats.rows != len(feed.times):
        raise BenchError(f"{path} holds {stats.rows} rows, {len(feed.times)} were appended")
    check_store(path, feed.packets, ordered=True)
    return {"segments": info.segments, "rows": stats.rows, "batches": stats.batches}


def _first_row_ms(path: Path, feed: Feed, seed: int, *, ordered: bool) -> float:
    """Open, read the first batch from a row's time on, close: the median over the places."""
    rng, taken_ms = random.Random(seed), []
    for number in (rng.randrange(len(feed.times)) for _ in range(PLACES)):
        started = time.perf_counter_ns()
        with kvstore.open(path) as store:
            start, stop = float(feed.times[number]), float(feed.times[-1])
            batch = next(iter(store[STREAM].read(start, stop, ordered=ordered)))
        taken_ms.append((time.perf_counter_ns() - started) / 1e6)
        if not np.array_equal(batch["timestamps"], feed.times[feed.numbers(batch)]):
            raise BenchError(f"{path}: rows from {start!r} on have times of other rows")
        if not (batch["timestamps"] >= start).all():
            raise BenchError(f"{path}: a range from {start!r} on has earlier rows")
    return median(taken_ms)


def _row_ns(path: Path, feed: Feed, seed: int, *, ordered: bool) -> float:
    """Read 1 % ranges and check that each has its rows, all of them, once."""
    rng = random.Random(seed)
    share = max(1, len(feed.times) // 100)
    taken_ns = 0
    with kvstore.open(path) as store:
        for first in (rng.randrange(len(feed.times) - share) for _ in range(RANGES)):
            start, stop = float(feed.times[first]), float(feed.times[first + share - 1])
            started = time.perf_counter_ns()
            found = list(store[STREAM].read(start, stop, ordered=ordered))
            taken_ns += time.perf_counter_ns() - started
            _check(path, feed, found, first, share, ordered=ordered)
    return taken_ns / RANGES / share


def _check(
    path: Path, feed: Feed, found: list[Batch], first: int, rows: int, *, ordered: bool
) -> None:
    expected = np.arange(first, first + rows)
    numbers = np.concatenate([feed.numbers(batch) for batch in found] or [expected[:0]])
    times = np.concatenate([batch["timestamps"] for batch in found] or [feed.times[:0]])
    right = np.array_equal(numbers if ordered else np.sort(numbers), expected)
    if not right or not np.array_equal(times, feed.times[numbers]):
        raise BenchError(f"{path}: {len(numbers)} rows for the {rows} from {first} on, or others")


MEASUREMENTS: Final = (
    Measurement("late-particles", "packets up to an hour late, 1 to 1,000 particles", particles),
    Measurement("late-readings", f"packets up to an hour late, {TOGETHER} readings", readings),
)
