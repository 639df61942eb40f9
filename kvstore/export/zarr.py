"""Rows as a Zarr v3 group, a directory: an array a field, its first axis the row.

Each array has dimension names, so that ``xarray.open_zarr`` finds the time as a coordinate.
Times other than float seconds are int64 counts with CF units, which xarray decodes exactly.
Text is Zarr's variable-length string, whose specification is not final yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import zarr

from kvstore.export.attributes import (
    attributes,
    check_storable,
    plain_dtype,
    plain_values,
)
from kvstore.export.chunks import Put, chunk_rows, fill
from kvstore.schema import Array, Batch, Field


def write(batches: Iterable[Batch], fields: Sequence[Field], path: Path, *, time: str = "") -> int:
    """Write all rows; returns how many."""
    rows_axis = time if time in [field.name for field in fields] else "row"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(not|currently not) .*(V3 specif|format 3 specif)")
        group = zarr.open_group(path, mode="a", zarr_format=3)
        group.attrs["time"] = rows_axis if rows_axis == time else ""
        puts = [_array(group, fields, field, rows_axis, time) for field in fields]
        rows = fill(batches, fields, puts)
        zarr.consolidate_metadata(path)  # else xarray asks for each array's own, and warns
    return rows


def _array(group: Any, fields: Sequence[Field], field: Field, rows_axis: str, time: str) -> Put:
    check_storable(field, "Zarr")
    inner = [f"{field.name}_{axis}" for axis in range(len(field.shape))]
    array = group.create_array(
        field.name,
        shape=(0, *field.shape),
        chunks=(chunk_rows(field, len(fields)), *(max(1, n) for n in field.shape)),
        dtype=str if field.is_text else plain_dtype(field),
        dimension_names=[rows_axis, *inner],
        attributes=attributes(field, time),
    )

    def put(offset: int, values: Array) -> None:
        array.resize((offset + len(values), *field.shape))
        array[offset:] = plain_values(field, values, "Zarr")

    return put
