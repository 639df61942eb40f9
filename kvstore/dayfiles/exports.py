"""Export files: which files of a folder are some, when their rows are, and their rows in chunks.

A file is an export if its name ends in .parquet or .csv and its columns are those of the long or
the wide layout (chunk.py). All else is *skipped*, with the reason. Names say nothing about time:
when a file's rows are comes from its own statistics, or from reading its times.

Only this module opens export files, and never to write.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from kvstore.dayfiles.arrays import arrow
from kvstore.dayfiles.cells import NO_TIME, cells, times_ns
from kvstore.dayfiles.chunk import (
    DROPPED,
    LONG,
    TIME,
    WIDE,
    Chunk,
    Kinds,
    Window,
    long_chunk,
    wide_chunk,
)
from kvstore.errors import DayfilesError
from kvstore.timestamps import NS_PER_S

_CHUNK_ROWS: Final = 1 << 20  # some 150 MB decoded; the real files have 5,000 to 65,000 rows
_CSV_BLOCK_BYTES: Final = 16 << 20
_SUFFIXES: Final = (".parquet", ".csv")
_APART_NS: Final = 86400 * NS_PER_S  # rows that are further apart are no one stretch of time
_BATCH_ERRORS: Final = (pa.ArrowException, OSError, UnicodeDecodeError)

Layout = Literal["long", "wide"]


class Export(NamedTuple):
    """An export file as it was found.

    name: its path below the input folder. spans: the stretches of time that its rows lie in, first
    and last time of each: a row of 1970 must not claim all days since. texts: columns of texts, by
    their paths in Parquet. digest: of its content, empty until it was asked for.
    """

    path: str
    name: str
    layout: Layout
    size_bytes: int
    modified_ns: int
    rows: int
    spans: tuple[tuple[int, int], ...]
    texts: tuple[str, ...]
    digest: str = ""

    @property
    def first_ns(self) -> int:
        """Its first time."""
        return self.spans[0][0]

    def overlaps(self, window: Window) -> bool:
        """Whether some of its rows may lie in the window."""
        return any(first < window.stop_ns and last >= window.start_ns for first, last in self.spans)


class Skipped(NamedTuple):
    """A file that was left out."""

    name: str
    reason: str


# ---- finding them ----


def files_below(folder: Path, *, outside: Path) -> Iterator[tuple[str, str]]:
    """Paths and names of all files of a folder, in the order of their names.

    outside: a folder to leave alone, the output, which may lie in the input. A file in the place of
    the folder stands for itself.
    """
    if folder.is_file():
        yield str(folder), folder.name
        return
    if not folder.is_dir():
        raise DayfilesError(f"{folder}: no such folder; expected one with exports, or one file")
    # Links may lead in a circle, or to one folder twice: each is read once.
    met = {_place(folder)} | ({_place(outside)} if outside.is_dir() else set())
    refused: list[OSError] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refused.append):
        places = {name: _place(Path(parent, name)) for name in sorted(folders)}
        folders[:] = [name for name, place in places.items() if place not in met]
        met.update(places.values())
        for name in sorted(names):
            path = os.path.join(parent, name)  # noqa: PTH118  # a Path costs ten times that
            yield path, os.path.relpath(path, folder)
    for error in refused:
        yield error.filename, os.path.relpath(error.filename, folder)


def _place(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def examined(path: str, name: str) -> Export | Skipped:
    """What a file is, by its name, its columns and its statistics, or its times without those."""
    if foreign := _foreign(path, name):
        return foreign
    try:
        found = Path(path).stat()
        if not found.st_size:
            return Skipped(name, "empty")
        is_csv = name.lower().endswith(".csv")
        layout, rows, spans, texts = _csv_span(path) if is_csv else _parquet_span(path)
    except _BATCH_ERRORS as error:
        return Skipped(name, _reason(error))
    if layout is None:
        return Skipped(
            name, f"foreign: expected the columns {', '.join(LONG)}, or {', '.join(WIDE)}"
        )
    if not rows or not spans:
        return Skipped(name, "no row has a time that can be read" if rows else "empty: no rows")
    return Export(path, name, layout, found.st_size, found.st_mtime_ns, rows, tuple(spans), texts)


def _foreign(path: str, name: str) -> Skipped | None:
    try:
        path.encode()
    except UnicodeEncodeError:  # Arrow opens no such file, and JSON holds no such name
        named = name.encode(errors="backslashreplace").decode()
        return Skipped(named, "its name is not UTF-8: rename it")
    if Path(path).is_dir():
        return Skipped(name, "a folder that cannot be read")
    is_known = name.lower().endswith(_SUFFIXES)
    return None if is_known else Skipped(name, "foreign: expected .parquet or .csv")


def hashed(export: Export) -> Export | Skipped:
    """With the digest of its content."""
    try:
        with Path(export.path).open("rb") as file:
            return export._replace(digest=hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        return Skipped(export.name, _reason(error))


def _reason(error: Exception) -> str:
    told = str(error).strip().splitlines() or [type(error).__name__]
    return f"corrupt: {told[0][:200]}" if isinstance(error, pa.ArrowException) else told[0][:200]


def _layout(names: Sequence[str]) -> Layout | None:
    if set(LONG) <= set(names):
        return "long" if all(names.count(name) == 1 for name in LONG) else None
    is_wide = set(WIDE) < set(names) and len(set(names)) == len(names)
    return "wide" if is_wide and "payload_type" not in names else None


_Spans: TypeAlias = list[tuple[int, int]]
_Found: TypeAlias = tuple[Layout | None, int, _Spans, tuple[str, ...]]


def _parquet_span(path: str) -> _Found:
    with pq.ParquetFile(path) as file:
        layout, metadata = _layout(file.schema_arrow.names), file.metadata
        if layout is None or not metadata.num_rows:
            return layout, metadata.num_rows, [], ()
        groups = [
            _group_span(metadata, group, file.schema_arrow)
            for group in range(metadata.num_row_groups)
        ]
        spans = [span for span in groups if span is not None]
        if len(spans) < len(groups) or any(last - first > _APART_NS for first, last in spans):
            spans = [
                span
                for batch in file.iter_batches(_CHUNK_ROWS, columns=[TIME])
                for span in _times_spans(batch.column(0))
            ]
        leaves = [file.schema.column(number) for number in range(len(file.schema))]
        texts = tuple(leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY")
        return layout, metadata.num_rows, _joined(spans), texts


def _group_span(metadata: Any, group: int, schema: pa.Schema) -> tuple[int, int] | None:
    """First and last time by a row group's statistics; None where it has none to be relied on."""
    found = metadata.row_group(group)
    index = schema.get_field_index(TIME)
    column = found.column(index)
    kind = schema.field(index).type
    if column.path_in_schema != TIME or not pa.types.is_integer(kind) or pa.types.is_uint64(kind):
        return None
    statistics = column.statistics
    if statistics is None or not statistics.has_min_max or statistics.null_count:
        return None
    first, last = times_ns(arrow(np.array([statistics.min, statistics.max], np.int64))).tolist()
    return None if NO_TIME in (first, last) else (first, last)


def _times_spans(column: pa.Array) -> _Spans:
    ns = np.unique(times_ns(cells(column).distinct))
    ns = ns[ns != NO_TIME]
    if not len(ns):
        return []
    # Unsigned: from 1677 to 2262 is more than int64 holds.
    cuts = np.flatnonzero(np.diff(ns.view(np.uint64)) > np.uint64(_APART_NS))
    firsts, lasts = ns[np.append(0, cuts + 1)], ns[np.append(cuts, len(ns) - 1)]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _joined(spans: _Spans) -> _Spans:
    joined: _Spans = []
    for first, last in sorted(spans):
        if joined and first - joined[-1][1] <= _APART_NS:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def _csv_span(path: str) -> _Found:
    with _csv_batches(path) as batches:
        layout = _layout(batches.schema.names)
        if layout is None:
            return None, 0, [], ()
        rows = 0
        spans: _Spans = []
        for batch in batches:
            rows += batch.num_rows
            spans += _times_spans(batch.column(TIME))
    return layout, rows, _joined(spans), ()


@contextmanager
def _csv_batches(path: str) -> Iterator[Any]:
    """A CSV file's batches, all cells as text; rows with too many or too few cells are errors."""
    with csv.open_csv(path, csv.ReadOptions(use_threads=False)) as probe:
        names = probe.schema.names
    types = {name: pa.string() for name in names}
    convert = csv.ConvertOptions(
        column_types=types,
        strings_can_be_null=True,
        null_values=[""],
        quoted_strings_can_be_null=True,
    )
    options = csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES)
    with csv.open_csv(path, options, convert_options=convert) as batches:
        yield batches


# ---- their rows ----


def read(export: Export, window: Window, kinds: Kinds) -> list[Chunk] | Skipped:
    """A file's readings of a window; all of them, or none where the file is found to be corrupt."""
    try:
        return list(_chunks(export, window, kinds))
    except (*_BATCH_ERRORS, DayfilesError) as error:
        return Skipped(export.name, _reason(error))


def _chunks(export: Export, window: Window, kinds: Kinds) -> Iterator[Chunk]:
    for first_row, batch in batches_of(export, window):
        if export.layout == "long":
            yield long_chunk(batch, first_row, window, kinds)
        else:
            yield wide_chunk(batch, first_row, window)


def batches_of(export: Export, window: Window) -> Iterator[tuple[int, pa.RecordBatch]]:
    """A file's rows, but for row groups outside of the window; the first row's number with each."""
    if export.name.lower().endswith(".csv"):
        with _csv_batches(export.path) as batches:
            first = 0
            for batch in batches:
                yield first, batch
                first += batch.num_rows
        return
    options = {"read_dictionary": export.texts, "page_checksum_verification": True}
    with pq.ParquetFile(export.path, pre_buffer=False, **options) as file:
        metadata, schema = file.metadata, file.schema_arrow
        is_long = export.layout == "long"
        names = list(LONG) if is_long else [n for n in schema.names if n != DROPPED]
        first = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if _may_hold(_group_span(metadata, group, schema), window):
                yield from _group_batches(file, group, first, names)
            first += rows


def _may_hold(span: tuple[int, int] | None, window: Window) -> bool:
    return span is None or (span[0] < window.stop_ns and span[1] >= window.start_ns)


def _group_batches(
    file: pq.ParquetFile, group: int, first: int, names: Sequence[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    if file.metadata.row_group(group).num_rows <= _CHUNK_ROWS:
        # iter_batches takes memory for whole batches: three times as long for small files
        table = file.read_row_group(group, columns=names, use_threads=False)
        yield from ((first, batch) for batch in table.combine_chunks().to_batches())
        return
    for batch in file.iter_batches(
        _CHUNK_ROWS, row_groups=[group], columns=names, use_threads=False
    ):
        yield first, batch
        first += batch.num_rows


def unchanged(export: Export) -> bool:
    """Whether the file is still the one that was found."""
    try:
        found = Path(export.path).stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (export.size_bytes, export.modified_ns)
