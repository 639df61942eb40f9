"""Readings of one identity compared: which is stored, which is a duplicate, which conflicts.

Exact, and by column: doubles bit for bit (but -0.0 is 0.0, NaN is null), texts as strings. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kvstore.telemetry.records import Fate
from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks.iceberg_scan import encoded

if TYPE_CHECKING:
    from numpy.typing import NDArray


def compared(stored: pa.Table, ours: pa.Table) -> NDArray[np.uint8]:
    """Fates of our rows: each is compared with the first of its identity.

    stored: rows that are there already, which come before all of ours; any others do no harm.
    Both have the identity's columns, then the values'.
    """
    both = pa.concat_tables([stored, plain(ours, stored.schema)])
    first = _first_of_each(both)
    fates = np.full(len(first), Fate.DUPLICATE, np.uint8)
    fates[~_same(both, first, stored.column_names[2:])] = Fate.CONFLICT
    fates[first == np.arange(len(first))] = Fate.STORED
    return fates[len(stored) :]


def _first_of_each(both: pa.Table) -> NDArray[np.int64]:
    """For each row, the number of the first row of its identity."""
    codes = encoded(both[rows.DEVICE]).indices.to_numpy(zero_copy_only=False)
    ts_us = rows.micros(both[rows.TS])
    order = np.lexsort((ts_us, codes))  # stable: the first stays the first
    new = np.ones(len(order), np.bool_)
    new[1:] = (np.diff(codes[order]) != 0) | (np.diff(ts_us[order]) != 0)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return first


def _same(both: pa.Table, first: NDArray[np.int64], columns: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each row's values are those of the first of its identity."""
    same = np.ones(len(first), np.bool_)
    for name in columns:
        if pa.types.is_floating(both[name].type):
            values = bits(rows.doubles(both[name]))
        else:
            codes = encoded(both[name]).indices
            values = codes.fill_null(-1).to_numpy(zero_copy_only=False)
        same &= values == values[first]
    return same


def bits(values: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Doubles as they are compared."""
    values = values + 0.0
    values[np.isnan(values)] = np.nan
    return values.view(np.uint64)


def plain(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the schema's types: texts that were dictionaries as text."""
    return pa.table([table[f.name].cast(f.type) for f in schema], schema=schema)
