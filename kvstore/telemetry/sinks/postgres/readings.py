"""The readings of a commit: which are there, in what shape, and the rest copied in.

The primary key alone decides which are there; all else is a guess that makes it fast. A reading
behind the newest that this sink has stored of its device is taken for new and copied straight in,
under a savepoint. All others are staged in a temporary table first and looked up: that is how
repeats, late readings and conflicts are found. Where the guess was wrong the key refuses the COPY,
the savepoint is rolled back, and the whole batch is looked up.

Lost to this: staging all readings and ON CONFLICT DO NOTHING, at half the speed, which does not
tell a repeat from a conflict.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from psycopg import errors, sql

from kvstore.errors import SinkError
from kvstore.telemetry.sinks.postgres import batch as batches
from kvstore.telemetry.sinks.postgres import binary
from kvstore.telemetry.sinks.postgres.batch import Batch
from kvstore.telemetry.sinks.postgres.binary import Encoded, Rows
from kvstore.telemetry.sinks.postgres.session import Connection, Micros, named
from kvstore.telemetry.sinks.postgres.tables import Tables

Fates: TypeAlias = NDArray[np.uint8]
Found: TypeAlias = NDArray[np.uint8]

# Looks into the table before a commit gives up. Each further one ends because another worker has
# stored some of the same readings in between: rare, and not many times in a row.
LOOKS_MAX: Final = 5
# Devices whose newest reading is remembered, some 150 MB at most. Beyond, all are forgotten, and
# the next batch of each is looked up.
DEVICES_MAX: Final = 1_000_000


class StaleError(Exception):
    """Columns or days are no longer as known: look again, then try again."""


class Store:
    """Stores batches, and remembers how far each device has come."""

    def __init__(self, tables: Tables):
        self._tables = tables
        self._newest_us: dict[str, int] = {}

    def put(self, connection: Connection, batch: Batch, columns: Encoded) -> tuple[Fates, Found]:
        """Decide on each reading, and copy the new ones in. ``remember`` once it is durable.

        StaleError where columns or days have changed.
        """
        found = np.zeros(len(batch.ts_us), np.uint8)
        if not len(found):
            return found, found
        if not self._tables.are_as_known(connection):
            raise StaleError
        suspects = batch.suspects(self._newest_us)
        for _ in range(LOOKS_MAX):
            if len(suspects):
                found = self._look_up(connection, batch, columns, suspects)
            fates = batch.fates(found)
            if self._copied(connection, columns, batch.fresh(fates)):
                return fates, found
            suspects = batch.order
        raise SinkError(
            "other workers stored readings of the same identities again and again while one commit "
            "was at work; nothing was kept; let the events of a device go through one worker"
        )

    def remember(self, batch: Batch, found: Found) -> None:
        """What is stored now of each device; of one whose latest was there before, nothing."""
        if len(self._newest_us) > DEVICES_MAX:
            self._newest_us.clear()
        latest = batch.latest()
        news = zip(batch.devices, batch.ts_us[latest].tolist(), found[latest].tolist(), strict=True)
        for device, ts_us, was in news:
            newest_us = self._newest_us.get(device)
            if newest_us is not None and ts_us <= newest_us:
                continue
            if was == batches.ABSENT:
                self._newest_us[device] = ts_us
            else:  # others have stored it: there may be more behind it
                self._newest_us.pop(device, None)

    def _copied(self, connection: Connection, columns: Encoded, rows: Rows) -> bool:
        """Copy rows in; False, and as if nothing had happened, where the key refuses one."""
        if not len(rows):
            return True
        try:
            with connection.transaction():  # a savepoint
                self._copy(connection, self._tables.table("readings"), columns, rows)
        except errors.UniqueViolation:
            return False
        except errors.CheckViolation:  # a day's partition was dropped since
            raise StaleError from None
        return True

    def _look_up(self, connection: Connection, batch: Batch, columns: Encoded, rows: Rows) -> Found:
        """What is stored under the identities of these rows; ABSENT for all others.

        An index scan a row, whatever the statistics say: a new day has none.
        """
        found = np.zeros(len(batch.ts_us), np.uint8)
        staged = self._tables.stage(connection)
        self._copy(connection, staged, binary.numbered(columns, len(found)), rows)
        connection.execute("SET LOCAL enable_seqscan = off")
        connection.execute("SET LOCAL enable_bitmapscan = off")
        times_us = batch.ts_us[rows]
        span = [Micros(int(times_us.min())), Micros(int(times_us.max()))]
        answer = connection.execute(self._query(staged), span, prepare=False, binary=True)
        for row, same in answer.fetchall():
            found[row] = batches.SAME if same else batches.OTHER
        connection.execute(self._tables.query("TRUNCATE {staged}", staged=staged), ())
        return found

    def _query(self, staged: sql.SQL) -> sql.Composed:
        """Which staged rows are stored, and whether with the same values.

        OFFSET 0 keeps the inner part as it stands: for each staged row one probe of the key.
        """
        names = ["_extras_text", *self._tables.columns]
        same = [
            self._tables.query("r.{c} IS NOT DISTINCT FROM s.{c}", c=named(name)) for name in names
        ]
        return self._tables.query(
            "SELECT s._row, stored.same FROM {staged} s CROSS JOIN LATERAL ("
            "SELECT r.extras::text IS NOT DISTINCT FROM s.extras::text AND {same} AS same "
            "FROM {schema}.readings r WHERE r.device_id = s.device_id AND r.ts = s.ts "
            "AND r.ts BETWEEN %s AND %s OFFSET 0) AS stored",
            same=sql.SQL(" AND ").join(same),
            staged=staged,
        )

    def _copy(self, connection: Connection, table: sql.SQL, columns: Encoded, rows: Rows) -> None:
        names = sql.SQL(", ").join(map(named, columns.columns))
        statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(table, names)
        # COPY takes no parameters, so that nothing halves what ``named`` has doubled.
        query = sql.SQL(statement.as_string(None).replace("%%", "%"))
        with connection.cursor() as cursor, cursor.copy(query) as copy:
            for piece in columns.pieces(rows):
                copy.write(piece)
