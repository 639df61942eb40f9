"""CSV back into batches, some lines at a time.

A file is read twice where its types must be found out: once for them, once for the values.
A column is bool (True, False), int64, uint64, float64, datetime64[ns] (ISO 8601; naive is UTC)
or text, the first of these that all its values are; empty ones are NaN, NaT or the empty
text, and make an integer column a float one. Columns called ``grid_0_0, grid_0_1, …`` side by
side are one field with a per-row shape. A stream that exists already says the types instead.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore.errors import KvstoreError, SchemaError
from kvstore.export.csv import column_names
from kvstore.export.loaded import Loaded, schema_with_time
from kvstore.schema import Array, Batch, Field, Schema

_LINES: Final = 4096
_CELL_BYTES_MAX: Final = 64 << 20
_INDEXES: Final = re.compile(r"(_0)+$")
_ISO: Final = re.compile(
    r"(\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?)(?:Z|([+-]\d\d):?(\d\d))?"
)
_BOOLS: Final = {"True": True, "true": True, "False": False, "false": False}
_NS: Final[np.dtype[Any]] = np.dtype("<M8[ns]")
# The least type that holds two.
_WIDER: Final = {
    frozenset(("nat", "int")): "int",
    frozenset(("nat", "uint")): "uint",
    frozenset(("nat", "float")): "float",
    frozenset(("int", "float")): "float",
    frozenset(("uint", "float")): "float",
}
_DTYPES: Final = {
    "bool": "?", "nat": "<i8", "int": "<i8", "uint": "<u8",
    "float": "<f8", "time": "<M8[ns]", "text": "text",
}  # fmt: skip

Table = list[tuple[str, ...]]
"""Some lines, as columns of texts."""


def load(path: Path, time: str, known: Schema | None) -> Loaded:
    """A CSV file with a header line."""
    header = next(_lines(path, 1), [[]])[0]
    if len(set(header)) != len(header) or not header:
        raise SchemaError(f"{path}: expected a header line of different names, found {header}")
    if known is not None:
        return Loaded(known, _batches(path, header, known))
    kinds = _kinds(path, header)
    schema = schema_with_time(_fields(header, kinds), time, path)
    return Loaded(schema, _batches(path, header, schema))


def _lines(path: Path, count: int) -> Iterator[list[list[str]]]:
    """The lines, some at a time, the header among them."""
    csv.field_size_limit(_CELL_BYTES_MAX)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            while lines := list(islice(reader, count)):
                yield lines
        except (csv.Error, UnicodeDecodeError) as error:
            raise KvstoreError(
                f"{path}, line {reader.line_num}: {error}; expected CSV in UTF-8"
            ) from error


def _tables(path: Path, header: Sequence[str]) -> Iterator[Table]:
    first, row = 1, 0
    for lines in _lines(path, _LINES):
        for line in lines:
            row += 1
            if len(line) != len(header):
                raise SchemaError(
                    f"{path}, row {row}: {len(line)} values, expected the header's {len(header)}"
                )
        if lines[first:]:
            yield list(zip(*lines[first:], strict=True))
        first = 0


# ---- types ----


def _kinds(path: Path, header: Sequence[str]) -> list[str]:
    kinds: list[str] = [""] * len(header)
    empty = [False] * len(header)
    for table in _tables(path, header):
        for number, texts in enumerate(table):
            there = [text for text in texts if text]
            empty[number] |= len(there) < len(texts)
            if there and kinds[number] != "text":
                kinds[number] = _joint(kinds[number], _kind(there))
    return [
        _with_empty(kind) if gap else kind or "text" for kind, gap in zip(kinds, empty, strict=True)
    ]


def _with_empty(kind: str) -> str:
    return {"nat": "float", "int": "float", "uint": "float", "bool": "text"}.get(
        kind, kind or "text"
    )


def _joint(before: str, found: str) -> str:
    if before in ("", found):
        return found
    return _WIDER.get(frozenset((before, found)), "text")


def _kind(texts: Sequence[str]) -> str:
    if all(text in _BOOLS for text in texts):
        return "bool"
    numbers = _tried(int, texts)
    if numbers is not None:
        low, high = min(numbers), max(numbers)
        if low >= -(2**63) and high < 2**63:
            return "nat" if low >= 0 else "int"
        return "uint" if low >= 0 and high < 2**64 else "text"
    if _tried(float, texts) is not None:
        return "float"
    return "text" if _tried(_iso, texts) is None else "time"


def _tried(convert: Callable[[str], Any], texts: Sequence[str]) -> list[Any] | None:
    try:
        return [convert(text) for text in texts]
    except (ValueError, OverflowError):
        return None


def _iso(text: str) -> None:
    if text != "NaT" and not _ISO.fullmatch(text):
        raise ValueError(text)
    _datetime(text, _NS)


def _fields(header: Sequence[str], kinds: Sequence[str]) -> list[Field]:
    fields, place = [], 0
    while place < len(header):
        field = _shaped(header, kinds, place) or Field(header[place], _DTYPES[kinds[place]])
        fields.append(field)
        place += len(column_names(field))
    return fields


def _shaped(header: Sequence[str], kinds: Sequence[str], place: int) -> Field | None:
    """The field of several columns that begins here, if there is one."""
    match = _INDEXES.search(header[place])
    if match is None or not match.start():
        return None
    name, axes = header[place][: match.start()], len(match[0]) // 2
    pattern = re.compile(re.escape(name) + r"_(\d+)" * axes)
    indexes = []
    for column in header[place:]:
        if not (found := pattern.fullmatch(column)):
            break
        indexes.append(tuple(map(int, found.groups())))
    shape = tuple(n + 1 for n in indexes[-1])
    kind = ""
    for each in kinds[place : place + len(indexes)]:
        kind = _joint(kind, each)
    whole = len(indexes) > 1 and indexes == list(np.ndindex(shape))
    return Field(name, _DTYPES[kind], shape) if whole else None


# ---- values ----


def _batches(path: Path, header: Sequence[str], schema: Schema) -> Iterator[Batch]:
    place = {name: number for number, name in enumerate(header)}
    wanted = {field.name: column_names(field) for field in schema.fields}
    if set(place) != {name for names in wanted.values() for name in names}:
        raise SchemaError(
            f"{path}: columns {', '.join(header)}; expected those of the fields "
            f"{', '.join(schema.names)}"
        )
    for table in _tables(path, header):
        yield {field.name: _column(table, place, field, path) for field in schema.fields}


def _column(table: Table, place: Mapping[str, int], field: Field, path: Path) -> Array:
    columns = [_values(table[place[name]], field, path) for name in column_names(field)]
    rows = len(table[0])
    if not columns:
        return np.empty((rows, *field.shape), field.np_dtype)
    return np.stack(columns, axis=-1).reshape(rows, *field.shape)


def _values(texts: Sequence[str], field: Field, path: Path) -> Array:
    if field.is_text:
        values = np.empty(len(texts), object)
        values[:] = texts
        return values
    try:
        return np.array([_value(text, field.np_dtype) for text in texts], field.np_dtype)
    except (ValueError, OverflowError, KeyError) as error:
        raise SchemaError(
            f"{path}: field {field.name!r}: not all values are {field.np_dtype}: {error}"
        ) from error


def _value(text: str, dtype: np.dtype[Any]) -> Any:
    kind = dtype.kind
    if kind == "b":
        return _BOOLS[text]
    if kind in "iu":
        return int(text)
    if kind == "M":
        return _datetime(text, dtype)
    if kind == "m":
        return np.timedelta64(int(text.partition(" ")[0]) if text not in ("", "NaT") else "NaT")
    number = complex if kind == "c" else float
    return number(text) if text else number("nan")


def _datetime(text: str, dtype: np.dtype[Any]) -> Any:
    """ISO 8601 in a field's unit; ValueError where that would round or overflow."""
    if text in ("", "NaT"):
        return np.datetime64("NaT")
    match = _ISO.fullmatch(text)
    bare = match[1] if match else text  # years and months, too
    given = np.datetime64(bare)
    if str(given)[:7] != bare[:7]:  # numpy wraps far times with many digits, and knows "now"
        raise ValueError(f"{text} is no date, or too far for its digits")
    if match and match[2]:
        minutes = int(match[2]) * 60 + int(match[2][0] + match[3])
        given = given - np.timedelta64(minutes, "m")
    value = given.astype(dtype)
    if value.astype(given.dtype) != given:
        raise ValueError(f"{text} has no exact {dtype}")
    return value
