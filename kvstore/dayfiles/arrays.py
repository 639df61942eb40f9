"""Numpy arrays as Arrow's, without a copy and without pandas.

``pyarrow.array`` and what takes scalars import pandas where that is installed, if only to see that
an argument is no Series: 0.35 s of each process, as much as converting a million rows takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_TYPES: Final[dict[np.dtype[Any], pa.DataType]] = {
    np.dtype(np.int8): pa.int8(),
    np.dtype(np.int32): pa.int32(),
    np.dtype(np.int64): pa.int64(),
    np.dtype(np.float64): pa.float64(),
}


def arrow(values: npt.NDArray[Any], kind: pa.DataType | None = None) -> pa.Array:
    """The same values; they must not change any more. kind: if not that of the dtype."""
    values = np.ascontiguousarray(values)
    kind = kind or _TYPES[values.dtype]
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def arrow_with_nulls(values: npt.NDArray[Any], missing: npt.NDArray[np.bool_]) -> pa.Array:
    """The same values, but null where they are missing."""
    values = np.ascontiguousarray(values)
    there = np.packbits(~missing, bitorder="little")
    buffers = [pa.py_buffer(there), pa.py_buffer(values)]
    return pa.Array.from_buffers(_TYPES[values.dtype], len(values), buffers)


def arrow_texts(texts: Sequence[str]) -> pa.Array:
    """Texts, none of them null."""
    data = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = np.zeros(len(data) + 1, np.int32)
    np.cumsum([len(text) for text in data], out=ends[1:])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(data))]
    return pa.Array.from_buffers(pa.string(), len(data), buffers)


def plain(array: pa.Array) -> npt.NDArray[Any]:
    """An Arrow array of numbers as numpy's, without a copy. What is in place of nulls is anything.

    Its own ``to_numpy`` imports pandas, too.
    """
    dtype = array.type.to_pandas_dtype()
    data = array.buffers()[1]
    if data is None or not len(array):
        return np.empty(len(array), dtype)
    return np.frombuffer(data, dtype, len(array), array.offset * np.dtype(dtype).itemsize)


def truths(array: pa.Array) -> npt.NDArray[np.bool_]:
    """An Arrow array of bools as numpy's; a null is not true."""
    validity, data = array.buffers()
    found = _bits(data, array)
    return found & _bits(validity, array) if array.null_count else found


def _bits(data: pa.Buffer, array: pa.Array) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return bits[array.offset : array.offset + len(array)].astype(np.bool_)


def filled(array: pa.Array, fill: int) -> npt.NDArray[Any]:
    """An Arrow array of numbers as numpy's, its nulls filled."""
    values = plain(array)
    if array.null_count:
        values = values.copy()
        values[truths(array.is_null())] = fill
    return values
