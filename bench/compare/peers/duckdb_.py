"""DuckDB: one table of the particles, INTEGER[n] arrays, from and to Arrow.

A transaction each 31 MB; the log is fsynced at each commit, and its size makes a checkpoint due.
Compression is the engine's own choice for each column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.columns import batch_of, table
from bench.compare.packets import CHUNK_ROWS, blocks
from bench.compare.peer import EVER

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "DuckDB"
PACKAGES: tuple[str, ...] = ("duckdb", "pyarrow")
COMPRESSES = True
DURABILITY = "each 31 MB"
LIVE = False


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Insert from Arrow; each statement is a transaction."""
    import duckdb  # noqa: PLC0415  # a peer

    with duckdb.connect(str(path)) as database:
        database.execute(
            "CREATE TABLE particles"
            " (timestamps DOUBLE, scattering INTEGER[1024], spectral INTEGER[512])"
        )
        for block in blocks(batches):
            database.register("block", table(block))
            database.execute("INSERT INTO particles SELECT * FROM block")
            database.unregister("block")


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Select; rows come in the order in which they were inserted."""
    import duckdb  # noqa: PLC0415  # a peer

    limits = [
        f"timestamps >= {start!r}::DOUBLE" if start != -EVER else "",
        f"timestamps <= {stop!r}::DOUBLE" if stop != EVER else "",
    ]
    where = " AND ".join(filter(None, limits)) or "true"
    query = f"SELECT {', '.join(fields)} FROM particles WHERE {where}"  # noqa: S608  # our names
    with duckdb.connect(str(path), read_only=True) as database:
        for record in database.sql(query).to_arrow_reader(CHUNK_ROWS):
            yield batch_of(record, fields)
