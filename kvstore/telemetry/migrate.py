"""History from the lake into an operational store, through the same commits as live events.

The lake is a source of its own: a place whose positions are times. Each batch is one commit of
the target's, fenced and idempotent; so a migration can be stopped, killed and started again, and
runs beside live ingest: what is there already is a duplicate, whoever brought it first. Rows keep
their lineage: the target knows which event of which topic each was.

A run reads one snapshot of the lake, which it notes in its position; started again it goes on in
that one. Once at its end, another run takes what has come into the lake since: the files that the
old snapshot lacks (all of them, where it has expired; that costs time, not correctness).

``verify`` compares both sides by device and day (see reconcile.py).
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, overload

import numpy as np

from kvstore.errors import CommitUnknown, SinkError
from kvstore.telemetry import counts
from kvstore.telemetry.contract import DEVICE, TIMESTAMP
from kvstore.telemetry.reconcile import DAY_US, Difference, reconcile
from kvstore.telemetry.records import (
    Claim,
    Count,
    Outcome,
    Place,
    Position,
    Readings,
    Work,
)
from kvstore.telemetry.sink import Sink
from kvstore.telemetry.sinks.iceberg import IcebergSink
from kvstore.telemetry.sinks.iceberg_view import View

ROWS_MAX: Final = 100_000  # of a commit: some 30 MB as records
SHIFT_US: Final = 10**16  # positions are never negative, times before 1970 are
DIFFERENCES_MAX: Final = 1000  # that are kept to be shown; all are counted


@dataclass(frozen=True, slots=True)
class Window:
    """start_us <= ts_us < stop_us; None is without an end."""

    start_us: int | None = None
    stop_us: int | None = None

    def place(self, lake_id: str) -> Place:
        """What the target knows it by: another window is another migration."""
        ends = ("" if us is None else str(us) for us in (self.start_us, self.stop_us))
        return Place(f"iceberg:{lake_id}/{'..'.join(ends)}", 0)


@dataclass(slots=True)
class Moved:
    """What a run has done so far. is_whole: it came to its end."""

    rows: int = 0
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    commits: int = 0
    resumed: bool = False
    is_whole: bool = False

    def add(self, rows: int, outcome: Outcome) -> None:
        """One commit more."""
        self.rows += rows
        self.stored += outcome.stored
        self.duplicates += outcome.duplicates
        self.conflicts += outcome.conflicts
        self.commits += 1


@dataclass(slots=True)
class Verdict:
    """What a comparison found. differences: the first ones; differing: devices and days."""

    days: int = 0
    rows: int = 0
    differing: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        """Whether both sides hold the same."""
        return not self.differing


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run reads: files of a snapshot, from a time on. since: the last run's snapshot."""

    view: View
    claim: Claim | None
    start_us: int | None
    since: int | None
    is_done: bool

    def token(self, *, done: bool = False) -> str:
        """What the position says of the run."""
        return json.dumps({"snapshot": self.view.snapshot, "since": self.since, "done": done})


def plan(lake: IcebergSink, window: Window, position: Position, claim: Claim | None) -> Plan:
    """Where a run begins, given how far the target is."""
    now = lake.view()
    assert now is not None
    if position.next < 0:
        return Plan(now, claim, window.start_us, None, is_done=False)
    known = json.loads(position.token)
    before = lake.view(known["snapshot"])
    if known["done"]:
        fresh = now if before is None else now.but_not(before)
        same = now.snapshot == known["snapshot"]
        return Plan(fresh, claim, window.start_us, known["snapshot"], is_done=same)
    if before is None:  # expired on the way: all again
        return Plan(now, claim, window.start_us, None, is_done=False)
    older = lake.view(known["since"]) if known["since"] is not None else None
    part = before if older is None else before.but_not(older)
    return Plan(part, claim, position.next - SHIFT_US, known["since"], is_done=False)


def migrate(
    lake: IcebergSink,
    target: Sink,
    window: Window,
    *,
    contract_version: int,
    run: str,
    rows_max: int = ROWS_MAX,
    clock: Callable[[], int] = lambda: time.time_ns() // 1000,
    stopped: Callable[[], bool] = lambda: False,
    moved: Moved | None = None,
) -> Moved:
    """Move the window; the target must have been evolved. moved: is kept up to date, to be shown.

    Fenced where another process migrates the same window into this target.
    """
    moved = Moved() if moved is None else moved
    current = lake.view()
    assert current is not None
    (claim,) = target.claim([window.place(current.lake_id)])
    found = plan(lake, window, claim.position, claim)
    moved.resumed = claim.position.next >= 0
    if found.is_done:
        moved.is_whole = True
        return moved

    def made(batch: Readings, claim: Claim, after: Position) -> Work:
        return Work(
            commit_id=uuid.uuid4().hex,
            run=run,
            committed_us=clock(),
            claims=(claim,),
            after=(after,),
            readings=batch,
            raw=Rendered(batch),
            seen=_received(batch),
            contract_version=contract_version,
        )

    for batch in found.view.read(found.start_us, window.stop_us, rows_max=rows_max):
        if stopped():
            return moved
        after = Position(claim.position.place, int(batch.ts_us[-1]) + 1 + SHIFT_US, found.token())
        work = made(batch, claim, after)
        moved.add(len(batch), _committed(target, work))
        claim = claim._replace(position=after)
    end = Position(claim.position.place, max(claim.position.next, 0), found.token(done=True))
    _committed(target, made(_empty(found.view), claim, end))
    moved.is_whole = True
    return moved


def _empty(view: View) -> Readings:
    from kvstore.telemetry.sinks import iceberg_rows  # noqa: PLC0415

    schema = view.table.schema()
    return iceberg_rows.from_arrow(schema.as_arrow().empty_table(), schema)


def _committed(target: Sink, work: Work) -> Outcome:
    try:
        return target.commit(work)
    except CommitUnknown as error:
        outcome = target.settle(work)
        if outcome is None:
            raise SinkError(f"{error}: it is not there; start the migration again") from error
        return outcome


def _received(batch: Readings) -> list[Count]:
    hours = (batch.ts_us // counts.HOUR_US * counts.HOUR_US).tolist()
    groups = Counter(zip(batch.device_id, hours, strict=True))
    return [Count(*key, counts.RECEIVED, value) for key, value in groups.items()]


class Rendered(Sequence[bytes | None]):
    """Each reading as the event it could have been, made when it is asked for (a conflict)."""

    def __init__(self, readings: Readings):
        self._readings = readings

    def __len__(self) -> int:
        return len(self._readings)

    @overload
    def __getitem__(self, number: int) -> bytes | None: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[bytes | None]: ...
    def __getitem__(self, number: int | slice) -> bytes | Sequence[bytes | None] | None:
        """The event in JSON."""
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        readings = self._readings
        values = {name: column[number] for name, column in readings.values.items()}
        event = {
            DEVICE: readings.device_id[number],
            TIMESTAMP: f"{np.datetime64(int(readings.ts_us[number]), 'us')}Z",
            **{name: _plain(value) for name, value in values.items() if _plain(value) is not None},
            **json.loads(readings.extras[number] or "{}"),
        }
        return json.dumps(event, ensure_ascii=False).encode()


def _plain(value: object) -> object:
    if isinstance(value, float):  # numpy's are floats, too
        return None if np.isnan(value) else float(value)
    return value


# ---- comparing ----


def verify(
    lake: IcebergSink,
    target: Sink,
    window: Window,
    *,
    on_day: Callable[[int], None] = lambda _day_us: None,
) -> Verdict:
    """Compare both sides. Days that differ are compared again at the end: rows arrive meanwhile."""
    verdict, doubtful = Verdict(), []
    for day_us, rows, found in _compared(lake, target, window):
        on_day(day_us)
        verdict.days += 1
        verdict.rows += rows
        if found:
            doubtful.append(day_us)
    for day_us in doubtful:
        for _, _, found in _compared(lake, target, _within(window, day_us)):
            verdict.differing += len({each.device_id for each in found})
            verdict.differences += found[: DIFFERENCES_MAX - len(verdict.differences)]
    return verdict


def _compared(
    lake: IcebergSink, target: Sink, window: Window
) -> Iterator[tuple[int, int, list[Difference]]]:
    ends = window.start_us, window.stop_us
    return reconcile(lake.read(*ends), target.read(*ends))


def _within(window: Window, day_us: int) -> Window:
    start, stop = window.start_us, window.stop_us
    return Window(
        day_us if start is None else max(start, day_us),
        day_us + DAY_US if stop is None else min(stop, day_us + DAY_US),
    )
