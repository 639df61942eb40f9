"""From appended rows to batches worth storing: gather the small, sort, cut the large.

A block of a few hundred bytes wastes most of a page and compresses badly, so small appends
are staged until a megabyte is there or the flush interval ends; rows of plain numbers are
packed by ``struct``, which copies and type-checks them in a fraction of a microsecond. A
large append is cut so that the first row of any range is at most 4 MB away.

Not thread-safe: the writer's lock guards each Staging.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final

import numpy as np

from kvstore.schema import Array, BatchLike, Schema
from kvstore.timestamps import time_bounds

SMALL_BYTES: Final = 256 << 10  # an append below this is staged
STAGED_BYTES_MAX: Final = 1 << 20  # and stored as one batch at this size
BATCH_BYTES_MAX: Final = 4 << 20  # a longer one is cut: 4 MB decompress in about 1 ms
_CODES: Final = {
    "<f8": "d", "<f4": "f", "<i8": "q", "<u8": "Q", "<i4": "i", "<u4": "I",
    "<i2": "h", "<u2": "H", "|i1": "b", "|u1": "B",
}  # fmt: skip  # no bool: struct would take any object for one
_INTEGERS: Final = frozenset({int, np.int64, np.int32, np.uint32, np.int16, np.uint16, np.uint8})
_EXACT: Final = {"d": frozenset({float, np.float64}), "f": frozenset({float})}
"""What struct packs into floats as Schema.columns would; it rounds other types in silence."""


class Staging:
    """The rows of one stream that wait to become a batch."""

    def __init__(self, schema: Schema):
        self.bytes = 0
        self._schema = schema
        self._parts: list[list[Array]] = []
        self._packed = bytearray()
        self._pack = _packer(schema)
        self._values = operator.itemgetter(*schema.names)
        self._count = len(schema.names)
        self._time = schema.number(schema.time)
        self._codes = [_CODES.get(field.np_dtype.str, "") for field in schema.fields]
        self._exact: set[tuple[type, ...]] = set()  # types of rows that need no further look
        self._low, self._high = time_bounds(schema.time_dtype)

    def add_row(self, row: BatchLike) -> int:
        """Stage one row of plain numbers: its bytes, or 0 where it needs the general way."""
        if self._pack is None:
            return 0
        try:
            values = self._values(row)
            time = values[self._time]
            if tuple(map(type, values)) not in self._exact and not self._is_exact(values):
                return 0
            if len(row) != self._count or not self._low <= time <= self._high:
                return 0
            packed: bytes = self._pack(*values)
        except (KeyError, TypeError, ValueError, OverflowError, struct.error):
            return 0  # Schema.columns finds the words for it
        self._packed += packed
        self.bytes += len(packed)
        return len(packed)

    def _is_exact(self, values: tuple[Any, ...]) -> bool:
        """Whether struct packs values of these types as Schema.columns converts them."""
        types = tuple(map(type, values))
        fit = all(
            each in _EXACT.get(code, _INTEGERS)
            for each, code in zip(types, self._codes, strict=True)
        )
        if fit:
            self._exact.add(types)
        return fit

    def add(self, columns: list[Array], size: int, *, copy: bool) -> None:
        """Stage a few rows. With copy=False the arrays must stay as they are."""
        self._close_packed()
        self._parts.append([column.copy() for column in columns] if copy else columns)
        self.bytes += size

    def take(self) -> list[Array]:
        """All staged rows as columns in arrival order; the staging is empty afterwards."""
        self._close_packed()
        parts = self._parts
        taken = parts[0]
        if len(parts) > 1:
            taken = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        self._parts, self.bytes = [], 0
        return taken

    def _close_packed(self) -> None:
        if not self._packed:
            return
        dtype = np.dtype([(f.name, f.np_dtype) for f in self._schema.fields])
        rows = np.frombuffer(self._packed, dtype)
        self._parts.append([np.ascontiguousarray(rows[name]) for name in self._schema.names])
        self._packed = bytearray()


def _packer(schema: Schema) -> Any:
    codes = [_CODES.get(field.np_dtype.str, "") for field in schema.fields]
    if not all(codes) or len(codes) == 1 or any(field.shape for field in schema.fields):
        return None
    return struct.Struct("<" + "".join(codes)).pack


def size_of(columns: list[Array]) -> int:
    """Bytes of the rows before compression; text counts its characters too."""
    size = 0
    for column in columns:
        size += column.nbytes
        if column.dtype == object:
            size += sum(map(len, filter(None, column.ravel().tolist())))  # a fifth of a loop's time
    return size


def cut(columns: list[Array], time: int) -> Iterator[list[Array]]:
    """Rows sorted by time, stably, in pieces of at most BATCH_BYTES_MAX of even length.

    time: number of the time column. A single row is never cut; no rows make no piece.
    """
    rows = len(columns[time])
    if not rows:
        return
    columns = _sorted(columns, time)
    pieces = min(rows, -(-size_of(columns) // BATCH_BYTES_MAX))
    if pieces == 1:
        yield columns
        return
    ends = [rows * piece // pieces for piece in range(pieces + 1)]
    for start, stop in pairwise(ends):
        yield [column[start:stop] for column in columns]


def _sorted(columns: list[Array], time: int) -> list[Array]:
    times = columns[time]
    if len(times) < 2 or bool((times[1:] >= times[:-1]).all()):  # noqa: PLR2004
        return columns
    order = np.argsort(times, kind="stable")
    return [column[order] for column in columns]
