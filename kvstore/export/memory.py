"""All rows of a read as one array a field: for targets that live in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kvstore.export.chunks import joined
from kvstore.schema import Array, Batch, Field


def columns(batches: Iterable[Batch], fields: Sequence[Field], time: str) -> dict[str, Array]:
    """Arrays by field name; an int64 time as datetime64[ns]."""
    empty = {field.name: np.empty((0, *field.shape), field.np_dtype) for field in fields}
    found = joined(list(batches) or [empty])
    if time in found and found[time].dtype.kind == "i":
        found[time] = found[time].view("<M8[ns]")
    return found
