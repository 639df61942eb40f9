"""TileDB: a dense array for each field, tiles of 512 rows, byte shuffle and LZ4 at level 5.

A write is a fragment of whole tiles, so that none is written twice. TileDB fsyncs its files but not
their folders (seen with strace): the bench does, after each 31 MB. The times are read whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.compare.packets import CHUNK_ROWS, COMMIT_ROWS, FIELDS, blocks, pieces
from bench.compare.peer import Syncer

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "TileDB, LZ4"
PACKAGES: tuple[str, ...] = ("tiledb",)
COMPRESSES = True
DURABILITY = "each 31 MB, folders by the bench, no transaction"
LIVE = True
_ROWS_MAX = COMMIT_ROWS << 30


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Write a fragment a field for each commit; the times last, they say what is there."""
    import tiledb  # noqa: PLC0415  # a peer

    path.mkdir()
    for name in FIELDS:
        tiledb.Array.create(str(path / name), _schema(name))
    syncer, rows = Syncer(path), 0
    for block in blocks(batches):
        count = len(block["timestamps"])
        for name in reversed(FIELDS):
            with tiledb.open(str(path / name), "w") as array:
                array[rows : rows + count] = block[name]
        rows += count
        syncer.sync()


def _schema(name: str) -> object:
    import tiledb  # noqa: PLC0415  # a peer

    dtype, shape = FIELDS[name]
    tile = CHUNK_ROWS if shape else COMMIT_ROWS
    dims = [tiledb.Dim("row", domain=(0, _ROWS_MAX - 1), tile=tile, dtype=np.int64)]
    dims += [
        tiledb.Dim(f"d{number}", domain=(0, size - 1), tile=size, dtype=np.int64)
        for number, size in enumerate(shape)
    ]
    filters = tiledb.FilterList([tiledb.ByteShuffleFilter(), tiledb.LZ4Filter(level=5)])
    attribute = tiledb.Attr(dtype=np.dtype(dtype), filters=filters)
    return tiledb.ArraySchema(domain=tiledb.Domain(*dims), attrs=[attribute])


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Search the times, then read a tile first, then ten at a time."""
    import tiledb  # noqa: PLC0415  # a peer

    with tiledb.open(str(path / "timestamps")) as array:
        span = array.nonempty_domain()
        times = array[: span[0][1] + 1] if span else np.empty(0)
    arrays = {name: tiledb.open(str(path / name)) for name in fields if name != "timestamps"}
    try:
        for rows in pieces(times, start, stop, COMMIT_ROWS):
            yield {n: times[rows] if n == "timestamps" else arrays[n][rows] for n in fields}
    finally:
        for array in arrays.values():
            array.close()
