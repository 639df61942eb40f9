"""What a pickled numpy array is made of, described instead of built.

Owns the vocabulary of ``pickle_machine``: the globals that may appear, and what their calls and
states mean for bytes, dtypes and arrays. Every function here is pure, takes values whose type it
does not trust, and raises PacketError on any that no numpy ever wrote. Nothing is allocated
here in proportion to what the input claims; an array is only a ``Layout`` over bytes that came.
"""

# ruff: noqa: PLR2004 - the lengths of numpy's own tuples, spelt out in each docstring

from __future__ import annotations

import math
import re
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import numpy as np

from kvstore.errors import PacketError

if TYPE_CHECKING:
    from kvstore.schema import Array

Shape = tuple[int, ...]
T = TypeVar("T")

DIMS_MAX = 32  # numpy 1's own limit, so that every reader can hold the array
# No array of this size exists, and below it numpy's own size arithmetic cannot overflow.
SPAN_BYTES_MAX = 2**48

_NUMBERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})
_FLOATS = frozenset({"f2", "f4", "f8", "c8", "c16"})  # no long double: it differs by platform
_TIMES = frozenset({"M8", "m8"})
_TIME_UNITS = frozenset(b"Y M W D h m s ms us ns ps fs as".split())
_TEXT = re.compile(r"U[1-9][0-9]{0,6}")
_NO_UNIT = "a datetime64 or timedelta64 array without a valid unit; give it one, such as [us]"


class Symbol(Enum):
    """The globals that pickled arrays are made of: names, never the objects themselves."""

    FROMBUFFER = "numpy._core.numeric._frombuffer"
    RECONSTRUCT = "numpy._core.multiarray._reconstruct"
    NDARRAY = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    ENCODE = "_codecs.encode"
    BYTES = "builtins.bytes"


SYMBOLS: dict[tuple[str, str], Symbol] = {
    ("numpy._core.numeric", "_frombuffer"): Symbol.FROMBUFFER,
    ("numpy.core.numeric", "_frombuffer"): Symbol.FROMBUFFER,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): Symbol.RECONSTRUCT,
    ("numpy.core.multiarray", "_reconstruct"): Symbol.RECONSTRUCT,
    ("numpy", "ndarray"): Symbol.NDARRAY,
    ("numpy", "dtype"): Symbol.DTYPE,
    ("_codecs", "encode"): Symbol.ENCODE,
    ("builtins", "bytes"): Symbol.BYTES,
    ("__builtin__", "bytes"): Symbol.BYTES,  # as protocols 0 to 2 spell it
}


class Bytes:
    """Bytes in the pickle: a slice of the frame at ``start``, or a decoded copy (start -1)."""

    __slots__ = ("data", "start", "was_read")

    def __init__(self, data: memoryview, start: int) -> None:
        self.data = data
        self.start = start
        self.was_read = False

    def read(self, bytes_max: int) -> bytes:
        """The bytes, or none if there are too many. From now on the parse depends on them."""
        self.was_read = True
        return self.data.tobytes() if len(self.data) <= bytes_max else b""


class Dtype:
    """A dtype being described; fixed once its state is set or an array has used it."""

    __slots__ = ("code", "dtype")

    def __init__(self, code: str) -> None:
        self.code = code
        self.dtype: np.dtype[Any] | None = None

    def fixed(self) -> np.dtype[Any]:
        """What an array gets that uses it now."""
        if self.dtype is None:
            if self.code in _TIMES:
                raise PacketError(_NO_UNIT)
            self.dtype = np.dtype(self.code)
        return self.dtype


class Layout(NamedTuple):
    """One array as a view: where its bytes are and how to read them."""

    data: Bytes
    dtype: np.dtype[Any]
    shape: Shape
    strides: Shape | None  # None: C order

    def view(self, frame: memoryview) -> Array:
        """The array, over the frame it was described in, or over its decoded copy."""
        if self.data.start < 0:
            return np.ndarray(self.shape, self.dtype, self.data.data, 0, self.strides)
        return np.ndarray(self.shape, self.dtype, frame, self.data.start, self.strides)


class PickledArray:
    """An array being described; without a layout until its state is set."""

    __slots__ = ("layout",)

    def __init__(self, layout: Layout | None = None) -> None:
        self.layout = layout


def expect(value: object, kind: type[T], what: str) -> T:
    """The value, if it is exactly of that type: a bool is no dimension."""
    if type(value) is not kind:
        raise PacketError(f"{what} should be of type {_noun(kind)}, not {_noun(type(value))}")
    return value


def _noun(kind: type) -> str:
    return kind.__name__.lower().removeprefix("pickled")


def excerpt(text: str) -> str:
    """Text from the input as an error message may show it."""
    return repr(text if len(text) <= 80 else text[:80] + "...")


# -- dtypes --------------------------------------------------------------------------------


def _dtype_code(code: str) -> str:
    if code in _NUMBERS or code in _FLOATS or code in _TIMES or _TEXT.fullmatch(code):
        return code
    if code.startswith(("O", "V")):
        kind = "object" if code[0] == "O" else "structured or void"
        raise PacketError(
            f"an array of {kind} dtype ({excerpt(code)}); send numbers, booleans, datetimes,"
            " or text as a numpy 'U' array, one field each"
        )
    raise PacketError(
        f"an array of dtype {excerpt(code)}; booleans, integers, floats up to 64 bits, complex,"
        " datetime64, timedelta64 and 'U' text are accepted"
    )


def dtype_of_state(code: str, state: tuple[object, ...]) -> np.dtype[Any]:
    """The dtype that ``numpy.dtype(code)`` becomes by ``__setstate__(state)``."""
    items, version = (9, 4) if code in _TIMES else (8, 3)
    if len(state) != items or expect(state[0], int, "a dtype's version") != version:
        raise PacketError(f"dtype {code!r} with a state other than numpy's of version {version}")
    if any(state[index] is not None for index in (2, 3, 4)):  # sub-array, names, fields
        raise PacketError("an array of structured dtype; send one field each")
    dtype = np.dtype(code + (_time_unit(state[8]) if code in _TIMES else ""))
    order = expect(state[1], str, "a byte order")
    sizes = [expect(item, int, "a dtype's size, alignment or flags") for item in state[5:8]]
    wanted = [dtype.itemsize, 4, 8] if dtype.kind == "U" else [-1, -1, 0]
    if sizes != wanted or order not in (("|",) if dtype.byteorder == "|" else ("<", ">")):
        raise PacketError(f"dtype {code!r} of byte order {excerpt(order)} and sizes {sizes}")
    return dtype.newbyteorder(cast('Literal["<", ">", "|"]', order))


def _time_unit(metadata: object) -> str:
    """``[25us]`` from what numpy keeps of it: ``(None or {}, (b"us", 25, 1, 1))``."""
    pair = expect(metadata, tuple, "the metadata of a datetime dtype")
    parts = expect(pair[1], tuple, "a datetime unit") if len(pair) == 2 else ()
    if len(parts) != 4:
        raise PacketError("a datetime dtype whose unit is not (unit, multiple, 1, 1)")
    unit = expect(parts[0], Bytes, "a datetime unit").read(8)
    numbers = [expect(part, int, "a datetime unit's multiple") for part in parts[1:]]
    if unit not in _TIME_UNITS or not 1 <= numbers[0] < 2**31 or numbers[1:] != [1, 1]:
        raise PacketError(_NO_UNIT)
    return f"[{numbers[0]}{unit.decode()}]"


# -- arrays --------------------------------------------------------------------------------


def _layout(data: object, dtype: object, shape: object) -> Layout:
    """An array in C order; its size is compared with the bytes that came."""
    blob = expect(data, Bytes, "an array's data")
    fixed = expect(dtype, Dtype, "an array's dtype").fixed()
    dims = _dimensions(expect(shape, tuple, "an array's shape"), fixed.itemsize)
    size = math.prod(dims) * fixed.itemsize
    if size != len(blob.data):
        raise PacketError(
            f"an array of shape {dims} and dtype {fixed} takes {size} bytes,"
            f" and {len(blob.data)} came"
        )
    return Layout(blob, fixed, dims, None)


def _dimensions(shape: tuple[object, ...], itemsize: int) -> Shape:
    if len(shape) > DIMS_MAX:
        raise PacketError(f"an array of {len(shape)} dimensions; {DIMS_MAX} at most")
    dims = tuple(expect(dim, int, "a dimension") for dim in shape)
    if any(dim < 0 for dim in dims):
        raise PacketError(f"an array of shape {dims}; no dimension can be negative")
    if math.prod(max(dim, 1) for dim in dims) * itemsize > SPAN_BYTES_MAX:
        raise PacketError(f"an array of shape {dims}, which no memory holds")
    return dims


def _transposed(stored: Layout, axes: list[int]) -> Layout:
    """``stored.transpose(axes)``, by strides."""
    itemsize, shape = stored.dtype.itemsize, stored.shape
    strides = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return stored._replace(
        shape=tuple(shape[axis] for axis in axes), strides=tuple(strides[axis] for axis in axes)
    )


def _in_f_order(stored: Layout) -> Layout:
    """The same bytes read with the first axis running fastest."""
    turned = stored._replace(shape=stored.shape[::-1])
    return _transposed(turned, list(range(len(stored.shape)))[::-1])


def layout_of_state(state: tuple[object, ...]) -> Layout:
    """``(1, shape, dtype, is_fortran, bytes)``, as protocols 0 to 4 write arrays."""
    if len(state) != 5 or type(state[0]) is not int or state[0] != 1:
        raise PacketError("an array whose state is not (1, shape, dtype, is_fortran, bytes)")
    layout = _layout(state[4], state[2], state[1])
    return _in_f_order(layout) if expect(state[3], bool, "an array's order") else layout


def _array_of_buffer(arguments: tuple[object, ...]) -> PickledArray:
    """``_frombuffer(bytes, dtype, shape, order[, axes])``, as protocol 5 writes arrays."""
    if len(arguments) not in (4, 5):
        raise PacketError("an array that is not described by (bytes, dtype, shape, order)")
    layout = _layout(*arguments[:3])
    order = expect(arguments[3], str, "an array's order")
    if order == "K" and len(arguments) == 5:
        axes = [expect(x, int, "an axis") for x in expect(arguments[4], tuple, "an axis order")]
        if sorted(axes) != list(range(len(layout.shape))):
            raise PacketError(f"an axis order that does not permute {len(layout.shape)} axes")
        return PickledArray(_transposed(layout, axes))
    if order not in ("C", "F") or len(arguments) == 5:
        raise PacketError(f"an array of memory order {excerpt(order)}; C and F are accepted")
    return PickledArray(layout if order == "C" else _in_f_order(layout))


# -- what calling a symbol means -----------------------------------------------------------


def _new_dtype(arguments: tuple[object, ...]) -> Dtype:
    if len(arguments) != 3 or any(type(flag) not in (bool, int) for flag in arguments[1:]):
        raise PacketError("a dtype that is not described by (code, align, copy)")
    return Dtype(_dtype_code(expect(arguments[0], str, "a dtype")))


def _new_array(arguments: tuple[object, ...]) -> PickledArray:
    if len(arguments) != 3 or arguments[0] is not Symbol.NDARRAY:
        raise PacketError("an array of a class other than numpy.ndarray")
    return PickledArray()


def _encoded(arguments: tuple[object, ...]) -> Bytes:
    """``_codecs.encode(text, "latin1")``: how protocols 0 to 2 write bytes."""
    if len(arguments) != 2:
        raise PacketError("bytes that are not described by (text, encoding)")
    text = expect(arguments[0], str, "bytes spelt as text")
    if expect(arguments[1], str, "an encoding") != "latin1":
        raise PacketError("bytes spelt as text in an encoding other than latin1")
    try:
        return Bytes(memoryview(text.encode("latin-1")), -1)
    except UnicodeEncodeError as error:
        raise PacketError("bytes spelt as text that is not latin1") from error


def _no_bytes(arguments: tuple[object, ...]) -> Bytes:
    if arguments:
        raise PacketError("bytes built from values; only the empty bytes are written so")
    return Bytes(memoryview(b""), -1)


def _no_call(_: tuple[object, ...]) -> object:
    raise PacketError("the pickle calls numpy.ndarray; arrays are not written so")


MEANINGS: dict[Symbol, Callable[[tuple[object, ...]], object]] = {
    Symbol.FROMBUFFER: _array_of_buffer,
    Symbol.RECONSTRUCT: _new_array,
    Symbol.NDARRAY: _no_call,
    Symbol.DTYPE: _new_dtype,
    Symbol.ENCODE: _encoded,
    Symbol.BYTES: _no_bytes,
}
