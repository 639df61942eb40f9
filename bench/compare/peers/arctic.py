"""ArcticDB on LMDB: a symbol for each field, a DataFrame of a column a value, times as its index.

An append for each 31 MB, which LMDB syncs by itself (seen with strace). Segments of 512 rows.
Frames come by column and are copied into rows, which is what the other stores give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare.packets import CHUNK_ROWS, COMMIT_ROWS, FIELDS, blocks, pieces

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "ArcticDB (LMDB), LZ4"
PACKAGES: tuple[str, ...] = ("arcticdb", "pandas")
COMPRESSES = True
DURABILITY = "each 31 MB, no transaction over symbols"
LIVE = True
_MAP = "64GB"
_COLUMNS_MAX = 1024


def _library(path: Path) -> Any:
    import arcticdb  # noqa: PLC0415  # a peer

    options = arcticdb.LibraryOptions(columns_per_segment=_COLUMNS_MAX, rows_per_segment=CHUNK_ROWS)
    arctic = arcticdb.Arctic(f"lmdb://{path}?map_size={_MAP}")
    return arctic.get_library("particles", create_if_missing=True, library_options=options)


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Append a frame a field for each commit; the times last, they say what is there."""
    import pandas as pd  # noqa: PLC0415  # a peer

    library = _library(path)
    for block in blocks(batches):
        index = pd.DatetimeIndex((block["timestamps"] * 1e9).astype("datetime64[ns]"))
        for name in reversed(FIELDS):
            rows = block[name].reshape(len(index), -1)
            columns = [str(number) for number in range(rows.shape[1])]
            library.append(name, pd.DataFrame(rows, index, columns), prune_previous_versions=True)


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Search the times, then read a segment first, then ten at a time."""
    library = _library(path)
    times = _rows(library.read("timestamps").data, "timestamps")
    for rows in pieces(times, start, stop, COMMIT_ROWS):
        ends = (rows.start, rows.stop)
        yield {name: _rows(library.read(name, row_range=ends).data, name) for name in fields}


def _rows(frame: Any, name: str) -> Any:
    return np.ascontiguousarray(frame.to_numpy()).reshape(-1, *FIELDS[name][1])
