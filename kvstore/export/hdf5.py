"""Rows as HDF5: a dataset a field, its first axis the row, in chunks of about 1 MB.

Compressed with shuffle and gzip, which every HDF5 library reads. Times other than float
seconds are int64 counts, their unit in the attribute ``units``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py

from kvstore.export.attributes import (
    attributes,
    check_storable,
    check_texts,
    plain_dtype,
    plain_values,
)
from kvstore.export.chunks import Put, chunk_rows, fill
from kvstore.schema import Array, Batch, Field


def write(batches: Iterable[Batch], fields: Sequence[Field], path: Path, *, time: str = "") -> int:
    """Write all rows; returns how many."""
    with h5py.File(path, "w") as file:
        file.attrs["time"] = time if time in [field.name for field in fields] else ""
        return fill(batches, fields, [_dataset(file, fields, field, time) for field in fields])


def _dataset(file: Any, fields: Sequence[Field], field: Field, time: str) -> Put:
    check_storable(field, "HDF5")
    # A chunk's axes are at least 1, though a row without values has an axis of 0.
    dataset = file.create_dataset(
        field.name,
        shape=(0, *field.shape),
        maxshape=(None, *field.shape),
        chunks=(chunk_rows(field, len(fields)), *(max(1, n) for n in field.shape)),
        dtype=h5py.string_dtype() if field.is_text else plain_dtype(field),
        shuffle=not field.is_text,
        compression="gzip",
        compression_opts=1,
    )
    dataset.attrs.update(attributes(field, time))

    def put(offset: int, array: Array) -> None:
        check_texts(field, array, "HDF5")
        dataset.resize(offset + len(array), axis=0)
        dataset[offset:] = plain_values(array)

    return put
