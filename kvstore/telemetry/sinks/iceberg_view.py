"""The readings as one snapshot has them: read in order of time, whatever is written meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pyiceberg.expressions import And, EqualTo

from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks.iceberg_lake import Lake, scan, translated
from kvstore.telemetry.sinks.iceberg_scan import DataFile, Files, between, in_slices, tasks

if TYPE_CHECKING:
    import pyarrow as pa

    from kvstore.telemetry.records import Readings

READ_ROWS_MAX: Final = 250_000  # of a batch: some 50 MB as records
DAY_US: Final = 86_400_000_000
FIRST_US: Final = -(1 << 63)
LAST_US: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class View:
    """A snapshot's files."""

    table: Any
    files: Sequence[DataFile]
    snapshot: int | None
    location: str

    @property
    def lake_id(self) -> str:
        """What the table is known by, wherever it lies."""
        return str(self.table.metadata.table_uuid)

    def but_not(self, other: View) -> View:
        """Only the files that the other view lacks: what was added (or compacted) since."""
        known = {file.path for file in other.files}
        return replace(self, files=[file for file in self.files if file.path not in known])

    def read(
        self,
        start_us: int | None = None,
        stop_us: int | None = None,
        *,
        device_id: str | None = None,
        rows_max: int = READ_ROWS_MAX,
    ) -> Iterator[Readings]:
        """Readings with start_us <= ts_us < stop_us, in order of time, then of device.

        All rows of one time are in one batch, which may so be longer than rows_max.
        """
        start = FIRST_US if start_us is None else start_us
        stop = LAST_US if stop_us is None else stop_us
        for low, high in _days(self.files, start, stop):
            near = [file for file in self.files if file.overlaps(low, high - 1)]
            with translated(self.location):
                slices = list(in_slices(self.table, near, low, high, rows_max))
            for first, last in slices:
                with translated(self.location):
                    found = self._slice(near, first, last, device_id)
                if len(found):
                    yield rows.from_arrow(found, self.table.schema())

    def _slice(
        self, files: Sequence[DataFile], first: int, last: int, device_id: str | None
    ) -> pa.Table:
        where = between(first, last)
        if device_id is not None:
            where = And(where, EqualTo(rows.DEVICE, device_id))
        wanted = [file for file in files if file.overlaps(first, last)]
        names = self.table.schema().column_names
        found = scan(self.table, tasks(self.table, wanted, self.snapshot), names, where)
        return found.sort_by([(rows.TS, "ascending"), (rows.DEVICE, "ascending")])

    def rows_between(self, start_us: int | None, stop_us: int | None) -> int:
        """How many readings that are."""
        start = FIRST_US if start_us is None else start_us
        last = LAST_US if stop_us is None else stop_us - 1
        near = [file for file in self.files if file.overlaps(start, last)]
        whole = [file for file in near if start <= file.first_us and file.last_us <= last]
        parts = [file for file in near if file not in whole]
        found = 0
        if parts:
            with translated(self.location):
                given = tasks(self.table, parts, self.snapshot)
                found = len(scan(self.table, given, (rows.TS,), between(start, last)))
        return found + sum(file.rows for file in whole)


def view(lake: Lake, files: Files, snapshot: int | None = None) -> View | None:
    """The current snapshot, or that one; None where it has expired."""
    table = lake.table()
    current = table.metadata.current_snapshot_id
    wanted = current if snapshot is None else snapshot
    if snapshot is not None and table.metadata.snapshot_by_id(snapshot) is None:
        return None
    with translated(lake.location):
        found = files.of(table, None if wanted == current else wanted)
    return View(table, found, wanted, lake.location)


def _days(files: Sequence[DataFile], start_us: int, stop_us: int) -> Iterator[tuple[int, int]]:
    """Spans [low, high): the days that have files, cut to the range."""
    days = {file.partition[0] for file in files if file.partition}
    for file in files:
        if not file.partition:  # another tool's layout
            days |= set(range(file.first_us // DAY_US, file.last_us // DAY_US + 1))
    for day in sorted(days):
        low, high = max(start_us, day * DAY_US), min(stop_us, (day + 1) * DAY_US)
        if low < high:
            yield low, high
