"""Rows to a file whose name says the format, and such a file's rows back.

A file appears complete and durable, or not at all: atomic.py. Memory is bounded by the format's
row group or chunks, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from kvstore.errors import KvstoreError, SchemaError
from kvstore.export import csv, jsonl, npz
from kvstore.export.atomic import replacing
from kvstore.export.extras import needed_for
from kvstore.export.metadata import Loaded, Progress
from kvstore.lossless import converted
from kvstore.schema import TIME_NAMES, Array, Batch, Field, Schema
from kvstore.timestamps import Unit

FORMATS: Final = ("npz", "npy", "csv", "jsonl", "parquet", "arrow", "h5", "zarr")
LOADABLE: Final = ("parquet", "arrow", "npz", "csv")
_INT64: Final = np.dtype("<i8")

Write = Callable[[Iterable[Batch], Sequence[Field], Path, str], int]


# ---- out ----


def write_file(
    batches: Iterable[Batch], fields: Sequence[Field], path: Path, *, time: str = ""
) -> int:
    """Write all rows in the format of the path's suffix; returns how many.

    time: name of the stream's time field, whether or not it is among ``fields``.
    """
    write = _writer(path)
    names = [field.name for field in fields]
    if not names or len(set(names)) != len(names):
        raise SchemaError(f"fields to export: {', '.join(names) or 'none'}; name each once")
    with replacing(path, marker="zarr.json" if path.suffix == ".zarr" else "") as fresh:
        return write(batches, fields, fresh, time)


def check_format(path: Path) -> None:
    """KvstoreError where the name ends in no known format or a library for it is missing."""
    _writer(path)


def _writer(path: Path) -> Write:
    suffix = path.suffix[1:]
    if suffix not in FORMATS:
        raise KvstoreError(f"{path}: in which format? Name it .{', .'.join(FORMATS)}")
    if suffix in ("npz", "npy", "csv", "jsonl"):
        return _plain_writer(suffix)
    with needed_for(f".{suffix}"):
        return _library_writer(suffix)


def _plain_writer(suffix: str) -> Write:
    def write(batches: Iterable[Batch], fields: Sequence[Field], path: Path, time: str) -> int:
        with path.open("wb") as file:
            if suffix == "csv":
                return csv.write(batches, fields, file)
            if suffix == "jsonl":
                return jsonl.write(batches, fields, file)
            if suffix == "npy":
                return npz.write_npy(batches, fields, file, spool=path.parent)
            return npz.write(batches, fields, file, time=time, spool=path.parent)

    return write


def _library_writer(suffix: str) -> Write:
    # Each loads a library of its own, of which the others are no part.
    if suffix == "parquet":
        from kvstore.export.parquet import write  # noqa: PLC0415
    elif suffix == "arrow":
        from kvstore.export.arrow import write  # noqa: PLC0415
    elif suffix == "h5":
        from kvstore.export.hdf5 import write  # noqa: PLC0415
    else:
        from kvstore.export.zarr import write  # noqa: PLC0415
    return lambda batches, fields, path, time: write(batches, fields, path, time=time)


# ---- in ----


class Rows(NamedTuple):
    """What a file holds for a stream."""

    schema: Schema
    batches: Iterator[Batch]


def load_file(
    path: Path,
    *,
    time: str = "",
    unit: Unit | None = None,
    known: Schema | None = None,
    progress: Progress = lambda _: None,
) -> Rows:
    """A file's schema and its rows, read as they are asked for.

    A file that kvstore exported brings its schema along (CSV does not); of any other it is
    inferred. time: the time field; else the file's own, or timestamps, timestamp or time.
    unit: of integer times, which is never guessed. known: the schema that the rows are for,
    where there is one; only CSV, which has no types of its own, is read by it.
    """
    suffix = path.suffix[1:]
    if suffix not in LOADABLE:
        raise KvstoreError(f"{path}: cannot be imported; expected .{', .'.join(LOADABLE)}")
    try:
        if suffix == "csv":
            loaded = csv.load(path, _csv_types(known, unit), progress)
        else:
            loaded = _loader(suffix)(path, progress)
    except KvstoreError:
        raise
    except OSError as error:
        raise KvstoreError(f"{path}: {error.strerror or error}") from error
    return _timed(path, loaded, time, unit, known)


def _loader(suffix: str) -> Callable[[Path, Progress], Loaded]:
    if suffix == "npz":
        return npz.load
    with needed_for(f".{suffix}"):
        if suffix == "parquet":
            from kvstore.export.parquet import load  # noqa: PLC0415  # loads pyarrow
        else:
            from kvstore.export.arrow import load  # noqa: PLC0415  # the same
    return load


def _csv_types(known: Schema | None, unit: Unit | None) -> tuple[Field, ...] | None:
    """The fields to read CSV by: with a unit, its times are integers."""
    if known is None or unit is None:
        return known.fields if known else None
    counts = Field(known.time, _INT64)
    return tuple(counts if field.name == known.time else field for field in known.fields)


def _timed(path: Path, loaded: Loaded, time: str, unit: Unit | None, known: Schema | None) -> Rows:
    """The rows with their time field settled: which it is, and the unit of its integers."""
    fields = {field.name: field for field in loaded.fields}
    name = known.time if known else _time_name(path, list(fields), time or loaded.time)
    if name not in fields:
        raise SchemaError(
            f"{path}: no field {name!r}, the stream's time, among its fields {', '.join(fields)}"
        )
    is_integer = fields[name].np_dtype.kind in "iu"
    if not is_integer and unit:
        raise SchemaError(
            f"{path}: the times in {name!r} are {fields[name].np_dtype} and not integers: leave "
            "their unit (--time-unit) out"
        )
    if is_integer and not unit and not known and name != loaded.time:
        raise SchemaError(
            f"{path}: the times in {name!r} are integers: say with --time-unit whether they "
            "count s, ms, us or ns since 1970"
        )
    if not is_integer or not unit:
        return Rows(known or Schema(loaded.fields, name), loaded.batches)
    dtype = _INT64 if unit == "ns" else np.dtype(f"<M8[{unit}]")
    fields[name] = Field(name, dtype, (), "", fields[name].description)
    return Rows(
        known or Schema(tuple(fields.values()), name), _recounted(loaded.batches, name, dtype)
    )


def _time_name(path: Path, names: Sequence[str], given: str) -> str:
    for name in [given] if given else TIME_NAMES:
        if name in names:
            return name
    wanted = f"no field {given!r}" if given else f"none of {', '.join(TIME_NAMES)}"
    raise SchemaError(
        f"{path}: {wanted} among its fields ({', '.join(names)}); name the time field with "
        "--time-field"
    )


def _recounted(batches: Iterable[Batch], name: str, dtype: np.dtype[np.generic]) -> Iterator[Batch]:
    for batch in batches:
        counts: Array = converted(batch[name], _INT64, name)
        yield batch | {name: counts.view(dtype)}
