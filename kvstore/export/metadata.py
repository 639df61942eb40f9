"""A selection's schema as text that travels in a file, so that an import restores it exactly.

    {"version": 1, "time": "timestamps", "fields": [Field.to_record(), …]}

In Parquet and Arrow it is the schema's metadata under ``kvstore``, in .npz the archive's comment.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvstore.errors import SchemaError
from kvstore.schema import Field

_VERSION: Final = 1
KEY: Final = b"kvstore"


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
