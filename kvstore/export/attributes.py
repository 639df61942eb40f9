"""What HDF5, Zarr and xarray say of a field besides its values, in CF's words where it has them.

Integral times carry CF's ``units`` ("microseconds since 1970-01-01"), which xarray decodes
exactly. Float seconds do not: decoding would round them to nanoseconds; they carry the unit
"s" and an ``epoch``.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from kvstore.errors import SchemaError
from kvstore.schema import Array, Field

_CF: Final = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def attributes(field: Field, time: str) -> dict[str, str]:
    """Name -> text: dtype, units, description."""
    found = {"dtype": "text" if field.is_text else field.np_dtype.str}
    if units := _units(field, time):
        found["units"] = units
    if field.name == time and field.np_dtype.kind == "f":
        found["epoch"] = "1970-01-01T00:00:00Z"
    if field.description:
        found["description"] = field.description
    return found


def _units(field: Field, time: str) -> str:
    kind, is_time = field.np_dtype.kind, field.name == time
    if is_time and kind == "f":
        return field.unit or "s"
    if not (kind in "mM" or (is_time and kind == "i")):
        return field.unit
    dtype: Any = np.dtype("M8[ns]") if kind == "i" else field.np_dtype
    unit, multiple = np.datetime_data(dtype)
    word = _CF.get(unit, "") if multiple == 1 else ""
    return word + (" since 1970-01-01" if kind != "m" else "") if word else field.unit


def plain_dtype(field: Field) -> np.dtype[Any]:
    """The dtype as formats without times have it: int64 counts."""
    return np.dtype("<i8") if field.np_dtype.kind in "mM" else field.np_dtype


def plain_values(field: Field, array: Array, target: str) -> Array:
    """Values of plain_dtype; SchemaError for text that the target would not bring back."""
    if field.is_text:
        for text in array.flat:
            _check_text(field, text, target)
    return array.view("<i8") if array.dtype.kind in "mM" else array


def _check_text(field: Field, text: str | None, target: str) -> None:
    if text is None:
        problem, instead = "None", "parquet or jsonl"
    elif target == "HDF5" and "\0" in text:
        problem, instead = "text with a NUL", "parquet or jsonl"
    elif _is_utf8(text):
        return
    else:
        problem, instead = "text with a lone surrogate, which is no UTF-8", "jsonl"
    raise SchemaError(
        f"field {field.name!r} holds {problem}: {target} cannot; leave the field out (--fields) or "
        f"use {instead}"
    )


def _is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8 at all."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_storable(field: Field, target: str) -> None:
    """Refuse names that these formats take for paths or their own, and what HDF5 cannot chunk."""
    name = field.name
    if "/" in name or not name.strip(".") or name.startswith("__") or name == "zarr.json":
        raise SchemaError(
            f"field {name!r}: {target} takes its name for a path or its own; leave the field out "
            "(--fields) or use parquet"
        )
    if target == "HDF5" and 0 in field.shape:
        raise SchemaError(
            f"field {name!r}: rows of shape {field.shape} hold no values, which HDF5 cannot "
            "chunk; leave the field out (--fields)"
        )
