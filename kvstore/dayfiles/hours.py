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
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
from kvstore.timestamps import NS_PER_S

TIME: Final = "timestamp"
FLAG_SUFFIX: Final = "_flag"
KEY: Final = b"kvstore.dayfiles"
_VERSION: Final = 1
_TIME_TYPE: Final = pa.timestamp("us", tz="UTC")
_SORTED: Final = (pq.SortingColumn(0),)


class Coverage(NamedTuple):
    """How many of a column's bins are what; the rest is missing."""

    observed: int
    held: int
    interpolated: int


class Hour(NamedTuple):
    """An hour of a tree, to be written. coverage: of each column that has readings or values."""

    tree: str
    start_ns: int
    table: pa.Table
    coverage: dict[str, Coverage]


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
    touched = (filled.seen | (filled.flags != MISSING)).any(axis=0)
    rows = {column.name: row for row, column in enumerate(filled.columns)}
    words = pa.array(texts, pa.string())
    for first in range(0, grid.bins, per_hour):
        cut = slice(first, first + per_hour)
        if not touched[cut].any():
            continue
        values, flags = filled.values[:, cut], filled.flags[:, cut]
        start_ns = grid.start_ns + first * grid.every_ns
        kept = None
        if settings.trim:
            kept = np.flatnonzero((flags != MISSING).any(axis=0))
            if not len(kept):
                continue
            values, flags = values[:, kept], flags[:, kept]
        times = _times(start_ns, grid.every_ns, per_hour, kept)
        coverage = _coverage(filled.columns, flags)
        table = _table(times, values, flags, columns, rows, words, settings)
        yield Hour(
            filled.tree,
            start_ns,
            _described(table, filled.tree, start_ns, coverage, settings),
            coverage,
        )


def _times(start_ns: int, every_ns: int, count: int, kept: Any) -> pa.Array:
    every_us = every_ns // 1000
    times = start_ns // 1000 + np.arange(count) * every_us
    return pa.array(times if kept is None else times[kept]).view(_TIME_TYPE)


def _coverage(columns: Sequence[Column], flags: Bytes) -> dict[str, Coverage]:
    counts = np.stack(
        [np.count_nonzero(flags == flag, axis=1) for flag in (OBSERVED, HELD, INTERPOLATED)], axis=1
    ).tolist()
    counted = sorted(zip([c.name for c in columns], counts, strict=True))
    return {name: Coverage(*count) for name, count in counted if any(count)}


def _table(  # noqa: PLR0917  # all of a file
    times: pa.Array, values: Floats, flags: Bytes, columns: Sequence[Column],
    rows: dict[str, int], words: pa.Array, settings: Settings,
) -> pa.Table:  # fmt: skip
    arrays = [times]
    for column in columns:
        row = rows.get(column.name)
        if row is None:
            arrays.append(pa.nulls(len(times), _type_of(column)))
        elif column.measure.is_text:
            codes = np.nan_to_num(values[row]).astype(np.int32)
            arrays.append(words.take(pa.array(codes, mask=np.isnan(values[row]))))
        else:
            arrays.append(pa.array(values[row], from_pandas=True))
    if settings.with_flags:
        missing = pa.array(np.full(len(times), MISSING, np.int8))
        chosen = [rows.get(column.name) for column in columns]
        arrays += [missing if row is None else pa.array(flags[row]) for row in chosen]
    return pa.Table.from_arrays(arrays, schema=_schema(tuple(columns), settings))


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
    """A file's rows. Without partitioning: pyarrow sees none in years and months, but looks."""
    return pq.read_table(path, partitioning=None)


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
    return _facts(pq.read_schema(path).metadata)


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
        else pc.fill_null(pa.nulls(found.num_rows, field.type), MISSING)
        if field.name.endswith(FLAG_SUFFIX)
        else pa.nulls(found.num_rows, field.type)
        for field in schema
    ]
    metadata = {KEY: found.schema.metadata[KEY]}
    return pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))


# ---- how it appears ----


def path_of(root: Path, tree: str, start_ns: int) -> Path:
    """Where an hour's file goes."""
    time = datetime.fromtimestamp(start_ns // NS_PER_S, UTC)
    return day_folder(root, tree, time) / f"{time.hour:02}.parquet"


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
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(fresh, content)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(fresh, content)
    try:
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return True


def _write(path: Path, content: memoryview) -> None:
    try:
        with path.open("wb", buffering=0) as file:
            while content:
                content = content[file.write(content) :]
    except OSError:
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
