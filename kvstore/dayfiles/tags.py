"""The tags column of a chunk as small numbers, one per combination, without a look at each row.

An export repeats some 500 combinations of some 40 pairs in millions of rows. The words arrive as
codes of the file's own dictionary; a pair of codes becomes a bit, a row the sum of its bits: one
gather and one running sum over the pairs, 15 ns a row. The sum says exactly which pairs a row
has as long as no row has one twice, which counting its bits shows. What does not fit (more than
63 pairs, huge vocabularies, pairs that are none) takes slower ways to the same answer.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvstore.dayfiles.arrays import arrow, filled, plain

Pair: TypeAlias = tuple[str | None, str | None]
Pairs: TypeAlias = frozenset[Pair]
Ints: TypeAlias = npt.NDArray[np.int64]
_BITS: Final = 63
_WORDS_MAX: Final = 1024  # pairs are looked up in a table of the square of it: 8 MB


class Coded(NamedTuple):
    """A column as codes and what they stand for. None among tags: no list of pairs."""

    codes: npt.NDArray[np.integer[Any]]
    tags: list[Pairs | None]


class TagCoder:
    """Codes the tags of chunk after chunk; remembers which pair has which bit."""

    def __init__(self) -> None:
        self._bits: dict[tuple[str, str], int] = {}
        self._known: dict[int, Pairs] = {}

    def code(self, tags: pa.Array) -> Coded:
        """Codes for lists of lists of strings, the latter in a dictionary."""
        lists = _Lists.of(tags)
        if lists is None:
            return _listed(tags)
        if len(lists.words) > _WORDS_MAX:
            return _by_position(lists)
        sums = self._sums(lists)
        return _by_position(lists) if sums is None else self._distinct(sums)

    def _sums(self, lists: _Lists) -> Ints | None:
        """Each row's bits, or None where bits cannot tell."""
        pairs = np.multiply(lists.keys, len(lists.words), dtype=np.intp)
        pairs += lists.values
        # Indexing would check each bound, and convert what is not intp.
        sums = lists.sums(self._table(lists.words).take(pairs, mode="clip"))
        if lists.are(sums):
            return sums
        table = self._learn(lists.words, pairs)
        sums = lists.sums(table[pairs]) if table is not None else sums
        return sums if table is not None and lists.are(sums) else None

    def _table(self, words: list[str | None]) -> Ints:
        """The bit of each pair of words; 0 for pairs not yet seen."""
        code_of = {word: code for code, word in enumerate(words)}
        table = np.zeros(len(words) ** 2, np.int64)
        for (key, value), bit in self._bits.items():
            if key in code_of and value in code_of:
                table[code_of[key] * len(words) + code_of[value]] = 1 << bit
        return table

    def _learn(self, words: list[str | None], pairs: npt.NDArray[Any]) -> Ints | None:
        """Give bits to the pairs of this chunk; None where they are too many, or hold nulls."""
        seen = np.flatnonzero(np.bincount(pairs, minlength=1)).tolist()
        found = [(words[pair // len(words)], words[pair % len(words)]) for pair in seen]
        fresh = [(k, v) for k, v in found if k is not None and v is not None]
        if len(found) > _BITS or len(fresh) < len(found):
            return None
        if len(self._bits.keys() | set(fresh)) > _BITS:
            self._bits, self._known = {}, {}
        for pair in fresh:
            self._bits.setdefault(pair, len(self._bits))
        return self._table(words)

    def _distinct(self, sums: Ints) -> Coded:
        encoded = arrow(sums).dictionary_encode()
        return Coded(plain(encoded.indices), [*map(self._pairs, encoded.dictionary.to_pylist())])

    def _pairs(self, bits: int) -> Pairs:
        if bits not in self._known:
            pairs = (pair for pair, bit in self._bits.items() if bits >> bit & 1)
            self._known[bits] = frozenset(pairs)
        return self._known[bits]


class _Lists(NamedTuple):
    """Rows of pairs, flat: row i has those from starts[i] up to starts[i + 1]."""

    starts: npt.NDArray[np.integer[Any]]
    keys: npt.NDArray[np.int32]
    values: npt.NDArray[np.int32]
    words: list[str | None]

    @classmethod
    def of(cls, tags: pa.Array) -> _Lists | None:
        """None where the column is built in another way, or has lists that are no pairs."""
        if not _is_list(tags.type) or not _is_list(tags.type.value_type) or tags.null_count:
            return None
        starts = plain(tags.offsets)
        pairs = tags.values
        if pairs.null_count:
            return None
        ends = plain(pairs.offsets)
        if not (np.diff(ends) == 2).all():  # noqa: PLR2004  # key, value
            return None
        leaves = pairs.values[int(ends[0]) : int(ends[-1])]
        if not pa.types.is_dictionary(leaves.type):
            leaves = leaves.dictionary_encode()
        words = leaves.dictionary.cast(pa.string()).to_pylist()
        flat = filled(leaves.indices, len(words))
        if leaves.indices.null_count:
            words.append(None)
        return cls(starts, flat[0::2], flat[1::2], words)

    def sums(self, bits: Ints) -> Ints:
        """Each row's sum. Sums over all rows wrap around: their differences are right."""
        running = np.zeros(len(bits) + 1, np.int64)
        np.cumsum(bits, out=running[1:])
        ends: Ints = running[self.starts]
        return np.diff(ends)

    def are(self, sums: Ints) -> bool:
        """Whether each row's sum has as many bits as the row has pairs: then it is exact."""
        return bool((np.bitwise_count(sums) == np.diff(self.starts)).all())


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _by_position(lists: _Lists) -> Coded:
    """Codes made pair by pair; exact whatever the number of words."""
    pairs = lists.keys.astype(np.int64) * len(lists.words) + lists.values
    distinct, dense = np.unique(pairs, return_inverse=True)
    counts = np.diff(lists.starts)
    codes = np.zeros(len(counts), np.int64)
    padded = np.append(dense + 1, np.zeros(int(counts.max(initial=0)) + 1, np.int64))
    for position in range(int(counts.max(initial=0))):
        here = np.where(counts > position, padded[lists.starts[:-1] + position], 0)
        _, codes = np.unique(codes * (len(distinct) + 1) + here, return_inverse=True)
    _, firsts, codes = np.unique(codes, return_index=True, return_inverse=True)
    width = len(lists.words)
    spans = [(int(lists.starts[row]), int(lists.starts[row + 1])) for row in firsts]
    return Coded(codes, [
        frozenset((lists.words[p // width], lists.words[p % width]) for p in pairs[a:b].tolist())
        for a, b in spans
    ])  # fmt: skip


def _listed(tags: pa.Array) -> Coded:
    """Row by row, for what is rare: nulls, lists that are no pairs, maps and structs."""
    numbers: dict[Pairs | None, int] = {}
    codes = [numbers.setdefault(_pairs_of(row), len(numbers)) for row in tags.to_pylist()]
    return Coded(np.array(codes, np.int64), list(numbers))


def _pairs_of(row: object) -> Pairs | None:
    if row is None:
        return frozenset()
    if isinstance(row, dict):
        row = list(row.items())
    if not isinstance(row, list):
        return None
    pairs = [tuple(pair.values() if isinstance(pair, dict) else pair or ()) for pair in row]
    if any(len(pair) != 2 for pair in pairs):  # noqa: PLR2004  # key, value
        return None
    return frozenset((_text(key), _text(value)) for key, value in pairs)


def _text(value: object) -> str | None:
    return value.decode() if isinstance(value, bytes) else None if value is None else str(value)
