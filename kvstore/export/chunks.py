"""Batches regrouped to what a target likes: even chunks, row groups, batches of so many rows.

Pure: arrays in, arrays out. Memory is bounded by what is being gathered and one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from kvstore.schema import Array, Batch, Field

CHUNK_BYTES: Final = 1 << 20  # one read of an HDF5 or Zarr chunk: as its makers advise
_CHUNKS_BYTES_MAX: Final = 64 << 20  # gathered over all fields
_TEXT_BYTES: Final = (
    256  # a value of text, at a guess: a log line. Only so does memory stay bounded
)
GROUP_BYTES: Final = 32 << 20  # a row group or record batch, uncompressed
GROUP_ROWS: Final = 1 << 20  # the usual row group: a scalar field's 8 MB

Put = Callable[[int, Array], None]
"""Store rows of one field from this row on."""


def chunk_rows(field: Field, fields: int) -> int:
    """Rows in a chunk of one field among so many."""
    row_bytes = math.prod(field.shape) * _TEXT_BYTES if field.is_text else field.row_bytes
    return max(1, min(CHUNK_BYTES, _CHUNKS_BYTES_MAX // fields) // max(1, row_bytes))


def fill(batches: Iterable[Batch], fields: Sequence[Field], puts: Sequence[Put]) -> int:
    """Hand each field's rows to its ``put`` in whole chunks, each once; returns the rows."""
    columns = [
        _Column(chunk_rows(field, len(fields)), put)
        for field, put in zip(fields, puts, strict=True)
    ]
    rows = 0
    for batch in batches:
        for field, column in zip(fields, columns, strict=True):
            column.add(batch[field.name])
        rows += _rows(batch)
    for column in columns:
        column.finish()
    return rows


class _Column:
    """Rows of a field that wait until a chunk is full."""

    def __init__(self, chunk: int, put: Put):
        self._chunk = chunk
        self._put = put
        self._offset = 0
        self._waiting: list[Array] = []
        self._rows = 0

    def add(self, array: Array) -> None:
        self._waiting.append(array)
        self._rows += len(array)
        if self._rows >= self._chunk:
            self._send(self._rows - self._rows % self._chunk)

    def finish(self) -> None:
        if self._rows:
            self._send(self._rows)

    def _send(self, rows: int) -> None:
        joined = np.concatenate(self._waiting)
        self._put(self._offset, joined[:rows])
        self._offset += rows
        self._waiting = [joined[rows:].copy()]  # a view would keep the whole of it
        self._rows -= rows


def grouped(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Small batches joined until they make a group of rows."""
    waiting: list[Batch] = []
    rows = size = 0
    for batch in batches:
        waiting.append(batch)
        rows += _rows(batch)
        size += sum(map(_bytes, batch.values()))
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            yield _taken(waiting)
            rows = size = 0
    if waiting:
        yield _taken(waiting)


def of_rows(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    """Batches of exactly so many rows; the last may have fewer."""
    waiting: list[Batch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += _rows(batch)
        if count < rows:
            continue
        whole = joined(waiting)
        for start in range(0, count - count % rows, rows):
            yield {name: column[start : start + rows] for name, column in whole.items()}
        waiting = [{name: column[count - count % rows :].copy() for name, column in whole.items()}]
        count %= rows
    if count:
        yield joined(waiting)


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches with the same fields as one."""
    if len(batches) == 1:
        return batches[0]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def columns(batches: Iterable[Batch], fields: Sequence[Field], time: str) -> Batch:
    """All rows in memory, for targets that live there; an int64 time as datetime64[ns]."""
    empty = {field.name: np.empty((0, *field.shape), field.np_dtype) for field in fields}
    found = dict(joined(list(batches) or [empty]))
    if time in found and found[time].dtype.kind == "i":
        found[time] = found[time].view("<M8[ns]")
    return found


def _taken(waiting: list[Batch]) -> Batch:
    """They as one, held by nobody else: a group and its parts would be twice the memory."""
    whole = joined(waiting)
    waiting.clear()
    return whole


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _bytes(array: Array) -> int:
    if array.dtype != object:
        return array.nbytes
    return array.nbytes + sum(len(text) for text in array.flat if text)
