"""One field as a .npy file, through npz.py's spool: an array's length stands before its data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from kvstore.errors import SchemaError
from kvstore.export.npz import copy_array, spool_rows
from kvstore.schema import Batch, Field


def write(batches: Iterable[Batch], fields: Sequence[Field], file: BinaryIO) -> int:
    """Write all rows of the one field; returns how many."""
    if len(fields) != 1:
        names = ", ".join(field.name for field in fields)
        raise SchemaError(
            f".npy holds one array, and {len(fields)} fields were asked for ({names}): name one "
            "with --fields, or use .npz"
        )
    (field,) = fields
    rows, width = 0, 1
    with tempfile.TemporaryFile() as spool:
        for batch in batches:
            width = max(width, spool_rows(batch[field.name], field, spool))
            rows += len(batch[field.name])
        copy_array(field, spool, width, rows, file)
    return rows
