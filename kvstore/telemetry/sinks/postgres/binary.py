"""Readings as PostgreSQL's binary COPY, built by column in bulk. Pure: numpy in, bytes out.

    row     field count (int16), then per field: length (int32, -1 for NULL), bytes; big-endian
    ours    count | one record of all numbers, their lengths among them | device_id | texts …

A row is one record of fixed width (numpy writes those of a whole piece at once) and one bytes
object a text, looked up by its text: devices and versions repeat. Rows that lack a number have a
shorter record: one record type for each set of nulls that occurs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import SinkError
from kvstore.telemetry.contract import DEVICE
from kvstore.telemetry.records import Readings

Rows: TypeAlias = NDArray[np.intp]

EPOCH_US: Final = 946_684_800_000_000  # 2000-01-01, where PostgreSQL's times begin
# Where timestamptz begins: 4714-11-24 BC. It ends in 294276 AD, behind the last of int64.
TS_US_MIN: Final = -210_866_803_200_000_000
TEXT_BYTES_MAX: Final = 2**30 - 1  # of one value: PostgreSQL's own limit

# Rows a piece: some 500 kB. Large enough for numpy, small enough that the server works on one
# while the next is made.
PIECE_ROWS: Final = 4096

HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER: Final = b"\xff\xff"
_NULL: Final = b"\xff\xff\xff\xff"
_JSONB_VERSION: Final = b"\x01"

# Extras that jsonb might not give back letter for letter: exponents, negative zeros, escapes,
# digits that are rounded or dropped, blanks. Rather too many than one too few.
_INEXACT: Final = re.compile(r"\d[eE]|-0|\\|0\.0000|[\d.]{17}|\.\d+0(?!\d)|[:,]\s")
# Extras that jsonb refuses: U+0000, halves of surrogate pairs, numbers out of all proportion.
_REFUSED: Final = re.compile(r"\\u0000|\\u[dD][89a-fA-F]|[eE][+-]?\d{3}|\d{500}")


class Numbers(NamedTuple):
    """A column of fixed width: big-endian type, values, and where it is null, if anywhere."""

    name: str
    dtype: str
    values: NDArray[Any]
    nulls: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Columns ready to be sent: ``columns`` in the order in which ``pieces`` has them."""

    numbers: tuple[Numbers, ...]
    texts: tuple[tuple[str, list[bytes]], ...]

    @property
    def columns(self) -> list[str]:
        """Names for the column list of COPY."""
        return [*(column.name for column in self.numbers), *(name for name, _ in self.texts)]

    def pieces(self, rows: Rows) -> Iterator[bytes]:
        """These rows, in this order, as one COPY."""
        yield HEADER
        for start in range(0, len(rows), PIECE_ROWS):
            yield self._piece(rows[start : start + PIECE_ROWS])
        yield TRAILER

    def _piece(self, rows: Rows) -> bytes:
        width = 1 + len(self.texts)
        parts: list[bytes] = [b""] * (len(rows) * width)
        parts[::width] = self._records(rows)
        at = rows.tolist()
        for number, (_, texts) in enumerate(self.texts, 1):
            parts[number::width] = [texts[i] for i in at]
        return b"".join(parts)

    def _records(self, rows: Rows) -> list[bytes]:
        pattern = np.zeros(len(rows), np.int64)
        nullable = [column for column in self.numbers if column.nulls is not None]
        for bit, column in enumerate(nullable):
            assert column.nulls is not None
            pattern |= column.nulls[rows].astype(np.int64) << bit
        patterns = np.unique(pattern)
        if len(patterns) == 1:
            return self._alike(rows, self._lacking(nullable, int(patterns[0])))
        records = np.empty(len(rows), object)
        for code in patterns.tolist():
            of_it = pattern == code
            records[of_it] = self._alike(rows[of_it], self._lacking(nullable, code))
        found: list[bytes] = records.tolist()
        return found

    @staticmethod
    def _lacking(nullable: Sequence[Numbers], code: int) -> frozenset[str]:
        return frozenset(c.name for bit, c in enumerate(nullable) if code >> bit & 1)

    def _alike(self, rows: Rows, lacking: frozenset[str]) -> list[bytes]:
        """The records of rows that lack the same numbers."""
        fields = [("count", ">i2")]
        for number, column in enumerate(self.numbers):
            fields.append((f"length{number}", ">i4"))
            if column.name not in lacking:
                fields.append((f"value{number}", column.dtype))
        records = np.empty(len(rows), fields)
        records["count"] = len(self.numbers) + len(self.texts)
        for number, column in enumerate(self.numbers):
            there = column.name not in lacking
            records[f"length{number}"] = np.dtype(column.dtype).itemsize if there else -1
            if there:
                records[f"value{number}"] = column.values[rows]
        found: list[bytes] = records.view(f"V{records.dtype.itemsize}").tolist()
        return found


def encoded(readings: Readings, lineage: NDArray[np.int32]) -> Encoded:
    """All columns of the readings. lineage: number of each one's row in ``lineages``.

    Raises SinkError where PostgreSQL cannot hold a value, and names the reading.
    """
    _check_times(readings)
    numbers = [
        Numbers("ts", ">i8", readings.ts_us - EPOCH_US),
        Numbers("_ingested_at", ">i8", readings.lineage.ingested_us - EPOCH_US),
        Numbers("_offset", ">i8", readings.lineage.offset),
        Numbers("_lineage", ">i4", lineage),
    ]
    texts = [(DEVICE, _texts(readings, DEVICE, readings.device_id))]
    for name, column in readings.values.items():
        if isinstance(column, np.ndarray):
            nulls = np.isnan(column)
            # 0.0 is added since -0.0 and 0.0 are one value
            numbers.append(Numbers(name, ">f8", column + 0.0, nulls if nulls.any() else None))
        else:
            texts.append((name, _texts(readings, name, column)))
    return Encoded(tuple(numbers), (*texts, *_extras(readings)))


def numbered(columns: Encoded, count: int) -> Encoded:
    """The same with each reading's own number, to tell them apart again."""
    numbers = (Numbers("_row", ">i4", np.arange(count, dtype=np.int32)), *columns.numbers)
    return Encoded(numbers, columns.texts)


def _check_times(readings: Readings) -> None:
    before = np.flatnonzero(readings.ts_us < TS_US_MIN)
    if len(before):
        raise SinkError(
            f"{_where(readings, int(before[0]))}: its time, {readings.ts_us[before[0]]} µs from "
            "1970, lies before 4714 BC, where PostgreSQL's times begin; limit the age of events"
        )


def _texts(readings: Readings, name: str, column: Sequence[str | None]) -> list[bytes]:
    """Each text with its length before it; a text that repeats is made once."""

    def made(text: str | None) -> bytes:
        return _NULL if text is None else _prefixed(_utf8(readings, name, column, text))

    return _by_value(column, made)


def _extras(readings: Readings) -> Iterator[tuple[str, list[bytes]]]:
    """The two columns of extras, where there are any."""
    if not any(readings.extras):
        return

    def queried(text: str | None) -> bytes:
        if text is None or _REFUSED.search(text):
            return _NULL
        return _prefixed(_JSONB_VERSION + _utf8(readings, "extras", readings.extras, text))

    def exact(text: str | None) -> bytes:
        if text is None or not _INEXACT.search(text):
            return _NULL
        return _prefixed(_utf8(readings, "extras", readings.extras, text))

    yield "extras", _by_value(readings.extras, queried)
    yield "_extras_text", _by_value(readings.extras, exact)


def _by_value(column: Sequence[str | None], made: Callable[[str | None], bytes]) -> list[bytes]:
    table = {text: made(text) for text in set(column)}
    return list(map(table.__getitem__, column))


def _prefixed(content: bytes) -> bytes:
    return struct.pack(">i", len(content)) + content


def _utf8(readings: Readings, name: str, column: Sequence[str | None], text: str) -> bytes:
    try:
        content = text.encode()
    except UnicodeEncodeError:
        content = b"\0"
    if b"\0" in content or len(content) > TEXT_BYTES_MAX:
        raise SinkError(
            f"{_where(readings, column.index(text))}: its {name} cannot be held by PostgreSQL: "
            "U+0000, half of a surrogate pair, or 1 GB and more; reject such texts by the contract"
        )
    return content


def _where(readings: Readings, i: int) -> str:
    lineage = readings.lineage
    return f"event {lineage.offset[i]} of {lineage.source[i]}, partition {lineage.partition[i]}"
