"""Rows as HDF5: a dataset a field, its first axis the row, in chunks of about 1 MB.

Compressed with shuffle and gzip, which every HDF5 library reads. Times other than float
seconds are int64 counts, their unit in the attribute ``units``.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py

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
    with _Sink(path, "w+b") as sink:
        with h5py.File(sink, "w") as file:
            file.attrs["time"] = time if time in [field.name for field in fields] else ""
            puts = [_dataset(file, fields, field, time) for field in fields]
            rows = fill(batches, fields, [_checked(put, sink) for put in puts])
        sink.check()
        return rows


class _Sink(io.FileIO):
    """A file that keeps its first error for itself until ``check`` raises it.

    Where HDF5 meets a full disk it can never close the file, and kills the process at its
    exit. So it is told that all is well, and the file is thrown away.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self.error is None and done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def _checked(put: Put, sink: _Sink) -> Put:
    def checked(offset: int, array: Array) -> None:
        put(offset, array)
        sink.check()

    return checked


def _dataset(file: Any, fields: Sequence[Field], field: Field, time: str) -> Put:
    check_storable(field, "HDF5")
    dataset = file.create_dataset(
        field.name,
        shape=(0, *field.shape),
        maxshape=(None, *field.shape),
        chunks=(chunk_rows(field, len(fields)), *field.shape),
        dtype=h5py.string_dtype() if field.is_text else plain_dtype(field),
        shuffle=not field.is_text,
        compression="gzip",
        compression_opts=1,
    )
    dataset.attrs.update(attributes(field, time))

    def put(offset: int, array: Array) -> None:
        dataset.resize(offset + len(array), axis=0)
        dataset[offset:] = plain_values(field, array, "HDF5")

    return put
