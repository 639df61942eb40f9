"""The sink itself: one commit is one transaction.

    lock the rows of its places, hold them against the claims (the fence)
      ─ readings: look up what may be there, copy what is not ─ dead letters ─ counts
      ─ positions ─ a row with the commit's id ─ COMMIT

A commit whose reply was lost is looked for by its id, and not repeated: see ``settle``.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, Literal, Self

import numpy as np
from psycopg import errors

from kvstore.errors import CommitUnknown, Fenced, SinkError
from kvstore.telemetry.contract import Contract
from kvstore.telemetry.records import (
    Claim,
    Count,
    DeadLetter,
    Fate,
    LetterChange,
    Outcome,
    Place,
    Position,
    Readings,
    State,
    Work,
)
from kvstore.telemetry.sinks.postgres import batch as batches
from kvstore.telemetry.sinks.postgres import binary, counts, letters
from kvstore.telemetry.sinks.postgres.batch import Batch
from kvstore.telemetry.sinks.postgres.binary import Encoded
from kvstore.telemetry.sinks.postgres.lineages import Lineages
from kvstore.telemetry.sinks.postgres.places import Places
from kvstore.telemetry.sinks.postgres.read import Reader
from kvstore.telemetry.sinks.postgres.readings import Found, StaleError, Store
from kvstore.telemetry.sinks.postgres.session import Connection, Micros, Session, address
from kvstore.telemetry.sinks.postgres.tables import DAY_US, Tables

SCHEMA: Final = "telemetry"
# Tries of one commit when the tables are changed under it: each change ends at most one try.
STALE_MAX: Final = 5


class PostgresSink:
    """As Sink, for one thread.

    url: postgresql://…, the password better in PGPASSWORD. schema: of its tables; else what the
    URL says behind ``?schema=``, else SCHEMA. mode: with "w" the tables are made where missing.

    Needs a connection of its own, or a pooler in session mode: it has settings and a temporary
    table there.
    """

    def __init__(self, url: str, *, schema: str | None = None, mode: Literal["r", "w"] = "w"):
        # Shown by pg_stat_activity and in places: who holds what.
        self.worker = f"kvstore telemetry {secrets.token_hex(8)}"
        at = address(url)
        self._mode = mode
        self._session = Session(at, self.worker)
        self._tables = Tables(self._session, schema or at.schema or SCHEMA)
        self._places = Places(self._session, self._tables)
        self._lineages = Lineages(self._session, self._tables)
        self._reader = Reader(self._session, self._tables, self._lineages)
        self._store = Store(self._tables)

    @classmethod
    def open(cls, url: str, contract: Contract, *, mode: Literal["r", "w"] = "w") -> Self:
        """As every sink is opened; what the contract has is made room for by ``evolve``."""
        del contract
        return cls(url, mode=mode)

    def __enter__(self) -> Self:
        try:
            with self._session.translating():
                _ = self._session.connection  # without retries: a wrong address stays wrong
            self._tables.open(create=self._mode == "w")
        except BaseException:
            self._session.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._session.close()

    @property
    def address(self) -> str:
        """Where it writes to, without a password."""
        return self._session.shown

    @property
    def is_hypertable(self) -> bool:
        """Whether TimescaleDB divides the readings; else they are partitioned by day."""
        return self._tables.hypertable

    def evolve(self, contract: Contract) -> None:
        """As Sink.evolve. A new column rewrites nothing and locks others out for milliseconds."""
        self._tables.evolve(contract)

    def drop_before(self, before_us: int) -> list[str]:
        """Drop the days (chunks) that end at or before that time, and the log of commits before.

        Gives the names of the days. A reading of them that is sent again is stored again.
        """
        dropped = self._tables.drop_before(before_us)
        query = self._tables.query("DELETE FROM {schema}.commits WHERE committed_at < %s")
        self._session.run(lambda c: c.execute(query, [Micros(before_us)]))
        return dropped

    def positions(self, source: str | None = None) -> list[Position]:
        """As Sink.positions."""
        return self._places.positions(source)

    def claim(self, places: Sequence[Place]) -> list[Claim]:
        """As Sink.claim."""
        return self._places.claim(places)

    # ---- commit ----

    def commit(self, work: Work) -> Outcome:
        """As Sink.commit."""
        batch = batches.batch(work.readings)
        for _ in range(STALE_MAX):
            columns = self._prepare(work, batch)
            try:
                write = partial(self._write, work=work, batch=batch, columns=columns)
                outcome, found = self._session.run(write, twice=False)
            except StaleError:
                self._tables.look()
                continue
            self._store.remember(batch, found)
            return outcome
        raise SinkError(
            f"{self.address}: the tables were changed {STALE_MAX} times under one commit; nothing "
            "was kept; change them one after the other"
        )

    def _prepare(self, work: Work, batch: Batch) -> Encoded:
        """What is done ahead of the transaction, and does no harm where nothing comes of it."""
        self._tables.make_days((np.unique(batch.ts_us // DAY_US) * DAY_US).tolist())
        if work.readings.values.keys() - self._tables.columns.keys():
            self._tables.look()
        missing = work.readings.values.keys() - self._tables.columns.keys()
        if missing:
            raise SinkError(
                f"{self.address}: there is no column for {', '.join(sorted(missing))}; evolve the "
                "sink by the contract first"
            )
        return binary.encoded(work.readings, self._lineages.numbers(work.readings.lineage))

    def _write(
        self, connection: Connection, work: Work, batch: Batch, columns: Encoded
    ) -> tuple[Outcome, Found]:
        self._places.check(connection, work)
        fates, found = self._store.put(connection, batch, columns)
        conflicting = np.flatnonzero(fates == Fate.CONFLICT).tolist()
        conflicts = [letters.conflict(work, i) for i in conflicting]
        letters.insert(connection, self._tables, work, [*work.rejections, *conflicts])
        again = frozenset((each.place, each.offset) for each in conflicts)
        letters.change(connection, self._tables, work.changes, again)
        self._places.move(connection, work)
        outcome = Outcome(
            stored=int((fates == Fate.STORED).sum()),
            duplicates=int((fates == Fate.DUPLICATE).sum()),
            rejected=len(work.rejections) + len(conflicts),
            conflicts=len(conflicts),
        )
        if not self._sign(connection, work, outcome):
            raise Fenced(f"{self.address}: commit {work.commit_id} is there already; settle it")
        # Last, since its rows may be shared with other workers, who wait for them.
        decided = counts.decided(batch, fates) if len(fates) else ()
        counts.add(connection, self._tables, [*work.seen, *decided])
        return outcome, found

    def _sign(self, connection: Connection, work: Work, outcome: Outcome) -> bool:
        """Leave the commit's id; False where it is there. Waits for one that is under way."""
        query = self._tables.query(
            "INSERT INTO {schema}.commits VALUES (%s, %s, %s, %s, %s, %s, %s, %s) "
            "ON CONFLICT DO NOTHING"
        )
        values = [work.commit_id, work.run, Micros(work.committed_us), work.contract_version]
        return connection.execute(query, [*values, *outcome]).rowcount == 1

    # ---- settling ----

    def settle(self, work: Work) -> Outcome | None:
        """As Sink.settle. Waits for a COMMIT that is still under way on the server."""
        self._session.close()
        try:
            return self._session.run(lambda connection: self._settle(connection, work))
        except SinkError as error:
            if not isinstance(error.__cause__, errors.LockNotAvailable):
                raise
        self._session.end_sessions([self.worker])  # ours of before: nobody listens to it
        return self._session.run(lambda connection: self._settle(connection, work))

    def _settle(self, connection: Connection, work: Work) -> Outcome | None:
        """Sign in its place: that waits until it is done, one way or the other."""
        with connection.transaction(force_rollback=True):
            if self._sign(connection, work, Outcome(0, 0, 0, 0)):
                return None
        query = self._tables.query(
            "SELECT stored, duplicates, rejected, conflicts FROM {schema}.commits "
            "WHERE commit_id = %s"
        )
        row = connection.execute(query, [work.commit_id]).fetchone()
        if row is None:
            raise CommitUnknown(
                f"{self.address}: commit {work.commit_id} was dropped; settle again"
            )
        return Outcome(*row)

    # ---- reading ----

    def read(
        self,
        start_us: int | None = None,
        stop_us: int | None = None,
        *,
        device_id: str | None = None,
    ) -> Iterator[Readings]:
        """As Sink.read."""
        return self._reader.read(start_us, stop_us, device_id)

    def dead_letters(
        self,
        *,
        state: State | None = None,
        reason: str | None = None,
        place: Place | None = None,
        offset: int | None = None,
    ) -> Iterator[DeadLetter]:
        """As Sink.dead_letters."""
        return letters.select(
            self._session, self._tables, state=state, reason=reason, place=place, offset=offset
        )

    def change_letters(self, changes: Sequence[LetterChange]) -> None:
        """As Sink.change_letters."""
        self._session.run(lambda c: letters.change(c, self._tables, changes))

    def counts(self, start_us: int | None = None, stop_us: int | None = None) -> Iterator[Count]:
        """As Sink.counts, in order of device, hour and name."""
        return counts.select(self._session, self._tables, start_us, stop_us)
