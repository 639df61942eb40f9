"""A day of an output: the one unit of work, a plain function of its input files and the settings.

    convert_day(task) -> report

It can be run in any process that sees the files, again and again, alone or beside itself: the
same task leaves the same bytes. Nothing but the report comes back. Memory is that of a day's
distinct readings, and of one chunk of one file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from kvstore import libc
from kvstore.dayfiles import exports, hours, tally
from kvstore.dayfiles.cells import NO_TIME
from kvstore.dayfiles.chunk import Chunk, Kinds, Oddity, Window
from kvstore.dayfiles.exports import Export, Skipped
from kvstore.dayfiles.grid import DAY_NS, HOUR_NS, Lattice, Settings, binned, filled, lattice
from kvstore.dayfiles.measures import MEASURES, Level, columns_of, level_of, table_columns
from kvstore.dayfiles.readings import Flags, Ints, Merged, Part, merged
from kvstore.dayfiles.tally import SeriesTally
from kvstore.errors import DayfilesError
from kvstore.timestamps import NS_PER_S

HOLD_S_MAX: Final = max(measure.hold_s for measure in MEASURES)
_NAMED_MAX: Final = 20  # of each kind of oddity, a day; all are counted
_EPOCH: Final = date(1970, 1, 1)

Extra = Mapping[Level, frozenset[str]]
"""Columns beyond the table's, by kind of file."""


class Task(NamedTuple):
    """A day to be made. day: since 1970. exports: all that may have rows that matter to it."""

    root: str
    day: int
    exports: tuple[Export, ...]
    settings: Settings
    extra: Extra


class Fed(NamedTuple):
    """What an input gave to a day.

    hours: of the day, those that it has rows in. beside: rows around the day that matter to it.
    """

    name: str
    digest: str
    rows: int
    hours: list[int]
    beside: int = 0


class DayReport(NamedTuple):
    """What became of a day.

    rows: of the inputs that lie in the day, and distinct readings among them. conflicts: readings
    that lost to another of their identity. unplaced, unreadable: rows; the first ones are named.
    files: hour to size, by tree. found: extra columns that have readings in the day itself;
    written: those that its files have.
    """

    day: int
    inputs: list[Fed]
    skipped: list[Skipped]
    rows: int
    distinct: int
    conflicts: int
    unplaced: int
    unreadable: int
    named: list[str]
    files: dict[str, dict[str, int]]
    hours_changed: int
    found: dict[Level, list[str]]
    written: dict[Level, list[str]]
    series: dict[str, SeriesTally]


def day_text(day: int) -> str:
    """A day as 2024-07-29."""
    return (_EPOCH + timedelta(days=day)).isoformat()


def day_lattice(day: int, settings: Settings) -> Lattice:
    """The bins of a day."""
    return lattice(day * DAY_NS, DAY_NS, settings, HOLD_S_MAX)


def convert_day(task: Task) -> DayReport:
    """Make all hour files of a day."""
    grid = day_lattice(task.day, task.settings)
    intake = _Intake(grid)
    for export in task.exports:
        intake.take(export)
    readings = merged(intake.parts)
    tallies = tally.reading_tallies(readings, grid.inner)
    written = _written(readings, task.extra)
    files, changed, tallies = _write(task, grid, readings, written, tallies)
    changed += _remove_others(Path(task.root), task.day, files)
    # Also where nothing changed: it may be what a killed run left, which nobody has synced.
    libc.sync_filesystem(Path(task.root))
    kept = grid.inner.holds(readings.distinct_ns)
    lost = grid.inner.holds(readings.lost[1])
    return DayReport(
        day=task.day,
        inputs=intake.fed,
        skipped=intake.skipped,
        rows=intake.rows,
        distinct=int(np.count_nonzero(kept)),
        conflicts=int(np.count_nonzero(lost)),
        unplaced=intake.unplaced,
        unreadable=intake.unreadable,
        named=[*intake.named[:_NAMED_MAX], *_named_conflicts(readings, lost)],
        files=files,
        hours_changed=changed,
        found=_found(readings, grid.inner),
        written={level: sorted(names) for level, names in written.items()},
        series=tallies,
    )


# ---- reading ----


class _Intake:
    """Reads a day's inputs one after the other, and keeps count."""

    def __init__(self, grid: Lattice) -> None:
        self.parts: list[Part] = []
        self.fed: list[Fed] = []
        self.skipped: list[Skipped] = []
        self.rows = self.unplaced = self.unreadable = 0
        self.named: list[str] = []
        self._grid = grid
        self._kinds = Kinds()

    def take(self, export: Export) -> None:
        """Add a file's readings."""
        chunks = exports.read(export, self._grid.window, self._kinds)
        if not exports.unchanged(export):
            raise DayfilesError(
                f"{export.path} changed while it was read: run again once it is complete"
            )
        if isinstance(chunks, Skipped):
            self.skipped.append(chunks)
            self.fed.append(Fed(export.name, export.digest, 0, []))
            return
        rows = beside = 0
        hour_set: set[int] = set()
        for chunk in chunks:
            self.parts += chunk.parts
            for part in chunk.parts:
                inner = self._grid.inner.holds(part.times_ns)
                rows += int(part.rows[inner].sum())
                beside += int(part.rows[~inner].sum())
                hour_set.update(self._hours(part.times_ns[inner]))
            rows += self._odd(export, chunk)
        self.rows += rows
        self.fed.append(Fed(export.name, export.digest, rows, sorted(hour_set), beside))

    def _hours(self, times: Ints) -> set[int]:
        """A set, not np.unique, which takes ten times as long for some hundred times."""
        return set(((times - self._grid.start_ns) // HOUR_NS).tolist())

    def _odd(self, export: Export, chunk: Chunk) -> int:
        """Count what is odd; returns how many rows have no place."""
        inner = self._grid.inner
        # Rows without a time are counted once: with the day in which their file begins.
        is_first = inner.start_ns <= export.first_ns < inner.stop_ns
        unplaced = int(np.count_nonzero(inner.holds(chunk.unplaced_ns)))
        if is_first:
            unplaced += int(np.count_nonzero(chunk.unplaced_ns == NO_TIME))
        self.unplaced += unplaced
        self.unreadable += int(np.count_nonzero(inner.holds(chunk.unreadable_ns)))
        for oddities, what in (chunk.unplaced, "unplaced"), (chunk.unreadable, "unreadable"):
            self._name(export.name, oddities, what, inner, is_first=is_first)
        return unplaced

    def _name(
        self, name: str, oddities: Sequence[Oddity], what: str, inner: Window, *, is_first: bool
    ) -> None:
        for row, told, time_ns in oddities:
            is_ours = is_first if time_ns == NO_TIME else inner.start_ns <= time_ns < inner.stop_ns
            if is_ours and len(self.named) < _NAMED_MAX:
                self.named.append(f"{name} row {row}: {what}: {told}")


def _named_conflicts(readings: Merged, lost: Flags) -> list[str]:
    codes, times, values = (axis[lost][:_NAMED_MAX] for axis in readings.lost)
    named = []
    for code, time_ns, value in zip(codes.tolist(), times.tolist(), values.tolist(), strict=True):
        series = readings.series[code]
        told = readings.texts[int(value)] if series.column.measure.is_text else value
        time = datetime.fromtimestamp(time_ns / NS_PER_S, UTC).isoformat()
        named.append(f"conflict: {series.key} at {time}: {told!r} lost to a lower value")
    return named


# ---- columns ----


def _found(readings: Merged, inner: Window) -> dict[Level, list[str]]:
    used = np.unique(readings.codes[inner.holds(readings.times_ns)]).tolist()
    found: dict[Level, set[str]] = {}
    for code in used:
        tree, column = readings.series[code]
        level = level_of(tree)
        if column.name not in table_columns(level):
            found.setdefault(level, set()).add(column.name)
    return {level: sorted(names) for level, names in sorted(found.items())}


def _written(readings: Merged, extra: Extra) -> dict[Level, frozenset[str]]:
    """The extra columns of this day's files: those known before, and those that it has itself."""
    everywhere = Window(NO_TIME + 1, np.iinfo(np.int64).max)
    own = _found(readings, everywhere)
    levels = sorted(own.keys() | extra.keys())
    return {
        level: frozenset(extra.get(level, ())) | frozenset(own.get(level, ())) for level in levels
    }


# ---- writing ----


def _write(
    task: Task, grid: Lattice, readings: Merged, written: Extra, tallies: dict[str, SeriesTally]
) -> tuple[dict[str, dict[str, int]], int, dict[str, SeriesTally]]:
    """Sizes of the files by tree and hour, how many are new, and the tallies with bins."""
    root = Path(task.root)
    files: dict[str, dict[str, int]] = {}
    changed = 0
    for bins in binned(readings, grid):
        tree = filled(bins, grid, task.settings)
        columns = columns_of(level_of(tree.tree), frozenset(written.get(level_of(tree.tree), ())))
        sizes: dict[str, int] = {}
        rows = 0
        for hour in hours.hours(tree, grid, columns, readings.texts, task.settings):
            path = hours.path_of(root, hour.tree, hour.start_ns)
            content = hours.encoded(hour.table)
            changed += hours.put(path, content)
            sizes[path.stem] = len(content)
            rows += hour.table.num_rows
        if sizes:
            files[tree.tree] = sizes
            tallies = tallies | tally.with_bins(tallies, tree, rows)
    return files, changed, tallies


def _remove_others(root: Path, day: int, files: Mapping[str, Mapping[str, int]]) -> int:
    """Remove a day's hour files that are not among these, and what killed runs left."""
    removed = 0
    for path in files_of_day(root, day):
        tree = path.relative_to(root).parts[0]
        if path.suffix == ".tmp":
            path.unlink(missing_ok=True)
        elif path.stem not in files.get(tree, {}):
            hours.remove(path, root)
            removed += 1
    return removed


def files_of_day(root: Path, day: int) -> list[Path]:
    """The hour files of a day that are there, and the temporary ones that killed runs left."""
    time = datetime.fromtimestamp(day * 86400, UTC)
    found = []
    for tree in sorted(os.listdir(root)) if root.is_dir() else []:
        if tree.startswith("."):
            continue
        folder = hours.day_folder(root, tree, time)
        with suppress(FileNotFoundError, NotADirectoryError):
            found += [folder / name for name in sorted(os.listdir(folder)) if _is_ours(name)]
    return found


def _is_ours(name: str) -> bool:
    if name.endswith(".tmp"):
        return name.startswith(".") and ".parquet." in name
    return len(name) == len("00.parquet") and name[:2].isdigit() and name.endswith(".parquet")
