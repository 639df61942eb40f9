"""Readings: what a file holds for a stretch of time, and all files' readings of it, in order.

A reading is a time, a series and a value. A file's readings come as *parts*: codes into the
part's own lists of series, times and values, each combination once. Merged, they are sorted by
series, time and value: what is left depends on the set of readings alone, never on how many
files it came in, or in which order.

Of one identity (time and series) one value stays. Equal readings are duplicates. Different ones
are a conflict, which the lowest value wins (of texts, the first in code point order): a rule on
values alone. A reading whose value could not be read has none: it loses against every value, and
where it stands alone, it says that there is none.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore.dayfiles.series import Series

Ints: TypeAlias = npt.NDArray[np.int64]
Codes: TypeAlias = npt.NDArray[np.integer[Any]]
Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]

_KEY_BITS: Final = 63


class Part(NamedTuple):
    """Distinct readings of some rows of a file.

    series_codes, time_codes, value_codes: one of each a reading, into the lists. numbers: NaN for
    a value that is no number. texts: None for no value at all. rows: how many rows, duplicates
    included, have each of the times.
    """

    series: Sequence[Series]
    times_ns: Ints
    numbers: Floats
    texts: Sequence[str | None]
    series_codes: Codes
    time_codes: Codes
    value_codes: Codes
    rows: Ints


class Merged(NamedTuple):
    """All readings, by series and time; each identity once.

    codes: into ``series``, which is sorted. values: NaN for none; those of a series of texts are
    indexes into ``texts``, which is sorted. distinct: readings, those that lost included.
    conflicts: those that lost, as (series, time, value).
    """

    series: Sequence[Series]
    texts: Sequence[str]
    codes: Ints
    times_ns: Ints
    values: Floats
    distinct_ns: Ints
    lost: tuple[Ints, Ints, Floats]


def distinct(series_codes: Codes, time_codes: Codes, value_codes: Codes, sizes: tuple[int, int]
             ) -> tuple[Ints, Ints, Ints]:  # fmt: skip
    """Each combination once, sorted. sizes: how many times and values there are.

    By sorting packed keys: numpy's sort of int64 takes 6 ns a row where hashing takes 15-50.
    """
    time_bits, value_bits = ((size - 1).bit_length() for size in sizes)
    series_bits = int(series_codes.max(initial=0)).bit_length()
    if series_bits + time_bits + value_bits > _KEY_BITS:
        return _distinct_rows(series_codes, time_codes, value_codes)
    keys = series_codes.astype(np.int64)
    for bits, codes in (time_bits, time_codes), (value_bits, value_codes):
        keys <<= bits
        keys |= codes
    keys.sort()
    keys = keys[_changes(keys)]
    rest = keys >> value_bits
    return rest >> time_bits, rest & ((1 << time_bits) - 1), keys & ((1 << value_bits) - 1)


def _distinct_rows(*columns: Codes) -> tuple[Ints, Ints, Ints]:
    """The same for codes that do not fit into a key together."""
    rows = np.unique(np.stack(columns, axis=1).astype(np.int64), axis=0)
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _changes(keys: Ints) -> Flags:
    first = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return first


def merged(parts: Iterable[Part]) -> Merged:
    """All parts' readings as one set."""
    parts = list(parts)
    series = sorted({s for part in parts for s in part.series}, key=lambda s: s.key)
    times = np.unique(_joined([part.times_ns for part in parts], np.int64))
    numbers = np.unique(_joined([_numbers(part) for part in parts], np.float64))
    texts = sorted({t for part in parts for t in _texts(part)})
    code_of = {s: code for code, s in enumerate(series)}
    values = max(len(numbers), len(texts)) + 1  # the last stands for none
    coded = [_recoded(part, code_of, times, numbers, texts, values - 1) for part in parts]
    s, t, v = (_joined([one[axis] for one in coded], np.int64) for axis in range(3))
    s, t, v = distinct(s, t, v, (max(1, len(times)), values))
    is_text = np.array([one.column.measure.is_text for one in series], np.bool_)
    decoded = np.where(is_text[s], v.astype(np.float64), _padded(numbers, values)[v])
    decoded[v == values - 1] = np.nan
    return _resolved(series, texts, s, times[t], decoded)


def _resolved(series: Sequence[Series], texts: Sequence[str], s: Ints, times: Ints, values: Floats
              ) -> Merged:  # fmt: skip
    stays = np.ones(len(s), np.bool_)
    stays[1:] = (s[1:] != s[:-1]) | (times[1:] != times[:-1])
    lost = ~stays & ~np.isnan(values)
    return Merged(
        series,
        texts,
        s[stays],
        times[stays],
        values[stays],
        times,
        (s[lost], times[lost], values[lost]),
    )


def _numbers(part: Part) -> Floats:
    return part.numbers[~np.isnan(part.numbers)]


def _texts(part: Part) -> set[str]:
    """The texts of a part's series of texts: few, as a rule."""
    is_text = np.array([s.column.measure.is_text for s in part.series], np.bool_)
    if not is_text.any():
        return set()
    used = np.bincount(part.value_codes[is_text[part.series_codes]])
    return {
        text for code in np.flatnonzero(used).tolist() if (text := part.texts[code]) is not None
    }


def _recoded(  # noqa: PLR0917  # all lists of the whole
    part: Part, code_of: Mapping[Series, int], times: Ints, numbers: Floats,
    texts: Sequence[str], none: int,
) -> tuple[Ints, Ints, Ints]:  # fmt: skip
    """A part's codes in terms of all parts' lists."""
    series = np.array([code_of[s] for s in part.series], np.int64)
    is_text = np.array([s.column.measure.is_text for s in part.series], np.bool_)
    values = np.searchsorted(numbers, part.numbers)
    values[np.isnan(part.numbers)] = none
    value_codes = values[part.value_codes]
    if is_text.any():
        rank = {text: code for code, text in enumerate(texts)}
        of_texts = np.array([rank.get(t, none) if t is not None else none for t in part.texts])
        value_codes = np.where(is_text[part.series_codes], of_texts[part.value_codes], value_codes)
    return (
        series[part.series_codes],
        np.searchsorted(times, part.times_ns)[part.time_codes],
        value_codes,
    )


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _padded(numbers: Floats, length: int) -> Floats:
    padded = np.full(length, np.nan)
    padded[: len(numbers)] = numbers
    return padded
