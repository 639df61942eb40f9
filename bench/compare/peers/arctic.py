"""ArcticDB on LMDB: a symbol for each field, a DataFrame of a column a value, times as its index.

An append for each 31 MB; what LMDB itself syncs is ArcticDB's choice, so the bench fsyncs too.
Frames come by column and are copied into rows, which is what the other stores give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare.columns import cut
from bench.compare.packets import CHUNK_ROWS, COMMIT_ROWS, FIELDS, blocks
from bench.compare.peer import EVER, Syncer

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "ArcticDB (LMDB), LZ4"
PACKAGES: tuple[str, ...] = ("arcticdb", "pandas")
COMPRESSES = True
DURABILITY = "fsync by the bench each 31 MB, no transaction"
LIVE = True
_MAP = "64GB"
_COLUMNS_MAX = 1024
# Its index has ns, a double of this epoch is 0.2 us coarse: look wider, then cut by the values.
_WIDER_NS = 1_000


def _library(path: Path) -> Any:
    import arcticdb  # noqa: PLC0415  # a peer

    options = arcticdb.LibraryOptions(
        columns_per_segment=_COLUMNS_MAX, rows_per_segment=CHUNK_ROWS
    )
    arctic = arcticdb.Arctic(f"lmdb://{path}?map_size={_MAP}")
    return arctic.get_library("particles", create_if_missing=True, library_options=options)


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Append a frame a field for each commit; the times last, they say what is there."""
    import pandas as pd  # noqa: PLC0415  # a peer

    library, syncer = _library(path), Syncer(path)
    for block in blocks(batches):
        index = pd.DatetimeIndex((block["timestamps"] * 1e9).astype("datetime64[ns]"))
        for name in reversed(FIELDS):
            rows = block[name].reshape(len(index), -1)
            columns = [str(number) for number in range(rows.shape[1])]
            library.append(name, pd.DataFrame(rows, index, columns), prune_previous_versions=True)
        syncer.sync()


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Read row ranges of 5,120 where everything is asked for, else by the index."""
    library = _library(path)
    if start == -EVER and stop == EVER:
        rows = library.get_description("timestamps").row_count
        for at in range(0, rows, COMMIT_ROWS):
            ends = (at, min(rows, at + COMMIT_ROWS))
            yield {name: _rows(library.read(name, row_range=ends).data, name) for name in fields}
        return
    wanted = (*fields, "timestamps")
    ends = (_time(start, -_WIDER_NS), _time(stop, _WIDER_NS))
    batch = {name: _rows(library.read(name, date_range=ends).data, name) for name in wanted}
    yield cut(batch, fields, start, stop)


def _time(seconds: float, wider_ns: int) -> Any:
    import pandas as pd  # noqa: PLC0415  # a peer

    return None if abs(seconds) == EVER else pd.Timestamp(int(seconds * 1e9) + wider_ns)


def _rows(frame: Any, name: str) -> Any:
    return np.ascontiguousarray(frame.to_numpy()).reshape(-1, *FIELDS[name][1])
