"""What there is to do: input files against the manifest.

A day is done if its record is complete, was made from inputs of the same contents with the same
settings, and its files are there. All other days that inputs have rows for are to be made. An
input whose content is nowhere in the input folder any more has *vanished*, unless it has grown
where it was: what it gave stays in the output, and a day that would lose it is not made again
(*blocked*), unless --prune says so.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.dayfiles.day import Extra, Fed, Task, day_lattice
from kvstore.dayfiles.exports import Export, Skipped, examined, files_below, hashed
from kvstore.dayfiles.grid import DAY_NS, Settings
from kvstore.dayfiles.hours import path_of
from kvstore.dayfiles.manifest import Record, fingerprint
from kvstore.dayfiles.measures import Level

_THREADS: Final = 2  # hashing goes as fast as the disk, then


class Shard(NamedTuple):
    """The part of the days that this run takes: those whose number leaves ``part`` over."""

    part: int = 0
    parts: int = 1

    def has(self, day: int) -> bool:
        """Whether that day is this run's."""
        return day % self.parts == self.part


class Plan(NamedTuple):
    """What a run is to do.

    tasks: days to make. gone: days of the manifest without any input, to be removed. vanished:
    inputs that are gone, by name. blocked: days that need making, but would lose what a vanished
    input gave.
    """

    exports: list[Export]
    skipped: list[Skipped]
    tasks: list[Task]
    gone: list[int]
    vanished: list[str]
    blocked: list[int]


def found(source: Path, root: Path) -> tuple[list[Export], list[Skipped]]:
    """The exports of a folder, and the files that are none."""
    exports: list[Export] = []
    skipped: list[Skipped] = []
    for path, name in files_below(source, outside=root):
        file = examined(path, name)
        exports.append(file) if isinstance(file, Export) else skipped.append(file)
    return exports, skipped


def plan(
    source: Path,
    root: Path,
    settings: Settings,
    records: Mapping[int, Record],
    *,
    shard: Shard,
    full: bool = False,
    prune: bool = False,
) -> Plan:
    """Compare the input with the manifest."""
    exports, skipped = found(source, root)
    days = _days(exports, settings, shard)
    exports, unread = _hashed(exports, days)
    skipped += unread
    days = _days(exports, settings, shard)
    own = {day: record for day, record in records.items() if shard.has(day)}
    extra = known_columns(records.values())
    digests = {export.digest for export in exports}
    tasks, blocked = [], []
    vanished: set[str] = set()
    for day in sorted(days.keys() | own.keys()):
        record = own.get(day)
        inputs = days.get(day, [])
        lost = [] if record is None else _lost(record, inputs, digests)
        vanished.update(fed.name for fed in lost)
        if (
            record is not None
            and not full
            and _is_done(record, inputs, settings, root, lost, prune=prune)
        ):
            continue
        if lost and not (prune or full):
            if inputs:
                blocked.append(day)
            continue
        if inputs:
            tasks.append(Task(str(root), day, tuple(inputs), settings, extra))
    gone = [day for day in own if day not in days] if prune else []
    return Plan(exports, skipped, tasks, gone, sorted(vanished), blocked)


def _lost(record: Record, inputs: Iterable[Export], digests: Container[str]) -> list[Fed]:
    """Inputs that a day has rows of, and that are gone, whatever name they may have by now.

    One that has grown in its place is not lost, but read again: a file that is appended to.
    """
    sizes = {export.name: export.size_bytes for export in inputs}
    return [
        fed
        for fed in record.report.inputs
        if (fed.rows or fed.beside)
        and fed.digest not in digests
        and sizes.get(fed.name, -1) < record.sizes.get(fed.name, 0)
    ]


def _days(exports: Sequence[Export], settings: Settings, shard: Shard) -> dict[int, list[Export]]:
    """Days that exports may have rows in, with all exports that matter to them.

    A day is among them for its own rows, and for what is held into it from the one before.
    """
    days: dict[int, list[Export]] = {}
    for export in exports:
        for day in _days_of(export, settings):
            if shard.has(day) and export.overlaps(day_lattice(day, settings).window):
                days.setdefault(day, []).append(export)
    return days


def _days_of(export: Export, settings: Settings) -> set[int]:
    reach = day_lattice(0, settings).window
    days: set[int] = set()
    for first_ns, last_ns in export.spans:
        first = (first_ns - reach.stop_ns) // DAY_NS + 1
        last = (last_ns - reach.start_ns) // DAY_NS
        days.update(range(first, last + 1))
    return days


def _hashed(
    exports: Sequence[Export], days: Mapping[int, Iterable[Export]]
) -> tuple[list[Export], list[Skipped]]:
    """The exports that these days need, with the digests of their contents."""
    needed = {export.path for group in days.values() for export in group}
    with ThreadPoolExecutor(_THREADS) as threads:
        answers = list(threads.map(hashed, [e for e in exports if e.path in needed]))
    return (
        [answer for answer in answers if isinstance(answer, Export)],
        [answer for answer in answers if isinstance(answer, Skipped)],
    )


def _is_done(
    record: Record, inputs: Sequence[Export], settings: Settings, root: Path,
    lost: Sequence[object], *, prune: bool,
) -> bool:  # fmt: skip
    if not record.complete or not has_files(record, root):
        return False
    if record.fingerprint == fingerprint(inputs, settings):
        return True
    # Only less than there was: what is in the output stays, unless it is to be pruned.
    known = {fed.digest for fed in record.report.inputs}
    return (
        bool(lost)
        and not prune
        and settings == record.settings
        and all(e.digest in known for e in inputs)
    )


def has_files(record: Record, root: Path) -> bool:
    """Whether the files of a day are all there, and of their sizes."""
    try:
        return all(
            path_of(root, tree, record.report.day * DAY_NS + int(hour) * DAY_NS // 24)
            .stat()
            .st_size
            == size
            for tree, sizes in record.report.files.items()
            for hour, size in sizes.items()
        )
    except FileNotFoundError:
        return False


def known_columns(records: Iterable[Record]) -> Extra:
    """The extra columns that the days of an output have among them."""
    extra: dict[Level, frozenset[str]] = {}
    for record in records:
        for level, names in record.report.found.items():
            extra[level] = extra.get(level, frozenset()) | frozenset(names)
    return extra
