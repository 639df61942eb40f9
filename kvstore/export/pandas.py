"""Rows as a pandas DataFrame, in memory: indexed by the time exactly as it is stored.

Float seconds give a float index, int64 ns and datetime64 a UTC DatetimeIndex. A field with a
per-row shape is a column of arrays (``np.stack`` makes one of them); units and descriptions are
in ``attrs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kvstore.export.chunks import columns
from kvstore.schema import Array, Batch, Field


def frame(batches: Iterable[Batch], fields: Sequence[Field], time: str) -> pd.DataFrame:
    """All rows as a DataFrame."""
    found = columns(batches, fields, time)
    series = {field.name: _column(field, found[field.name]) for field in fields}
    made = pd.DataFrame(series, copy=False)
    made.attrs = {
        field.name: {"unit": field.unit, "description": field.description} for field in fields
    }
    return made.set_index(time) if time in found else made


def _column(field: Field, array: Array) -> Any:
    if field.shape:
        rows = np.empty(len(array), object)
        for number, row in enumerate(array):
            rows[number] = row
        return rows
    if field.is_text:
        return pd.Series(array, dtype=object)
    if array.dtype.kind == "M" and np.datetime_data(array.dtype)[0] in ("s", "ms", "us", "ns"):
        return pd.Series(array).dt.tz_localize("UTC")
    return array
