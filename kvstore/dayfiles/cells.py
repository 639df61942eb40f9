"""The cells of a chunk's columns: times to nanoseconds, values to numbers, each distinct one once.

Every column becomes codes into the list of its distinct cells; text is parsed there, some
hundred times a file instead of some ten thousand. Bare integers and numbers are epoch seconds,
as the exports have them; texts without an offset are UTC.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvstore.dayfiles.arrays import filled, plain, truths
from kvstore.dayfiles.readings import Codes, Floats, Ints
from kvstore.errors import TimeError
from kvstore.timestamps import MAX_NS, NS_PER_S, to_time

NO_TIME: Final = np.iinfo(np.int64).min
_NS_MAX: Final = MAX_NS - 9 * 86400 * NS_PER_S  # a day, and the 7 that it is held, fit
_INT64: Final[np.dtype[Any]] = np.dtype(np.int64)
_PLAIN: Final = r"^-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?$"  # what Arrow is sure to parse
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Cells(NamedTuple):
    """A column as codes into its distinct cells, a missing one among them."""

    codes: Codes
    distinct: pa.Array


def cells(column: pa.Array) -> Cells:
    """Any column of a batch; the file's own dictionary is used where it came as one."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    codes, distinct = filled(column.indices, len(column.dictionary)), column.dictionary
    if column.indices.null_count:
        distinct = pa.concat_arrays([distinct, pa.nulls(1, distinct.type)])
    if pa.types.is_binary(distinct.type) or pa.types.is_large_binary(distinct.type):
        distinct = distinct.cast(pa.string())  # some tools leave out that bytes are text
    return Cells(codes, distinct)


def times_ns(distinct: pa.Array) -> Ints:
    """Nanoseconds since 1970 of distinct times; NO_TIME where there is none, or none that fits."""
    kind = distinct.type
    if pa.types.is_integer(kind):
        seconds = filled(distinct.cast(pa.int64(), safe=False), NO_TIME)
        if pa.types.is_uint64(kind):  # what is too large came out negative
            seconds = np.where(seconds < 0, NO_TIME, seconds)
        bound = _NS_MAX // NS_PER_S
        fits = (seconds >= -bound) & (seconds <= bound)
        return np.where(fits, np.where(fits, seconds, 0) * NS_PER_S, NO_TIME)
    if pa.types.is_timestamp(kind):
        counts = filled(distinct.cast(pa.int64(), safe=False), NO_TIME)
        unit = {"s": NS_PER_S, "ms": 10**6, "us": 10**3, "ns": 1}[kind.unit]
        fits = (counts >= -(_NS_MAX // unit)) & (counts <= _NS_MAX // unit)
        return np.where(fits, np.where(fits, counts, 0) * unit, NO_TIME)
    if pa.types.is_floating(kind) or _is_text(kind):
        return np.array([_time_ns(cell) for cell in distinct.to_pylist()], np.int64)
    return np.full(len(distinct), NO_TIME)


def _time_ns(cell: float | str | None) -> int:
    try:
        ns = int(to_time(cell, _INT64, side="start")) if cell is not None else NO_TIME
    except TimeError:
        return NO_TIME
    return ns if -_NS_MAX <= ns <= _NS_MAX else NO_TIME


def numbers(distinct: pa.Array) -> Floats:
    """Distinct values as float64; NaN for what is no finite number. Never a negative zero."""
    if _is_text(distinct.type):
        found = _parsed(distinct)
    elif pa.types.is_boolean(distinct.type) or _is_number(distinct.type):
        found = plain(distinct.cast(pa.float64(), safe=False)).copy()
        found[truths(distinct.is_null())] = np.nan
    else:
        found = np.full(len(distinct), np.nan)
    found[~np.isfinite(found)] = np.nan
    return found + 0.0


def _parsed(distinct: pa.Array) -> Floats:
    """All that are plainly numbers at once; the rest, such as system states, one by one."""
    matches = pc.match_substring_regex(distinct, _PLAIN)
    is_plain = truths(matches)
    parsed = np.full(len(distinct), np.nan)
    parsed[is_plain] = plain(distinct.filter(matches).cast(pa.float64()))
    for row in np.flatnonzero(~is_plain).tolist():
        parsed[row] = number(distinct[row].as_py())
    return parsed


def number(text: str | None) -> float:
    """The number that a text is, or NaN; Python's float() also takes 1_000 and digits of Thai."""
    text = (text or "").strip()
    return float(text) if _NUMBER.fullmatch(text) else math.nan


def texts(distinct: pa.Array) -> Sequence[str | None]:
    """Distinct values as they would be printed; None for none."""
    plain = distinct.to_pylist()
    if _is_text(distinct.type):
        return plain  # type: ignore[no-any-return]
    return [None if cell is None or cell != cell else str(cell) for cell in plain]  # noqa: PLR0124


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )
