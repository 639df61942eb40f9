"""The input rows behind a value of an output: which files and rows, and what became of each.

Inputs are read again, those of the value's day that the manifest names, and the value is made
again of what they have: so an explanation also shows where an output is older than its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from kvstore.dayfiles import hours
from kvstore.dayfiles.cells import Cells, cells, numbers, texts, times_ns
from kvstore.dayfiles.chunk import (
    DROPPED,
    TIME,
    WIDE,
    Kinds,
    Window,
    long_chunk,
    tag_codes,
    wide_cells,
    wide_chunk,
    wide_trees,
)
from kvstore.dayfiles.day import HOLD_S_MAX, day_text
from kvstore.dayfiles.exports import Export, batches_of, examined, files_below, hashed
from kvstore.dayfiles.grid import (
    DAY_NS,
    HELD,
    INTERPOLATED,
    MISSING,
    OBSERVED,
    Bins,
    Lattice,
    Settings,
    binned,
    filled,
    lattice,
)
from kvstore.dayfiles.manifest import Manifest, Record
from kvstore.dayfiles.measures import TEXT_SUFFIX, Column, column
from kvstore.dayfiles.readings import Merged, Part, merged
from kvstore.dayfiles.series import Series, column_of_header
from kvstore.errors import DayfilesError
from kvstore.timestamps import NS_PER_S

Use = Literal["used", "duplicate", "lost a conflict", "unreadable"]
_WORDS = {OBSERVED: "observed", HELD: "held", INTERPOLATED: "interpolated", MISSING: "missing"}


class Source(NamedTuple):
    """A row of an input that has to do with a value. row: from 0, in its file."""

    file: str
    row: int
    time_ns: int
    text: str | None
    use: Use


class Explanation(NamedTuple):
    """A value and where it comes from.

    state: observed, held, interpolated or missing. bins_ns: the bins whose readings it is made
    of: its own, the one that is held, or the two around it. remade: the same, of the inputs as
    they are now. absent: inputs that are gone: no file of the source folder has their content.
    """

    path: str
    column: Column
    time_ns: int
    value: float | str | None
    state: str
    bins_ns: list[int]
    remade: float | str | None
    sources: list[Source]
    absent: list[str]


def explain(path: Path, column_name: str, time_ns: int) -> Explanation:
    """Explain the value of a column in an hour file, in the bin that holds this time."""
    path = path.resolve()
    facts = hours.facts_of(path)
    root = path.parents[min(4, len(path.parents) - 1)]  # less of a file that was moved away
    place = (time_ns - facts.start_ns) // facts.every_ns * facts.every_ns + facts.start_ns
    value = _value(path, column_name, place)
    day = place // DAY_NS
    record = Manifest(root).records().get(day)
    if record is None:
        raise DayfilesError(f"{root} has no record of {day_text(day)}: convert it again first")
    grid = lattice(place, facts.every_ns, record.settings, HOLD_S_MAX)
    found = _Found(facts.tree, column_name, grid)
    inputs, absent = _inputs(record, root)
    for export in inputs:
        if export.overlaps(grid.window):
            found.read(export)
    return found.explained(str(path), place, value, record.settings, absent)


def _value(path: Path, name: str, place: int) -> float | str | None:
    table = hours.read(path)
    known = [n for n in table.column_names if n != TIME and not n.endswith(hours.FLAG_SUFFIX)]
    if name not in known:
        raise DayfilesError(f"{path}: no column {name!r} among {', '.join(known)}")
    times = (table[TIME].cast("int64").to_numpy() * 1000).tolist()
    if place not in times:
        raise DayfilesError(
            f"{path}: no bin at {_iso(place)}; it has {_iso(times[0])} to {_iso(times[-1])}"
        )
    value: float | str | None = table[name][times.index(place)].as_py()
    return value


def _iso(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / NS_PER_S, UTC).isoformat()


class _Row(NamedTuple):
    """A row of the series. number: as convert reads its value, NaN for none."""

    file: str
    row: int
    time_ns: int
    text: str | None
    number: float


def _inputs(record: Record, root: Path) -> tuple[list[Export], list[str]]:
    """The inputs of a day, whatever they are called now; and those that are gone.

    A day whose inputs were renamed is not made again, so its record has the names of old.
    """
    source = Path(record.source)
    found: dict[str, Export] = {}
    missing = []
    for fed in record.report.inputs:
        path = str(source / fed.name if source.is_dir() else source)
        export = examined(path, fed.name)
        if isinstance(export, Export):
            found[path] = export
        else:
            missing.append(fed)
    sought = {record.sizes.get(fed.name) for fed in missing}
    below = files_below(source, outside=root) if missing and source.is_dir() else ()
    moved = [hashed(e) for e in _exports_of_sizes(below, sought)]
    by_digest = {export.digest: export for export in moved if isinstance(export, Export)}
    # An input that is there under its own name may be a copy of one that is gone: it is read once.
    again = [by_digest[fed.digest] for fed in missing if fed.digest in by_digest]
    found = {export.path: export for export in again} | found
    gone = [fed.name for fed in missing if fed.digest not in by_digest]
    return sorted(found.values(), key=lambda export: export.name), gone


def _exports_of_sizes(
    files: Iterable[tuple[str, str]], sizes: Container[int | None]
) -> Iterator[Export]:
    for path, name in files:
        with suppress(OSError):  # a file that goes meanwhile is none
            if Path(path).stat().st_size in sizes:
                export = examined(path, name)
                if isinstance(export, Export):
                    yield export


class _Found:
    """What the inputs have of a series, around a bin."""

    def __init__(self, tree: str, name: str, grid: Lattice) -> None:
        self._key = f"{tree}/{name}"
        self._column = column(name)
        self._grid = grid
        self._rows: list[_Row] = []
        self._parts: list[Part] = []

    def read(self, export: Export) -> None:
        """Read what an input has."""
        kinds = Kinds()
        window = self._grid.window
        for first, batch in batches_of(export, window):
            if export.layout == "long":
                chunk, rows = long_chunk(batch, first, window, kinds), _long_rows(batch, kinds)
            else:
                chunk, rows = wide_chunk(batch, first, window), _wide_rows(batch)
            self._parts += chunk.parts
            self._rows += [
                _Row(export.name, first + row, ns, text, value)
                for series, row, ns, text, value in rows
                if _target(series, text, value) == self._key
                and window.start_ns <= ns < window.stop_ns
            ]

    def explained(
        self,
        path: str,
        place: int,
        value: float | str | None,
        settings: Settings,
        absent: list[str],
    ) -> Explanation:
        """What the rows make of the bin."""
        readings = merged(self._parts)
        own = [b for b in binned(readings, self._grid) if self._key in _keys(b)]
        flag, remade = MISSING, None
        places: list[int] = []
        if own:
            flag, places, remade = self._bin(own[0], readings, settings)
        sources = list(self._sources(readings, places))
        return Explanation(
            path, self._column, place, value, _WORDS[flag], places, remade, sources, absent
        )

    def _bin(
        self, bins: Bins, readings: Merged, settings: Settings
    ) -> tuple[int, list[int], float | str | None]:
        row = _keys(bins).index(self._key)
        tree = filled(bins, self._grid, settings)
        flag, made = int(tree.flags[row, 0]), float(tree.values[row, 0])
        here = self._grid.lead
        seen = np.flatnonzero(bins.seen[row]).tolist()
        before = [place for place in seen if place <= here]
        after = [place for place in seen if place > here]
        places: list[int] = {
            OBSERVED: before[-1:],
            HELD: before[-1:],
            INTERPOLATED: before[-1:] + after[:1],
            MISSING: before[-1:] if bins.seen[row, here] else [],
        }[flag]
        starts = [self._grid.window.start_ns + place * self._grid.every_ns for place in places]
        if flag == MISSING:
            return flag, starts, None
        return flag, starts, readings.texts[int(made)] if self._column.measure.is_text else made

    def _sources(self, readings: Merged, starts: Iterable[int]) -> Iterator[Source]:
        stays = self._staying(readings)
        seen: set[int] = set()
        for start in sorted(starts):
            inside = Window(start, start + self._grid.every_ns)
            rows = [r for r in self._rows if inside.start_ns <= r.time_ns < inside.stop_ns]
            for row in sorted(rows, key=lambda r: (r.time_ns, r.file, r.row)):
                use = self._use(row, stays, seen)
                yield Source(row.file, row.row, row.time_ns, row.text, use)

    def _staying(self, readings: Merged) -> Mapping[int, Any]:
        """The value that stays of each time."""
        keys = [one.key for one in readings.series]
        if self._key not in keys:
            return {}
        own = readings.codes == keys.index(self._key)
        numbers = readings.values[own].tolist()
        if self._column.measure.is_text:
            told = [None if n != n else readings.texts[int(n)] for n in numbers]  # noqa: PLR0124
        else:
            told = [None if n != n else n for n in numbers]  # noqa: PLR0124
        return dict(zip(readings.times_ns[own].tolist(), told, strict=True))

    def _use(self, row: _Row, stays: Mapping[int, Any], seen: set[int]) -> Use:
        value = row.text if self._column.measure.is_text else row.number
        if value is None or value != value:  # noqa: PLR0124  # NaN
            return "unreadable"
        if value != stays.get(row.time_ns):
            return "lost a conflict"
        if row.time_ns in seen:
            return "duplicate"
        seen.add(row.time_ns)
        return "used"


def _keys(bins: Bins) -> list[str]:
    return [f"{bins.tree}/{column.name}" for column in bins.columns]


def _target(series: Series, text: str | None, value: float) -> str:
    """The key of the series that a row goes to: texts of an open measure have one of their own."""
    is_word = series.column.measure.is_open and text is not None and math.isnan(value)
    return series.key + TEXT_SUFFIX if is_word else series.key


_Told = tuple[Series, int, int, str | None, float]


def _long_rows(batch: Any, kinds: Kinds) -> Iterator[_Told]:
    """Series, row, time, text and number of each row that has a series."""
    times, values = cells(batch.column(TIME)), cells(batch.column("value"))
    names = cells(batch.column("payload_type"))
    series, codes = kinds.of_chunk(names, tag_codes(batch.column("tags"), kinds.tags))
    ns, told = times_ns(times.distinct).tolist(), _told(values)
    for row, (code, time, value) in enumerate(
        zip(codes.tolist(), times.codes.tolist(), values.codes.tolist(), strict=True)
    ):
        one = series[code]
        if one is not None:
            yield one, row, ns[time], *told[value]


def _wide_rows(batch: Any) -> Iterator[_Told]:
    times = cells(batch.column(TIME))
    ns = times_ns(times.distinct).tolist()
    trees, places = wide_trees(batch)
    for name in batch.schema.names:
        if name in WIDE or name == DROPPED:
            continue
        header = column_of_header(name)
        rows, values = wide_cells(batch.column(name))
        told = _told(values)
        for row, value in zip(rows.tolist(), values.codes.tolist(), strict=True):
            tree = trees[places[row]]
            if tree is not None:
                yield Series(tree, header), row, ns[times.codes[row]], *told[value]


def _told(values: Cells) -> list[tuple[str | None, float]]:
    """Distinct cells as they are printed, and as convert reads them: a bool is a number to it."""
    words, floats = texts(values.distinct), numbers(values.distinct).tolist()
    return list(zip(words, floats, strict=True))
