"""HDF5 by h5py: one extensible dataset a field, chunks of 1-2 MB, in SWMR mode.

Flush and fsync after each commit. HDF5 keeps no journal: SWMR's order of writes lets a reader or
the next opening follow, but a power cut between two syncs may leave a file that has to be cleared.
Rows come in whole chunks, so that none is compressed twice; the time column is searched whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.compare.packets import CHUNK_ROWS, COMMIT_ROWS, FIELDS, blocks, pieces
from bench.compare.peer import sync

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "HDF5 (h5py)"
PACKAGES: tuple[str, ...] = ("h5py",)
COMPRESSES = False
DURABILITY = "fsync each 31 MB, no journal"
LIVE = True
# As rows come in chunks, the cache holds one each; HDF5's default of 1 MiB holds none.
_CACHE_BYTES = 8 << 20


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Extend, assign, flush, fsync."""
    write_with(path, batches, {})


def write_with(path: Path, batches: Iterable[Batch], options: Mapping[str, Any]) -> None:
    """Write with filters."""
    import h5py  # noqa: PLC0415  # a peer

    with h5py.File(path, "x", libver="latest", rdcc_nbytes=_CACHE_BYTES) as file:
        for name, (dtype, shape) in FIELDS.items():
            chunk = (CHUNK_ROWS if shape else COMMIT_ROWS, *shape)
            file.create_dataset(
                name, (0, *shape), dtype, maxshape=(None, *shape), chunks=chunk, **options
            )
        file.swmr_mode = True
        rows = 0
        for block in blocks(batches):
            rows += len(block["timestamps"])
            for name, array in block.items():
                file[name].resize(rows, axis=0)
                file[name][rows - len(array) :] = array
            file.flush()
            sync(path)
    sync(path)


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Search the times, then read chunk by chunk."""
    import h5py  # noqa: PLC0415  # a peer

    with h5py.File(path, "r", swmr=True, libver="latest", rdcc_nbytes=_CACHE_BYTES) as file:
        times = file["timestamps"][: min(len(file[name]) for name in FIELDS)]
        for rows in pieces(times, start, stop):
            yield {n: times[rows] if n == "timestamps" else file[n][rows] for n in fields}
