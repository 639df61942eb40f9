"""The lake as a sink: Apache Iceberg by pyiceberg, on a local disk with an SQLite catalog, or more.

One fenced commit. Readings, positions and epochs change in one snapshot of the readings table;
dead letters and counts are staged before it and become current by being named in it (see
iceberg_side.py). So to every reader that commit is one, and before it nothing is there.

The loop of a commit: load the table, check that it was not rolled back, check claims and
positions, find duplicates and conflicts among the files that are there now, write files, stage,
and swap. Where the swap is lost to somebody else, all of it again. pyiceberg's own retry is off:
it would append what the winner has already stored. Each commit of ours, a claim too, makes a
snapshot, so that nobody's check is older than the state that it commits onto.

Where the catalog gives no answer the commit is CommitUnknown: ``settle`` looks for its id in the
summaries of the snapshots. No file of such a commit is deleted; ``maintain`` removes files that
nothing refers to after days, behind a snapshot of its own, after which no old commit can arrive.

    iceberg_lake   catalog, tables, swap          iceberg_files  durable files
    iceberg_state  positions, epochs, the head    iceberg_keys   the anti-join
    iceberg_side   dead letters and counts        iceberg_scan   data files by partition and time
    iceberg_rows   records <-> Arrow              iceberg_maintain  compact, expire, remove
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyiceberg.expressions import And, EqualTo

from kvstore.errors import SinkError
from kvstore.telemetry import counts
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
    Reason,
    Rejection,
    State,
    Work,
)
from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks import iceberg_side as side
from kvstore.telemetry.sinks import iceberg_state as states
from kvstore.telemetry.sinks.iceberg_keys import Batch, Keys
from kvstore.telemetry.sinks.iceberg_lake import (
    BUCKETS,
    COUNTS,
    DEAD_LETTERS,
    Change,
    Lake,
    evolve,
    open_lake,
    raced,
    races,
    scan,
    swap,
    translated,
)
from kvstore.telemetry.sinks.iceberg_scan import (
    DataFile,
    Files,
    between,
    in_slices,
    tasks,
)
from kvstore.telemetry.sinks.iceberg_write import write

READ_ROWS_MAX: Final = 250_000  # of a batch that is read
REUSE_S: Final = 600  # files written longer ago may have been taken for garbage

NOTHING: Final = Outcome(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Written:
    """Data files of an attempt, usable by the next one if the same readings are kept."""

    kept: NDArray[np.bool_]
    entries: Sequence[Any]
    at_s: float

    def fits(self, kept: NDArray[np.bool_]) -> bool:
        """Whether they hold just these readings, and are surely still there."""
        return np.array_equal(self.kept, kept) and time.monotonic() - self.at_s < REUSE_S


class IcebergSink:
    """A lake. Make one with ``open``."""

    def __init__(self, lake: Lake):
        self._lake = lake
        table = lake.table()
        buckets = [
            f.transform.num_buckets for f in table.spec().fields if f.name.endswith("bucket")
        ]
        self._keys = Keys(buckets[0] if buckets else BUCKETS)
        self._files = Files()

    @classmethod
    def open(
        cls,
        location: str,
        contract: Contract | None = None,
        *,
        mode: Literal["r", "w"] = "w",
        catalog: Mapping[str, str] | None = None,
        buckets: int = BUCKETS,
    ) -> Self:
        """The lake at a folder or URI; see iceberg_lake.open_lake. mode w makes what is missing."""
        create = mode == "w"
        lake = open_lake(
            location, catalog=catalog, create=create, contract=contract, buckets=buckets
        )
        return cls(lake)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            if exc_info[0] is None:
                self._publish()
        finally:
            self._lake.close()

    def evolve(self, contract: Contract) -> None:
        """Add the contract's fields that the table lacks, as nullable columns."""
        evolve(self._lake, contract)

    # ---- positions ----

    def positions(self, source: str | None = None) -> list[Position]:
        """How far each place was read and committed, of one source or of all."""
        _, state = self._loaded()
        found = [mark.position for mark in state.marks.values() if mark.commit_id]
        return sorted(each for each in found if source in (None, each.place.source))

    def claim(self, places: Sequence[Place]) -> list[Claim]:
        """Take the places over: any earlier claim of them can commit no more."""
        commit_id = f"claim-{uuid.uuid4()}"
        for attempt in races():
            table, state = self._loaded()
            after, claims = state.claimed(places)
            with raced(attempt):
                self._swap(table, state, after, commit_id=commit_id)
                return claims
        raise AssertionError

    def settle(self, work: Work) -> Outcome | None:
        """What the commit of that id did, or None where it is not there."""
        table, state = self._loaded()
        return states.outcome_of(table.metadata, state, work.commit_id)

    def _loaded(self) -> tuple[Any, states.State]:
        table = self._lake.table()
        with translated(self._lake.location):
            state = states.state_of(table.metadata)
            states.check_lineage(table.metadata, state, self._lake.location)
        return table, state

    # ---- committing ----

    def commit(self, work: Work) -> Outcome:
        """Decide on each reading, and make all of the work durable."""
        batch, written = None, None
        for attempt in races():
            table, state = self._loaded()
            state.check_claims(work.claims)
            with translated(self._lake.location):
                if batch is None or batch.schema_id != table.schema().schema_id:
                    batch, written = Batch(work.readings, table.schema(), self._keys.devices), None
                fates = self._keys.fates(batch, table, self._files.of(table))
                kept = fates == Fate.STORED
                if written is None or not written.fits(kept):
                    self._discard(table, written)
                    entries = write(table, batch.pieces(kept))
                    written = Written(kept, entries, time.monotonic())
            with raced(attempt):
                return self._commit(table, state, work, batch, fates, written)
        raise AssertionError

    def _commit(
        self,
        table: Any,
        state: states.State,
        work: Work,
        batch: Batch,
        fates: NDArray[np.uint8],
        written: Written,
    ) -> Outcome:
        outcome = _outcome(work, fates)
        head = self._staged(state.head, work, batch, fates)
        self._swap(
            table,
            state,
            replace(state, head=head),
            commit_id=work.commit_id,
            entries=written.entries,
            moved=work.after,
            outcome=outcome,
        )
        added = [_data_file(entry) for entry in written.entries]
        self._keys.add(batch, written.kept, added)
        return outcome

    def _staged(
        self, head: states.Head, work: Work, batch: Batch, fates: NDArray[np.uint8]
    ) -> states.Head:
        """Dead letters and counts, behind those of the head; what is named in the new one."""
        conflicts = [_conflict(work, number) for number in np.flatnonzero(fates == Fate.CONFLICT)]
        letters = [
            DeadLetter(each, work.committed_us, work.contract_version, work.run)
            for each in [*work.rejections, *conflicts]
        ]
        keys = frozenset((each.place, each.offset) for each in conflicts)
        found = counts.summed([*work.seen, *batch.counts(fates)])
        return replace(
            head,
            letters=side.stage_letters(self._lake, head.letters, letters, work.changes, keys),
            counts=side.stage_counts(self._lake, head.counts, found),
        )

    def _swap(
        self,
        table: Any,
        before: states.State,
        after: states.State,
        *,
        commit_id: str,
        entries: Sequence[Any] = (),
        moved: Sequence[Position] = (),
        outcome: Outcome = NOTHING,
    ) -> None:
        """One snapshot of the readings with all that the state has become."""
        with translated(self._lake.location):
            summary = states.summary(commit_id, moved, outcome, after.head)
            transaction = Change(table)
            producer = transaction.update_snapshot(snapshot_properties=summary).merge_append()
            for entry in entries:
                producer.append_data_file(entry)
            producer.commit()
            snapshot = int(producer.snapshot_id)
            after = after.moved(moved, snapshot=snapshot, commit_id=commit_id, outcome=outcome)
            sequence = transaction.table_metadata.last_sequence_number
            after = replace(after, head=replace(after.head, snapshot=snapshot, sequence=sequence))
            transaction.set_properties(states.changed(before, after))
        swap(transaction, self._lake.location)

    def _discard(self, table: Any, written: Written | None) -> None:
        """Files of an attempt that surely did not happen, and that is not repeated as it was."""
        for entry in () if written is None else written.entries:
            with contextlib.suppress(OSError):
                table.io.delete(entry.file_path)

    def _publish(self) -> None:
        _, state = self._loaded()
        side.publish(self._lake, DEAD_LETTERS, state.head.letters)
        side.publish(self._lake, COUNTS, state.head.counts)

    # ---- reading ----

    def read(
        self,
        start_us: int | None = None,
        stop_us: int | None = None,
        *,
        device_id: str | None = None,
    ) -> Iterator[Readings]:
        """Readings with start_us <= ts_us < stop_us, in order of time, then of device."""
        table = self._lake.table()
        with translated(self._lake.location):
            files = self._files.of(table)
        yield from read_table(table, files, start_us, stop_us, device_id=device_id)

    # ---- dead letters and counts ----

    def dead_letters(
        self,
        *,
        state: State | None = None,
        reason: str | None = None,
        place: Place | None = None,
        offset: int | None = None,
    ) -> Iterator[DeadLetter]:
        """Dead letters in the order of their places and offsets."""
        head = self._loaded()[1].head
        for letter in side.read_letters(self._lake, head.letters, place=place, offset=offset):
            codes = {each.code for each in letter.rejection.reasons}
            if state in (None, letter.state) and (reason is None or reason in codes):
                yield letter

    def change_letters(self, changes: Sequence[LetterChange]) -> None:
        """Discard dead letters, or open them again: without rows, in a commit of its own."""
        commit_id = f"letters-{uuid.uuid4()}"
        for attempt in races():
            table, state = self._loaded()
            letters = side.stage_letters(self._lake, state.head.letters, [], changes)
            after = replace(state, head=replace(state.head, letters=letters))
            with raced(attempt):
                self._swap(table, state, after, commit_id=commit_id)
                return

    def counts(self, start_us: int | None = None, stop_us: int | None = None) -> Iterator[Count]:
        """Figures of quality by device and hour, added up; start_us <= hour < stop_us."""
        head = self._loaded()[1].head
        yield from side.read_counts(self._lake, head.counts, start_us, stop_us)


def _outcome(work: Work, fates: NDArray[np.uint8]) -> Outcome:
    stored, duplicates, conflicts = (int(np.count_nonzero(fates == fate)) for fate in Fate)
    return Outcome(stored, duplicates, len(work.rejections) + conflicts, conflicts)


def _conflict(work: Work, number: int) -> Rejection:
    readings, lineage = work.readings, work.readings.lineage
    return Rejection(
        Place(lineage.source[number], int(lineage.partition[number])),
        int(lineage.offset[number]),
        work.raw[number],
        (Reason(counts.CONFLICT),),
        device_id=readings.device_id[number],
        ts_us=int(readings.ts_us[number]),
    )


def _data_file(entry: Any) -> DataFile:
    """Enough of a file just written to know its keys by."""
    partition = entry.partition[0], entry.partition[1]
    return DataFile(
        entry.file_path, partition, 0, 0, entry.record_count, entry.file_size_in_bytes, entry
    )


# ---- reading ----


def read_table(
    table: Any,
    files: Sequence[DataFile],
    start_us: int | None = None,
    stop_us: int | None = None,
    *,
    device_id: str | None = None,
) -> Iterator[Readings]:
    """Readings of a table as it was loaded, in order of time, then of device."""
    start = -(1 << 63) if start_us is None else start_us
    stop = (1 << 63) - 1 if stop_us is None else stop_us
    location = str(table.location())
    for low, high in days_of(files, start, stop):
        near = [file for file in files if file.overlaps(low, high - 1)]
        with translated(location):
            slices = list(in_slices(table, near, low, high, READ_ROWS_MAX))
        for first, last in slices:
            with translated(location):
                found = _slice(table, near, first, last, device_id)
            if len(found):
                yield rows.from_arrow(found, table.schema())


def _slice(
    table: Any, files: Sequence[DataFile], first: int, last: int, device_id: str | None
) -> pa.Table:
    where = between(first, last)
    if device_id is not None:
        where = And(where, EqualTo(rows.DEVICE, device_id))
    wanted = [file for file in files if file.overlaps(first, last)]
    found = scan(table, tasks(table, wanted), table.schema().column_names, where)
    return found.sort_by([(rows.TS, "ascending"), (rows.DEVICE, "ascending")])


def days_of(files: Sequence[DataFile], start_us: int, stop_us: int) -> Iterator[tuple[int, int]]:
    """Spans [low, high) that part the files of one partition from the others: days with rows."""
    day_us = 86_400_000_000
    days = {file.partition[0] for file in files if file.partition}
    for file in files:
        if not file.partition:  # another tool's layout
            days |= set(range(file.first_us // day_us, file.last_us // day_us + 1))
    for day in sorted(days):
        low, high = max(start_us, day * day_us), min(stop_us, (day + 1) * day_us)
        if low < high:
            yield low, high
