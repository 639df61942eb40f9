"""What a comparison found, as a table for people and as plain values. Pure.

In a cell: a peer's median, and in brackets how many times better this store was, the median of the
pairs. Bold where this store lost. Under the table: the targets, each with the peer that decides.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A measured quantity; better: which way is."""

    key: str
    heading: str
    better: int  # 1: more is better, -1: less is


COLUMNS = (
    Column("write", "write GB/s", 1),
    Column("full", "full read GB/s", 1),
    Column("kept", "kept GB/s", 1),
    Column("spectral", "`spectral` Mrows/s", 1),
    Column("range", "1 % range ms", -1),
    Column("first", "first row ms", -1),
    Column("cold", "cold read GB/s", 1),
    Column("live", "read beside writer GB/s", 1),
    Column("live_write", "writer then GB/s", 1),
    Column("size", "raw / stored", 1),
    Column("write_mb", "write MB", -1),
    Column("read_mb", "read MB", -1),
    Column("write_cpu", "write CPU s/GB", -1),
    Column("full_cpu", "full read CPU s/GB", -1),
)
# Of these only the targets speak: by CPU time, which other work on the machine hardly changes.
BY_CPU = {key: Column(f"{key}_cpu", "", -1) for key in ("write", "full", "kept", "range", "first")}


class Target(NamedTuple):
    """At least bound times better than every peer, or than each of those that compress."""

    key: str
    profiles: tuple[str, ...]
    compressing_only: bool
    bound: float


_BOTH = ("uniform", "counts")
TARGETS = (
    Target("write", _BOTH, compressing_only=True, bound=1.5),
    Target("write", _BOTH, compressing_only=False, bound=1.1),
    Target("full", ("counts",), compressing_only=True, bound=1.3),
    Target("kept", ("counts",), compressing_only=True, bound=1.3),
    Target("full", ("uniform",), compressing_only=False, bound=1.5),
    Target("kept", ("uniform",), compressing_only=False, bound=1.5),
    Target("range", ("counts",), compressing_only=True, bound=1.5),
    Target("first", ("counts",), compressing_only=True, bound=1.5),
    Target("range", ("uniform",), compressing_only=True, bound=2.0),
    Target("first", ("uniform",), compressing_only=True, bound=2.0),
    Target("size", _BOTH, compressing_only=False, bound=1.0),
)
ONE_FIELD_BOUND = 2.5


@dataclasses.dataclass
class Row:
    """One store: every single run's values, and those of this store's runs beside them."""

    name: str
    compresses: bool
    durability: str
    reason: str = ""
    failed: bool = False
    values: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    ours: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def median(self, key: str) -> float | None:
        """The median of its runs."""
        return statistics.median(self.values[key]) if self.values.get(key) else None

    def ratio(self, column: Column) -> float | None:
        """How many times better this store was: the median of the pairs."""
        pairs = zip(self.ours.get(column.key, ()), self.values.get(column.key, ()), strict=False)
        ratios = [(us / them) ** column.better for us, them in pairs if us and them]
        return statistics.median(ratios) if ratios else None


def markdown(profile: str, rows: Sequence[Row]) -> str:
    """Lay out limit, this store and its peers."""
    limit, ours, *peers = rows
    memcpy = limit.median("memcpy") or 0.0
    heads = ["store", "durable", *(c.heading for c in COLUMNS), "write x size", "full x size"]
    about = "in brackets, how many times better kvstore was beside it; bold where it lost"
    lines = [
        f"{profile}: {about}. memcpy {memcpy:.2f} GB/s.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *(_table_row(row) for row in (limit, ours, *peers)),
        "",
        *targets(profile, rows),
    ]
    return "\n".join(lines)


def targets(profile: str, rows: Sequence[Row]) -> Iterator[str]:
    """Say of each target whether it was met, and which peer decides."""
    limit, ours, *peers = rows
    columns = {column.key: column for column in COLUMNS}
    for target in (t for t in TARGETS if profile in t.profiles):
        of = [row for row in peers if row.compresses or not target.compressing_only]
        found = [(ratio, row.name) for row in of if (ratio := row.ratio(columns[target.key]))]
        if found:
            who = "each that compresses" if target.compressing_only else "every peer"
            heading = columns[target.key].heading
            yield _verdict(f"{heading}, against {who}", *min(found), target.bound) + _by_cpu(
                target.key, of
            )
    spectral, full = ours.median("spectral"), ours.median("full")
    if spectral and full:
        own = spectral / (full * 1e3 / 6152)
        yield _verdict("one field, against its own full read", own, "rows", ONE_FIELD_BOUND)
    cold, size, disk = ours.median("cold"), ours.median("size"), limit.median("cold")
    if cold and size and disk:
        yield _verdict("cold read, stored bytes", cold / size / disk, "the limit's cold read", 1.0)


def line(row: Row) -> str:
    """Say one row in one line."""
    cells = [f"{c.key} {_cell(row, c)}" for c in COLUMNS if row.median(c.key) is not None]
    return f"{row.name}: " + ", ".join(cells)


def as_record(row: Row) -> dict[str, Any]:
    """Turn a row into plain values, every single run included."""
    ratios = {column.key: row.ratio(column) for column in (*COLUMNS, *BY_CPU.values())}
    return {**dataclasses.asdict(row), "times_better": ratios}


def _verdict(what: str, ratio: float, against: str, bound: float) -> str:
    met = "met" if ratio >= bound else "**missed**"
    return f"- {what}: {ratio:.2f} ({against}), target {bound:g}: {met}"


def _by_cpu(key: str, rows: Sequence[Row]) -> str:
    """The same by CPU seconds, against the peer that needs the fewest."""
    if key not in BY_CPU:
        return ""
    found = [(ratio, row.name) for row in rows if (ratio := row.ratio(BY_CPU[key]))]
    return f"; by CPU time {min(found)[0]:.2f} ({min(found)[1]})" if found else ""


def _table_row(row: Row) -> str:
    if row.reason:
        return f"| {row.name} | {row.reason} |" + " |" * (len(COLUMNS) + 2)
    size = row.median("size") or 0.0
    products = [f"{(row.median(key) or 0.0) * size:.3g}" for key in ("write", "full")]
    cells = [row.name, row.durability, *(_cell(row, column) for column in COLUMNS), *products]
    return "| " + " | ".join(cells) + " |"


def _cell(row: Row, column: Column) -> str:
    value, ratio = row.median(column.key), row.ratio(column)
    if value is None:
        return "-"
    text = f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    if ratio is None:
        return text
    return f"**{text} ({ratio:.2g}x)**" if ratio < 1 else f"{text} ({ratio:.2g}x)"
