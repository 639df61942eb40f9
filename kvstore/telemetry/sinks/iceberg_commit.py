"""One commit of ours on the readings: a snapshot, and in it all that the state has become.

The sink's commits and claims, and ``maintain``: all go through here, so all of them fence each
other. See iceberg_state.py for why each makes a snapshot, even an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from kvstore.telemetry.records import Outcome, Position
from kvstore.telemetry.sinks import iceberg_state as states
from kvstore.telemetry.sinks.iceberg_lake import (
    SNAPSHOTS_MAX,
    Change,
    Lake,
    swap,
    translated,
    trim,
)

NOTHING: Final = Outcome(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Step:
    """What a commit does. entries: files that come; gone: files that go; moved: new positions."""

    commit_id: str
    entries: Sequence[Any] = ()
    gone: Sequence[Any] = ()
    moved: Sequence[Position] = ()
    outcome: Outcome = NOTHING


def loaded(lake: Lake) -> tuple[Any, states.State]:
    """The readings table and its state as they are now; an error where it was rolled back."""
    table = lake.table()
    with translated(lake.location):
        state = states.state_of(table.metadata)
        states.check_lineage(table.metadata, state, lake.location)
    return table, state


def advance(lake: Lake, table: Any, before: states.State, after: states.State, step: Step) -> None:
    """Commit onto the table as it was loaded, with ``before``; it ends as a swap does."""
    with translated(lake.location):
        summary = states.summary(step.commit_id, step.moved, step.outcome, after.head)
        transaction = Change(table)
        update = transaction.update_snapshot(snapshot_properties=summary)
        producer = update.overwrite() if step.gone else update.merge_append()
        for entry in step.gone:
            producer.delete_data_file(entry)
        for entry in step.entries:
            producer.append_data_file(entry)
        producer.commit()
        trim(transaction, SNAPSHOTS_MAX)
        after = after.moved(
            step.moved,
            snapshot=int(producer.snapshot_id),
            commit_id=step.commit_id,
            outcome=step.outcome,
        )
        sequence = transaction.table_metadata.last_sequence_number
        head = replace(after.head, snapshot=int(producer.snapshot_id), sequence=sequence)
        transaction.set_properties(states.changed(before, replace(after, head=head)))
    swap(transaction, lake.location)
