"""What a row is: fields, schemas, and batches that fit them. Pure: no files, no clocks.

A schema is an ordered tuple of fields, one of which is the time. Fields are only ever
*appended* to a stream's schema, never changed, removed or reordered: so a field's number
in the file is its position, and a stored batch's number of blocks says which fields it has.

Numbers are kept little-endian in the dtype they are declared with. Text fields are object
arrays of ``str`` or None. Arrays that leave ``Schema.columns`` may still share memory with
the caller's: who keeps them must copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from kvstore.errors import NoFillError, SchemaError
from kvstore.timestamps import check_times

Array = NDArray[Any]
Batch = dict[str, Array]
"""Rows: field name -> array whose first axis is the row."""
BatchLike = Mapping[str, ArrayLike]

FIELDS_MAX: Final = 1000  # bounds an index record: about 20 bytes a field
NAME_BYTES_MAX: Final = 255
ROW_BYTES_MAX: Final = 256 << 20  # a row is never cut: bounds one block and one packet alike
TIME_NAMES: Final = ("timestamps", "timestamp", "time")
"""Tried in this order where the time field is not named."""

_TEXT = np.dtype(object)
_KINDS = "biufcmM"
_NO_FILL: Final = "no fill"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a stream.

    dtype: any bool, integer, float (16, 32, 64), complex, datetime64 or timedelta64 dtype,
    or ``"text"`` (str or None). shape: of one row's value, ``()`` for a scalar. fill: what
    stands for this field in batches stored before it was added; without one, floats give NaN,
    times NaT and text None, while integers and bools have no honest fill.
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
        return self.np_dtype.itemsize * int(np.prod(self.shape, dtype=object))

    def filled(self, rows: int) -> Array:
        """Rows of the fill value; NoFillError where none would be honest."""
        if self.fill != _NO_FILL:
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
        if self.fill == _NO_FILL:
            return record
        value = np.asarray(self.fill)
        plain = int(value.astype("i8")) if value.dtype.kind in "mM" else value.item()
        if isinstance(plain, complex):
            plain = [plain.real, plain.imag]
        return [*record, plain]

    @classmethod
    def from_record(cls, record: Sequence[Any]) -> Field:
        """The inverse of to_record."""
        name, dtype, shape, unit, description, *fill = record
        if not fill:
            return cls(name, dtype, tuple(shape), unit, description)
        value = fill[0]
        if dtype != "text" and np.dtype(dtype).kind in "mM":
            value = np.array(value, "i8").view(dtype)[()]
        elif isinstance(value, list):
            value = complex(*value)
        return cls(name, dtype, tuple(shape), unit, description, value)


def check_name(name: str, what: str) -> None:
    """Names of fields, streams and marks: printable, 1 to 255 bytes of UTF-8."""
    fits = isinstance(name, str) and name.isprintable() and name.strip() == name
    if not fits or not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
        raise SchemaError(
            f"{what} name {name!r}: use 1 to {NAME_BYTES_MAX} bytes of printable text "
            "without blanks at its ends"
        )


def _canonical(dtype: DTypeLike, name: str) -> np.dtype[Any]:
    if dtype in ("text", str) or (isinstance(dtype, np.dtype) and dtype.kind in "UTO"):
        return _TEXT
    try:
        given = np.dtype(dtype)
    except TypeError as error:
        raise SchemaError(f"field {name!r}: {dtype!r} is no numpy dtype") from error
    if given.kind == "U":
        return _TEXT
    if given.kind not in _KINDS or given.itemsize > 16 or given.char in "gG":  # noqa: PLR2004
        raise SchemaError(
            f"field {name!r}: dtype {given} cannot be stored; use bool, integer, float16 to "
            "float64, complex, datetime64, timedelta64 or text"
        )
    if given.kind in "mM" and np.datetime_data(given)[0] == "generic":
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
        """dtype of the time field."""
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
    def infer(cls, batch: BatchLike, time: str = "") -> Schema:
        """The schema that a batch of arrays shows; ``time`` names its time field."""
        time = time or _guess_time(tuple(batch))
        if time not in batch:
            raise SchemaError(f"the time field {time!r} is not in the batch: {sorted(batch)}")
        lead = np.ndim(np.asarray(batch[time]))
        fields = []
        for name, values in batch.items():
            array = np.asarray(values)
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
        if len(batch) != len(self.fields) or self.time not in batch:
            return None
        times = batch[self.time]
        rows = len(times) if isinstance(times, np.ndarray) and times.ndim == 1 else -1
        columns: list[Array] = []
        for field in self.fields:
            column = batch.get(field.name)
            if (
                type(column) is not np.ndarray
                or column.dtype != field.dtype
                or column.shape != (rows, *field.shape)
                or field.is_text
            ):
                return None
            columns.append(column)
        check_times(times, self.time_dtype)  # type: ignore[arg-type]  # an array, as seen above
        return columns


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
    if array.dtype != _TEXT or all(v is None or isinstance(v, str) for v in array.flat):
        return array.dtype
    raise SchemaError(f"field {name!r}: Python objects cannot be stored; text is str or None")


def _column(field: Field, values: ArrayLike, *, one_row: bool) -> Array:
    if field.is_text:
        column = np.asarray(values, dtype=object)
        _text_or(column, field.name)
    elif isinstance(values, np.ndarray | np.generic):
        if values.dtype != field.np_dtype and not np.can_cast(values.dtype, field.np_dtype):
            raise SchemaError(
                f"field {field.name!r}: dtype {values.dtype} does not fit {field.np_dtype} "
                "without loss; convert it before appending"
            )
        column = np.asarray(values, dtype=field.np_dtype)
    else:
        column = _converted(field, values)
    return column[np.newaxis] if one_row else column


def _converted(field: Field, values: ArrayLike) -> Array:
    """A list or scalar as an array, refusing what numpy would quietly round off."""
    try:
        plain = np.asarray(values)
        column = np.asarray(values, dtype=field.np_dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise SchemaError(f"field {field.name!r} ({field.np_dtype}): {error}") from error
    integers = plain.dtype.kind in "iu" and field.np_dtype.kind in "iu"  # numpy checks the bounds
    if plain.size and not (
        integers or plain.dtype.kind == "U" or np.can_cast(plain.dtype, field.np_dtype, "same_kind")
    ):
        raise SchemaError(
            f"field {field.name!r}: {plain.dtype} values do not fit {field.np_dtype}"
        )
    return column


def _mismatch(given: set[str], expected: set[str]) -> str:
    parts = [f"expected the fields {', '.join(sorted(expected))}"]
    if missing := sorted(expected - given):
        parts.append(f"missing {', '.join(missing)}")
    if unknown := sorted(map(str, given - expected)):
        parts.append(f"unknown {', '.join(unknown)} (add new fields with stream.add_fields)")
    return "; ".join(parts)
