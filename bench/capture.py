"""Appending within one process, beside the disk and the cores that bound it.

Every store that was written is counted afterwards: a figure for rows that are not there would
be worth nothing. Timed: the appends and the flush. Not timed: opening and closing the store,
as the bare file is not timed either while it is created and closed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numcodecs.blosc
import numpy as np

import kvstore
from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import GB, bare_write_seconds, interleaved, removed, scratch, seconds, settle
from bench.workload import Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.schema import Batch, BatchLike

STREAM = "particles"

# The level of the store's own blocks (DESIGN.md, section 4, decision 6).
BLOSC_LEVEL = 5

# Compressible data may beat the disk by this much, says the table.
BARE_WRITE_SHARE = 1.2

SMALL_ROWS_MAX = 200_000
SMALL_ROW_SHARE_BYTES = 1_000  # one row per so many bytes of --size, to shrink with it
ROWS_TOGETHER = 1_000


def append_uniform(setting: Setting) -> list[Figure]:
    """Append and flush in one process against bare writes of the same bytes."""
    work = Workload.of("uniform", setting.size_bytes, setting.seed)
    with scratch(setting.folder, bytes_needed=setting.size_bytes) as folder:
        ours, bare, uncopied = interleaved(
            setting.pairs,
            lambda: _append_gb_s(folder / "run.kv", work),
            lambda: bare_gb_s(folder / "bare", work.raw),
            lambda: _append_gb_s(folder / "run.kv", work, copy=False),
        )
    particle_gb = len(work.raw) / work.rows / GB
    return [
        Figure(
            name="append-uniform",
            unit="GB/s",
            limit_name="write + fdatasync",
            values=ours,
            limits=bare,
            rules=(Rule("ratio", ">=", 0.95),),
            details={
                "particles_s": median(ours) / particle_gb,
                "with_copy_false_gb_s": median(uncopied),
            },
        )
    ]


def append_counts(setting: Setting) -> list[Figure]:
    """Append and flush compressible data against two compressing cores, and the disk."""
    work = Workload.of("counts", setting.size_bytes, setting.seed)
    with scratch(setting.folder, bytes_needed=setting.size_bytes) as folder:
        ours, bare, cores = interleaved(
            setting.pairs,
            lambda: _append_gb_s(folder / "run.kv", work),
            lambda: bare_gb_s(folder / "bare", work.raw),
            lambda: len(work.raw) / GB / compress_seconds(work.batches, threads=2),
        )
    lower = [min(c, BARE_WRITE_SHARE * b) for c, b in zip(cores, bare, strict=True)]
    return [
        Figure(
            name="append-counts",
            unit="GB/s",
            limit_name="2 cores' Blosc or 1.2 bare",
            values=ours,
            limits=lower,
            rules=(Rule("ratio", ">=", 0.85),),
            details={"bare_write_gb_s": median(bare), "two_cores_gb_s": median(cores)},
        )
    ]


def one_row_appends(setting: Setting) -> list[Figure]:
    """Append one row of three scalars at a time; the store gathers them."""
    count = min(SMALL_ROWS_MAX, setting.size_bytes // SMALL_ROW_SHARE_BYTES)
    rows = _scalar_rows(count)
    together = _gathered(rows, ROWS_TOGETHER)
    with scratch(setting.folder) as folder:
        ours, bare, gathered = interleaved(
            setting.pairs,
            lambda: _append_seconds(folder / "rows.kv", rows, count) * 1e6 / count,
            lambda: _keep_seconds(rows) * 1e6 / count,
            lambda: _append_seconds(folder / "rows.kv", together, count) * 1e6 / count,
        )
    return [
        Figure(
            name="one-row-appends",
            unit="us/row",
            limit_name="list.append of the rows",
            values=ours,
            limits=bare,
            rules=(Rule("value", "<", 1.0),),
            details={f"by_{ROWS_TOGETHER}_us_per_row": median(gathered)},
        )
    ]


def compressed(array: NDArray[Any]) -> bytes:
    """Compress one array as the store does, on the calling thread alone."""
    block: bytes = numcodecs.blosc.compress(array, b"lz4", BLOSC_LEVEL, numcodecs.blosc.SHUFFLE, 0)
    return block


def compress_seconds(batches: Sequence[Batch], *, threads: int) -> float:
    """Time Blosc-LZ4 over every field of every batch on so many threads, results dropped."""
    numcodecs.blosc.use_threads = False  # as in the store: its own pool serves one caller
    arrays = [array for batch in batches for array in batch.values()]
    with ThreadPoolExecutor(threads) as pool:
        return seconds(lambda: sum(pool.map(_compressed_bytes, arrays)))


def bare_gb_s(path: Path, content: memoryview) -> float:
    """Settle, then measure the disk with bare writes."""
    settle(len(content))
    return len(content) / GB / bare_write_seconds(path, content)


def write_store(path: Path, batches: Iterable[BatchLike], *, copy: bool = True) -> float:
    """Append batches to a new store, flush, and return the seconds that took."""
    with kvstore.open(path, mode="w") as store:
        stream = store.stream(STREAM)
        started = time.perf_counter_ns()
        for batch in batches:
            stream.append(batch, copy=copy)
        store.flush()
        return (time.perf_counter_ns() - started) / 1e9


def check_rows(path: Path, expected: int) -> None:
    """Raise BenchError unless the store holds so many rows."""
    with kvstore.open(path) as store:
        found = store[STREAM].count()
    if found != expected:
        raise BenchError(f"{path} holds {found} rows after {expected} were written")


def _append_gb_s(path: Path, work: Workload, *, copy: bool = True) -> float:
    settle(len(work.raw))
    return len(work.raw) / GB / _append_seconds(path, work.batches, work.rows, copy=copy)


def _append_seconds(
    path: Path, batches: Iterable[BatchLike], rows: int, *, copy: bool = True
) -> float:
    with removed(path):
        taken_s = write_store(path, batches, copy=copy)
        check_rows(path, rows)
    return taken_s


def _compressed_bytes(array: NDArray[Any]) -> int:
    return len(compressed(array))


def _scalar_rows(count: int) -> list[BatchLike]:
    """Make rows of a time and two readings, plain Python numbers as a driver hands them over."""
    times = (1_771_342_356.0 + number / 1000 for number in range(count))
    return [
        {"timestamps": time_s, "level": time_s % 60, "state": number % 7}
        for number, time_s in enumerate(times)
    ]


def _gathered(rows: Sequence[BatchLike], rows_together: int) -> list[BatchLike]:
    """Turn the same rows into batches, as a caller would who gathers them himself."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return [
        {name: column[at : at + rows_together] for name, column in columns.items()}
        for at in range(0, len(rows), rows_together)
    ]


def _keep_seconds(rows: Sequence[BatchLike]) -> float:
    kept: list[BatchLike] = []
    started = time.perf_counter_ns()
    for row in rows:
        kept.append(row)  # noqa: PERF402  # one call a row is the point
    return (time.perf_counter_ns() - started) / 1e9


MEASUREMENTS = (
    Measurement("append-uniform", "append + flush in one process, uniform", append_uniform),
    Measurement("append-counts", "append + flush in one process, counts", append_counts),
    Measurement("one-row-appends", "rows of three scalars, one at a time", one_row_appends),
)
