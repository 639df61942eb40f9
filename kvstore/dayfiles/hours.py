"""Hour files: ``{tree}/{year}/{month}/{day}/{hour}.parquet``, what is in them and how they appear.

A file holds an hour of one tree: ``timestamp`` and a column a measure, null where there is no
value; with flags then a column ``NAME_flag`` each. Its metadata says what the columns are and what
the file covers, and nothing that depends on when or by which run it was made: equal rows give
equal bytes.

A file takes its name once it is complete, and only if its bytes are not there already. What
makes it durable is one sync of the file system a day (``sync``), before the manifest says so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kvstore.dayfiles.arrays import arrow, arrow_texts, arrow_with_nulls
from kvstore.dayfiles.grid import (
    HELD,
    HOUR_NS,
    INTERPOLATED,
    MISSING,
    OBSERVED,
    Bytes,
    Fill,
    Filled,
    Lattice,
    Settings,
)
from kvstore.dayfiles.measures import Column
from kvstore.dayfiles.readings import Floats
from kvstore.errors import DayfilesError
from kvstore.timestamps import NS_PER_S

TIME: Final = "timestamp"
FLAG_SUFFIX: Final = "_flag"
KEY: Final = b"kvstore.dayfiles"
_VERSION: Final = 1
_TIME_TYPE: Final = pa.timestamp("us", tz="UTC")
_SORTED: Final = (pq.SortingColumn(0),)
# Once for want of the folder, else because another run of the same day took the unfinished file
# for what a killed one left: it does so once, at its end.
_PUTS_MAX: Final = 4


class Coverage(NamedTuple):
    """How many of a column's bins are what; the rest is missing."""

    observed: int
    held: int
    interpolated: int


class Hour(NamedTuple):
    """An hour of a tree, to be written."""

    tree: str
    start_ns: int
    table: pa.Table


class Facts(NamedTuple):
    """What a file's metadata says of it. hold_s: None where each measure has its own."""

    tree: str
    start_ns: int
    every_ns: int
    fill: Fill
    hold_s: float | None
    coverage: dict[str, Coverage]


# ---- what is in a file ----


def hours(
    filled: Filled,
    grid: Lattice,
    columns: Sequence[Column],
    texts: Sequence[str],
    settings: Settings,
) -> Iterator[Hour]:
    """The hours of a tree that have readings or values. columns: all that the files have."""
    per_hour = HOUR_NS // grid.every_ns
    touched = (filled.seen | (filled.flags != MISSING)).any(axis=0).reshape(-1, per_hour)
    covered = (filled.flags != MISSING).any(axis=0).reshape(-1, per_hour)
    whole = _table(filled, grid, columns, texts, settings)
    counts = _counts(filled.flags, per_hour)
    for number in np.flatnonzero(touched.any(axis=1)).tolist():
        table = whole.slice(number * per_hour, per_hour)
        if settings.trim:
            table = table.take(arrow(np.flatnonzero(covered[number])))
        if table.num_rows:
            start_ns = grid.start_ns + number * HOUR_NS
            coverage = _coverage(filled.columns, counts[:, :, number])
            described = _described(table, filled.tree, start_ns, coverage, settings)
            yield Hour(filled.tree, start_ns, described)


def _counts(flags: Bytes, per_hour: int) -> npt.NDArray[np.int64]:
    """How many bins are observed, held and interpolated: by flag, column and hour."""
    by_hour = flags.reshape(len(flags), -1, per_hour)
    kinds = (OBSERVED, HELD, INTERPOLATED)
    return np.stack([np.count_nonzero(by_hour == kind, axis=2) for kind in kinds])


def _coverage(columns: Sequence[Column], counts: npt.NDArray[np.int64]) -> dict[str, Coverage]:
    counted = sorted(zip([c.name for c in columns], counts.T.tolist(), strict=True))
    return {name: Coverage(*count) for name, count in counted if any(count)}


def _table(
    filled: Filled,
    grid: Lattice,
    columns: Sequence[Column],
    texts: Sequence[str],
    settings: Settings,
) -> pa.Table:
    """All hours of a tree at once: they are cut from it without a copy."""
    rows = {column.name: row for row, column in enumerate(filled.columns)}
    chosen = [rows.get(column.name) for column in columns]
    words = arrow_texts(texts)
    arrays = [arrow((grid.start_ns + np.arange(grid.bins) * grid.every_ns) // 1000, _TIME_TYPE)]
    for column, row in zip(columns, chosen, strict=True):
        if row is None:
            arrays.append(pa.nulls(grid.bins, _type_of(column)))
        else:
            arrays.append(_column(filled.values[row], words if column.measure.is_text else None))
    if settings.with_flags:
        missing = arrow(np.full(grid.bins, MISSING, np.int8))
        arrays += [missing if row is None else arrow(filled.flags[row]) for row in chosen]
    return pa.Table.from_arrays(arrays, schema=_schema(tuple(columns), settings))


def _column(values: Floats, words: pa.Array | None) -> pa.Array:
    missing = np.isnan(values)
    if words is None:
        return arrow_with_nulls(values, missing)
    codes = np.where(missing, 0, values).astype(np.int32)
    return words.take(arrow_with_nulls(codes, missing))


def _type_of(column: Column) -> pa.DataType:
    return pa.string() if column.measure.is_text else pa.float64()


@functools.cache
def _schema(columns: tuple[Column, ...], settings: Settings) -> pa.Schema:
    fields = [pa.field(TIME, _TIME_TYPE, nullable=False)]
    fields += [pa.field(c.name, _type_of(c), metadata=_field_facts(c, settings)) for c in columns]
    if settings.with_flags:
        fields += [pa.field(c.name + FLAG_SUFFIX, pa.int8(), nullable=False) for c in columns]
    return pa.schema(fields)


def _field_facts(column: Column, settings: Settings) -> dict[str, str]:
    measure = column.measure
    hold_s = measure.hold_s if settings.hold_ns is None else settings.hold_ns / NS_PER_S
    return {
        "unit": measure.unit,
        "kind": measure.kind,
        "rule": measure.rule,
        "hold_s": f"{hold_s:g}",
    }


def _described(
    table: pa.Table, tree: str, start_ns: int, coverage: dict[str, Coverage], settings: Settings
) -> pa.Table:
    hold_s = None if settings.hold_ns is None else settings.hold_ns / NS_PER_S
    facts = {
        "version": _VERSION,
        "tree": tree,
        "start": datetime.fromtimestamp(start_ns // NS_PER_S, UTC).isoformat(),
        "every_s": settings.every_ns / NS_PER_S,
        "fill": settings.fill,
        "hold_s": hold_s,
        "coverage": coverage,
    }
    return table.replace_schema_metadata({KEY: json.dumps(facts)})


def read(path: Path) -> pa.Table:
    """A file's rows. Not by read_table, which looks for partitions and loads half of pyarrow."""
    with pq.ParquetFile(path) as file:
        return file.read()


def read_all(paths: Sequence[Path]) -> pa.Table:
    """The rows of a tree's files, one after the other."""
    return pa.concat_tables([read(path) for path in paths])


def value_digest(path: Path) -> bytes:
    """Of a file's values, columns without any left out: these come and go with other days."""
    digest = hashlib.sha256()
    table = read(path)
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if column.null_count < len(column) and not name.endswith(FLAG_SUFFIX):
            digest.update(name.encode())
            values = column.to_numpy(zero_copy_only=False)
            is_text = pa.types.is_string(column.type)
            digest.update(repr(values.tolist()).encode() if is_text else values.tobytes())
    return digest.digest()


def facts_of(path: Path) -> Facts:
    """What a file's metadata says; its rows are not read."""
    try:
        return _facts(pq.read_schema(path).metadata)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DayfilesError(
            f"{path}: no hour file of `kvstore dayfiles convert`: {error}"
        ) from error


def _facts(metadata: dict[bytes, bytes]) -> Facts:
    found = json.loads(metadata[KEY])
    start = datetime.fromisoformat(found["start"])
    coverage = {name: Coverage(*counts) for name, counts in found["coverage"].items()}
    return Facts(
        found["tree"],
        int(start.timestamp()) * NS_PER_S,
        round(found["every_s"] * NS_PER_S),
        found["fill"],
        found["hold_s"],
        coverage,
    )


def with_columns(path: Path, columns: Sequence[Column], settings: Settings) -> pa.Table:
    """A file's table with other columns: new ones are null, those left out had no values.

    The very table that these columns would have been written as in the first place.
    """
    found = read(path)
    schema = _schema(tuple(columns), settings)
    arrays = [
        found.column(field.name)
        if field.name in found.column_names
        else arrow(np.full(found.num_rows, MISSING, np.int8))
        if field.name.endswith(FLAG_SUFFIX)
        else pa.nulls(found.num_rows, field.type)
        for field in schema
    ]
    metadata = {KEY: found.schema.metadata[KEY]}
    return pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))


# ---- how it appears ----


def path_of(root: Path, tree: str, start_ns: int) -> Path:
    """Where an hour's file goes."""
    day, hour = divmod(start_ns // HOUR_NS, 24)
    return _folder(root, tree, day) / f"{hour:02}.parquet"


@functools.lru_cache(maxsize=64)
def _folder(root: Path, tree: str, day: int) -> Path:
    return day_folder(root, tree, datetime.fromtimestamp(day * 86400, UTC))


def day_folder(root: Path, tree: str, day: datetime) -> Path:
    """Where a day's files of a tree go."""
    return root / tree / f"{day.year:04}" / f"{day.month:02}" / f"{day.day:02}"


def encoded(table: pa.Table) -> memoryview:
    """The file's bytes.

    Snappy: zstd takes a fifth less room and twice the time. No dictionaries: a mean is seldom
    met again.
    """
    sink = pa.BufferOutputStream()
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    with pq.ParquetWriter(
        sink, table.schema, compression="snappy", use_dictionary=texts, sorting_columns=_SORTED
    ) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue()).cast("B")  # else it equals no bytes above 127


def put(path: Path, content: memoryview) -> bool:
    """Make the file have this content; False where it has it already."""
    if _has(path, content):
        return False
    # Not by the pid: two containers that were given the same day may both have it.
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    for left in reversed(range(_PUTS_MAX)):
        try:
            _write(fresh, content)
            _rename(fresh, path)
        except FileNotFoundError:
            if not left:
                raise
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            break
    return True


def _rename(fresh: Path, path: Path) -> None:
    try:
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _write(path: Path, content: memoryview) -> None:
    try:
        with path.open("wb", buffering=0) as file:
            while content:
                content = content[file.write(content) :]
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say of what
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def _has(path: Path, content: memoryview) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except FileNotFoundError:
        return False


def remove(path: Path, root: Path) -> None:
    """Remove a file, and the folders that are empty without it, up to the root."""
    path.unlink(missing_ok=True)
    for folder in path.parents:
        if folder == root:
            return
        try:
            folder.rmdir()
        except OSError:
            return
