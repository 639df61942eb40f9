"""Batches as Arrow tables, a row's values as a list of fixed size, and back without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compare.packets import FIELDS, within

if TYPE_CHECKING:
    from kvstore.schema import Batch


def table(batch: Batch, *, fixed: bool = True) -> Any:
    """See a batch as an Arrow table; a row's values are a list of fixed or of variable size."""
    import pyarrow as pa  # noqa: PLC0415  # a peer's

    arrays, fields = [], []
    for name, (_, shape) in FIELDS.items():
        array, size = pa.array(batch[name].reshape(-1)), int(np.prod(shape))
        if shape and fixed:
            array = pa.FixedSizeListArray.from_arrays(array, size)
        elif shape:
            ends = pa.array(np.arange(0, len(array) + 1, size, dtype=np.int32))
            array = pa.ListArray.from_arrays(ends, array)
        arrays.append(array)
        fields.append(pa.field(name, array.type, nullable=False))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def batch_of(record: Any, fields: Sequence[str]) -> Batch:
    """See a record batch as arrays."""
    return {name: _values(record.column(name)).reshape(-1, *FIELDS[name][1]) for name in fields}


def _values(column: Any) -> Any:
    import pyarrow as pa  # noqa: PLC0415  # a peer's

    flat = column.flatten() if pa.types.is_nested(column.type) else column
    return flat.to_numpy(zero_copy_only=False)


def cut(batch: Batch, fields: Sequence[str], start: float, stop: float) -> Batch:
    """Keep rows in the range, and the fields asked for."""
    found = within(batch, batch["timestamps"], start, stop)
    return {name: found[name] for name in fields}


def with_times(fields: Sequence[str]) -> list[str]:
    """Name the fields, and the times that say where a range ends."""
    return list(dict.fromkeys([*fields, "timestamps"]))
