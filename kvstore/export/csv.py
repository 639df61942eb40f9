"""Rows as CSV, one line each: for spreadsheets and small selections.

A field with a per-row shape becomes one column a value: ``spectral_0_15``. Times are written
as they are stored: float64 seconds in their shortest exact decimal, int64 ns as integers,
datetime64 as ISO 8601. NaN is ``nan``; None is empty.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from kvstore.schema import Array, Batch, Field


def write(batches: Iterable[Batch], fields: Sequence[Field], file: BinaryIO) -> int:
    """Write a header line and all rows; returns how many."""
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column for field in fields for column in _columns(field)])
    rows = 0
    for batch in batches:
        flat = [list(_values(batch[field.name])) for field in fields]
        writer.writerows(
            [value for values in row for value in values] for row in zip(*flat, strict=True)
        )
        rows += len(flat[0])
    text.detach()
    return rows


def _columns(field: Field) -> list[str]:
    return ["_".join([field.name, *map(str, index)]) for index in np.ndindex(field.shape)]


def _values(array: Array) -> Iterator[list[Any]]:
    """The values of each row, as Python objects that csv prints exactly."""
    flat = array.reshape(len(array), -1)
    if flat.dtype.kind in "mM":
        flat = flat.astype(str)
    elif flat.dtype.kind == "f":
        flat = flat.astype(str) if flat.dtype.itemsize < 8 else flat  # noqa: PLR2004  # own digits
    yield from flat.tolist()
