"""One row of a range by its number, found by the index: batches before it are not read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.entries import Entry
from kvstore.errors import DamageError, KvstoreError, StoreFormatError
from kvstore.plots.digest import column_of
from kvstore.reading import Scan
from kvstore.schema import Array, Field
from kvstore.segment import Segment
from kvstore.survey import rows_inside
from kvstore.timestamps import time_to_ns


class Row(NamedTuple):
    """A row's values, one-row arrays by field; a field that it does not have is left out."""

    number: int
    time_ns: int
    values: dict[str, Array]


def find_row(scan: Scan, number: int, fields: Sequence[Field]) -> Row:
    """The row of that number, from 0, in the order in which ``Stream.read`` gives them.

    KvstoreError where the range has fewer rows. A damaged batch before it counts as no rows.
    """
    left = number
    for segment, entry in scan.entries():
        low, rows = 0, entry.rows
        if not scan.range.covers(entry.first, entry.last):
            inside = rows_inside(scan, segment, entry)
            if inside is None:
                continue
            low, rows = inside[0].start, len(inside[1])
        if 0 <= left < rows:
            return Row(number, *_taken(scan, segment, entry, fields, low + left))
        left -= rows
    raise KvstoreError(
        f"no such row: the range of stream {scan.info.name!r} has {number - left} rows, "
        "numbered from 0: choose a number below that, or a longer range"
    )


def _taken(
    scan: Scan, segment: Segment, entry: Entry, fields: Sequence[Field], at: int
) -> tuple[int, dict[str, Array]]:
    try:
        time = scan.times(segment, entry)[at]
        found = {field.name: column_of(scan.info.schema, segment, entry, field) for field in fields}
    except StoreFormatError as error:
        raise DamageError(f"the row's batch cannot be read: {error}") from error
    there = {name: column[at : at + 1] for name, column in found.items() if column is not None}
    return time_to_ns(time, time.dtype), there
