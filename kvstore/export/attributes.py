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


def plain_values(array: Array) -> Array:
    """Values of plain_dtype."""
    return array.view("<i8") if array.dtype.kind in "mM" else array


def check_storable(field: Field, target: str) -> None:
    """Names are paths in HDF5 and Zarr: those that would lead elsewhere are refused."""
    if "/" in field.name or field.name in (".", "..") or field.name.startswith("__"):
        raise SchemaError(
            f"field {field.name!r}: {target} takes its name for a path; leave the field out "
            "(--fields) or use parquet"
        )


def check_texts(field: Field, array: Array, target: str) -> None:
    """None has no place among strings of fixed meaning."""
    if field.is_text and any(text is None for text in array.flat):
        raise SchemaError(
            f"field {field.name!r} holds None, which {target} cannot; leave the field out "
            "(--fields) or use parquet or jsonl"
        )
