"""Small rows: a time and two readings, one of which is the row's running number.

As instruments send them that have no spectra: 24 bytes, a few together. Row n of a store of
many streams belongs to stream n // TOGETHER % streams.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

import kvstore
from bench.figure import BenchError
from bench.workload import START_S

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.schema import Batch

TOGETHER: Final = 10  # rows in one append
ROWS_PER_S: Final = 1000.0
_LEVELS: Final = 1 << 16  # what a converter of 16 bits gives, as a float; each once, scattered:
_SCATTER: Final = 40_503  # levels that rose in steps would compress to nothing
_CHUNK_ROWS: Final = 100_000  # made at once: a millisecond for a hundred of appends


class Read(NamedTuple):
    """A stream that was read and checked: its rows, and seconds.

    first_s: from opening the store to the first batch. full_s: for all rows, in the open store.
    """

    rows: int
    first_s: float
    full_s: float


def columns(rows: int) -> Batch:
    """So many rows, in the order of their times."""
    return rows_at(np.arange(rows))


def rows_at(numbers: NDArray[Any]) -> Batch:
    """The rows with those numbers."""
    return {
        "timestamps": START_S + numbers / ROWS_PER_S,
        "level": numbers * _SCATTER % _LEVELS / 100,
        "number": numbers,
    }


def pieces(batch: Batch, rows_together: int = TOGETHER) -> Iterator[Batch]:
    """Cut a batch into appends."""
    for at in range(0, len(batch["timestamps"]), rows_together):
        yield {name: column[at : at + rows_together] for name, column in batch.items()}


def stream_name(number: int) -> str:
    """The name of one of many streams."""
    return f"sensor{number:04}"


def numbers_of(stream: int, streams: int, rows: int) -> NDArray[Any]:
    """The rows of one stream, of so many in the store."""
    starts = np.arange(stream * TOGETHER, rows, streams * TOGETHER)
    numbers: NDArray[Any] = (starts[:, None] + np.arange(TOGETHER)).ravel()
    return numbers[numbers < rows]


def write_streams(path: str, streams: int, rows: int) -> dict[str, float]:
    """Append all rows to so many streams in turns, and flush; what that took and made.

    Streams are made by their first append, inside the time.
    """
    with kvstore.open(path, mode="w") as store:
        started = time.perf_counter_ns()
        opened = itertools.cycle([store.stream(stream_name(n)) for n in range(streams)])
        for first in range(0, rows, _CHUNK_ROWS):
            made = rows_at(np.arange(first, min(rows, first + _CHUNK_ROWS)))
            for piece in pieces(made):
                next(opened).append(piece)
        store.flush()
        taken_s = (time.perf_counter_ns() - started) / 1e9
        info = store.info()
    if sum(stream.rows for stream in info.streams) != rows or len(info.streams) != streams:
        raise BenchError(f"{path} does not hold {rows} rows in {streams} streams")
    batches = sum(stream.batches for stream in info.streams)
    return {"rows_s": rows / taken_s, "batches": batches, "segments": info.segments}


def check_stream(store: str, stream: int, streams: int, rows: int) -> Read:
    """Open a store, read one of its streams, and check every row."""
    started = time.perf_counter_ns()
    with kvstore.open(store) as opened:
        next(opened[stream_name(stream)].read())
        first = time.perf_counter_ns()
        again = time.perf_counter_ns()
        found = list(opened[stream_name(stream)].read())
        ended = time.perf_counter_ns()
    expected = numbers_of(stream, streams, rows)
    for name, column in rows_at(expected).items():
        if not np.array_equal(np.concatenate([batch[name] for batch in found]), column):
            raise BenchError(f"{store}: {name} of stream {stream} is not what was written")
    return Read(len(expected), (first - started) / 1e9, (ended - again) / 1e9)
