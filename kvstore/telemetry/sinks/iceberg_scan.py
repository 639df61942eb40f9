"""The readings' data files as the current snapshot has them, with what their manifests say.

Each manifest is read once: it never changes, and a commit adds one. Bounds of time are exact
(Iceberg cuts only texts); a file without them may hold any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.conversions import from_bytes
from pyiceberg.expressions import And, GreaterThanOrEqual, LessThanOrEqual
from pyiceberg.manifest import ManifestContent
from pyiceberg.table import FileScanTask
from pyiceberg.types import TimestamptzType

from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks.iceberg_lake import scan

if TYPE_CHECKING:
    from numpy.typing import NDArray

Partition = tuple[int, int]  # days since 1970, bucket of the device

_LOW: Final = -(1 << 63)
_HIGH: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True, eq=False)
class DataFile:
    """One Parquet file. partition: None where another tool wrote it under another layout."""

    path: str
    partition: Partition | None
    first_us: int
    last_us: int
    rows: int
    size_bytes: int
    entry: Any  # pyiceberg's

    def overlaps(self, first_us: int, last_us: int) -> bool:
        """Whether it may hold rows of that time, both ends included."""
        return self.first_us <= last_us and first_us <= self.last_us


class Files:
    """Data files of a table, over its changes."""

    def __init__(self) -> None:
        self._manifests: dict[str, list[DataFile]] = {}

    def of(self, table: Any, snapshot_id: int | None = None) -> list[DataFile]:
        """All files of the current snapshot, or of that one."""
        manifests = _manifests(table, snapshot_id)
        data = [each for each in manifests if each.content == ManifestContent.DATA]
        if snapshot_id is not None:
            return [file for each in data for file in _files_in(each, table)]
        known = self._manifests
        self._manifests = {
            each.manifest_path: known.get(each.manifest_path) or _files_in(each, table)
            for each in data
        }
        return [file for files in self._manifests.values() for file in files]


def _files_in(manifest: Any, table: Any) -> list[DataFile]:
    ts_id = table.schema().find_field(rows.TS).field_id
    entries = manifest.fetch_manifest_entry(table.io, discard_deleted=True)
    spec_id = table.spec().spec_id
    return [
        _file(entry.data_file, ts_id, ours=manifest.partition_spec_id == spec_id)
        for entry in entries
    ]


def _file(entry: Any, ts_id: int, *, ours: bool) -> DataFile:
    first = (entry.lower_bounds or {}).get(ts_id)
    last = (entry.upper_bounds or {}).get(ts_id)
    return DataFile(
        entry.file_path,
        (entry.partition[0], entry.partition[1]) if ours else None,
        _LOW if first is None else from_bytes(TimestamptzType(), first),
        _HIGH if last is None else from_bytes(TimestamptzType(), last),
        entry.record_count,
        entry.file_size_in_bytes,
        entry,
    )


def _manifests(table: Any, snapshot_id: int | None) -> list[Any]:
    snapshot = table.current_snapshot()
    if snapshot_id is not None:
        snapshot = table.metadata.snapshot_by_id(snapshot_id)
    return [] if snapshot is None else list(snapshot.manifests(table.io))


def has_deletes(table: Any, snapshot_id: int | None = None) -> bool:
    """Whether another tool has deleted rows by files of deletes."""
    found = _manifests(table, snapshot_id)
    return any(each.content == ManifestContent.DELETES for each in found)


def tasks(table: Any, files: Iterable[DataFile], snapshot_id: int | None = None) -> list[Any]:
    """What pyiceberg wants to read them, with the deletes that apply where there are any."""
    files = list(files)
    if not has_deletes(table, snapshot_id):
        return [FileScanTask(file.entry) for file in files]
    wanted = {file.path for file in files}
    planned = table.scan(snapshot_id=snapshot_id).plan_files()
    return [task for task in planned if task.file.file_path in wanted]


def between(first_us: int, last_us: int) -> Any:
    """The rows of that time, both ends included."""
    return And(GreaterThanOrEqual(rows.TS, first_us), LessThanOrEqual(rows.TS, last_us))


def keys_of(table: Any, file: DataFile) -> tuple[pa.DictionaryArray, NDArray[np.int64]]:
    """The two key columns of a file: devices (dictionary encoded), times.

    Straight from the file, where its columns have the table's names: twice as fast as pyiceberg's
    scan, and rows that were deleted since do not matter to a filter.
    """
    with table.io.new_input(file.path).open() as stream:
        parquet = pq.ParquetFile(stream, read_dictionary=[rows.DEVICE], pre_buffer=True)
        if {rows.DEVICE, rows.TS} <= set(parquet.schema_arrow.names):
            found = parquet.read([rows.DEVICE, rows.TS])
            return encoded(found[rows.DEVICE]), rows.micros(found[rows.TS])
    found = scan(table, tasks(table, [file]), (rows.DEVICE, rows.TS))
    return encoded(found[rows.DEVICE]), rows.micros(found[rows.TS])


def encoded(texts: pa.ChunkedArray) -> pa.DictionaryArray:
    """A column of text as one dictionary and one array of codes."""
    if not pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_encode()
    found = texts.unify_dictionaries().combine_chunks()
    if isinstance(found, pa.ChunkedArray):  # of no chunks
        found = pa.array([], pa.large_string()).dictionary_encode()
    return found


def in_slices(
    table: Any, files: Sequence[DataFile], start_us: int, stop_us: int, rows_max: int
) -> Iterator[tuple[int, int]]:
    """Spans of time [first, last] with at most rows_max rows each, where time can be cut so.

    Decided by the time column alone, which a file's row groups prune.
    """
    files = [file for file in files if file.overlaps(start_us, stop_us - 1)]
    if not files:
        return
    first = max(start_us, min(file.first_us for file in files))
    last = min(stop_us - 1, max(file.last_us for file in files))
    if sum(file.rows for file in files) > rows_max and first < last:
        found = scan(table, tasks(table, files), (rows.TS,), between(first, last))
        times = np.sort(rows.micros(found[rows.TS]))
        yield from _cut(times, rows_max)
    else:
        yield first, last


def _cut(times: NDArray[np.int64], rows_max: int) -> Iterator[tuple[int, int]]:
    """Spans that cover the sorted times; rows of one time are never apart."""
    at = 0
    while at < len(times):
        end = min(at + rows_max, len(times))
        if end < len(times):
            cut = int(np.searchsorted(times, times[end]))  # where that time begins
            end = cut if cut > at else int(np.searchsorted(times, times[end], "right"))
        yield int(times[at]), int(times[end - 1])
        at = end
