"""An input folder to an output folder: plan, make the days, record them, bring columns in line.

The output depends on the set of input rows and the settings alone. Not on files, folders, order,
workers or shards, nor on how often runs were killed in between, or what was there before.

Days are made by a *runner*: it maps ``convert_day`` over tasks, here (``in_this_process``), on the
machine's cores (``in_processes``), or anywhere else that sees the files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import pyarrow as pa

from kvstore import libc
from kvstore.dayfiles import hours
from kvstore.dayfiles.day import DayReport, Extra, Task, convert_day, files_of_day
from kvstore.dayfiles.exports import Skipped
from kvstore.dayfiles.grid import DAY_NS, Settings
from kvstore.dayfiles.manifest import Manifest, Record, fingerprint, held, last_one
from kvstore.dayfiles.measures import columns_of, level_of
from kvstore.dayfiles.plan import Plan, Shard, has_files, known_columns, plan
from kvstore.errors import DayfilesError

Runner: TypeAlias = "Callable[[Sequence[Task]], Iterable[DayReport]]"
_WHOLE: Final = Shard()


class Progress(NamedTuple):
    """How far a run is."""

    days: int
    days_total: int
    rows: int
    rows_total: int


class Outcome(NamedTuple):
    """What a run did, and what the output holds after it.

    made: days that were made. records: all days of the output. skipped: files left out, now or
    when their day was made.
    """

    made: list[DayReport]
    removed: list[int]
    records: dict[int, Record]
    files: int
    skipped: list[Skipped]
    vanished: list[str]
    blocked: list[int]
    hours_changed: int

    @property
    def is_whole(self) -> bool:
        """Whether all input rows are in the output, each in its place."""
        unplaced = any(record.report.unplaced for record in self.records.values())
        return not (self.skipped or self.blocked or unplaced)


def in_this_process(tasks: Sequence[Task]) -> Iterator[DayReport]:
    """One day after the other."""
    yield from map(convert_day, tasks)


def in_processes(workers: int) -> Runner:
    """As many days at a time, each in a process."""

    def run(tasks: Sequence[Task]) -> Iterator[DayReport]:
        if workers == 1 or len(tasks) < 2:  # noqa: PLR2004  # nothing to share
            yield from in_this_process(tasks)
            return
        spawned = multiprocessing.get_context("spawn")  # forks of a threaded process may hang
        count = min(workers, len(tasks))
        with ProcessPoolExecutor(count, mp_context=spawned, initializer=_start_worker) as pool:
            try:
                for done in as_completed([pool.submit(convert_day, task) for task in tasks]):
                    yield done.result()
            except BrokenProcessPool as error:
                raise DayfilesError(
                    "a worker process was killed, perhaps for want of memory: days that are done "
                    "are kept; run again, with fewer --workers"
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return run


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    libc.die_with_parent()
    libc.keep_freed_memory()
    pa.set_cpu_count(1)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def convert(
    source: Path,
    root: Path,
    settings: Settings = Settings(),  # noqa: B008  # immutable
    *,
    full: bool = False,
    prune: bool = False,
    shard: Shard = _WHOLE,
    run: Runner = in_this_process,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Outcome:
    """Bring the output folder up to date with the input folder.

    full: make all days that there are inputs for, whatever the manifest says. prune: let go of
    what vanished inputs gave. shard: only these days; runs with other shards may run beside it.
    """
    settings = settings.checked()
    source, root = source.absolute(), root.absolute()  # workers elsewhere have other folders
    if root.resolve() in {source.resolve(), *source.resolve().parents}:
        raise DayfilesError(
            f"{source} lies in {root}, where hour files that no run made are removed: give the "
            "output a folder of its own"
        )
    manifest = Manifest(root)
    with held(root, alone=shard.parts == 1):
        todo = plan(source, root, settings, manifest.records(), shard=shard, full=full, prune=prune)
        made = list(_made(todo, manifest, source, run, progress))
        for day in todo.gone:
            _remove(root, day, manifest)
    with last_one(root) as is_last:
        aligned = _align(root, manifest) if is_last else 0
    records = manifest.records()
    return Outcome(
        made,
        todo.gone,
        records,
        len(todo.exports),
        _skipped(todo, records),
        todo.vanished,
        todo.blocked,
        aligned + sum(report.hours_changed for report in made),
    )


def _made(
    todo: Plan,
    manifest: Manifest,
    source: Path,
    run: Runner,
    progress: Callable[[Progress], None],
) -> Iterator[DayReport]:
    tasks = {task.day: task for task in todo.tasks}
    records = manifest.records()
    for day in tasks.keys() & records.keys():
        manifest.doubt(records[day])
    expected = {task.day: sum(export.rows for export in task.exports) for task in todo.tasks}
    done = rows = 0
    for report in run(todo.tasks):
        task = tasks[report.day]
        manifest.write(_record(task, report, source))
        done, rows = done + 1, rows + expected[report.day]
        progress(Progress(done, len(tasks), rows, sum(expected.values())))
        yield report


def _record(task: Task, report: DayReport, source: Path) -> Record:
    sizes = {export.name: export.size_bytes for export in task.exports}
    marked = fingerprint(task.exports, task.settings)
    return Record(
        marked,
        complete=True,
        source=str(source.resolve()),
        settings=task.settings,
        sizes=sizes,
        report=report,
    )


def _remove(root: Path, day: int, manifest: Manifest) -> None:
    manifest.doubt(manifest.records()[day])
    for path in files_of_day(root, day):
        hours.remove(path, root)
    manifest.forget(day)


def _skipped(todo: Plan, records: Mapping[int, Record]) -> list[Skipped]:
    """Files that this run left out, or that were left out of days that are done."""
    there = {export.name for export in todo.exports}
    before = {one for record in records.values() for one in record.report.skipped}
    return sorted({*todo.skipped, *(one for one in before if one.name in there)})


# ---- columns ----


def _align(root: Path, manifest: Manifest) -> int:
    """Give all files of a kind the same columns: those that the whole output has readings of.

    Days are made without knowing what later ones, or other shards, will find. Returns how many
    files were changed.
    """
    records = manifest.records()
    extra = known_columns(records.values())
    changed = 0
    for record in records.values():
        # Files that were removed together with their inputs are nobody's to make again.
        if record.complete and _differs(record, extra) and has_files(record, root):
            changed += _realigned(root, manifest, record, extra)
    return changed


def _differs(record: Record, extra: Extra) -> bool:
    written = record.report.written
    levels = {level_of(tree) for tree in record.report.files}
    return any(set(written.get(level, ())) != extra.get(level, frozenset()) for level in levels)


def _realigned(root: Path, manifest: Manifest, record: Record, extra: Extra) -> int:
    manifest.doubt(record)
    changed = 0
    files = {tree: dict(sizes) for tree, sizes in record.report.files.items()}
    for tree, sizes in files.items():
        columns = columns_of(level_of(tree), extra.get(level_of(tree), frozenset()))
        for hour in sizes:
            path = hours.path_of(root, tree, record.report.day * DAY_NS + int(hour) * DAY_NS // 24)
            content = hours.encoded(hours.with_columns(path, columns, record.settings))
            sizes[hour] = len(content)
            changed += hours.put(path, content)
    libc.sync_filesystem(root)
    written = {level: sorted(names) for level, names in extra.items()}
    report = record.report._replace(files=files, written=written)
    manifest.write(record._replace(complete=True, report=report))
    return changed
