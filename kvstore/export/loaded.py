"""What every kind of file becomes on its way in, and the bounds that all of them keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from kvstore.errors import SchemaError
from kvstore.schema import TIME_NAMES, Batch, Field, Schema

_BATCH_BYTES: Final = 8 << 20
_BATCH_ROWS_MAX: Final = 1 << 16


class Loaded(NamedTuple):
    """A file's rows. batches: open the file when the first is asked for."""

    schema: Schema
    batches: Iterator[Batch]


def schema_with_time(fields: Sequence[Field], time: str, where: object) -> Schema:
    """The schema with the time that was named, or else the one of the usual name."""
    names = [field.name for field in fields]
    if time in names or (not time and not set(TIME_NAMES).isdisjoint(names)):
        return Schema(tuple(fields), time)
    wanted = f"no field {time!r}" if time else f"none of {', '.join(TIME_NAMES)}"
    raise SchemaError(
        f"{where}: {wanted} among its fields ({', '.join(names)}); name the time field with "
        "--time-field"
    )


def batch_rows(schema: Schema) -> int:
    """How many rows to take at once."""
    return max(1, min(_BATCH_ROWS_MAX, _BATCH_BYTES // max(1, schema.row_bytes)))
