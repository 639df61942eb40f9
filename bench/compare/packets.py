"""The packets of a comparison in a file, which every child maps: nobody's anonymous memory.

One file of the batches' bytes as Workload lays them out, one of rows per batch. A child that
reads them from the page cache neither draws random numbers nor counts them in its own peak.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from kvstore.schema import Batch

FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "timestamps": ("<f8", ()),
    "scattering": ("<i4", (64, 16)),
    "spectral": ("<i4", (32, 16)),
}
COMMIT_BYTES = 32 << 20
CHUNK_ROWS = 512  # 2 MB of scattering, 1 MB of spectral
COMMIT_ROWS = 10 * CHUNK_ROWS  # 31.5 MB: whole chunks, for stores that rewrite partial ones


def save(path: Path, work: Workload) -> None:
    """Write a workload's bytes, and its rows per batch beside them."""
    path.write_bytes(work.raw)
    rows = [len(batch["timestamps"]) for batch in work.batches]
    path.with_suffix(".json").write_text(json.dumps(rows))


def load(path: Path) -> list[Batch]:
    """Map a saved workload, with all of its pages present."""
    pool = np.memmap(path, np.uint8, mode="r")
    pool[::4096].sum()
    offset = 0
    batches: list[Batch] = []
    for rows in json.loads(path.with_suffix(".json").read_text()):
        batch, offset = _placed(pool, offset, rows)
        batches.append(batch)
    return batches


def _placed(pool: NDArray[Any], offset: int, rows: int) -> tuple[Batch, int]:
    batch: Batch = {}
    for name, (dtype, shape) in FIELDS.items():
        size = rows * row_bytes(name)
        batch[name] = np.asarray(pool[offset : offset + size]).view(dtype).reshape(rows, *shape)
        offset += size
    return batch, offset


def row_bytes(name: str) -> int:
    """Bytes of one row of a field."""
    dtype, shape = FIELDS[name]
    return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=int))


def array_of(name: str, content: bytes | memoryview | NDArray[Any]) -> NDArray[Any]:
    """See a field's rows in a buffer, without a copy."""
    dtype, shape = FIELDS[name]
    return np.frombuffer(content, dtype).reshape(-1, *shape)


def groups(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Batches together that make a commit of about 32 MB; never an empty one."""
    group: list[Batch] = []
    size = 0
    for batch in batches:
        group.append(batch)
        size += sum(array.nbytes for array in batch.values())
        if size >= COMMIT_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def blocks(batches: Iterable[Batch], rows: int = COMMIT_ROWS) -> Iterator[Batch]:
    """Cut and join batches into copies of exactly so many rows, the last one shorter."""
    held: list[Batch] = []
    held_rows = 0
    for batch in batches:
        at = 0
        while held_rows + len(batch["timestamps"]) - at >= rows:
            held.append({name: a[at : at + rows - held_rows] for name, a in batch.items()})
            at += rows - held_rows
            yield _joined(held)
            held, held_rows = [], 0
        held.append({name: array[at:] for name, array in batch.items()})
        held_rows += len(batch["timestamps"]) - at
    if held_rows:
        yield _joined(held)


def _joined(held: list[Batch]) -> Batch:
    return {name: np.concatenate([batch[name] for batch in held]) for name in FIELDS}


def within(batch: Batch, times: NDArray[Any], start: float, stop: float) -> Batch:
    """Keep the rows in [start, stop] of a batch whose sorted times are given; views."""
    first = int(np.searchsorted(times, start, side="left"))
    last = int(np.searchsorted(times, stop, side="right"))
    return {name: array[first:last] for name, array in batch.items()}


def pieces(
    times: NDArray[Any], start: float, stop: float, rows: int = CHUNK_ROWS
) -> Iterator[slice]:
    """Cut the rows in [start, stop] at whole chunks, so that none is decompressed twice.

    The first piece ends with its chunk, whatever rows is, so that a range begins soon.
    """
    first = int(np.searchsorted(times, start, side="left"))
    last = int(np.searchsorted(times, stop, side="right"))
    step = CHUNK_ROWS
    while first < last:
        end = min(last, first - first % CHUNK_ROWS + step)
        yield slice(first, end)
        first, step = end, rows
