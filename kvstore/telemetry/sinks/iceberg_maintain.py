"""Upkeep of a lake, while others write to it: compact, expire snapshots, remove garbage.

1. *Compact*: small files of a day and bucket become one, in order of time; small files of letters
   and counts as well (counts are added up). The rows stay the same ones.
2. *Fence*: a snapshot of our own. A commit that was prepared before it can no longer arrive: it
   loses the race and starts again. So from here on each file is either referred to, or garbage.
3. *Expire*: snapshots older than ``keep_s``, with the files that nothing refers to any more.
   Those that a branch, a tag or a kept snapshot of the readings names stay.
4. *Remove orphans*: files below the tables' folders that nothing refers to, older than
   ``orphans_s``. Never younger ones: a commit that is being made has its files there already.

A file goes only after the commit that lets go of it. Killed anywhere, this leaves garbage at
worst, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pyarrow.fs import FileSelector, FileType
from pyiceberg.table import FileScanTask
from pyiceberg.table.update.snapshot import ExpireSnapshots

from kvstore.errors import SinkError
from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks import iceberg_side as side
from kvstore.telemetry.sinks import iceberg_state as states
from kvstore.telemetry.sinks.iceberg_commit import Step, advance, loaded
from kvstore.telemetry.sinks.iceberg_lake import (
    COUNTS,
    DEAD_LETTERS,
    READINGS,
    Change,
    Lake,
    raced,
    races,
    scan,
    swap,
    translated,
)
from kvstore.telemetry.sinks.iceberg_scan import DataFile, Files, has_deletes, tasks
from kvstore.telemetry.sinks.iceberg_write import Piece, write

if TYPE_CHECKING:
    import pyarrow as pa

    from kvstore.telemetry.records import Position

FILE_ROWS: Final = 1_000_000  # of a compacted file: held in memory while it is made, some 150 MB
SMALL_ROWS: Final = FILE_ROWS // 2
SMALL_BYTES: Final = 32 << 20  # of a file of letters or counts
FILES_MIN: Final = 4  # small files that are worth a rewrite
KEEP_S: Final = 86_400.0  # a day of snapshots: for readers that are at it, and to look back
ORPHANS_S: Final = 3 * 86_400.0  # longer than any commit is on its way


@dataclass(slots=True)
class Upkeep:
    """What was done, or would be."""

    compacted: int = 0  # files that became fewer
    into: int = 0
    expired: int = 0  # snapshots
    files_removed: int = 0
    bytes_removed: int = 0
    orphans: int = 0


def maintain(
    lake: Lake,
    *,
    keep_s: float = KEEP_S,
    orphans_s: float = ORPHANS_S,
    compact: bool = True,
    dry_run: bool = False,
    now_s: Callable[[], float] = time.time,
) -> Upkeep:
    """All of it. keep_s, orphans_s: ages of what goes. dry_run: say what would, change nothing."""
    done = Upkeep()
    loaded(lake)  # an error here where the table was rolled back: nothing may be expired then
    if compact:
        _compact_readings(lake, done, dry_run=dry_run)
    head = _fence(lake, done, compact=compact, dry_run=dry_run)
    if not dry_run:
        side.publish(lake, DEAD_LETTERS, head.letters)
        side.publish(lake, COUNTS, head.counts)
    horizon_s = now_s() - keep_s
    _expire(lake, READINGS, horizon_s, set(), done, dry_run=dry_run)
    heads = [head, *_heads(lake, horizon_s)]
    named = {
        DEAD_LETTERS: {each.letters for each in heads},
        COUNTS: {each.counts for each in heads},
    }
    for name, keep in named.items():
        _expire(lake, name, horizon_s, keep, done, dry_run=dry_run)
    for name in (READINGS, DEAD_LETTERS, COUNTS):
        _remove_orphans(lake, name, now_s() - orphans_s, done, dry_run=dry_run)
    return done


# ---- compacting ----


def _compact_readings(lake: Lake, done: Upkeep, *, dry_run: bool) -> None:
    table = lake.table()
    with translated(lake.location):
        if has_deletes(table):
            return  # another tool's deletes apply to files by their age: it should compact
        groups = list(_groups(Files().of(table)))
    for partition, group in groups:
        done.compacted += len(group)
        done.into += 1
        if not dry_run:
            _compact(lake, partition, group, done)


def _groups(files: Iterable[DataFile]) -> Iterator[tuple[tuple[int, int], list[DataFile]]]:
    """Small files of a partition that are to become one, neighbours in time."""
    small = defaultdict(list)
    for file in files:
        if file.partition and file.rows < SMALL_ROWS:
            small[file.partition].append(file)
    for partition, found in sorted(small.items()):
        group: list[DataFile] = []
        for file in sorted(found, key=lambda each: (each.first_us, each.path)):
            if sum(each.rows for each in group) + file.rows > FILE_ROWS:
                if len(group) >= FILES_MIN:
                    yield partition, group
                group = []
            group.append(file)
        if len(group) >= FILES_MIN:
            yield partition, group


def _compact(
    lake: Lake, partition: tuple[int, int], group: Sequence[DataFile], done: Upkeep
) -> None:
    """Several files into one. Where somebody else has replaced one of them, leave it."""
    entries, known = None, Files()
    for attempt in races():
        table, state = loaded(lake)
        with translated(lake.location):
            live = {file.path for file in known.of(table)}
            if not all(file.path in live for file in group) or has_deletes(table):
                done.compacted -= len(group)
                done.into -= 1
                return
            if entries is None:
                names = table.schema().column_names
                found = scan(table, tasks(table, group), names)
                found = found.sort_by([(rows.TS, "ascending"), (rows.DEVICE, "ascending")])
                entries = write(table, [Piece(partition, found)])
        with raced(attempt):
            gone = [file.entry for file in group]
            step = Step(f"compact-{uuid.uuid4()}", entries=entries, gone=gone)
            advance(lake, table, state, state, step)
            return


def _fence(lake: Lake, done: Upkeep, *, compact: bool, dry_run: bool) -> states.Head:
    """A snapshot of ours, which also names the side tables compacted; the head after it."""
    merges = {DEAD_LETTERS: _sorted_letters, COUNTS: rows.counts_added}
    for attempt in races():
        table, state = loaded(lake)
        head = state.head
        at = {DEAD_LETTERS: head.letters, COUNTS: head.counts}
        small = {name: _small(lake, name, at[name]) for name in merges if compact}
        if not dry_run:
            for name, files in small.items():
                at[name] = _compact_side(lake, name, at[name], files, merges[name])
            head = replace(head, letters=at[DEAD_LETTERS], counts=at[COUNTS])
        with raced(attempt):
            if not dry_run:
                step = Step(f"maintain-{uuid.uuid4()}")
                advance(lake, table, state, replace(state, head=head), step)
            done.compacted += sum(map(len, small.values()))
            done.into += sum(map(bool, small.values()))
            return head
    raise AssertionError


def _small(lake: Lake, name: str, at: int | None) -> list[Any]:
    """Files of a side table that are worth becoming one."""
    table = lake.table(name)
    with translated(lake.location):
        files = [task.file for task in side.tasks_at(table, at)]
    small = [file for file in files if file.file_size_in_bytes < SMALL_BYTES]
    return small if len(small) >= FILES_MIN else []


def _sorted_letters(table: pa.Table) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in ("source", "partition", "offset")])


def _compact_side(
    lake: Lake,
    name: str,
    at: int | None,
    files: Sequence[Any],
    merged: Callable[[pa.Table], pa.Table],
) -> int | None:
    def decide(table: Any) -> side.Edit | None:
        if not files:
            return None
        found = scan(table, [FileScanTask(file) for file in files], table.schema().column_names)
        plain = table.schema().as_arrow()
        return side.Edit(merged(found.cast(plain)).cast(plain), files)

    return side.stage(lake, name, at, decide)


# ---- expiring ----


def _heads(lake: Lake, horizon_s: float) -> Iterator[states.Head]:
    """What the snapshots of the readings that stay say of the side tables."""
    for snapshot in lake.table().metadata.snapshots:
        found = states.head_of(snapshot)
        if found is not None and snapshot.timestamp_ms / 1000 >= horizon_s:
            yield found


def _expire(
    lake: Lake,
    name: str,
    horizon_s: float,
    keep: Collection[int | None],
    done: Upkeep,
    *,
    dry_run: bool,
) -> None:
    old = _old_snapshots(lake.table(name), horizon_s, keep)
    done.expired += len(old)
    if not old or dry_run:
        return
    ids = {snapshot.snapshot_id for snapshot in old}
    with translated(lake.location):
        before = referred(lake.table(name), old)
    for attempt in races():
        table = lake.table(name)
        with translated(lake.location):
            here = ids & {snapshot.snapshot_id for snapshot in table.metadata.snapshots}
            transaction = Change(table)
            ExpireSnapshots(transaction).by_ids(sorted(here)).commit()
        with raced(attempt):
            swap(transaction, lake.location)
            break
    table = lake.table(name)
    with translated(lake.location):
        _remove(table, before - referred(table, table.metadata.snapshots), done)


def _old_snapshots(table: Any, horizon_s: float, keep: Collection[int | None]) -> list[Any]:
    named = {ref.snapshot_id for ref in table.metadata.refs.values()}.union(keep)
    return [
        snapshot
        for snapshot in table.metadata.snapshots
        if snapshot.timestamp_ms / 1000 < horizon_s and snapshot.snapshot_id not in named
    ]


def referred(table: Any, snapshots: Iterable[Any]) -> set[str]:
    """All files that snapshots need: lists of manifests, manifests, data."""
    found: set[str] = set()
    for snapshot in snapshots:
        found.add(snapshot.manifest_list)
        for manifest in snapshot.manifests(table.io):
            if manifest.manifest_path not in found:
                found.add(manifest.manifest_path)
                entries = manifest.fetch_manifest_entry(table.io, discard_deleted=True)
                found.update(entry.data_file.file_path for entry in entries)
    return found


def _remove(table: Any, paths: Iterable[str], done: Upkeep) -> None:
    for path in sorted(paths):
        with contextlib.suppress(FileNotFoundError):
            size = len(table.io.new_input(path))
            table.io.delete(path)
            done.files_removed += 1
            done.bytes_removed += size


# ---- orphans ----


def _remove_orphans(
    lake: Lake, name: str, horizon_s: float, done: Upkeep, *, dry_run: bool
) -> None:
    before = lake.table(name)
    with translated(lake.location):
        listed = _listed(before)
        if _plain(before, before.metadata_location) not in listed:
            raise SinkError(
                f"{lake.location}: {before.metadata_location} is not among the files found below "
                f"{before.location()}; nothing was removed, as names cannot be told apart"
            )
        # Looked at after the listing: what was committed in between is in the newer table.
        table = lake.table(name)
        metadata = table.metadata
        known = referred(table, metadata.snapshots) | {table.metadata_location}
        known |= {each.metadata_file for each in metadata.metadata_log}
        known |= {each.statistics_path for each in metadata.statistics}
        needed = {_plain(table, each) for each in known}
        orphans = [
            location
            for plain, (location, written_s) in listed.items()
            if written_s < horizon_s and plain not in needed
        ]
        done.orphans += len(orphans)
        if not dry_run:
            _remove(table, orphans, done)


def _listed(table: Any) -> dict[str, tuple[str, float]]:
    """All files below the table's folder: location, and when it was last written."""
    scheme, netloc, path = table.io.parse_location(table.location(), table.io.properties)
    found = table.io.fs_by_scheme(scheme, netloc).get_file_info(FileSelector(path, recursive=True))
    files = [each for each in found if each.type == FileType.File]
    named = ((f"{scheme}://{each.path}", each.mtime_ns / 1e9) for each in files)
    return {_plain(table, location): (location, at_s) for location, at_s in named}


def _plain(table: Any, location: str) -> str:
    """A location as the disk has it: a relative one, file:/a and file:///a have other spellings."""
    scheme, _, path = table.io.parse_location(location, table.io.properties)
    return f"{scheme}:{path}"


# ---- after a rollback ----


def accept_rollback(lake: Lake) -> list[Position]:
    """Set positions back to what the current snapshot's past says, where somebody rolled back.

    Epochs grow, so that no worker of before can commit. What was read behind those positions is
    read again. Gives the positions that changed.
    """
    for attempt in races():
        table = lake.table()
        with translated(lake.location):
            state = states.state_of(table.metadata)
            offered = states.offered(table.metadata, state)
            lost = [place for place, position in offered.items() if position is None]
            if lost:
                raise SinkError(
                    f"{lake.location}: where {lost[0]} was read up to is not known any more: the "
                    "snapshots that say so have expired. Roll forward to a snapshot that has it"
                )
            head = _still_there(lake, states.past_head(table.metadata), state.head)
            after, changed = state.rewound(offered, head)
        with raced(attempt):
            advance(lake, table, state, after, Step(f"rollback-{uuid.uuid4()}"))
            return changed
    raise AssertionError


def _still_there(lake: Lake, past: states.Head, now: states.Head) -> states.Head:
    """The past head; where a side table's snapshot has expired, with the present one.

    Letters are unique by their place, so those that come again are the same ones. Counts then add
    what is read again to what was counted: `kvstore telemetry audit` tells.
    """
    letters = lake.table(DEAD_LETTERS).metadata.snapshot_by_id(past.letters or -1)
    counts = lake.table(COUNTS).metadata.snapshot_by_id(past.counts or -1)
    return replace(
        past,
        letters=past.letters if letters or past.letters is None else now.letters,
        counts=past.counts if counts or past.counts is None else now.counts,
    )
