"""One store in a process of its own: ``python -m bench.compare.child ACT PEER STORE PACKETS``.

What was measured goes to stderr as one line of JSON: seconds by the clock and, of all threads, of
CPU, which say on a busy machine what the clock does not. Before anything is timed a few rows go
through a small store, so that imports and pools of threads are paid for. What is read is
touched, a value in each 4 KiB, and its rows are counted.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from bench.compare.packets import FIELDS, load
from bench.compare.peer import EVER, Peer, files, peer
from bench.figure import BenchError

if TYPE_CHECKING:
    from kvstore.schema import Batch

RANGES = 5
FIRST_ROWS = 15
RANGE_SHARE = 0.01
READY, DONE = ".ready", ".done"
_WARM_UP_ROWS = 50
_RETRY_S = 0.005
_STEP = 4096


def write(store: Peer, path: Path, packets: Path) -> dict[str, float]:
    """Write every packet."""
    batches = load(packets)
    _warm_up(store, path, batches[0])
    return _timed("write", lambda: store.write(path, batches))


def read(store: Peer, path: Path, packets: Path) -> dict[str, float]:
    """Read everything, one field, ranges and first rows, each once before it counts."""
    batches = load(packets)
    rows, places = _rows(batches), _places(batches)
    del batches

    def full() -> None:
        _expect(_used(store, path, FIELDS), rows)

    def spectral() -> None:
        _expect(_used(store, path, ["spectral"]), rows)

    spans = [(start, stop) for start, stop, _ in places[:RANGES]]
    full()
    spectral()
    _used(store, path, FIELDS, *spans[0])
    ranges = [partial(_used, store, path, FIELDS, start, stop) for start, stop in spans]
    firsts = [partial(_first, store, path, start, end) for start, _, end in places]
    found = _timed("full", full) | _timed("spectral", spectral)
    return found | _timed("range", *ranges) | _timed("first", *firsts)


def keep(store: Peer, path: Path, packets: Path) -> dict[str, float]:
    """Read everything and keep all of it."""
    rows = _rows(load(packets))
    _first(store, path, -EVER, EVER)

    def full() -> None:
        kept = list(store.read(path, -EVER, EVER, list(FIELDS)))
        _expect(sum(map(_touched, kept)), rows)

    return _timed("kept", full)


def cold(store: Peer, path: Path, packets: Path) -> dict[str, float]:
    """Read everything, the page cache dropped by whoever started this."""
    batches = load(packets)
    rows = _rows(batches)
    _warm_up(store, path, batches[0])
    return _timed("cold", lambda: _expect(_used(store, path, FIELDS), rows))


def live(store: Peer, path: Path, packets: Path) -> dict[str, float]:
    """Read what there is, over and over, while another process writes it."""
    _warm_up(store, path, load(packets)[0])
    done = path.with_name(path.name + DONE)
    path.with_name(path.name + READY).touch()
    rows, begun_s = 0, 0.0
    while not done.exists():
        try:
            for batch in _until(store.read(path, -EVER, EVER, list(FIELDS)), done):
                begun_s = begun_s or time.perf_counter()
                rows += _touched(batch)
        except Exception:  # noqa: BLE001  # not there yet, or half: each peer says it its own way
            time.sleep(_RETRY_S)
        if not rows:
            time.sleep(_RETRY_S)
    if not rows:
        return {"live_rows_s": 0.0}
    return {"live_rows_s": rows / (time.perf_counter() - begun_s)}


def memcpy(_: Peer, __: Path, packets: Path) -> dict[str, float]:
    """Copy every array to the same memory."""
    batches = load(packets)
    memory = {
        name: np.empty_like(max((b[name] for b in batches), key=len), subok=False)
        for name in FIELDS
    }
    for array in memory.values():
        array.fill(0)

    def copy() -> None:
        for batch in batches:
            for name, array in batch.items():
                np.copyto(memory[name][: len(array)], array)

    return _timed("memcpy", copy)


def _timed(name: str, *acts: Callable[[], object]) -> dict[str, float]:
    """Medians of the seconds, by the clock and of CPU, that each took."""
    taken, used = [], []
    for act in acts:
        started, cpu = time.perf_counter_ns(), time.process_time_ns()
        act()
        used.append((time.process_time_ns() - cpu) / 1e9)
        taken.append((time.perf_counter_ns() - started) / 1e9)
    return {f"{name}_s": median(taken), f"{name}_cpu_s": median(used)}


def _warm_up(store: Peer, path: Path, batch: Batch) -> None:
    small = path.with_name(path.name + ".small")
    try:
        store.write(small, [{name: array[:_WARM_UP_ROWS] for name, array in batch.items()}])
        _used(store, small, FIELDS)
    finally:
        if small.is_dir():
            shutil.rmtree(small)
        else:
            for file in files(small):
                file.unlink()


def _used(
    store: Peer, path: Path, fields: Iterable[str], start: float = -EVER, stop: float = EVER
) -> int:
    """Touch batch after batch, each dropped before the next is asked for."""
    rows = 0
    for batch in store.read(path, start, stop, list(fields)):
        rows += _touched(batch)
        del batch
    return rows


def _first(store: Peer, path: Path, start: float, stop: float) -> None:
    """Open, touch the first batch of a range that goes on to the end, close."""
    with contextlib.closing(_generator(store.read(path, start, stop, list(FIELDS)))) as batches:
        for batch in batches:
            if _touched(batch):
                return
    raise BenchError(f"{path} has no row from {start} on")


def _until(batches: Iterator[Batch], done: Path) -> Iterator[Batch]:
    with contextlib.closing(_generator(batches)) as found:
        for batch in found:
            yield batch
            if done.exists():
                return


def _generator(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """Give an iterator that may be a generator a close; what it wraps closes with it."""
    yield from batches


def _touched(batch: Batch) -> int:
    """Read a value in each 4 KiB of every array; returns the rows."""
    for array in batch.values():
        assert array.flags.c_contiguous
        int(array.reshape(-1).view(np.uint8)[::_STEP].sum())
    return len(next(iter(batch.values())))


def _rows(batches: Sequence[Batch]) -> int:
    return sum(len(batch["timestamps"]) for batch in batches)


def _places(batches: Sequence[Batch]) -> list[tuple[float, float, float]]:
    """Seeded ranges of 1 % of the time, each with the end of all of it."""
    begin, end = float(batches[0]["timestamps"][0]), float(batches[-1]["timestamps"][-1])
    rng, width = random.Random(1), (end - begin) * RANGE_SHARE
    starts = [rng.uniform(begin, end - width) for _ in range(FIRST_ROWS)]
    return [(start, start + width, end) for start in starts]


def _expect(found: int, rows: int) -> None:
    if found != rows:
        raise BenchError(f"read {found} rows, {rows} were written")


ACTS: dict[str, Callable[[Peer, Path, Path], dict[str, float]]] = {
    "write": write,
    "read": read,
    "keep": keep,
    "cold": cold,
    "live": live,
    "memcpy": memcpy,
}

if __name__ == "__main__":
    act, name, store_path, packets_path = sys.argv[1:]
    found = ACTS[act](peer(name), Path(store_path), Path(packets_path))
    print(json.dumps(found), file=sys.stderr)
