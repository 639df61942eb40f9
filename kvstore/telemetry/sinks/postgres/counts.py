"""Figures of quality by device and hour, added up in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from psycopg import sql

from kvstore.telemetry import counts
from kvstore.telemetry.records import Count, Fate
from kvstore.telemetry.sinks.postgres.batch import Batch
from kvstore.telemetry.sinks.postgres.session import Connection, Micros, Session, storable
from kvstore.telemetry.sinks.postgres.tables import Tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

# One statement's arrays, and one page that is read.
ROWS_AT_ONCE: Final = 10_000


def add(connection: Connection, tables: Tables, found: Iterable[Count]) -> None:
    """Add figures up, in order: workers that share a row wait for each other, never in a ring."""
    total = _summed(found)
    query = tables.query(
        "INSERT INTO {schema}.counts AS c SELECT * FROM "
        "unnest(%b::text[], %b::timestamptz[], %b::text[], %b::bigint[]) "
        "ON CONFLICT (device_id, hour, name) DO UPDATE SET value = c.value + excluded.value"
    )
    for first in range(0, len(total), ROWS_AT_ONCE):
        some = total[first : first + ROWS_AT_ONCE]
        keys, values = zip(*some, strict=True)
        devices, hours, names = zip(*keys, strict=True)
        columns = [list(devices), list(map(Micros, hours)), list(names), list(values)]
        connection.execute(query, columns)


def decided(batch: Batch, fates: NDArray[np.uint8]) -> Iterator[Count]:
    """As counts.decided, along the order by device and time that a batch has: without a search."""
    hours = batch.ts_us[batch.order] // counts.HOUR_US
    devices = batch.device[batch.order]
    ends = (np.diff(devices, prepend=-1) != 0) | (np.diff(hours, prepend=hours[:1]) != 0)
    starts = np.flatnonzero(ends)
    for fate in Fate:
        totals = np.add.reduceat(fates[batch.order] == fate, starts, dtype=np.int64)
        for i in np.flatnonzero(totals).tolist():
            device_id = batch.devices[int(devices[starts[i]])]
            hour_us = int(hours[starts[i]]) * counts.HOUR_US
            for name in counts.NAMES[fate]:
                yield Count(device_id, hour_us, name, int(totals[i]))


def _summed(found: Iterable[Count]) -> list[tuple[tuple[str, int, str], int]]:
    """Sums by key, in the order of keys."""
    totals: dict[tuple[str, int, str], int] = {}
    for device_id, hour_us, name, value in found:
        key = storable(device_id), hour_us, name
        totals[key] = totals.get(key, 0) + value
    return sorted(each for each in totals.items() if each[1])


def select(
    session: Session, tables: Tables, start_us: int | None, stop_us: int | None
) -> Iterator[Count]:
    """As Sink.counts, in order of the key, a page at a time."""
    terms: list[tuple[str, list[Any]]] = [("value <> 0", [])]
    if start_us is not None:
        terms.append(("hour >= %s", [Micros(start_us)]))
    if stop_us is not None:
        terms.append(("hour < %s", [Micros(stop_us)]))
    page: list[tuple[Any, ...]] | None = None
    while page is None or len(page) == ROWS_AT_ONCE:
        further = [("(device_id, hour, name) > (%s, %s, %s)", _key(page[-1]))] if page else []
        page = session.read(*_query(tables, [*terms, *further]))
        yield from (Count(*row) for row in page)


def _query(tables: Tables, terms: list[tuple[str, list[Any]]]) -> tuple[Any, list[Any]]:
    query = tables.query(
        "SELECT device_id, hour, name, value FROM {schema}.counts WHERE {wanted} "
        "ORDER BY device_id, hour, name LIMIT %s",
        wanted=sql.SQL(" AND ").join(tables.query(term) for term, _ in terms),
    )
    return query, [*(value for _, values in terms for value in values), ROWS_AT_ONCE]


def _key(row: tuple[Any, ...]) -> list[Any]:
    return [row[0], Micros(row[1]), row[2]]
