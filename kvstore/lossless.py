"""Values as users give them -> arrays of a field's dtype, without loss. Pure.

Numpy calls casts safe that are not: large integers become rounded floats, far dates wrap
around in finer units, a list of numpy scalars wraps where Python's own integers would raise.
Here whatever does not come through with its value is refused by a SchemaError that names the
field. Only Python's own floats may be rounded, to the field's precision: they have no dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from kvstore.errors import SchemaError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = "NDArray[Any]"

# Kinds of values without a dtype of their own that go beyond numpy's "same_kind": the values
# decide, not what numpy takes them for. "O" is _listed's doing.
_BY_VALUE: Final = frozenset({"ii", "iu", "ui", "uu", "UM", "Um", "Oi", "Ou", "Of", "Oc"})
_LARGE: Final = 1 << 24  # the smallest float32 that has two integers to it


def as_array(values: ArrayLike, name: str, dtype: Any = None) -> Array:
    """An array by numpy's own rules; SchemaError where it finds no array, or overflows."""
    if hasattr(values, "mask") and isinstance(values, np.ma.MaskedArray):
        raise SchemaError(f"field {name!r}: a masked array's mask cannot be stored; fill it first")
    try:
        with np.errstate(over="raise"):
            return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError, OverflowError, FloatingPointError) as error:
        raise SchemaError(f"field {name!r} ({dtype or 'inferred'}): {error}") from error


def converted(values: ArrayLike, dtype: np.dtype[Any], name: str) -> Array:
    """The values in that dtype; the same memory where they have it already."""
    plain = not hasattr(values, "dtype")
    given = _listed(values, name) if plain else as_array(values, name)
    if given.dtype == dtype:
        return given
    fits = np.can_cast(given.dtype, dtype, "same_kind" if plain else "safe")
    if not given.size or fits or (plain and given.dtype.kind + dtype.kind in _BY_VALUE):
        column = as_array(given, name, dtype)
        if _is_exact(given, column):
            return column
    raise SchemaError(
        f"field {name!r}: {given.dtype} values do not fit {dtype} without loss; convert them "
        "before appending"
    )


def _listed(values: ArrayLike, name: str) -> Array:
    """A list as numpy takes it, but as objects where it would make floats of large integers."""
    given = as_array(values, name)
    if given.dtype.kind in "fc":
        with np.errstate(over="ignore"):
            large = bool((np.abs(given) >= _LARGE).any())
        objects = as_array(values, name, object) if large else given
        if large and any(isinstance(value, int | np.integer) for value in objects.flat):
            return objects
    return given


def _is_exact(given: Array, column: Array) -> bool:
    """Whether integers and times kept their values."""
    source, target = given.dtype.kind, column.dtype.kind
    if source == "O":
        return _are_exact_objects(given, column)
    if not given.size or source + target in ("im", "um") or source not in "iumM":
        return True
    if target in "fc":
        largest = 1 << (np.finfo(column.dtype).nmant + 1)
        return bool(given.min() >= -largest and given.max() <= largest)
    if source in "mM":
        return np.array_equal(column.astype(given.dtype), given, equal_nan=True)
    return np.array_equal(column, given)


def _are_exact_objects(given: Array, column: Array) -> bool:
    pairs = zip(given.flat, column.reshape(-1).tolist(), strict=True)
    return all(
        stored == int(value)
        if isinstance(value, int | np.integer)
        else column.dtype.kind in "fc" and isinstance(value, float | complex | np.inexact)
        for value, stored in pairs
    )
