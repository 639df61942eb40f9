"""What a row is: fields, schemas, and batches that fit them. Pure: no files, no clocks.

A schema is an ordered tuple of fields, one of which is the time. Fields are only ever
*appended* to a stream's schema, never changed, removed or reordered: so a field's number
in the file is its position, and a stored batch's number of blocks says which fields it has.

Numbers are kept little-endian in the dtype they are declared with. Text fields are object
arrays of ``str`` or None. Arrays that leave ``Schema.columns`` may still share memory with
the caller's: who keeps them must copy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import numpy as np

from kvstore.errors import NoFillError, SchemaError
from kvstore.lossless import as_array, converted
from kvstore.timestamps import check_times

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray  # 5 ms that `import kvstore` saves

Array: TypeAlias = "NDArray[Any]"
Batch: TypeAlias = "dict[str, NDArray[Any]]"
"""Rows: field name -> array whose first axis is the row."""
BatchLike: TypeAlias = "Mapping[str, ArrayLike]"

FIELDS_MAX: Final = 1000  # bounds an index record: about 20 bytes a field
NAME_BYTES_MAX: Final = 255
DESCRIPTION_BYTES_MAX: Final = 4096  # of unit and description: every new segment carries them
ROW_BYTES_MAX: Final = 256 << 20  # a row is never cut: bounds one block and one packet alike
TIME_NAMES: Final = ("timestamps", "timestamp", "time")
"""Tried in this order where the time field is not named."""

_TEXT = np.dtype(object)
_TEXT_TYPES: Final = frozenset({str, type(None)})
_KINDS = "biufcmM"


class _NoFill(Enum):
    """Stands for a fill that was not declared; an enum's member stays itself when pickled."""

    NO_FILL = "no fill"


_NO_FILL: Final = _NoFill.NO_FILL


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a stream.

    dtype: any bool, integer, float (16, 32, 64), complex, datetime64 or timedelta64 dtype,
    or ``"text"`` (str or None). shape: of one row's value, ``()`` for a scalar. fill: what
    stands for this field in batches stored before it was added, one value for a whole row;
    without one, floats give NaN, times NaT and text None, while integers and bools have no
    honest fill.
    """

    name: str
    dtype: DTypeLike
    shape: tuple[int, ...] = ()
    unit: str = ""
    description: str = ""
    fill: Any = _NO_FILL

    def __post_init__(self) -> None:
        check_name(self.name, "field")
        object.__setattr__(self, "dtype", _canonical(self.dtype, self.name))
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if any(n < 0 for n in self.shape):
            raise SchemaError(f"field {self.name!r}: shape {self.shape} has a negative length")
        if self.row_bytes > ROW_BYTES_MAX:
            raise SchemaError(
                f"field {self.name!r}: a row of {self.row_bytes} bytes is over the limit of "
                f"{ROW_BYTES_MAX}; split it into several fields or rows"
            )
        _check_text(self.unit, f"unit of field {self.name!r}")
        _check_text(self.description, f"description of field {self.name!r}")
        if self.fill is not _NO_FILL:
            object.__setattr__(self, "fill", _canonical_fill(self))

    @property
    def np_dtype(self) -> np.dtype[Any]:
        """The dtype of arrays of this field; object for text."""
        return self.dtype  # type: ignore[return-value]  # made canonical in __post_init__

    @property
    def is_text(self) -> bool:
        """Whether values are str or None."""
        return self.np_dtype == _TEXT

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed; text counts its references."""
        return self.np_dtype.itemsize * math.prod(self.shape)

    def filled(self, rows: int) -> Array:
        """Rows of the fill value; NoFillError where none would be honest."""
        if self.fill is not _NO_FILL:
            value = self.fill
        elif self.np_dtype.kind in "fc":
            value = np.nan
        elif self.np_dtype.kind in "mM":
            value = "NaT"
        elif self.is_text:
            value = None
        else:
            raise NoFillError(
                f"field {self.name!r} ({self.np_dtype}) was added later, and batches stored "
                "before lack it: declare Field(…, fill=…) when adding it, or leave the field "
                "or the earlier range out of the read"
            )
        return np.full((rows, *self.shape), value, dtype=self.np_dtype)

    def to_record(self) -> list[Any]:
        """Plain values for msgpack, in the order of docs/format.md."""
        dtype = "text" if self.is_text else self.np_dtype.str
        record = [self.name, dtype, list(self.shape), self.unit, self.description]
        if self.fill is _NO_FILL:
            return record
        if self.is_text:
            return [*record, self.fill]
        plain = self.fill.view("i8").item() if self.np_dtype.kind in "mM" else self.fill.item()
        if isinstance(plain, complex):
            plain = [plain.real, plain.imag]
        return [*record, plain]

    @classmethod
    def from_record(cls, record: Sequence[Any]) -> Field:
        """The inverse of to_record."""
        name, dtype, shape, unit, description, *fill = record
        if not fill:
            return _shared_field(name, dtype, tuple(shape), unit, description)
        value = fill[0]
        if dtype != "text" and np.dtype(dtype).kind in "mM":
            value = np.array(value, "i8").view(dtype)[()]
        elif isinstance(value, list):
            value = complex(*value)
        return cls(name, dtype, tuple(shape), unit, description, value)


# One object for all that are equal: a thousand streams may well have the same fields. Without
# fills only: of those, 0.0 and -0.0 would be taken for the same.
_SHARED_MAX: Final = 1024  # fields: with the longest descriptions 8 MB
_SHARED_SCHEMAS_MAX: Final = 128  # of 1,000 fields, 25 MB
_shared_field = lru_cache(_SHARED_MAX, typed=True)(Field)


def check_name(name: str, what: str) -> None:
    """Names of fields, streams and marks: printable, 1 to 255 bytes of UTF-8."""
    fits = isinstance(name, str) and name.isprintable() and name.strip() == name
    if not fits or not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
        raise SchemaError(
            f"{what} name {name!r}: use 1 to {NAME_BYTES_MAX} bytes of printable text "
            "without blanks at its ends"
        )


def _check_text(text: str, what: str) -> None:
    try:
        fits = isinstance(text, str) and len(text.encode()) <= DESCRIPTION_BYTES_MAX
    except UnicodeEncodeError:  # a lone surrogate
        fits = False
    if not fits:
        raise SchemaError(f"{what}: use text of at most {DESCRIPTION_BYTES_MAX} bytes of UTF-8")


def _canonical_fill(field: Field) -> Any:
    """The fill in the field's own dtype; one that is the default anyway counts as none."""
    value = field.fill
    if field.is_text:
        if value is None:
            return _NO_FILL
        _check_text(value, f"fill of field {field.name!r}")
        return value
    column = _column(field, value, one_row=False)
    if column.shape != ():
        raise SchemaError(
            f"field {field.name!r}: a fill of shape {column.shape}, expected one scalar"
        )
    return _NO_FILL if field.np_dtype.kind in "fcmM" and np.isnan(column) else column[()]


def _canonical(dtype: DTypeLike, name: str) -> np.dtype[Any]:
    if dtype in ("text", str):
        return _TEXT
    try:
        given = np.dtype(dtype)
    except TypeError as error:
        raise SchemaError(f"field {name!r}: {dtype!r} is no numpy dtype") from error
    if given.kind in "UTO":
        return _TEXT
    if given.kind not in _KINDS or given.itemsize > 16 or given.char in "gG":  # noqa: PLR2004
        raise SchemaError(
            f"field {name!r}: dtype {given} cannot be stored; use bool, integer, float16 to "
            "float64, complex, datetime64, timedelta64 or text"
        )
    if given.kind in "mM" and np.datetime_data(cast("Any", given))[0] == "generic":
        raise SchemaError(f"field {name!r}: dtype {given} has no unit; use for example '<M8[ns]'")
    return given.newbyteorder("<")


@dataclass(frozen=True, slots=True)
class Schema:
    """The fields of a stream, in order, and which of them is the time.

    The time field is a scalar of float64 (seconds since 1970, UTC), int64 (nanoseconds) or
    datetime64 in s, ms, us or ns.
    """

    fields: tuple[Field, ...]
    time: str = ""
    # What arrays must be to be taken as they are; empty where there is text, which never is.
    _exact: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        names = self.names
        if len(set(names)) != len(names) or not 1 <= len(names) <= FIELDS_MAX:
            raise SchemaError(f"a schema has 1 to {FIELDS_MAX} fields of different names: {names}")
        if not self.time:
            object.__setattr__(self, "time", _guess_time(names))
        if self.time not in names:
            raise SchemaError(f"the time field {self.time!r} is not among the fields {names}")
        _check_time_field(self.time_field)
        exact = tuple((each.name, each.np_dtype, each.shape) for each in self.fields)
        has_text = any(each.is_text for each in self.fields)
        object.__setattr__(self, "_exact", () if has_text else exact)

    @property
    def names(self) -> tuple[str, ...]:
        """The fields' names in order."""
        return tuple(field.name for field in self.fields)

    @property
    def time_field(self) -> Field:
        """The field that orders the rows."""
        return self.fields[self.names.index(self.time)]

    @property
    def time_dtype(self) -> np.dtype[Any]:
        """The time field's dtype."""
        return self.time_field.np_dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return sum(field.row_bytes for field in self.fields)

    def number(self, name: str) -> int:
        """Position of a field; SchemaError names the fields there are."""
        try:
            return self.names.index(name)
        except ValueError:
            raise SchemaError(f"no field {name!r}; there are {', '.join(self.names)}") from None

    def extended(self, fields: Sequence[Field]) -> Schema:
        """This schema with fields appended."""
        return Schema((*self.fields, *fields), self.time)

    def first(self, count: int) -> Schema:
        """The schema as it was when it had this many fields."""
        return self if count == len(self.fields) else Schema(self.fields[:count], self.time)

    @classmethod
    def of(cls, fields: tuple[Field, ...], time: str) -> Schema:
        """A schema that may be shared with other streams: one object for all that are equal."""
        if any(field.fill is not _NO_FILL for field in fields):
            return cls(fields, time)
        return _shared_schema(fields, time)

    @classmethod
    def infer(cls, batch: BatchLike, time: str = "") -> Schema:
        """The schema that a batch of arrays shows; ``time`` names its time field."""
        time = time or _guess_time(tuple(batch))
        if time not in batch:
            raise SchemaError(f"the time field {time!r} is not in the batch: {sorted(batch)}")
        lead = as_array(batch[time], time).ndim
        fields = []
        for name, values in batch.items():
            array = as_array(values, name)
            if array.ndim < lead:
                raise SchemaError(f"field {name!r}: needs a first axis of rows as {time!r} has")
            dtype = _text_or(array, name)
            fields.append(Field(name, dtype, array.shape[lead:]))
        return cls(tuple(fields), time)

    def columns(self, batch: BatchLike) -> list[Array]:
        """The batch's arrays in field order, converted without loss, checked; not copied.

        A scalar time makes the batch one row. SchemaError says which field does not fit,
        TimeError which row's time cannot be stored.
        """
        exact = self._exact_columns(batch)
        if exact is not None:
            return exact
        if batch.keys() != set(self.names):
            raise SchemaError(_mismatch(set(batch), set(self.names)))
        one_row = np.ndim(batch[self.time]) == 0
        columns = [_column(field, batch[field.name], one_row=one_row) for field in self.fields]
        times = columns[self.number(self.time)]
        for field, column in zip(self.fields, columns, strict=True):
            if column.shape != (len(times), *field.shape):
                raise SchemaError(
                    f"field {field.name!r}: shape {column.shape}, expected "
                    f"{(len(times), *field.shape)}: one value of shape {field.shape} for each "
                    f"of the {len(times)} times"
                )
        check_times(times, self.time_dtype)
        return columns

    def _exact_columns(self, batch: BatchLike) -> list[Array] | None:
        """The columns where all are arrays of the very dtype and shape, in a few µs."""
        times = batch.get(self.time)
        if type(times) is not np.ndarray or times.ndim != 1 or len(batch) != len(self._exact):
            return None
        rows = len(times)
        columns: list[Array] = []
        for name, dtype, shape in self._exact:
            column = batch.get(name)
            if (
                type(column) is not np.ndarray
                or column.dtype != dtype
                or column.shape != (rows, *shape)
            ):
                return None
            columns.append(column)
        check_times(times, times.dtype)
        return columns


_shared_schema = lru_cache(_SHARED_SCHEMAS_MAX)(Schema)


def _guess_time(names: Sequence[str]) -> str:
    for name in TIME_NAMES:
        if name in names:
            return name
    raise SchemaError(
        f"which field is the time? None of {list(names)} is called {' or '.join(TIME_NAMES)}: "
        "name it with time=… (on the command line --time-field)"
    )


def _check_time_field(field: Field) -> None:
    units = ("s", "ms", "us", "ns")
    dtype = field.np_dtype
    dated = dtype.kind == "M" and np.datetime_data(dtype) in [(unit, 1) for unit in units]
    if field.shape != () or not (dated or dtype.str in ("<f8", "<i8")):
        raise SchemaError(
            f"the time field {field.name!r} is {dtype} of shape {field.shape}; it must be one "
            "float64 (seconds), int64 (ns) or datetime64[s|ms|us|ns] a row"
        )


def _text_or(array: Array, name: str) -> DTypeLike:
    if array.dtype != _TEXT or _TEXT_TYPES.issuperset(map(type, array.ravel().tolist())):
        return array.dtype
    if all(v is None or isinstance(v, str) for v in array.flat):  # of subclasses
        return array.dtype
    raise SchemaError(f"field {name!r}: Python objects cannot be stored; text is str or None")


def _column(field: Field, values: ArrayLike, *, one_row: bool) -> Array:
    if field.is_text:
        column = as_array(values, field.name, field.np_dtype)
        _text_or(column, field.name)
    else:
        column = converted(values, field.np_dtype, field.name)
    return column[np.newaxis] if one_row else column


def _mismatch(given: set[str], expected: set[str]) -> str:
    parts = [f"expected the fields {', '.join(sorted(expected))}"]
    if missing := sorted(expected - given):
        parts.append(f"missing {', '.join(missing)}")
    if unknown := sorted(map(str, given - expected)):
        parts.append(f"unknown {', '.join(unknown)} (add new fields with stream.add_fields)")
    return "; ".join(parts)
