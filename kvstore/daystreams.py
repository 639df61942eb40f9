"""Day files as streams of a store: a stream a tree (``1_3``), with the rows of its files.

A day goes in whole or not at all, in one commit with a mark, ``dayfiles/2024-07-29``, that says
what its files were. So running again appends only days that are not there yet. What a store holds
it keeps: a day whose files have changed since is left as it is, and reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore.dayfiles import hours
from kvstore.dayfiles.day import day_text
from kvstore.dayfiles.grid import MISSING
from kvstore.dayfiles.manifest import Record
from kvstore.schema import Array, Field, Schema
from kvstore.store import Store

_MARK: Final = "dayfiles/"
_TIME: Final = Field("timestamp", "datetime64[us]")
_KINDS: Final = {"double": "float64", "string": "text"}


class Stored(NamedTuple):
    """What was put into a store. changed: days that are there with other rows."""

    days: int
    rows: int
    changed: list[int]


def store_days(root: Path, records: Mapping[int, Record], store: Store) -> Stored:
    """Append all days of an output that are complete and that the store does not have yet.

    A store keeps what it has, and the files of a day that is incomplete may yet change.
    store: opened with flush_interval_s=None, so that a day is one commit.
    """
    known = store.marks
    days = rows = 0
    changed = []
    for day, record in sorted(records.items()):
        paths = _paths(root, day, record)
        if not (record.complete and paths):
            continue
        mark, digest = _MARK + day_text(day), _digest(paths)
        if known.get(mark) == digest:
            continue
        if mark in known:
            changed.append(day)
            continue
        for tree, files in paths.items():
            rows += _append(store, tree, files)
        store.flush(marks={mark: digest})
        days += 1
    return Stored(days, rows, changed)


def _paths(root: Path, day: int, record: Record) -> dict[str, list[Path]]:
    date = datetime.fromtimestamp(day * 86400, UTC)
    return {
        tree: [hours.day_folder(root, tree, date) / f"{hour}.parquet" for hour in sorted(sizes)]
        for tree, sizes in sorted(record.report.files.items())
    }


def _digest(paths: Mapping[str, Sequence[Path]]) -> str:
    """Of the rows' files, but not of columns that came to be there without a value."""
    digest = hashlib.sha256()
    for tree, files in paths.items():
        digest.update(tree.encode())
        for path in files:
            digest.update(path.name.encode())
            digest.update(hours.value_digest(path))
    return digest.hexdigest()


def _append(store: Store, tree: str, files: Sequence[Path]) -> int:
    table = hours.read_all(files)
    fields = [_TIME, *(_field(field) for field in table.schema if field.name != hours.TIME)]
    if tree in store:
        have = set(store[tree].schema.names)
        fresh = [field for field in fields if field.name not in have]
        if fresh:
            store.stream(tree).add_fields(*fresh)
    else:
        store.stream(tree, Schema(tuple(fields), _TIME.name))
    batch = {field.name: _array(table.column(field.name), field) for field in fields}
    stream = store.stream(tree)
    for field in stream.schema.fields:
        if field.name not in batch:
            batch[field.name] = field.filled(table.num_rows)
    stream.append(batch)
    return int(table.num_rows)


def _field(field: Any) -> Field:
    unit = (field.metadata or {}).get(b"unit", b"").decode()
    is_flag = field.name.endswith(hours.FLAG_SUFFIX) and str(field.type) == "int8"
    if is_flag:
        return Field(field.name, "int8", fill=MISSING)
    return Field(field.name, _KINDS[str(field.type)], (), unit)


def _array(column: Any, field: Field) -> Array:
    if field.is_text:
        return np.array(column.to_pylist(), object)
    if field.name == _TIME.name:
        return np.asarray(column.cast("int64").to_numpy()).view("<M8[us]")
    return np.asarray(column.to_numpy(), field.np_dtype)
