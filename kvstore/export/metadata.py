"""What a file says of its rows: the schema that travels in it, and what an import makes of it.

    {"version": 1, "time": "timestamps", "fields": [Field.to_record(), …]}

In Parquet and Arrow this text is the schema's metadata under ``kvstore``, in .npz the archive's
comment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from kvstore.errors import SchemaError
from kvstore.schema import Batch, Field

_VERSION: Final = 1
KEY: Final = b"kvstore"
_BATCH_BYTES: Final = 8 << 20
_BATCH_ROWS_MAX: Final = 1 << 16

Progress = Callable[[float], None]
"""Called with the part of a file that was read, 0 to 1."""


class Loaded(NamedTuple):
    """A file's fields and rows. time: empty where the file does not say.

    batches: open the file when the first is asked for.
    """

    fields: tuple[Field, ...]
    time: str
    batches: Iterator[Batch]


class Described(NamedTuple):
    """What a file says of its own columns. time: empty where it was not exported."""

    fields: dict[str, Field]
    time: str


def describe(fields: Sequence[Field], time: str) -> bytes:
    """The text for these fields, one of which may be the time."""
    kept = time if time in [field.name for field in fields] else ""
    records = [field.to_record() for field in fields]
    return json.dumps({"version": _VERSION, "time": kept, "fields": records}).encode()


def described(text: bytes | None) -> Described:
    """The inverse; nothing where there is no text, or that of a later version."""
    if not text:
        return Described({}, "")
    try:
        found = json.loads(text)
        if found["version"] != _VERSION:
            return Described({}, "")
        fields = [Field.from_record(record) for record in found["fields"]]
        return Described({field.name: field for field in fields}, str(found["time"]))
    except (ValueError, TypeError, KeyError) as error:
        raise SchemaError(
            f"kvstore's metadata in the file cannot be read ({error}): expected what kvstore "
            "export writes; export it again, or write the file without the key 'kvstore'"
        ) from error


def batch_rows(fields: Sequence[Field]) -> int:
    """How many rows to take from a file at once."""
    row_bytes = sum(field.row_bytes for field in fields)
    return max(1, min(_BATCH_ROWS_MAX, _BATCH_BYTES // max(1, row_bytes)))
