"""Positions and claims: the fence of each commit, as rows that it locks first of all."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import errors

from kvstore.errors import Fenced, SinkError
from kvstore.telemetry.records import Claim, Place, Position, Work
from kvstore.telemetry.sinks.postgres.session import Connection, Micros, Session
from kvstore.telemetry.sinks.postgres.tables import Tables


class Places:
    """The table of that name."""

    def __init__(self, session: Session, tables: Tables):
        self._session = session
        self._tables = tables

    def positions(self, source: str | None) -> list[Position]:
        """As Sink.positions."""
        query = self._tables.query(
            "SELECT source, partition, next, token FROM {schema}.places WHERE next >= 0 "
            "AND (%s::text IS NULL OR source = %s) ORDER BY source, partition"
        )
        rows = self._session.read(query, [source, source])
        return [Position(Place(*row[:2]), *row[2:]) for row in rows]

    def claim(self, places: Sequence[Place]) -> list[Claim]:
        """As Sink.claim.

        A worker that stands still in the middle of a commit holds its places' locks: after
        LOCK_WAIT_S its session is ended, which undoes that commit.
        """
        try:
            return self._session.run(lambda connection: self._claim(connection, places))
        except SinkError as error:
            if not isinstance(error.__cause__, errors.LockNotAvailable):
                raise
        self._session.end_sessions(self._holders(places))
        return self._session.run(lambda connection: self._claim(connection, places))

    def check(self, connection: Connection, work: Work) -> None:
        """Lock the places until the end of the transaction; Fenced where any has moved."""
        query = self._tables.query(
            "SELECT next, token, epoch FROM {schema}.places "
            "WHERE (source, partition) = (%s, %s) FOR UPDATE"
        )
        for position, epoch in sorted(work.claims):
            row = connection.execute(query, position.place).fetchone()
            if row != (position.next, position.token, epoch):
                raise Fenced(
                    f"{position.place.source}, partition {position.place.partition}: read from "
                    f"{position.next} under claim {epoch}, found {row and (row[0], row[2])}: "
                    "another worker has claimed or moved it; nothing was kept; claim it again"
                )

    def move(self, connection: Connection, work: Work) -> None:
        """Set the positions behind what was read; they are locked already."""
        query = self._tables.query(
            "UPDATE {schema}.places SET next = %s, token = %s, updated_at = %s "
            "WHERE (source, partition) = (%s, %s)"
        )
        for place, next_, token in work.after:
            connection.execute(query, [next_, token, Micros(work.committed_us), *place])

    def _claim(self, connection: Connection, places: Sequence[Place]) -> list[Claim]:
        query = self._tables.query(
            "INSERT INTO {schema}.places AS p VALUES (%s, %s, -1, '', 1, %s, now()) "
            "ON CONFLICT (source, partition) DO UPDATE SET epoch = p.epoch + 1, "
            "worker = excluded.worker, updated_at = now() RETURNING next, token, epoch"
        )
        claims = {}
        for place in sorted(set(places)):  # in order: two that claim never wait in a ring
            row = connection.execute(query, [*place, self._session.worker]).fetchone()
            assert row is not None
            next_, token, epoch = row
            claims[place] = Claim(Position(place, next_, token), epoch)
        return [claims[place] for place in places]

    def _holders(self, places: Sequence[Place]) -> list[str]:
        query = self._tables.query(
            "SELECT DISTINCT worker FROM {schema}.places WHERE (source, partition) IN "
            "(SELECT * FROM unnest(%s::text[], %s::int[]))"
        )
        sources, partitions = map(list, zip(*places, strict=True))
        return [worker for (worker,) in self._session.read(query, [sources, partitions])]
