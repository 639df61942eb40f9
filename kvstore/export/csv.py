"""Rows as CSV, one line each, and back: for spreadsheets and small selections.

A field with a per-row shape becomes one column a value: ``spectral_0_15``. Times are written
as they are stored: float64 seconds in their shortest exact decimal, int64 ns as integers,
datetime64 as ISO 8601. NaN is ``nan``. Numbers stand bare, text and dates in quotes (a lone
carriage return inside a bare text would end its line); None is the empty text. Text is written
as it is: a spreadsheet takes ``=1+1`` for a formula, so import such columns as text there.

Back: a file is read twice where its types must be found out, once for them, once for the values.
A column is bool (True, False), int64, uint64, float64, datetime64[ns] (ISO 8601; naive is UTC)
or text, the first of these that all its values are; empty ones are NaN, NaT or the empty
text, and make an integer column a float one. Columns called ``grid_0_0, grid_0_1, …`` side by
side are one field with a per-row shape. A stream that exists already says the types instead.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np

from kvstore.errors import KvstoreError, SchemaError
from kvstore.export.metadata import Loaded, Progress
from kvstore.schema import Array, Batch, Field

_CELLS: Final = 1 << 17  # read at once: 50 bytes each, and more where they are text
_CELL_CHARACTERS_MAX: Final = 64 << 20
_INDEXES: Final = re.compile(r"(_0)+$")
_ISO: Final = re.compile(
    r"(\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?)(?:Z|([+-]\d\d):?(\d\d))?"
)
_NO_NUMBER: Final = re.compile(r"[^\x00-\x7f]|_")  # though Python takes 1_000 and ٣ for numbers
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

_UNITS: Final[dict[str, Any]] = {
    "years": "Y", "months": "M", "weeks": "W", "days": "D", "hours": "h", "minutes": "m",
    "seconds": "s", "milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns",
    "picoseconds": "ps", "femtoseconds": "fs", "attoseconds": "as",
}  # fmt: skip  # numpy's words

Lines = list[list[str]]


# ---- out ----


def write(batches: Iterable[Batch], fields: Sequence[Field], file: BinaryIO) -> int:
    """Write a header line and all rows; returns how many."""
    header = [name for field in fields for name in column_names(field)]
    if len(set(header)) != len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise SchemaError(
            f"the columns {', '.join(twice)} would stand twice in CSV: leave a field out (--fields)"
        )
    file.write(_text([header], csv.QUOTE_MINIMAL))
    rows = 0
    for batch in batches:
        flat = [_values(batch[field.name]) for field in fields]
        lines = map(list, map(chain.from_iterable, zip(*flat, strict=True)))
        file.write(_text(lines, csv.QUOTE_NONNUMERIC))
        rows += len(flat[0])
    return rows


def column_names(field: Field) -> list[str]:
    """Names of the columns that a field becomes."""
    return ["_".join([field.name, *map(str, index)]) for index in np.ndindex(field.shape)]


def _text(lines: Iterable[list[Any]], quoting: Literal[0, 2]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", quoting=quoting).writerows(lines)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _values(array: Array) -> list[list[Any]]:
    """The values of each row, as Python objects that csv prints exactly."""
    flat = printed(array.reshape(len(array), math.prod(array.shape[1:])))
    rows: list[list[Any]] = flat.tolist()
    return rows


def printed(array: Array) -> Array:
    """Values as text has them: times as numpy prints them, short floats by their own digits."""
    if array.dtype.kind in "mM":  # not astype(str): it cuts off what is longer than usual
        _check_printable(array)
        texts = np.empty(array.shape, object)
        texts.reshape(-1)[:] = list(map(str, array.flat))
        return texts
    if array.dtype.kind == "f" and array.dtype.itemsize < 8:  # noqa: PLR2004
        return array.astype(str).astype(float)  # 0.1, not 0.10000000149011612
    return array


def _check_printable(array: Array) -> None:
    """Counts of a unit such as 10 ms: numpy prints what overflows as ms as another time."""
    unit, multiple = np.datetime_data(array.dtype)
    if multiple > 1 and not _counts_as(array, np.dtype(f"{array.dtype.kind}8[{unit}]")):
        raise SchemaError(
            f"{array.dtype} holds times that {unit} cannot count, and so cannot be printed: "
            "leave the field out (--fields) or use parquet"
        )


def _counts_as(array: Array, dtype: np.dtype[Any]) -> bool:
    try:
        plain = array.astype(dtype)
    except OverflowError:  # before numpy 2.5 it wrapped
        return False
    return np.array_equal(plain.astype(array.dtype), array, equal_nan=True)


# ---- in ----


def load(path: Path, known: Sequence[Field] | None, progress: Progress) -> Loaded:
    """A CSV file with a header line. known: the fields, where a stream says them."""
    header = next(_lines(path, 1, lambda _: None), [[]])[0]
    if len(set(header)) != len(header) or not header:
        raise SchemaError(f"{path}: expected a header line of different names, found {header}")
    if known is not None:
        return Loaded(tuple(known), "", _batches(path, header, known, progress))
    fields = _fields(header, _kinds(path, header, lambda part: progress(part / 2)))
    batches = _batches(path, header, fields, lambda part: progress(0.5 + part / 2))
    return Loaded(tuple(fields), "", batches)


def _lines(path: Path, count: int, progress: Progress) -> Iterator[Lines]:
    """The lines, so many at a time, the header among them; blank ones are passed over."""
    csv.field_size_limit(_CELL_CHARACTERS_MAX)
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        file = io.TextIOWrapper(raw, "utf-8-sig", "surrogatepass", newline="")
        reader = csv.reader(file)
        try:
            while lines := list(islice(filter(None, reader), count)):
                yield lines
                progress(raw.tell() / max(1, size))
        except (csv.Error, UnicodeDecodeError) as error:
            raise KvstoreError(
                f"{path}, line {reader.line_num}: {error}; expected CSV in UTF-8"
            ) from error


def _tables(path: Path, header: Sequence[str], progress: Progress) -> Iterator[Lines]:
    """The lines behind the header, each as long as it."""
    first, row = 1, 0
    for lines in _lines(path, max(2, _CELLS // len(header)), progress):
        for line in lines:
            row += 1
            if len(line) != len(header):
                raise SchemaError(
                    f"{path}, row {row}: {len(line)} values, expected the header's {len(header)}"
                )
        if lines[first:]:
            yield lines[first:]
        first = 0


# ---- types ----


def _kinds(path: Path, header: Sequence[str], progress: Progress) -> list[str]:
    kinds: list[str] = [""] * len(header)
    empty = [False] * len(header)
    for lines in _tables(path, header, progress):
        for number, texts in enumerate(zip(*lines, strict=True)):
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
    if _NO_NUMBER.search("\n".join(texts)):
        return "text"
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
        return list(map(convert, texts))
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


def _batches(
    path: Path, header: Sequence[str], fields: Sequence[Field], progress: Progress
) -> Iterator[Batch]:
    place = {name: number for number, name in enumerate(header)}
    wanted = {field.name: column_names(field) for field in fields}
    if set(place) != {name for names in wanted.values() for name in names}:
        raise SchemaError(
            f"{path}: columns {', '.join(header)}; expected those of the fields {', '.join(wanted)}"
        )
    places = {name: [place[column] for column in columns] for name, columns in wanted.items()}
    for lines in _tables(path, header, progress):
        yield {field.name: _column(lines, places[field.name], field, path) for field in fields}


def _column(lines: Lines, places: Sequence[int], field: Field, path: Path) -> Array:
    """A field's values, from its columns in these places."""
    if len(places) == 1:
        texts = list(map(itemgetter(*places), lines))
    else:
        texts = list(chain.from_iterable(map(itemgetter(*places), lines))) if places else []
    if field.np_dtype.kind in "fc" and "" in texts:
        texts = [text or "nan" for text in texts]
    values = np.empty(len(texts), field.np_dtype)
    try:
        values[:] = texts if field.is_text else list(map(_parser(field.np_dtype), texts))
    except (ValueError, OverflowError, KeyError) as error:
        raise SchemaError(
            f"{path}: field {field.name!r}: not all values are {field.np_dtype}: {error}"
        ) from error
    return values.reshape(len(lines), *field.shape)


def _parser(dtype: np.dtype[Any]) -> Callable[[str], Any]:
    """From a value's text to Python's or numpy's own value of that dtype."""
    if dtype.kind == "b":
        return _BOOLS.__getitem__
    if dtype.kind in "iu":
        return int
    if dtype.kind == "M":
        return lambda text: _datetime(text, dtype)
    if dtype.kind == "m":
        return lambda text: _timedelta(text, dtype)
    return complex if dtype.kind == "c" else float


def _timedelta(text: str, dtype: np.dtype[Any]) -> Any:
    """As numpy prints one, such as ``5 milliseconds``; a bare number counts the field's unit."""
    if text in ("", "NaT"):
        return np.array("NaT", dtype)[()]
    count, _, word = text.partition(" ")
    if not word:
        return np.array(int(count)).astype(dtype)[()]
    given = np.timedelta64(int(count), _UNITS[word])
    value = given.astype(dtype)
    if value.astype(given.dtype) != given:
        raise ValueError(f"{text} has no exact {dtype}")
    return value


def _datetime(text: str, dtype: np.dtype[Any]) -> Any:
    """ISO 8601 in a field's unit; ValueError where that would round or overflow."""
    if text in ("", "NaT"):
        return np.array("NaT", dtype)[()]
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
