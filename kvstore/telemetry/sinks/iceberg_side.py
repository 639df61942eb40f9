"""Dead letters and counts: tables of their own that are committed by the readings' commit.

An Iceberg commit covers one table. So what belongs to a commit in these two is *staged* first: a
snapshot on the branch ``staged``, whose parent is the snapshot that the readings' head names. The
commit of the readings then names the staged one, and with that it is there. Where that commit
fails, nothing names the staged snapshot; the next one starts from the named one again, so garbage
never adds up, and ``maintain`` expires it.

Reading here means: at the snapshot that the readings name. Other tools read the branch ``main``,
which is moved there by the next staging or when the sink is closed: it may be one commit behind,
never ahead.

A letter is one row. Changing its state rewrites the file that holds it (copy on write), so that
every tool sees letters as they are. Counts are added: their table holds summands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.expressions import (
    AlwaysTrue,
    And,
    EqualTo,
    GreaterThanOrEqual,
    LessThan,
    LessThanOrEqual,
    Or,
)
from pyiceberg.table import FileScanTask
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.update.snapshot import ManageSnapshots

from kvstore.errors import SinkError
from kvstore.telemetry.counts import CONFLICT
from kvstore.telemetry.records import Count, DeadLetter, LetterChange, Place, Reason, State
from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks.iceberg_lake import (
    COUNTS,
    DEAD_LETTERS,
    SIDE_SNAPSHOTS_MAX,
    Change,
    Lake,
    raced,
    races,
    scan,
    swap,
    translated,
    trim,
)
from kvstore.telemetry.sinks.iceberg_write import Piece, write

STAGED: Final = "staged"
LETTERS_MAX: Final = 10_000  # that are held in memory at once while reading

Key = tuple[Place, int]


@dataclass(frozen=True, slots=True)
class Edit:
    """What a staging does to a table: rows that come, files that go."""

    rows: pa.Table
    gone: Sequence[Any] = ()


def stage(
    lake: Lake, name: str, at: int | None, decide: Callable[[Any], Edit | None]
) -> int | None:
    """Put a snapshot behind the one named ``at``; its id, or ``at`` where there is nothing to do.

    decide: the change, given the table; called again where another writer staged meanwhile.
    """
    for attempt in races():
        table = lake.table(name)
        with translated(lake.location):
            edit = decide(table)
            if edit is None:
                return at
            transaction = Change(table)
            _start_from(transaction, at)
            update = transaction.update_snapshot(branch=STAGED)
            producer = update.overwrite() if edit.gone else update.merge_append()
            for file in edit.gone:
                producer.delete_data_file(file)
            for file in write(table, [Piece((), edit.rows)]):
                producer.append_data_file(file)
            producer.commit()
            trim(transaction, SIDE_SNAPSHOTS_MAX)
        with raced(attempt):
            swap(transaction, lake.location)
            return int(producer.snapshot_id)
    raise AssertionError


def _start_from(transaction: Any, at: int | None) -> None:
    """The branch begins at the committed snapshot, and ``main`` follows up to there.

    Before the first commit that is the empty snapshot that ``main`` begins with.
    """
    start = transaction.table_metadata.current_snapshot_id if at is None else at
    if start is None:  # a table takes no snapshot on a branch before there is one on main
        transaction.update_snapshot().fast_append().commit()
        start = transaction.table_metadata.current_snapshot_id
    snapshots = ManageSnapshots(transaction)
    snapshots.create_branch(start, STAGED).create_branch(start, MAIN_BRANCH).commit()


def publish(lake: Lake, name: str, at: int | None) -> None:
    """Move ``main`` to the committed snapshot, for the readers of other tools."""
    for attempt in races():
        table = lake.table(name)
        current = table.metadata.current_snapshot_id
        if at in (None, current):
            return
        transaction = Change(table)
        with translated(lake.location):
            ManageSnapshots(transaction).create_branch(at, MAIN_BRANCH).commit()
        with raced(attempt):
            swap(transaction, lake.location)
            return


def tasks_at(table: Any, at: int | None, where: Any = None) -> list[Any]:
    """The files of a snapshot that may hold such rows."""
    if at is None:
        return []
    row_filter = AlwaysTrue() if where is None else where
    return list(table.scan(row_filter=row_filter, snapshot_id=at).plan_files())


# ---- counts ----


def stage_counts(lake: Lake, at: int | None, counts: Sequence[Count]) -> int | None:
    """Add counts."""
    if not counts:
        return at
    return stage(lake, COUNTS, at, lambda _table: Edit(rows.counts_to_arrow(counts)))


def read_counts(
    lake: Lake, at: int | None, start_us: int | None, stop_us: int | None
) -> list[Count]:
    """The counts of hours with start_us <= hour < stop_us, added up."""
    with translated(lake.location):
        table = lake.table(COUNTS)
        ends = [] if start_us is None else [GreaterThanOrEqual("hour", start_us)]
        ends += [] if stop_us is None else [LessThan("hour", stop_us)]
        where = And(AlwaysTrue(), AlwaysTrue(), *ends)
        names = rows.COUNTS.column_names
        found = scan(table, tasks_at(table, at, where), names, where)
        plain = rows.COUNTS.as_arrow()
        return rows.counts_from_arrow(rows.counts_added(found.select(names).cast(plain)))


# ---- dead letters ----


def stage_letters(
    lake: Lake,
    at: int | None,
    new: Sequence[DeadLetter],
    changes: Sequence[LetterChange] = (),
    conflicts: frozenset[Key] = frozenset(),
) -> int | None:
    """Add letters whose place and offset are not there yet, and change others.

    conflicts: of the changed ones, those whose reading now conflicts: they stay open for that.
    """
    if not new and not changes:
        return at

    def decide(table: Any) -> Edit | None:
        wanted = {(change.place, change.offset): change for change in changes}
        present, parts, gone = set(), [], []
        for task in tasks_at(table, at, _near([*map(_key, new), *wanted])):
            keys = _keys_in(table, task)
            present |= keys
            if not wanted.keys().isdisjoint(keys):
                letters = _letters_in(table, task)
                parts.append(rows.letters_to_arrow(_changed(letters, wanted, conflicts)))
                gone.append(task.file)
        missing = wanted.keys() - present
        if missing:
            place, offset = min(missing)
            raise SinkError(f"no dead letter at {place}, offset {offset}: nothing was changed")
        fresh = {_key(letter): letter for letter in reversed(new)}  # the first of each stays
        parts.append(rows.letters_to_arrow(each for k, each in fresh.items() if k not in present))
        made = pa.concat_tables(parts)
        return Edit(made, gone) if len(made) else None

    return stage(lake, DEAD_LETTERS, at, decide)


def _key(letter: DeadLetter) -> Key:
    return letter.rejection.place, letter.rejection.offset


def _near(keys: Iterable[Key]) -> Any:
    """Rows that these may be, for the pruning of files."""
    spans: dict[Place, tuple[int, int]] = {}
    for place, offset in keys:
        low, high = spans.get(place, (offset, offset))
        spans[place] = min(low, offset), max(high, offset)
    parts = [_within(place, *span) for place, span in spans.items()]
    return Or(*parts) if len(parts) > 1 else parts[0]


def _within(place: Place, first: int, last: int) -> Any:
    return And(
        EqualTo("source", place.source),
        EqualTo("partition", place.partition),
        GreaterThanOrEqual("offset", first),
        LessThanOrEqual("offset", last),
    )


def _keys_in(table: Any, task: Any) -> set[Key]:
    found = scan(table, [FileScanTask(task.file)], ("source", "partition", "offset"))
    columns = (found[name].to_pylist() for name in ("source", "partition", "offset"))
    return {
        (Place(source, partition), offset)
        for source, partition, offset in zip(*columns, strict=True)
    }


def _letters_in(table: Any, task: Any) -> list[DeadLetter]:
    found = scan(table, [FileScanTask(task.file)], rows.LETTERS.column_names)
    return rows.letters_from_arrow(found)


def _changed(
    letters: Iterable[DeadLetter], changes: dict[Key, LetterChange], conflicts: frozenset[Key]
) -> Iterator[DeadLetter]:
    for letter in letters:
        change = changes.get(_key(letter))
        if change is None:
            yield letter
        elif change.state == State.REPLAYED and _key(letter) in conflicts:
            refused = replace(letter.rejection, reasons=(Reason(CONFLICT),))
            yield replace(letter, rejection=refused, state=State.OPEN, replays=change.replays)
        else:
            yield replace(letter, state=change.state, replays=change.replays)


def read_letters(
    lake: Lake, at: int | None, *, place: Place | None, offset: int | None
) -> Iterator[DeadLetter]:
    """Letters in the order of their places and offsets, a bounded number at a time."""
    with translated(lake.location):
        table = lake.table(DEAD_LETTERS)
        spans = _spans(table, at, place, offset)
    for span in spans:
        with translated(lake.location):
            where = _within(*span)
            found = scan(table, tasks_at(table, at, where), rows.LETTERS.column_names, where)
            letters = sorted(rows.letters_from_arrow(found), key=_key)
        yield from letters


def _spans(
    table: Any, at: int | None, place: Place | None, offset: int | None
) -> list[tuple[Place, int, int]]:
    """Places with first and last offset, such that each span holds at most LETTERS_MAX."""
    names = ("source", "partition", "offset")
    given = [] if place is None else [EqualTo("source", place.source)]
    given += [] if place is None else [EqualTo("partition", place.partition)]
    given += [] if offset is None else [EqualTo("offset", offset)]
    where = And(AlwaysTrue(), AlwaysTrue(), *given)
    found = scan(table, tasks_at(table, at, where), names, where).combine_chunks()
    spans = []
    places = found.select(names[:2]).group_by(list(names[:2])).aggregate([]).to_pylist()
    for row in sorted(places, key=lambda each: (each["source"], each["partition"])):
        here = pc.and_(
            pc.equal(found["source"], row["source"]), pc.equal(found["partition"], row["partition"])
        )
        offsets = np.sort(found["offset"].filter(here).to_numpy())
        for start in range(0, len(offsets), LETTERS_MAX):
            piece = offsets[start : start + LETTERS_MAX]
            spans.append((Place(row["source"], row["partition"]), int(piece[0]), int(piece[-1])))
    return spans
