"""Dead letters in PostgreSQL: written, changed and read back, letter for letter.

Payloads, keys and headers are bytes and come back exactly. Texts that only help to find a letter
(its device) have U+0000 and halves of surrogate pairs replaced: PostgreSQL's text holds neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from psycopg import sql

from kvstore.errors import SinkError
from kvstore.telemetry import counts
from kvstore.telemetry.records import (
    DeadLetter,
    Headers,
    LetterChange,
    Place,
    Reason,
    Rejection,
    State,
    Work,
)
from kvstore.telemetry.sinks.postgres.session import Connection, Micros, Session, storable
from kvstore.telemetry.sinks.postgres.tables import Tables

CONFLICT: Final = (Reason(counts.CONFLICT),)
# Letters fetched at once: a payload may have megabytes, most have some hundred bytes.
PAGE_ROWS: Final = 200

_INSERT: Final = """
INSERT INTO {schema}.dead_letters (source, partition, event_offset, payload, key, headers, codes,
    reasons, device_id, ts, first_seen_at, contract_version, run, state, replays)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, 'open', 0)
ON CONFLICT DO NOTHING
"""
_SELECT: Final = """
SELECT source, partition, event_offset, payload, key, headers::text, reasons::text, device_id, ts,
    first_seen_at, contract_version, run, state, replays
FROM {schema}.dead_letters WHERE {wanted} ORDER BY source, partition, event_offset LIMIT %s
"""
_CHANGE: Final = """
UPDATE {schema}.dead_letters SET state = %s, replays = %s
WHERE (source, partition, event_offset) = (%s, %s, %s)
"""
_CHANGE_TO_CONFLICT: Final = """
UPDATE {schema}.dead_letters SET state = %s, replays = %s, codes = %s, reasons = %s
WHERE (source, partition, event_offset) = (%s, %s, %s)
"""


def conflict(work: Work, i: int) -> Rejection:
    """The dead letter of a reading whose identity is stored with other values."""
    readings, lineage = work.readings, work.readings.lineage
    place = Place(lineage.source[i], int(lineage.partition[i]))
    return Rejection(
        place,
        int(lineage.offset[i]),
        work.raw[i],
        CONFLICT,
        device_id=readings.device_id[i],
        ts_us=int(readings.ts_us[i]),
    )


def insert(
    connection: Connection, tables: Tables, work: Work, rejections: Iterable[Rejection]
) -> None:
    """Add letters; a position that has one keeps it. In order, so that workers never deadlock."""
    rows = [_row(each, work) for each in sorted(rejections, key=lambda r: (r.place, r.offset))]
    if rows:
        with connection.cursor() as cursor:
            cursor.executemany(tables.query(_INSERT), rows)


def change(
    connection: Connection,
    tables: Tables,
    changes: Sequence[LetterChange],
    conflicting: frozenset[tuple[Place, int]] = frozenset(),
) -> None:
    """Set states. A letter that was replayed and conflicts stays open, for that reason now."""
    for place, offset, state, replays in sorted(changes):
        if state == State.REPLAYED and (place, offset) in conflicting:
            query = _CHANGE_TO_CONFLICT
            values: list[object] = [
                State.OPEN.value,
                replays,
                [counts.CONFLICT],
                _reasons(CONFLICT),
            ]
        else:
            query, values = _CHANGE, [state.value, replays]
        changed = connection.execute(tables.query(query), [*values, *place, offset])
        if changed.rowcount != 1:
            raise SinkError(
                f"there is no dead letter of event {offset} of {place.source}, partition "
                f"{place.partition}; list those there are"
            )


def select(
    session: Session,
    tables: Tables,
    *,
    state: State | None,
    reason: str | None,
    place: Place | None,
    offset: int | None,
) -> Iterator[DeadLetter]:
    """Letters in order, a page at a time: no transaction is open in between."""
    wanted: list[tuple[str, list[Any]]] = [("true", [])]
    if state is not None:
        wanted.append(("state = %s", [state.value]))
    if reason is not None:
        wanted.append(("%s = ANY(codes)", [reason]))
    if place is not None:
        wanted.append(("(source, partition) = (%s, %s)", [*place]))
    if offset is not None:
        wanted.append(("event_offset = %s", [offset]))
    page: list[Any] = []
    behind: list[tuple[str, list[Any]]] = []
    while not behind or len(page) == PAGE_ROWS:
        terms = [*wanted, *behind]
        where = sql.SQL(" AND ").join(tables.query(term) for term, _ in terms)
        values = [value for _, of_it in terms for value in of_it]
        page = session.read(tables.query(_SELECT, wanted=where), [*values, PAGE_ROWS])
        yield from map(_letter, page)
        if page:
            behind = [("(source, partition, event_offset) > (%s, %s, %s)", [*page[-1][:3]])]
        else:
            return


def _row(each: Rejection, work: Work) -> tuple[object, ...]:
    return (
        *each.place,
        each.offset,
        each.payload,
        each.key,
        json.dumps([(name, None if v is None else v.hex()) for name, v in each.headers]),
        [storable(reason.code) for reason in each.reasons],
        _reasons(each.reasons),
        storable(each.device_id),
        None if each.ts_us is None else Micros(each.ts_us),
        Micros(work.committed_us),
        work.contract_version,
        work.run,
    )


def _reasons(reasons: Sequence[Reason]) -> str:
    return json.dumps(reasons)


def _letter(row: tuple[Any, ...]) -> DeadLetter:
    (source, partition, offset, payload, key, headers, reasons, device_id, ts_us) = row[:9]
    (first_seen_us, contract_version, run, state, replays) = row[9:]
    rejection = Rejection(
        Place(source, partition),
        offset,
        payload,
        tuple(Reason(*each) for each in json.loads(reasons)),
        key,
        _headers(headers),
        device_id,
        ts_us,
    )
    return DeadLetter(rejection, first_seen_us, contract_version, run, State(state), replays)


def _headers(text: str) -> Headers:
    return tuple((name, None if v is None else bytes.fromhex(v)) for name, v in json.loads(text))
