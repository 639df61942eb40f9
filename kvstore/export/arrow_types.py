"""Fields and arrays as Arrow types and columns, and back. Values are exact.

    float64 seconds          float64, with unit and epoch in the field's metadata: an Arrow
                             timestamp would round them, and rows would change sides of a range
    int64 ns (the time)      timestamp[ns, UTC]
    datetime64, timedelta64  timestamp[unit, UTC], duration[unit]; int64 where Arrow has no
    in s, ms, us or ns       such unit (minutes, days, 10 ms)
    a per-row shape          arrow.fixed_shape_tensor for numbers, FixedSizeList for the rest
    complex                  a last axis of two: real, imaginary
    text, NaT                null where None, null; NaN stays NaN

Units, descriptions, dtypes and shapes stand in each field's metadata, and the whole schema once
more as metadata.py has it. Back from a file: a column whose type is no longer what its metadata
describes (another tool rewrote it) is taken for what it is. Dates become datetime64[s];
dictionaries of text become text. Nulls become NaN, NaT or None, and are refused where a type
has none of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from kvstore.errors import KvstoreError, SchemaError
from kvstore.export.metadata import KEY, describe, described
from kvstore.schema import Array, Batch, Field

_UNITS: Final = ("s", "ms", "us", "ns")


# ---- fields -> types ----


def schema_of(fields: Sequence[Field], time: str) -> Any:
    """The Arrow schema of these fields."""
    columns = [
        pa.field(field.name, _type_of(field, time), metadata=_metadata(field, time))
        for field in fields
    ]
    return pa.schema(columns, {KEY: describe(fields, time)})


def _type_of(field: Field, time: str) -> Any:
    """A field's Arrow type."""
    value, shape = _value_type(field, time), _inner_shape(field)
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


def _inner_shape(field: Field) -> tuple[int, ...]:
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


# ---- arrays -> columns ----


def record_batch(batch: Batch, fields: Sequence[Field], schema: Any) -> Any:
    """A batch as a record batch; numeric columns share its memory."""
    columns = [_column(field, batch[field.name], schema.field(field.name).type) for field in fields]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(field: Field, array: Array, type_: Any) -> Any:
    shape = _inner_shape(field)
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


# ---- types -> fields ----


def fields_of(schema: Any) -> tuple[tuple[Field, ...], str]:
    """The fields of an Arrow schema, and its time field where that is still as exported."""
    known = described((schema.metadata or {}).get(KEY))
    fields, time = [], ""
    for column in schema:
        found = _inferred(column)
        field = known.fields.get(column.name)
        if field is not None and _alike(found, _expected(field, known.time)):
            found = field
            time = field.name if field.name == known.time else time
        fields.append(found)
    return tuple(fields), time


def _expected(field: Field, time: str) -> Field:
    """What export made of a field, as it looks to ``_inferred``."""
    return _inferred(pa.field(field.name, _type_of(field, time)))


def _alike(a: Field, b: Field) -> bool:
    """Equal but for the unit of times: Parquet has no seconds."""
    return a.shape == b.shape and (a.np_dtype.kind, a.np_dtype.itemsize) == (
        b.np_dtype.kind,
        b.np_dtype.itemsize,
    )


def _inferred(column: Any) -> Field:
    type_ = column.type
    shape: tuple[int, ...] = ()
    if isinstance(type_, pa.FixedShapeTensorType):
        type_, shape = type_.value_type, tuple(type_.shape)
    while pa.types.is_fixed_size_list(type_):
        type_, shape = type_.value_type, (*shape, type_.list_size)
    metadata = {key.decode(): text.decode() for key, text in (column.metadata or {}).items()}
    about = (metadata.get("unit", ""), metadata.get("description", ""))
    return Field(column.name, _dtype(type_, column.name), shape, *about)


def _dtype(type_: Any, name: str) -> Any:
    is_ = pa.types
    if is_.is_dictionary(type_):
        return _dtype(type_.value_type, name)
    if is_.is_string(type_) or is_.is_large_string(type_):
        return "text"
    if is_.is_date(type_):
        return "<M8[s]"
    if is_.is_timestamp(type_) or is_.is_duration(type_):
        return f"<{'M8' if is_.is_timestamp(type_) else 'm8'}[{type_.unit}]"
    if is_.is_boolean(type_) or is_.is_integer(type_) or is_.is_floating(type_):
        return np.dtype(type_.to_pandas_dtype())
    raise SchemaError(
        f"field {name!r}: Arrow type {type_} cannot be stored; convert it to numbers, "
        "timestamps, text or lists of fixed size, or leave the column out"
    )


# ---- columns -> arrays ----


def batch_of(part: Any, fields: Sequence[Field]) -> Batch:
    """A record batch as arrays of these fields."""
    return {field.name: _array(part.column(field.name), field) for field in fields}


def _array(column: Any, field: Field) -> Array:
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    while pa.types.is_fixed_size_list(column.type):
        _refuse_nulls(column, field)
        column = column.flatten()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    inner = _inner_shape(field)
    flat = _flat(column, field)
    rows = len(flat) // math.prod(inner) if math.prod(inner) else len(flat)
    return flat.reshape(rows, *inner).view(field.np_dtype).reshape(rows, *field.shape)


def _flat(column: Any, field: Field) -> Array:
    """The numbers as they lie in memory, of the field's dtype or a view of it."""
    if field.is_text:
        texts = np.empty(len(column), object)
        texts[:] = column.to_pylist()
        return texts
    is_temporal = pa.types.is_temporal(column.type)
    if field.np_dtype.kind in "biu" and not is_temporal:
        _refuse_nulls(column, field)
    values: Array = column.to_numpy(zero_copy_only=False)
    if is_temporal:
        values = _retimed(values, field)
    return np.ascontiguousarray(values)


def _retimed(values: Array, field: Field) -> Array:
    """Times in the field's unit; SchemaError where that would round them, or wrap."""
    dtype = field.np_dtype if field.np_dtype.kind in "mM" else np.dtype("<M8[ns]")
    retimed = values.astype(dtype)
    if values.dtype != dtype and not np.array_equal(
        retimed.astype(values.dtype), values, equal_nan=True
    ):
        raise SchemaError(
            f"field {field.name!r}: not all times are whole {dtype}, as the file's metadata has "
            "them; write the file without the key 'kvstore'"
        )
    return retimed


def _refuse_nulls(column: Any, field: Field) -> None:
    if column.null_count:
        raise SchemaError(
            f"field {field.name!r} ({field.np_dtype}) holds {column.null_count} nulls, for which "
            "it has no value; fill them, or make the column a float"
        )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in what pyarrow says of it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:  # of what it finds broken it says both
        raise KvstoreError(f"{path} cannot be read as {path.suffix}: {error}") from error
