"""Rows to a file whose name says the format; it appears complete and durable, or not at all.

A hidden temporary name beside the target, fsync, rename, fsync of the folder. A .zarr is a
directory, which no rename replaces: an existing one is refused. Memory is bounded by the format's
row group or chunks, whatever the number of rows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from kvstore.errors import KvstoreError
from kvstore.export.extras import needed_for
from kvstore.schema import Batch, Field

FORMATS: Final = ("npz", "npy", "csv", "jsonl", "parquet", "arrow", "h5", "zarr")
Write = Callable[[Iterable[Batch], Sequence[Field], Path, str], int]


def write_file(
    batches: Iterable[Batch], fields: Sequence[Field], path: Path, *, time: str = ""
) -> int:
    """Write all rows in the format of the path's suffix; returns how many.

    time: name of the stream's time field, whether or not it is among ``fields``.
    """
    write = _writer(path)
    target = path.resolve()  # a link stays a link
    if target.is_dir():
        raise KvstoreError(f"{path} exists and is a directory: remove it, or name another")
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        rows = write(batches, fields, fresh, time)
        _sync_tree(fresh)
        fresh.replace(target)
        _sync(target.parent)
    except KvstoreError:
        raise
    except OSError as error:
        raise KvstoreError(f"{path}: {error.strerror or error}") from error
    finally:
        _remove(fresh)
    return rows


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
    from kvstore.export import csv, jsonl, npy, npz  # noqa: PLC0415  # as the others

    def write(batches: Iterable[Batch], fields: Sequence[Field], path: Path, time: str) -> int:
        with path.open("wb") as file:
            if suffix == "npz":
                return npz.write(batches, fields, file, time=time)
            if suffix == "npy":
                return npy.write(batches, fields, file)
            if suffix == "csv":
                return csv.write(batches, fields, file)
            return jsonl.write(batches, fields, file)

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


def _sync_tree(path: Path) -> None:
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))
    if not path.is_dir():
        _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
