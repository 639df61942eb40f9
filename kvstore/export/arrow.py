"""Rows as Arrow: a table in memory, an .arrow (IPC) file, and back. Values are exact.

    float64 seconds          float64, with unit and epoch in the field's metadata: an Arrow
                             timestamp would round them, and rows would change sides of a range
    int64 ns (the time)      timestamp[ns, UTC]
    datetime64, timedelta64  timestamp[unit, UTC], duration[unit]; int64 where Arrow has no
    in s, ms, us or ns       such unit (minutes, days, 10 ms)
    a per-row shape          arrow.fixed_shape_tensor for numbers, FixedSizeList for the rest
    complex                  a last axis of two: real, imaginary
    text, NaT                null where None, null; NaN stays NaN

Units, descriptions, dtypes and shapes stand in each field's metadata, and the whole schema once
more as metadata.py has it. IPC files are not compressed: they can be used in place by mmap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from kvstore.errors import SchemaError
from kvstore.export.chunks import grouped
from kvstore.export.metadata import KEY, describe
from kvstore.schema import Array, Batch, Field

_UNITS: Final = ("s", "ms", "us", "ns")


def table(batches: Iterable[Batch], fields: Sequence[Field], time: str) -> Any:
    """All rows as a ``pyarrow.Table``, a chunk per batch."""
    schema = schema_of(fields, time)
    return pa.Table.from_batches(record_batches(batches, fields, schema), schema)


def write(batches: Iterable[Batch], fields: Sequence[Field], path: Path, *, time: str = "") -> int:
    """Write all rows to an IPC file; returns how many."""
    schema = schema_of(fields, time)
    rows = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for record_batch in record_batches(grouped(batches), fields, schema):
            writer.write_batch(record_batch)
            rows += record_batch.num_rows
    return rows


def record_batches(batches: Iterable[Batch], fields: Sequence[Field], schema: Any) -> Iterator[Any]:
    """Each batch as a record batch; numeric columns share its memory."""
    for batch in batches:
        columns = [
            _column(field, batch[field.name], schema.field(field.name).type) for field in fields
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


# ---- types ----


def schema_of(fields: Sequence[Field], time: str) -> Any:
    """The Arrow schema of these fields."""
    columns = [
        pa.field(field.name, type_of(field, time), metadata=_metadata(field, time))
        for field in fields
    ]
    return pa.schema(columns, {KEY: describe(fields, time)})


def type_of(field: Field, time: str) -> Any:
    """A field's Arrow type."""
    value, shape = _value_type(field, time), inner_shape(field)
    if not shape:
        return value
    if not math.prod(shape):
        raise SchemaError(
            f"field {field.name!r}: rows of shape {field.shape} hold no values, which Arrow and "
            "Parquet cannot say; leave the field out (--fields)"
        )
    if field.np_dtype.kind in "iufc":
        return pa.fixed_shape_tensor(value, shape)
    return pa.list_(value, math.prod(shape))


def inner_shape(field: Field) -> tuple[int, ...]:
    """The shape of a row's numbers: a complex one is two."""
    return (*field.shape, 2) if field.np_dtype.kind == "c" else field.shape


def _value_type(field: Field, time: str) -> Any:
    dtype = field.np_dtype
    if field.is_text:
        return pa.string()
    if dtype.kind == "c":
        return pa.from_numpy_dtype(_part(dtype))
    if field.name == time and dtype.kind == "i":
        return pa.timestamp("ns", "UTC")
    if dtype.kind not in "mM":
        return pa.from_numpy_dtype(dtype)
    unit = _arrow_unit(dtype)
    if not unit:
        return pa.int64()
    return pa.timestamp(unit, "UTC") if dtype.kind == "M" else pa.duration(unit)


def _arrow_unit(dtype: Any) -> str:
    unit, multiple = np.datetime_data(dtype)
    return unit if multiple == 1 and unit in _UNITS else ""


def _part(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"<f{dtype.itemsize // 2}")


def _metadata(field: Field, time: str) -> dict[str, str]:
    metadata = {"dtype": "text" if field.is_text else field.np_dtype.str}
    if field.shape:
        metadata["shape"] = json.dumps(field.shape)
    if field.name == time and field.np_dtype.kind == "f":
        metadata |= {"unit": "s", "epoch": "1970-01-01T00:00:00Z"}
    metadata |= {"unit": field.unit} if field.unit else {}
    return metadata | ({"description": field.description} if field.description else {})


# ---- values ----


def _column(field: Field, array: Array, type_: Any) -> Any:
    shape = inner_shape(field)
    list_ = isinstance(type_, pa.FixedShapeTensorType)
    value_type = type_.value_type if shape else type_
    values = _values(field, np.ascontiguousarray(array).reshape(-1), value_type)
    if not shape:
        return values
    lists = pa.FixedSizeListArray.from_arrays(values, math.prod(shape))
    return pa.ExtensionArray.from_storage(type_, lists) if list_ else lists


def _values(field: Field, flat: Array, type_: Any) -> Any:
    kind = field.np_dtype.kind
    if kind == "c":
        flat = flat.view(_part(field.np_dtype))
    elif kind in "mM" and pa.types.is_int64(type_):
        flat = flat.view("<i8")
    elif kind == "i" and pa.types.is_timestamp(type_):
        flat = flat.view("<M8[ns]")
    try:
        return pa.array(flat, type_)
    except UnicodeEncodeError as error:
        raise SchemaError(
            f"field {field.name!r}: text with a lone surrogate is no UTF-8, which Arrow and "
            "Parquet need; use jsonl"
        ) from error
