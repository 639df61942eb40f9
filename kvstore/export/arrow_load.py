"""Parquet and Arrow files back into batches: the inverse of arrow.py, and what others wrote.

A column whose type is no longer what its metadata describes (another tool rewrote it) is taken
for what it is. Dates become datetime64[s]; dictionaries of text become text. Nulls become NaN,
NaT or None, and are refused where a type has none of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvstore.errors import KvstoreError, SchemaError
from kvstore.export.arrow import inner_shape, type_of
from kvstore.export.loaded import Loaded, batch_rows, schema_with_time
from kvstore.export.metadata import KEY, described
from kvstore.schema import Array, Batch, Field, Schema


def load_parquet(path: Path, time: str) -> Loaded:
    """A Parquet file."""
    with _reported(path), pq.ParquetFile(path) as file:
        schema = _restored(file.schema_arrow, time, path)
    return Loaded(schema, _parquet_batches(path, schema))


def load_arrow(path: Path, time: str) -> Loaded:
    """An Arrow IPC file, also known as Feather version 2."""
    with _reported(path), pa.memory_map(str(path)) as source:
        schema = _restored(pa.ipc.open_file(source).schema, time, path)
    return Loaded(schema, _arrow_batches(path, schema))


def _parquet_batches(path: Path, schema: Schema) -> Iterator[Batch]:
    with _reported(path), pq.ParquetFile(path) as file:
        for part in file.iter_batches(batch_rows(schema)):
            yield _batch(part, schema)


def _arrow_batches(path: Path, schema: Schema) -> Iterator[Batch]:
    rows = batch_rows(schema)
    with _reported(path), pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            whole = reader.get_batch(number)
            for start in range(0, whole.num_rows, rows):
                yield _batch(whole.slice(start, rows), schema)


class _reported:  # noqa: N801  # reads as a verb where it is used
    """Name the file in what pyarrow says of it."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, pa.ArrowException):
            raise KvstoreError(
                f"{self._path} cannot be read as {self._path.suffix[1:]}: {error}"
            ) from error


# ---- types ----


def _restored(schema: Any, time: str, path: Path) -> Schema:
    known = described((schema.metadata or {}).get(KEY))
    fields = []
    for column in schema:
        found = _inferred(column)
        field = known.fields.get(column.name)
        same = field is not None and _alike(found, _expected(field, known.time))
        fields.append(field if field is not None and same else found)
    kept = known.time if known.time in [field.name for field in fields] else ""
    return schema_with_time(fields, time or kept, path)


def _expected(field: Field, time: str) -> Field:
    """What export made of a field, as it looks to ``_inferred``."""
    return _inferred(pa.field(field.name, type_of(field, time)))


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


# ---- values ----


def _batch(part: Any, schema: Schema) -> Batch:
    return {field.name: _values(part.column(field.name), field) for field in schema.fields}


def _values(column: Any, field: Field) -> Array:
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    while pa.types.is_fixed_size_list(column.type):
        _refuse_nulls(column, field)
        column = column.flatten()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    inner = inner_shape(field)
    flat = _flat(column, field)
    rows = len(flat) // math.prod(inner) if math.prod(inner) else len(flat)
    return flat.reshape(rows, *inner).view(field.np_dtype).reshape(rows, *field.shape)


def _flat(column: Any, field: Field) -> Array:
    """The numbers as they lie in memory, of the field's dtype or a view of it."""
    if field.is_text:
        texts = np.empty(len(column), object)
        texts[:] = column.to_pylist()
        return texts
    kind = field.np_dtype.kind
    is_temporal = pa.types.is_temporal(column.type)
    if kind in "biu" and not is_temporal:
        _refuse_nulls(column, field)
    values: Array = column.to_numpy(zero_copy_only=False)
    if is_temporal:
        values = values.astype(field.np_dtype if kind in "mM" else "<M8[ns]")
    return np.ascontiguousarray(values)


def _refuse_nulls(column: Any, field: Field) -> None:
    if column.null_count:
        raise SchemaError(
            f"field {field.name!r} ({field.np_dtype}) holds {column.null_count} nulls, for which "
            "it has no value; fill them, or make the column a float"
        )
