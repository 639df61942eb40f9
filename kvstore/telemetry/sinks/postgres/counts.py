"""Figures of quality by device and hour, added up in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from psycopg import sql

from kvstore.telemetry import counts
from kvstore.telemetry.records import Count
from kvstore.telemetry.sinks.postgres.session import Connection, Micros, Session, storable
from kvstore.telemetry.sinks.postgres.tables import Tables

# One statement's arrays, and one page that is read.
ROWS_AT_ONCE: Final = 10_000


def add(connection: Connection, tables: Tables, found: Iterable[Count]) -> None:
    """Add figures up, in order: workers that share a row wait for each other, never in a ring."""
    total = counts.summed(each._replace(device_id=storable(each.device_id)) for each in found)
    query = tables.query(
        "INSERT INTO {schema}.counts AS c SELECT * FROM "
        "unnest(%b::text[], %b::timestamptz[], %b::text[], %b::bigint[]) "
        "ON CONFLICT (device_id, hour, name) DO UPDATE SET value = c.value + excluded.value"
    )
    for first in range(0, len(total), ROWS_AT_ONCE):
        some = total[first : first + ROWS_AT_ONCE]
        devices, hours, names, values = map(list, zip(*some, strict=True))
        connection.execute(query, [devices, list(map(Micros, hours)), names, values])


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
