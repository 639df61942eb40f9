"""Rows that tell who they are: each holds its own running number, and is checked when read.

A particle's first scattering and spectral value is its number. In ``numbered`` batches every
other value is the number modulo BATCH_ROWS, which LZ4 makes 135 times smaller: 1 TB fits a disk.
Times follow from the number, so a range of rows is a range of times, and all of it can be
checked.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import kvstore
from bench.capture import STREAM
from bench.figure import BenchError
from bench.workload import PARTICLE_BYTES, PARTICLES_PER_S, START_S, Workload
from kvstore.generate import Profile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench.figure import Setting
    from kvstore.schema import Batch

BATCH_ROWS: Final = (4 << 20) // PARTICLE_BYTES  # the longest append that the store does not cut
PARTS: Final = 500  # of the whole size: what everything but the terabyte itself is measured on
_PART_BYTES_MIN: Final = 8_000_000
_ARRAYS: Final = ("scattering", "spectral")


def part_bytes(setting: Setting) -> int:
    """Bytes for a measurement that needs no terabyte: 2 GB where the whole is 1 TB."""
    return max(_PART_BYTES_MIN, setting.size_bytes // PARTS)


def times(numbers: NDArray[Any]) -> NDArray[np.float64]:
    """When those rows were measured, in seconds."""
    stamps: NDArray[np.float64] = START_S + numbers / PARTICLES_PER_S
    return stamps


def time_of(number: int) -> float:
    """When that row was measured: the same arithmetic, so the same bits."""
    return float(times(np.array([number]))[0])


class Numbered:
    """Batches of numbered rows, all in the same memory: a batch is good until the next.

    A batch costs three columns of its rows to make, not its 4 MB.
    """

    def __init__(self) -> None:
        fill = np.arange(BATCH_ROWS, dtype=np.int32)[:, None, None]
        self._batch: Batch = {
            "timestamps": np.empty(BATCH_ROWS),
            "scattering": np.broadcast_to(fill, (BATCH_ROWS, 64, 16)).copy(),
            "spectral": np.broadcast_to(fill, (BATCH_ROWS, 32, 16)).copy(),
        }

    def batches(self, first: int, stop: int) -> Iterator[Batch]:
        """Rows first to stop, stop left out; first is a multiple of BATCH_ROWS."""
        for start in range(first, stop, BATCH_ROWS):
            rows = min(BATCH_ROWS, stop - start)
            batch = {name: array[:rows] for name, array in self._batch.items()}
            put_numbers(batch, start)
            yield batch


def put_numbers(batch: Batch, first: int) -> None:
    """Write numbers from first on into a batch, and the times that follow from them."""
    numbers = np.arange(first, first + len(batch["timestamps"]))
    batch["timestamps"][:] = times(numbers)
    for name in _ARRAYS:
        batch[name][:, 0, 0] = numbers


def with_numbers(profile: Profile, size_bytes: int, seed: int, *, first: int = 0) -> Workload:
    """Particles of a profile in memory, with running numbers and the times of these."""
    work = Workload.of(profile, size_bytes, seed)
    for batch in work.batches:
        put_numbers(batch, first)
        first += len(batch["timestamps"])
    return work


def check_numbers(batch: Batch, first: int) -> int:
    """Check numbers and times of a batch whose first row should be that one; count its rows."""
    rows = len(batch["timestamps"])
    numbers = np.arange(first, first + rows)
    right = np.array_equal(batch["timestamps"], times(numbers))
    if not right or any(not np.array_equal(batch[name][:, 0, 0], numbers) for name in _ARRAYS):
        found = batch["scattering"][:3, 0, 0]
        raise BenchError(f"rows from {first} on were expected, these begin with {found}")
    return rows


def check_all(batch: Batch, first: int) -> int:
    """Check every value of a numbered batch; count its rows."""
    rows = check_numbers(batch, first)
    fill = (np.arange(first, first + rows) % BATCH_ROWS).astype(np.int32)[:, None]
    for name in _ARRAYS:
        if not (batch[name].reshape(rows, -1)[:, 1:] == fill).all():
            raise BenchError(f"{name}: wrong values within the rows from {first} on")
    return rows


def check_store(store: Path, batches: Sequence[Batch], *, ordered: bool = False) -> None:
    """Check every value of a store that holds these rows, in this order, and no others.

    ordered: they were appended in another order than that of their times.
    """
    starts = list(accumulate((len(batch["timestamps"]) for batch in batches), initial=0))
    found = 0
    with kvstore.open(store) as opened:
        for batch in opened[STREAM].read(ordered=ordered):
            rows = len(batch["timestamps"])
            last = min(bisect_left(starts, found + rows), len(batches))
            for number in range(bisect_right(starts, found) - 1, last):
                if not _agree(batch, found, batches[number], starts[number]):
                    raise BenchError(f"{store}: rows from {found} on are not what was written")
            found += rows
    if found != starts[-1]:
        raise BenchError(f"{store}: {found} rows were read, {starts[-1]} were written")


def _agree(one: Batch, one_first: int, other: Batch, other_first: int) -> bool:
    """Whether two batches have the same values in the rows that both hold."""
    start = max(one_first, other_first)
    stop = min(one_first + len(one["timestamps"]), other_first + len(other["timestamps"]))
    return all(
        np.array_equal(
            column[start - one_first : stop - one_first],
            other[name][start - other_first : stop - other_first],
        )
        for name, column in one.items()
    )


def read_seconds(batches: Iterator[Batch], first: int, rows: int) -> float:
    """Read numbered rows, check every value; the seconds that the reading took, not the check."""
    taken_ns, found = 0, first
    while True:
        started = time.perf_counter_ns()
        batch = next(batches, None)
        taken_ns += time.perf_counter_ns() - started
        if batch is None:
            break
        found += check_all(batch, found)
        del batch
    if found != first + rows:
        raise BenchError(f"{found - first} rows from {first} on, expected {rows}")
    return taken_ns / 1e9


def file_bytes(store: Path) -> int:
    """What a store takes on the disk, by its files' lengths."""
    return sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
