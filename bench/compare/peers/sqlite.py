"""SQLite: a row a packet, arrays as BLOBs, a table for each field so that one can be read alone.

WAL, synchronous=FULL, a transaction each 32 MB; pages of 16 KiB, which its documentation names for
large BLOBs; mapped for reading. SQLite has no compression.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.columns import cut, with_times
from bench.compare.packets import FIELDS, array_of, groups

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "SQLite (WAL, FULL)"
PACKAGES: tuple[str, ...] = ()
COMPRESSES = False
DURABILITY = "each 32 MB"
LIVE = True
_MAP_BYTES = 1 << 40


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Insert; commit each group."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(
            "PRAGMA page_size=16384; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
            "CREATE TABLE packets (id INTEGER PRIMARY KEY, first REAL, last REAL);"
            "CREATE INDEX packets_by_time ON packets (first, last);"
            + "".join(f"CREATE TABLE {n} (id INTEGER PRIMARY KEY, content BLOB);" for n in FIELDS)
        )
        number = 0
        for group in groups(batches):
            with database:
                for batch in group:
                    _insert(database, number, batch)
                    number += 1


def _insert(database: sqlite3.Connection, number: int, batch: Batch) -> None:
    times = batch["timestamps"]
    row = (number, float(times[0]), float(times[-1]))
    database.execute("INSERT INTO packets VALUES (?, ?, ?)", row)
    for name in FIELDS:
        content = batch[name].reshape(-1).view("u1").data
        database.execute(f"INSERT INTO {name} VALUES (?, ?)", (number, content))  # noqa: S608


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Find the packets by the index, then fetch each one's fields."""
    wanted = with_times(fields)
    query = "SELECT {} FROM packets {} WHERE first <= ? AND last >= ? ORDER BY first, packets.id"
    query = query.format(
        ", ".join(f"{name}.content" for name in wanted),
        " ".join(f"JOIN {name} USING (id)" for name in wanted),
    )
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        database.execute(f"PRAGMA mmap_size={_MAP_BYTES}")
        for row in database.execute(query, (stop, start)):
            batch = {n: array_of(n, content) for n, content in zip(wanted, row, strict=True)}
            yield cut(batch, fields, start, stop)
