"""How to measure on a machine that lies: runs in turns, settled disk, touched memory.

Its rules:

- Sides of a pair run next to each other, in an order that flips every round.
- Before a timed write everything dirty is on the disk (deleted files discarded too), and free
  memory of four times the bytes to be written was touched and freed: on a virtual machine,
  page cache pages that the host does not back cost 4-6 times a write.
- Clocks are perf_counter_ns. Files of a run live in their own folder and go with it.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.figure import BenchError

GB = 1_000_000_000

# The group size of the store, and of the bare writes it is held against.
WRITE_PIECE_BYTES = 32 << 20

# Bare writes of 1 GB in four rounds on a Firecracker guest with 24 GB, GB/s: untouched 0.4-1.7;
# twice the bytes touched, as the issue has it, 0.5-1.2; four times 1.4-2.0; ten times 1.4-1.7.
TOUCHES = 4

# Touching must leave room for what runs beside us; more than this of what is available
# would push out the page cache that warm reads are measured on.
_TOUCH_SHARE_MAX = 0.6

_WRITE_BYTES = 1 << 20

# Linux 5.14; the mmap module of Python 3.11 does not name it.
_MADV_POPULATE_WRITE = 23


def interleaved(rounds: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Run every side once a round and return each side's results, one per round.

    The order flips from round to round: a side that always runs second would inherit what
    the first one left behind.
    """
    results: list[list[float]] = [[] for _ in sides]
    for round_number in range(rounds):
        order = range(len(sides)) if round_number % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            results[side].append(sides[side]())
    return results


def seconds(act: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - started) / 1e9


@contextlib.contextmanager
def scratch(folder: Path, *, bytes_needed: int = 0) -> Iterator[Path]:
    """Yield a fresh folder on the disk under test and remove it afterwards.

    Raises BenchError where bytes_needed and a tenth more are not free.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < bytes_needed * 1.1:
        raise BenchError(
            f"{folder} has {free_bytes / GB:.1f} GB free, this needs {bytes_needed * 1.1 / GB:.1f}"
            " GB; choose another --dir or a smaller --size"
        )
    path = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def removed(path: Path) -> Iterator[Path]:
    """Yield the path of a file or folder that goes when the block ends."""
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def settle(bytes_to_write: int) -> None:
    """Bring disk and memory into the same state before a timed write of that many bytes."""
    gc.collect()
    os.sync()
    _touch(min(TOUCHES * bytes_to_write, int(_available_bytes() * _TOUCH_SHARE_MAX)))


def _touch(size_bytes: int) -> None:
    """Fault in that much memory and free it again."""
    if size_bytes < mmap.PAGESIZE:
        return
    with mmap.mmap(-1, size_bytes) as memory:
        try:
            memory.madvise(_MADV_POPULATE_WRITE)
        except OSError:
            for offset in range(0, size_bytes, mmap.PAGESIZE):
                memory[offset] = 1


def _available_bytes() -> int:
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise BenchError("/proc/meminfo names no MemAvailable; the bench needs Linux")


def bare_write_seconds(path: Path, content: memoryview) -> float:
    """Time os.write of the content in 32 MB pieces, fdatasync after each, into a new file.

    No preallocation: a store that grows as data comes in has none either. The file goes.
    """
    with removed(path), path.open("xb", buffering=0) as file:
        started = time.perf_counter_ns()
        for offset in range(0, len(content), WRITE_PIECE_BYTES):
            write_all(file.fileno(), content[offset : offset + WRITE_PIECE_BYTES])
            os.fdatasync(file.fileno())
        return (time.perf_counter_ns() - started) / 1e9


def write_all(descriptor: int, content: memoryview) -> None:
    """Write everything, a megabyte at a time.

    Single writes of 2 MB and more take folios of 2 MB, which cost a virtual machine up to five
    times as much (NOTES.md, "Writing"): a limit has to be one.
    """
    while content:
        content = content[os.write(descriptor, content[:_WRITE_BYTES]) :]


def warm(path: Path) -> None:
    """Read a file once, so that the page cache holds it."""
    with path.open("rb", buffering=0) as file:
        piece = bytearray(1 << 20)
        while file.readinto(piece):
            pass
