"""Where readings came from, once for all that share it: numbers of rows in ``lineages``.

Rows are added outside of commits, since one that nothing refers to does no harm, and never change:
what was seen once is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.telemetry.records import Lineage
from kvstore.telemetry.sinks.postgres.session import Connection, Session
from kvstore.telemetry.sinks.postgres.tables import Tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Remembered, some 30 MB; one a run, place and version of the contract.
REMEMBERED_MAX: Final = 100_000


class Origin(NamedTuple):
    """A row of ``lineages`` but its number."""

    source: str
    partition: int
    contract_version: int
    run: str


class Lineages:
    """The table of that name."""

    def __init__(self, session: Session, tables: Tables):
        self._session = session
        self._tables = tables
        self._numbers: dict[Origin, int] = {}
        self._origins: dict[int, Origin] = {}

    def numbers(self, lineage: Lineage) -> NDArray[np.int32]:
        """The number of each reading's lineage; missing ones are added."""
        columns = (
            lineage.source,
            lineage.partition.tolist(),
            lineage.contract_version.tolist(),
            lineage.run,
        )
        count = len(lineage.source)
        if count and all(column.count(column[0]) == count for column in columns):
            one = Origin._make(column[0] for column in columns)
            return np.full(count, self._known({one})[one], np.int32)
        origins = list(map(Origin._make, zip(*columns, strict=True)))
        numbers = self._known(set(origins))
        return np.fromiter(map(numbers.__getitem__, origins), np.int32, count)

    def origins(self, numbers: Sequence[int]) -> list[Origin]:
        """What the numbers stand for."""
        unknown = set(numbers) - self._origins.keys()
        if unknown:
            query = self._tables.query(
                "SELECT lineage, source, partition, contract_version, run FROM {schema}.lineages "
                "WHERE lineage = ANY(%s)"
            )
            if len(self._origins) > REMEMBERED_MAX:
                self._origins.clear()
                unknown = set(numbers)
            rows = self._session.read(query, [list(unknown)])
            self._origins |= {row[0]: Origin(*row[1:]) for row in rows}
        return [self._origins[each] for each in numbers]

    def _known(self, origins: set[Origin]) -> dict[Origin, int]:
        if len(self._numbers) > REMEMBERED_MAX:
            self._numbers.clear()
        missing = sorted(origins - self._numbers.keys())
        if missing:  # in order: two workers that add the same ones never deadlock
            self._numbers |= self._session.run(
                lambda c: {each: self._add(c, each) for each in missing}
            )
        return self._numbers

    def _add(self, connection: Connection, origin: Origin) -> int:
        select = self._tables.query(
            "SELECT lineage FROM {schema}.lineages "
            "WHERE (source, partition, contract_version, run) = (%s, %s, %s, %s)"
        )
        row = connection.execute(select, origin).fetchone()
        if row is None:
            insert = self._tables.query(
                "INSERT INTO {schema}.lineages (source, partition, contract_version, run) "
                "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING"
            )
            connection.execute(insert, origin)
            row = connection.execute(select, origin).fetchone()
        assert row is not None
        return int(row[0])
