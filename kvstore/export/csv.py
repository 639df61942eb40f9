"""Rows as CSV, one line each: for spreadsheets and small selections.

A field with a per-row shape becomes one column a value: ``spectral_0_15``. Times are written
as they are stored: float64 seconds in their shortest exact decimal, int64 ns as integers,
datetime64 as ISO 8601. NaN is ``nan``. Numbers stand bare, text and dates in quotes (a lone
carriage return inside a bare text would end its line); None is the empty text.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Literal

import numpy as np

from kvstore.schema import Array, Batch, Field


def write(batches: Iterable[Batch], fields: Sequence[Field], file: BinaryIO) -> int:
    """Write a header line and all rows; returns how many."""
    file.write(_text([[x for field in fields for x in column_names(field)]], csv.QUOTE_MINIMAL))
    rows = 0
    for batch in batches:
        flat = [list(_values(batch[field.name])) for field in fields]
        lines = ([value for values in row for value in values] for row in zip(*flat, strict=True))
        file.write(_text(lines, csv.QUOTE_NONNUMERIC))
        rows += len(flat[0])
    return rows


def _text(lines: Iterable[list[Any]], quoting: Literal[0, 2]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", quoting=quoting).writerows(lines)
    return text.getvalue().encode("utf-8", "surrogatepass")


def column_names(field: Field) -> list[str]:
    """Names of the columns that a field becomes."""
    return ["_".join([field.name, *map(str, index)]) for index in np.ndindex(field.shape)]


def _values(array: Array) -> Iterator[list[Any]]:
    """The values of each row, as Python objects that csv prints exactly."""
    flat = array.reshape(len(array), math.prod(array.shape[1:]))
    if flat.dtype.kind in "mM":
        flat = flat.astype(str)
    elif flat.dtype.kind == "f" and flat.dtype.itemsize < 8:  # noqa: PLR2004
        flat = flat.astype(str).astype(float)  # by its own digits: 0.1, not 0.10000000149011612
    yield from flat.tolist()
