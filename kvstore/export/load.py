"""Files back into batches: Parquet, Arrow, .npz and CSV, in bounded memory.

A file that kvstore exported brings its schema along (CSV does not); of any other it is
inferred, and the time field is the one named, or timestamps, timestamp or time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvstore.errors import KvstoreError
from kvstore.export.extras import needed_for
from kvstore.export.loaded import Loaded
from kvstore.schema import Schema

LOADABLE: Final = ("parquet", "arrow", "npz", "csv")


def load(path: Path, *, time: str = "", known: Schema | None = None) -> Loaded:
    """A file's schema and its rows.

    time: the time field. known: the schema that the rows are for, where there is one; only
    CSV, which has no types of its own, is read by it.
    """
    suffix = path.suffix[1:]
    if suffix not in LOADABLE:
        raise KvstoreError(f"{path}: cannot be imported; expected .{', .'.join(LOADABLE)}")
    try:
        if suffix == "csv":
            from kvstore.export import csv_load  # noqa: PLC0415  # as the others

            return csv_load.load(path, time, known)
        return _loader(suffix)(path, time)
    except KvstoreError:
        raise
    except OSError as error:
        raise KvstoreError(f"{path}: {error.strerror or error}") from error


def _loader(suffix: str) -> Callable[[Path, str], Loaded]:
    if suffix == "npz":
        from kvstore.export import npz_load  # noqa: PLC0415  # as the others

        return npz_load.load
    with needed_for(f".{suffix}"):
        from kvstore.export import arrow_load  # noqa: PLC0415  # loads pyarrow
    return arrow_load.load_parquet if suffix == "parquet" else arrow_load.load_arrow
