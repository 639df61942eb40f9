"""What workers do: each act takes plain values and gives figures by name, in seconds.

An act that times less than all it does gives its own started_s and ended_s.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

import kvstore
from bench.capture import STREAM
from bench.figure import BenchError
from bench.measure import seconds
from bench.scale.rows import check_all, check_numbers, read_seconds, time_of, with_numbers
from bench.scale.scalars import check_stream, write_streams
from bench.workload import Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.generate import Profile

COPIED_BYTES: Final = 4 << 20  # as a batch is
COPIED_PIECES: Final = 16  # more than a core's cache holds
_prepared: list[Workload] = []  # what this worker is to append


def ready() -> dict[str, float]:
    """Nothing: the answer says that the process is up."""
    return {}


def look(store: str, rows: int, ranges: int, places: int, seed: int) -> dict[str, float]:
    """Open, info, first row and 1 % ranges of a store of numbered rows; all warm.

    Of so many ranges and places, which are drawn; medians, but all rows of all ranges.
    """
    rng = random.Random(seed)
    starts = [rng.randrange(rows) for _ in range(places)]
    share = max(1, rows // 100)
    firsts = [rng.randrange(rows - share + 1) for _ in range(ranges)]
    _first_row_s(store, starts[0], rows)
    _ranges_s(store, firsts[:1], share)
    return {
        "open_s": statistics.median(seconds(lambda: _opened(store)) for _ in starts),
        "info_s": statistics.median(_info_s(store, rows) for _ in starts),
        "first_s": statistics.median(_first_row_s(store, start, rows) for start in starts),
        "row_s": _ranges_s(store, firsts, share) / (share * ranges),
    }


def look_at_streams(
    store: str, streams: int, rows: int, places: int, seed: int
) -> dict[str, float]:
    """The same of a store of many streams: one stream's first row, and all of its rows."""
    rng = random.Random(seed)
    numbers = [rng.randrange(streams) for _ in range(places)]
    check_stream(store, numbers[0], streams, rows)
    full = [check_stream(store, number, streams, rows) for number in numbers]
    return {
        "open_s": statistics.median(seconds(lambda: _opened(store)) for _ in numbers),
        "info_s": statistics.median(_info_s(store, rows) for _ in numbers),
        "first_s": statistics.median(each.first_s for each in full),
        "row_s": sum(each.full_s for each in full) / sum(each.rows for each in full),
    }


def prepare(profile: Profile, size_bytes: int, seed: int, first: int) -> dict[str, float]:
    """Have particles ready in memory for ``append``, numbered from ``first`` on."""
    _prepared[:] = [with_numbers(profile, size_bytes, seed, first=first)]
    return {"rows": _prepared[0].rows}


def append(store: str) -> dict[str, float]:
    """Append what was prepared and flush; timed without opening and closing."""
    (work,) = _prepared
    with kvstore.open(store, mode="w") as opened:
        stream = opened.stream(STREAM)
        started = time.perf_counter_ns()
        for batch in work.batches:
            stream.append(batch)
        opened.flush()
        ended = time.perf_counter_ns()
    return {"bytes": len(work.raw), "started_s": started / 1e9, "ended_s": ended / 1e9}


def read_until(store: str, end: str, rows_min: int) -> dict[str, float]:
    """Read the whole store over and over until a file is there; at least once.

    What is committed grows meanwhile. Of a read that is cut short, the rows count.
    """
    rows, ended = 0, Path(end)
    with kvstore.open(store) as opened:
        while not (rows and ended.exists()):
            found = 0
            for batch in opened[STREAM].read():
                found += check_numbers(batch, found)
                del batch
                if ended.exists():
                    break
            else:
                _expect(found >= rows_min, f"{store}: {found} rows, {rows_min} were there before")
            rows += found
    return {"rows": rows}


def read_shares(store: str, first: int, rows: int, threads: int) -> dict[str, float]:
    """Read a span of rows, an equal share of it by each thread, and check the numbers."""
    bounds = [first + rows * n // threads for n in range(threads + 1)]
    with kvstore.open(store) as opened, ThreadPoolExecutor(threads) as pool:
        spans = list(pairwise(bounds))
        started, cpu = time.perf_counter_ns(), time.process_time_ns()
        found = sum(pool.map(lambda span: _read(opened, *span), spans))
        ended, used = time.perf_counter_ns(), time.process_time_ns() - cpu
    _expect(found == rows, f"{store}: {found} rows were read, {rows} were asked for")
    return {"started_s": started / 1e9, "ended_s": ended / 1e9, "cpu_s": used / 1e9}


def memcpy(size_bytes: int, threads: int) -> dict[str, float]:
    """Copy so many bytes in pieces of a batch, an equal share by each thread.

    A thread has a source of 64 MB; each copy goes to new memory, as a read's does.
    """
    pieces = max(1, size_bytes // threads // COPIED_BYTES)
    sources = [_source(number) for number in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter_ns()
        copied = sum(pool.map(lambda source: _copied(source, pieces), sources))
        ended = time.perf_counter_ns()
    return {"started_s": started / 1e9, "ended_s": ended / 1e9, "bytes": copied}


def _opened(store: str) -> None:
    kvstore.open(store).close()


def _info_s(store: str, rows: int) -> float:
    with kvstore.open(store) as opened:
        started = time.perf_counter_ns()
        info = opened.info()
        taken = time.perf_counter_ns() - started
    found = sum(stream.rows for stream in info.streams)
    _expect(found == rows, f"{store}: info says {found} rows, {rows} were written")
    return taken / 1e9


def _first_row_s(store: str, number: int, rows: int) -> float:
    """Open, read one batch from that row on, close."""
    started = time.perf_counter_ns()
    with kvstore.open(store) as opened:
        batch = next(iter(opened[STREAM].read(time_of(number), time_of(rows))))
    taken = time.perf_counter_ns() - started
    check_all(batch, number)
    return taken / 1e9


def _ranges_s(store: str, firsts: list[int], rows: int) -> float:
    with kvstore.open(store) as opened:
        return sum(
            read_seconds(
                opened[STREAM].read(time_of(first), time_of(first + rows - 1)), first, rows
            )
            for first in firsts
        )


def _read(store: kvstore.Store, first: int, stop: int) -> int:
    found = first
    for batch in store[STREAM].read(time_of(first), time_of(stop - 1)):
        found += check_numbers(batch, found)
        del batch
    return found - first


@functools.cache
def _source(number: int) -> NDArray[np.uint8]:
    """A thread's own; made once, so that the next run starts at once."""
    return np.full((COPIED_PIECES, COPIED_BYTES), number, np.uint8)


def _copied(source: NDArray[np.uint8], pieces: int) -> int:
    copied = 0
    for number in range(pieces):
        copied += source[number % len(source)].copy().nbytes
    return copied


def _expect(holds: bool, said: str) -> None:  # noqa: FBT001
    if not holds:
        raise BenchError(said)


ACTS: Final[dict[str, Callable[..., dict[str, float]]]] = {
    "ready": ready,
    "look": look,
    "write_streams": write_streams,
    "look_at_streams": look_at_streams,
    "prepare": prepare,
    "append": append,
    "read_until": read_until,
    "read_shares": read_shares,
    "memcpy": memcpy,
}
