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
    iceberg_rows   records <-> Arrow              iceberg_write  rows -> a data file
    iceberg_commit one snapshot of ours           iceberg_view   reading, as a snapshot has it
    iceberg_maintain  compact, expire, remove     iceberg_compare  values of one identity
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np

from kvstore.errors import Fenced, SinkError
from kvstore.telemetry import counts
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
from kvstore.telemetry.sinks import iceberg_side as side
from kvstore.telemetry.sinks import iceberg_state as states
from kvstore.telemetry.sinks.iceberg_commit import Step, advance, loaded
from kvstore.telemetry.sinks.iceberg_keys import Batch, Keys
from kvstore.telemetry.sinks.iceberg_lake import (
    BUCKETS,
    COUNTS,
    DEAD_LETTERS,
    Lake,
    LostRace,
    evolve,
    open_lake,
    raced,
    races,
    translated,
)
from kvstore.telemetry.sinks.iceberg_preflight import preflight
from kvstore.telemetry.sinks.iceberg_scan import (
    DataFile,
    Files,
)
from kvstore.telemetry.sinks.iceberg_view import View, view
from kvstore.telemetry.sinks.iceberg_write import write

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.telemetry.contract import Contract

__all__ = ["IcebergSink", "preflight"]

REUSE_S: Final = 600  # files written longer ago may have been taken for garbage


@dataclass(frozen=True, slots=True)
class Decided:
    """An attempt to commit: fates of the readings, and the files of those that are stored."""

    batch: Batch
    fates: NDArray[np.uint8]
    entries: Sequence[Any]
    written_s: float

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which readings are stored."""
        found: NDArray[np.bool_] = self.fates == Fate.STORED
        return found

    def fits(self, batch: Batch, fates: NDArray[np.uint8]) -> bool:
        """Whether the files hold just what is to be stored now, and are surely still there."""
        same = batch is self.batch and np.array_equal(self.kept, fates == Fate.STORED)
        return same and time.monotonic() - self.written_s < REUSE_S

    def files(self) -> list[DataFile]:
        """Enough of the files to know their keys by."""
        return [
            DataFile(e.file_path, (e.partition[0], e.partition[1]), 0, 0, e.record_count, 0, e)
            for e in self.entries
        ]


class IcebergSink:
    """A lake. Make one with ``open``."""

    def __init__(self, lake: Lake, *, writes: bool = True):
        self._lake = lake
        self._writes = writes
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
        return cls(lake, writes=create)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            # Who reads changes nothing. What cannot be published now is by the next commit: to us
            # all of it is committed, and other tools may be one commit behind.
            if self._writes and exc_info[0] is None:
                with contextlib.suppress(SinkError):
                    self._publish()
        finally:
            self._lake.close()

    def evolve(self, contract: Contract) -> None:
        """Add the contract's fields that the table lacks, as nullable columns."""
        evolve(self._lake, contract)

    # ---- positions ----

    def positions(self, source: str | None = None) -> list[Position]:
        """How far each place was read and committed, of one source or of all."""
        _, state = loaded(self._lake)
        found = [mark.position for mark in state.marks.values() if mark.commit_id]
        return sorted(each for each in found if source in (None, each.place.source))

    def claim(self, places: Sequence[Place]) -> list[Claim]:
        """Take the places over: any earlier claim of them can commit no more."""
        commit_id = f"claim-{uuid.uuid4()}"
        for attempt in races():
            table, state = loaded(self._lake)
            after, claims = state.claimed(places)
            with raced(attempt):
                advance(self._lake, table, state, after, Step(commit_id))
                return claims
        raise AssertionError

    def settle(self, work: Work) -> Outcome | None:
        """What the commit of that id did, or None where it is not there."""
        table, state = loaded(self._lake)
        return states.outcome_of(table.metadata, state, work.commit_id)

    # ---- committing ----

    def commit(self, work: Work) -> Outcome:
        """Decide on each reading, and make all of the work durable."""
        decided: Decided | None = None
        for attempt in races():
            table, state = loaded(self._lake)
            try:
                state.check_claims(work.claims)
            except Fenced:
                self._discard(table, decided)
                raise
            with raced(attempt):
                decided = self._decided(table, work, decided)
                head = self._staged(state.head, work, decided)
                outcome = _outcome(work, decided.fates)
                step = Step(work.commit_id, decided.entries, moved=work.after, outcome=outcome)
                advance(self._lake, table, state, replace(state, head=head), step)
                self._keys.add(decided.batch, decided.kept, decided.files())
                return outcome
        raise AssertionError

    def _decided(self, table: Any, work: Work, before: Decided | None) -> Decided:
        """Fates against the table as it is now, and files; those of the last attempt if they do."""
        with translated(self._lake.location, missing=LostRace):
            if before is None or before.batch.schema_id != table.schema().schema_id:
                batch = Batch(work.readings, table.schema(), self._keys.devices)
            else:
                batch = before.batch
            fates = self._keys.fates(batch, table, self._files.of(table))
            if before is not None and before.fits(batch, fates):
                return replace(before, fates=fates)
            self._discard(table, before)
            entries = write(table, batch.pieces(fates == Fate.STORED))
            return Decided(batch, fates, entries, time.monotonic())

    def _staged(self, head: states.Head, work: Work, decided: Decided) -> states.Head:
        """Dead letters and counts, behind those of the head; what is named in the new one."""
        fates = decided.fates
        conflicts = [
            _conflict(work, int(number)) for number in np.flatnonzero(fates == Fate.CONFLICT)
        ]
        letters = [
            DeadLetter(each, work.committed_us, work.contract_version, work.run)
            for each in [*work.rejections, *conflicts]
        ]
        keys = frozenset((each.place, each.offset) for each in conflicts)
        found = counts.summed([*work.seen, *decided.batch.counts(fates)])
        return replace(
            head,
            letters=side.stage_letters(self._lake, head.letters, letters, work.changes, keys),
            counts=side.stage_counts(self._lake, head.counts, found),
        )

    def _discard(self, table: Any, decided: Decided | None) -> None:
        """Files of an attempt that surely did not happen, and that is not repeated as it was."""
        for entry in () if decided is None else decided.entries:
            with contextlib.suppress(OSError):
                table.io.delete(entry.file_path)

    def _publish(self) -> None:
        _, state = loaded(self._lake)
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
        now = view(self._lake, self._files)
        assert now is not None
        yield from now.read(start_us, stop_us, device_id=device_id)

    def view(self, snapshot: int | None = None) -> View | None:
        """The readings as one snapshot has them, whatever is written since; None where expired."""
        return view(self._lake, self._files, snapshot)

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
        head = loaded(self._lake)[1].head
        for letter in side.read_letters(self._lake, head.letters, place=place, offset=offset):
            codes = {each.code for each in letter.rejection.reasons}
            if state in (None, letter.state) and (reason is None or reason in codes):
                yield letter

    def change_letters(self, changes: Sequence[LetterChange]) -> None:
        """Discard dead letters, or open them again: without rows, in a commit of its own."""
        commit_id = f"letters-{uuid.uuid4()}"
        for attempt in races():
            table, state = loaded(self._lake)
            letters = side.stage_letters(self._lake, state.head.letters, [], changes)
            after = replace(state, head=replace(state.head, letters=letters))
            with raced(attempt):
                advance(self._lake, table, state, after, Step(commit_id))
                return

    def counts(self, start_us: int | None = None, stop_us: int | None = None) -> Iterator[Count]:
        """Figures of quality by device and hour, added up; start_us <= hour < stop_us."""
        head = loaded(self._lake)[1].head
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
