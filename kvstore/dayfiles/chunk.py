"""One chunk of an export to its readings, and what is wrong with the other rows.

Two layouts say the same. *Long*: ``timestamp, payload_type, value, tags``, a row a reading.
*Wide*: ``timestamp, phase, module``, then a column a measure, named as in the output; an empty
cell, or NaN, is no reading.

What cannot be placed (no time that can be read, tags that make no sense) is *unplaced*, what
has no value that can be read *unreadable*; both are counted by row and named with their row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa

from kvstore.dayfiles.arrays import arrow, truths
from kvstore.dayfiles.cells import NO_TIME, Cells, cells, numbers, texts, times_ns
from kvstore.dayfiles.measures import text_column
from kvstore.dayfiles.readings import Codes, Flags, Floats, Ints, Part, distinct
from kvstore.dayfiles.series import Series, column_of_header, parsed_tags, series_of, tree_of
from kvstore.dayfiles.tags import Coded, Pairs, TagCoder
from kvstore.errors import DayfilesError

TIME: Final = "timestamp"
LONG: Final = (TIME, "payload_type", "value", "tags")
WIDE: Final = (TIME, "phase", "module")
DROPPED: Final = "__index_level_0__"  # pandas leaves it behind
SERIES_MAX: Final = 20_000  # of a chunk; the real data has 490
_TABLE_MAX: Final = 1 << 22  # names times tags, 9 bytes each
_NAMED_MAX: Final = 20  # rows that are wrong and named, of a chunk; all are counted


class Window(NamedTuple):
    """A stretch of time: from start, included, to stop, not."""

    start_ns: int
    stop_ns: int

    def holds(self, times: Ints) -> Flags:
        """Which of the times lie in it."""
        return (times >= self.start_ns) & (times < self.stop_ns)


class Oddity(NamedTuple):
    """A row that is not as it should be. row: from 0, in its file."""

    row: int
    what: str
    time_ns: int


class Chunk(NamedTuple):
    """What a chunk holds of a window.

    unplaced: rows without a time or a series, the first of them; those that have a time only where
    it is in the window. unreadable: the same for rows without a value that can be read. Both with
    the times of all of them.
    """

    parts: list[Part]
    unplaced: list[Oddity]
    unreadable: list[Oddity]
    unplaced_ns: Ints
    unreadable_ns: Ints


class Kinds:
    """Looks series up by what a file calls them; remembers them from chunk to chunk."""

    def __init__(self) -> None:
        self.tags = TagCoder()
        self._known: dict[tuple[str | None, Pairs | None], Series | None] = {}

    def series(self, name: str | None, tags: Pairs | None) -> Series | None:
        """The series of a measure with these tags, or None."""
        key = name, tags
        if key not in self._known:
            self._known[key] = None if tags is None else series_of(name, tags)
        return self._known[key]

    def of_chunk(self, names: Cells, tags: Coded) -> tuple[list[Series | None], Codes]:
        """The combinations of name and tags that occur, and each row's."""
        words = texts(names.distinct)
        both = tags.codes.astype(np.int64) * len(words) + names.codes
        if len(tags.tags) * len(words) > _TABLE_MAX:
            found, codes = np.unique(both, return_inverse=True)
        else:
            seen = np.zeros(len(tags.tags) * len(words), np.bool_)
            seen[both] = True
            found = np.flatnonzero(seen)
            dense = np.zeros(len(seen), np.int64)
            dense[found] = np.arange(len(found))
            codes = dense[both]
        if len(found) > SERIES_MAX:
            raise DayfilesError(
                f"{len(found)} combinations of measure and tags, expected at most {SERIES_MAX}: is "
                "a tag another one in each row?"
            )
        series = [
            self.series(words[code % len(words)], tags.tags[code // len(words)])
            for code in found.tolist()
        ]
        return series, codes


def long_chunk(batch: pa.RecordBatch, first_row: int, window: Window, kinds: Kinds) -> Chunk:
    """The readings of a batch in the long layout."""
    times = cells(batch.column(TIME))
    ns = times_ns(times.distinct)
    names, values = cells(batch.column("payload_type")), cells(batch.column("value"))
    series, codes = kinds.of_chunk(names, tag_codes(batch.column("tags"), kinds.tags))
    rows = _Rows(series, codes, ns, times.codes, values, first_row)
    return rows.chunk(window)


def tag_codes(tags: pa.Array, coder: TagCoder) -> Coded:
    """The tags of a batch in codes, whether they are lists or written out."""
    if not pa.types.is_nested(tags.type):  # written out as text
        written = cells(tags)
        return Coded(written.codes, [_parsed(text) for text in texts(written.distinct)])
    return coder.code(tags)


def _parsed(text: str | None) -> Pairs | None:
    try:
        return frozenset(parsed_tags(text))
    except (ValueError, RecursionError):  # of [[[[…
        return None


def wide_chunk(batch: pa.RecordBatch, first_row: int, window: Window) -> Chunk:
    """The readings of a batch in the wide layout."""
    times = cells(batch.column(TIME))
    ns = times_ns(times.distinct)
    trees, pairs = wide_trees(batch)
    chunks = []
    for name in batch.schema.names:
        if name in WIDE or name == DROPPED:
            continue
        target = column_of_header(name)
        filled, values = wide_cells(batch.column(name))
        series = [None if tree is None else Series(tree, target) for tree in trees]
        rows = _Rows(series, pairs[filled], ns, times.codes[filled], values, first_row, filled)
        chunks.append(rows.chunk(window))
    return _together(chunks)


def wide_cells(column: pa.Array) -> tuple[Ints, Cells]:
    """The rows of a wide column that have a reading, and its cells there."""
    filled = np.flatnonzero(~truths(column.is_null(nan_is_null=True)))
    return filled, cells(column.take(arrow(filled)))


def wide_trees(batch: pa.RecordBatch) -> tuple[list[str | None], Codes]:
    """Trees of a wide batch, None for one that can have no folder, and which is each row's."""
    phases, modules = cells(batch.column("phase")), cells(batch.column("module"))
    trees = [
        tree_of(phase or None, module or None)
        for phase in map(_whole, texts(phases.distinct))
        for module in map(_whole, texts(modules.distinct))
    ]
    return trees, phases.codes.astype(np.int64) * len(modules.distinct) + modules.codes


def _whole(text: str | None) -> str | None:
    """3.0 as 3: a column of integers with gaps arrives as floats."""
    return text.removesuffix(".0").strip() if text else None


def _together(chunks: Sequence[Chunk]) -> Chunk:
    empty = np.empty(0, np.int64)
    return Chunk(
        [part for chunk in chunks for part in chunk.parts],
        [oddity for chunk in chunks for oddity in chunk.unplaced],
        [oddity for chunk in chunks for oddity in chunk.unreadable],
        np.concatenate([empty, *(chunk.unplaced_ns for chunk in chunks)]),
        np.concatenate([empty, *(chunk.unreadable_ns for chunk in chunks)]),
    )


class _Rows(NamedTuple):
    """Rows in codes: series or None, times or NO_TIME, values. numbers: of the rows, if not all."""

    series: Sequence[Series | None]
    codes: Codes
    times_ns: Ints
    time_codes: Codes
    values: Cells
    first_row: int
    numbers: Ints | None = None

    def chunk(self, window: Window) -> Chunk:
        floats, words = numbers(self.values.distinct), texts(self.values.distinct)
        known = np.array([one is not None for one in self.series], np.bool_)
        timed = window.holds(self.times_ns)
        unplaced = self._unplaced(known, timed)
        s, t, v, rows = self._distinct(known, timed)
        odd = self._odd_values(floats, words)
        unreadable = np.empty(0, np.int64)
        if odd(s, v).any():  # seldom: so rows are looked through only then
            all_rows = odd(self.codes, self.values.codes)
            unreadable = np.flatnonzero(all_rows & timed[self.time_codes] & known[self.codes])
        part = self._part(s, t, v, rows, floats, words)
        return Chunk(
            [part],
            self._named(unplaced, lambda row: "no time" if self._ns(row) == NO_TIME else "tags"),
            self._named(unreadable, lambda row: self._described(row, words)),
            self._times(unplaced),
            self._times(unreadable),
        )

    def _unplaced(self, known: Flags, timed: Flags) -> Ints:
        timeless = self.times_ns == NO_TIME
        if known.all() and not timeless.any():
            return np.empty(0, np.int64)
        lost = timeless[self.time_codes] | (~known[self.codes] & timed[self.time_codes])
        return np.flatnonzero(lost)

    def _odd_values(
        self, floats: Floats, words: Sequence[str | None]
    ) -> Callable[[Codes, Codes], Flags]:
        """Tells, of series and values, which have no value: none, or no number where one is due."""
        none = np.array([word is None for word in words], np.bool_)
        no_number = np.isnan(floats)
        strict = np.array([
            one is not None
            and not (one.column.measure.is_text or one.column.measure.is_open)
            for one in self.series
        ], np.bool_)  # fmt: skip
        return lambda s, v: none[v] | (no_number[v] & strict[s])

    def _distinct(self, known: Flags, timed: Flags) -> tuple[Ints, Ints, Ints, Ints]:
        """The readings, each once, and how many rows have each of the times."""
        codes, time_codes, values = self.codes, self.time_codes, self.values.codes
        if not (known.all() and timed.all()):
            kept = known[codes] & timed[time_codes]
            codes, time_codes, values = codes[kept], time_codes[kept], values[kept]
        rows = np.bincount(time_codes, minlength=len(self.times_ns))
        sizes = max(1, len(self.times_ns)), max(1, len(self.values.distinct))
        return *distinct(codes, time_codes, values, sizes), rows

    def _part(  # noqa: PLR0917  # what a part has
        self, s: Ints, t: Ints, v: Ints, rows: Ints, floats: Floats, words: Sequence[str | None]
    ) -> Part:
        used = np.flatnonzero(np.bincount(s, minlength=len(self.series)))
        dense = np.zeros(len(self.series) + 1, np.int64)
        dense[used] = np.arange(len(used))
        series = [one for code in used.tolist() if (one := self.series[code]) is not None]
        s, series = _with_texts(dense[s], v, series, floats, words)
        return _trimmed(Part(series, self.times_ns, floats, words, s, t, v, rows))

    def _ns(self, row: int) -> int:
        return int(self.times_ns[self.time_codes[row]])

    def _times(self, rows: Ints) -> Ints:
        return self.times_ns[self.time_codes[rows]]

    def _named(self, rows: Ints, what: Callable[[int], str]) -> list[Oddity]:
        first = rows[:_NAMED_MAX].tolist()
        return [Oddity(self._number(row), what(row), self._ns(row)) for row in first]

    def _number(self, row: int) -> int:
        return self.first_row + (row if self.numbers is None else int(self.numbers[row]))

    def _described(self, row: int, words: Sequence[str | None]) -> str:
        word, series = words[self.values.codes[row]], self.series[self.codes[row]]
        return f"{series.key if series else ''} {word!r}"


def _with_texts(
    s: Ints, v: Ints, series: list[Series], floats: Floats, words: Sequence[str | None]
) -> tuple[Ints, list[Series]]:
    """Readings of open measures that are no numbers go to the series of their texts."""
    is_open = np.array([one.column.measure.is_open for one in series], np.bool_)
    if not is_open.any():
        return s, series
    is_word = np.isnan(floats) & np.array([word is not None for word in words], np.bool_)
    moved = is_open[s] & is_word[v]
    for code in np.unique(s[moved]).tolist():
        s[moved & (s == code)] = len(series)
        series = [*series, Series(series[code].tree, text_column(series[code].column))]
    return s, series


def _trimmed(part: Part) -> Part:
    """The part without times that none of its readings has: those outside of the window."""
    used = part.rows > 0
    if used.all():
        return part
    dense = np.cumsum(used) - 1
    return part._replace(
        times_ns=part.times_ns[used], time_codes=dense[part.time_codes], rows=part.rows[used]
    )
