"""Hour files of one tree, read back for pictures: one array a column, on an unbroken grid.

Hours without a file are NaN, so that a line drawn through a column breaks where nothing is known.
Reads only; a range is read whole, 8 bytes a bin and column (a day of a module: 3 MB).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kvstore.dayfiles.grid import HOUR_NS, MISSING, OBSERVED
from kvstore.dayfiles.hours import FLAG_SUFFIX, TIME, Coverage, Facts, facts_of, read
from kvstore.errors import KvstoreError
from kvstore.timestamps import NS_PER_S

Floats = NDArray[np.float64]
Flags = NDArray[np.int8]


class Grid(NamedTuple):
    """What a tree's files say of some days.

    start_ns: of the first bin. every_s: width of a bin. values: numbers of each column that has
    any, NaN where there is none; flags: as the files have them, else observed or missing.
    told_apart: whether the files have flags, so that held bins are known as such.
    """

    tree: str
    start_ns: int
    every_s: float
    values: dict[str, Floats]
    flags: dict[str, Flags]
    told_apart: bool

    def __len__(self) -> int:
        return next(map(len, self.values.values()), 0)

    @property
    def seconds(self) -> Floats:
        """The begin of each bin, in seconds after the first."""
        return np.arange(len(self), dtype=np.float64) * np.float64(self.every_s)

    def observed(self, name: str) -> Floats:
        """A column's values in bins that have readings; NaN elsewhere."""
        values: Floats = np.where(self.flags[name] == OBSERVED, self.values[name], np.nan)
        return values

    def column(self, name: str) -> Floats:
        """A column, NaN throughout where no file has values of it."""
        found = self.values.get(name)
        return np.full(len(self), np.nan) if found is None else found

    def cells(self) -> dict[int, Floats]:
        """The cell voltages that there are, by number of the cell."""
        names = (name for name in self.values if name.startswith("cell_voltage_"))
        numbered = {name.removeprefix("cell_voltage_"): name for name in names}
        return {
            int(n): self.values[numbered[n]]
            for n in sorted(filter(str.isdecimal, numbered), key=int)
        }


def trees(output: Path) -> list[str]:
    """The trees in a folder of day files: 1_1, 1_2, …, 1, …, system."""
    found = (each.name for each in output.iterdir() if each.is_dir())
    named = [n for n in found if n == "system" or n.replace("_", "").isdecimal()]
    return sorted(
        named, key=lambda n: ([int(p) if p.isdecimal() else 10**9 for p in n.split("_")], n)
    )


def files(output: Path, tree: str, day: date | None = None) -> Iterator[Path]:
    """Hour files of a tree, of one day or of all, in order of time."""
    below = f"{day:%Y/%m/%d}" if day else "*/*/*"
    yield from sorted((output / tree).glob(f"{below}/[0-2][0-9].parquet"))


def days_of(output: Path, tree: str) -> list[date]:
    """The days of which a tree has files."""
    folders = {path.parent for path in files(output, tree)}
    return sorted(date(*(int(part) for part in each.parts[-3:])) for each in folders)


def load(output: Path, tree: str, day: date, days: int = 1) -> Grid:
    """All numbers of a tree for some days from one on; raises KvstoreError where there are none."""
    wanted = [day + timedelta(days=k) for k in range(days)]
    found = [path for each in wanted for path in files(output, tree, each)]
    if not found:
        there = days_of(output, tree) if (output / tree).is_dir() else []
        span = (
            f"it has {there[0]} to {there[-1]}"
            if there
            else f"there are {', '.join(trees(output))}"
        )
        raise KvstoreError(f"{output}: no files of {tree} on {day}; {span}")
    facts = [facts_of(path) for path in found]
    every_ns = facts[0].every_ns
    if any(each.every_ns != every_ns for each in facts):
        raise KvstoreError(
            f"{output}/{tree}: files of more than one grid; convert all anew, with --full"
        )
    start_ns = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * NS_PER_S
    bins = days * 24 * HOUR_NS // every_ns
    return _laid_out(tree, start_ns, every_ns, bins, map(read, found))


def _laid_out(
    tree: str, start_ns: int, every_ns: int, bins: int, tables: Iterable[pa.Table]
) -> Grid:
    values: dict[str, Floats] = {}
    flags: dict[str, Flags] = {}
    told_apart = False
    for table in tables:
        ns = table[TIME].cast(pa.int64()).to_numpy() * 1000
        places = (ns - start_ns) // every_ns
        for name in table.column_names:
            if not pa.types.is_float64(table.schema.field(name).type):
                continue
            found = table[name].to_numpy()
            values.setdefault(name, np.full(bins, np.nan))[places] = found
            flag = np.where(np.isnan(found), MISSING, OBSERVED).astype(np.int8)
            if name + FLAG_SUFFIX in table.column_names:
                told_apart = True
                flag = table[name + FLAG_SUFFIX].to_numpy()
            flags.setdefault(name, np.full(bins, MISSING, np.int8))[places] = flag
    filled = {name: column for name, column in values.items() if not np.isnan(column).all()}
    return Grid(
        tree, start_ns, every_ns / NS_PER_S, filled, {n: flags[n] for n in filled}, told_apart
    )


def coverage(
    output: Path, names: Iterable[str], column: str
) -> dict[str, dict[tuple[date, int], float]]:
    """Share of bins with readings of a column, by tree, day and hour, from the files' metadata."""
    return {tree: dict(_shares(output, tree, column)) for tree in names}


def _shares(output: Path, tree: str, column: str) -> Iterator[tuple[tuple[date, int], float]]:
    for facts in map(facts_of, files(output, tree)):
        begin = datetime.fromtimestamp(facts.start_ns // NS_PER_S, UTC)
        yield (begin.date(), begin.hour), _share(facts, column)


def _share(facts: Facts, column: str) -> float:
    return facts.coverage.get(column, Coverage(0, 0, 0)).observed * facts.every_ns / HOUR_NS
