"""Rows as JSON lines, one object each, with nested lists for per-row shapes.

JSON knows no NaN and no infinity: they become null, as do NaT and None. Times are written as
they are stored: float64 seconds exactly, int64 ns as integers, datetime64 as ISO 8601.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np

from kvstore.export.csv import printed
from kvstore.schema import Array, Batch, Field


def write(batches: Iterable[Batch], fields: Sequence[Field], file: BinaryIO) -> int:
    """Write all rows; returns how many."""
    names = [field.name for field in fields]
    rows = 0
    for batch in batches:
        columns = [_plain(batch[name]) for name in names]
        file.writelines(
            _line(dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)
        )
        rows += len(columns[0])
    return rows


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON knows as \udc00 only
        return json.dumps(row).encode() + b"\n"


def _plain(array: Array) -> list[Any]:
    kind = array.dtype.kind
    if kind in "mM":
        return _null(printed(array), np.isnat(array))
    if kind == "c":
        return _plain(np.stack([array.real, array.imag], axis=-1))
    if kind == "f":
        return _null(printed(array), ~np.isfinite(array))
    return list(array.tolist())


def _null(array: Array, missing: Array) -> list[Any]:
    if missing.any():
        array = array.astype(object)
        array[missing] = None
    return list(array.tolist())
