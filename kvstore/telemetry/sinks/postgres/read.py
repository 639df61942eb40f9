"""Readings read back from PostgreSQL, in order of time, in bounded batches.

One day (partition, chunk) after the other: the server sorts a day, keeps the result beside the
tables (a cursor WITH HOLD) and hands out pages of it. So no transaction and no lock is open while
the caller works on a page, however long that takes, and no index by time is needed for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import psycopg
from psycopg import sql

from kvstore.telemetry.records import Column, Lineage, Readings
from kvstore.telemetry.sinks.postgres.lineages import Lineages
from kvstore.telemetry.sinks.postgres.session import Micros, Session, named
from kvstore.telemetry.sinks.postgres.tables import Span, Tables

PAGE_ROWS: Final = 10_000


class Reader:
    """Reads for one sink."""

    def __init__(self, session: Session, tables: Tables, lineages: Lineages):
        self._session = session
        self._tables = tables
        self._lineages = lineages
        self._reads = 0

    def read(
        self, start_us: int | None, stop_us: int | None, device_id: str | None
    ) -> Iterator[Readings]:
        """As Sink.read."""
        columns = dict(self._tables.columns)
        for span in self._tables.spans():
            start, stop = _overlap(span, start_us, stop_us)
            if start is None or stop is None or start < stop:
                yield from self._read_span(columns, start, stop, device_id)

    def _read_span(
        self, columns: dict[str, str], start: int | None, stop: int | None, device_id: str | None
    ) -> Iterator[Readings]:
        terms: list[tuple[str, object]] = []
        if start is not None:
            terms.append(("ts >= %s", Micros(start)))
        if stop is not None:
            terms.append(("ts < %s", Micros(stop)))
        if device_id is not None:
            terms.append(("device_id = %s", device_id))
        query = self._tables.query(
            "SELECT device_id, ts, extras::text, _extras_text, _ingested_at, _offset, _lineage"
            "{columns} FROM {schema}.readings WHERE {wanted} ORDER BY ts, device_id",
            columns=sql.SQL("").join(sql.SQL(", ") + named(name) for name in columns),
            wanted=sql.SQL(" AND ").join(self._tables.query(t) for t in ["true", *dict(terms)]),
        )
        with self._session.translating():
            connection = self._session.connection
            self._reads += 1
            cursor = psycopg.ServerCursor(connection, f"kvstore_{self._reads}", withhold=True)
            cursor.format = psycopg.pq.Format.BINARY
            with cursor:
                cursor.execute(query, [value for _, value in terms], binary=True)
                while page := cursor.fetchmany(PAGE_ROWS):
                    yield self._readings(page, columns)

    def _readings(self, page: list[tuple[Any, ...]], columns: dict[str, str]) -> Readings:
        device, ts, extras, text, ingested, offset, lineage, *values = zip(*page, strict=True)
        origins = self._lineages.origins(lineage)
        named = zip(columns.items(), values, strict=True)
        return Readings(
            list(device),
            np.array(ts, np.int64),
            {name: _column(kind, column) for (name, kind), column in named},
            [_extras(*each) for each in zip(extras, text, strict=True)],
            Lineage(
                [each.source for each in origins],
                np.array([each.partition for each in origins], np.int32),
                np.array(offset, np.int64),
                np.array(ingested, np.int64),
                np.array([each.contract_version for each in origins], np.int16),
                [each.run for each in origins],
            ),
        )


def _overlap(
    span: Span, start_us: int | None, stop_us: int | None
) -> tuple[int | None, int | None]:
    starts = [us for us in (span.start_us, start_us) if us is not None]
    stops = [us for us in (span.stop_us, stop_us) if us is not None]
    return max(starts, default=None), min(stops, default=None)


def _column(kind: str, column: tuple[Any, ...]) -> Column:
    # None becomes NaN
    return list(column) if kind == "text" else np.array(column, np.float64)


def _extras(found: str | None, text: str | None) -> str | None:
    """As they came: jsonb sorts keys by length and sets blanks."""
    if text is not None or found is None:
        return text
    return json.dumps(json.loads(found), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
