"""The grid: readings to bins, and what stands in bins that have none.

A bin is [t, t + every), labelled t; bins begin at whole multiples of ``every`` since midnight
UTC. A bin's readings become their mean, or the last of them (measures.py). A bin without readings
is filled:

    hold    with the value of the last bin that has readings, if that is at most the hold older
    linear  between two bins with readings, at most the hold apart; steps and texts are held
    none    not at all

A bin whose readings all have no value has none itself, and nothing to hold either.

All sums are taken in the order of time, one by one: equal readings give equal bits. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from kvstore.dayfiles.chunk import Window
from kvstore.dayfiles.measures import Column
from kvstore.dayfiles.readings import Flags, Floats, Ints, Merged
from kvstore.errors import DayfilesError
from kvstore.timestamps import NS_PER_S

Bytes: TypeAlias = npt.NDArray[np.int8]
Fill = Literal["none", "hold", "linear"]
FILLS: Final[tuple[Fill, ...]] = get_args(Fill)
OBSERVED: Final = 0
HELD: Final = 1
INTERPOLATED: Final = 2
MISSING: Final = 9
HOUR_NS: Final = 3600 * NS_PER_S
DAY_NS: Final = 24 * HOUR_NS
_HOLD_NS_MAX: Final = 7 * DAY_NS  # a day reads what is held into it: this much before itself
_CELLS_MAX: Final = 40_000_000  # of a tree's day, 20 bytes each at the peak
_BINS_MAX: Final = 3_600_000  # an hour of milliseconds


class Settings(NamedTuple):
    """What decides over the output, beside the input. hold_ns: None for each measure's own."""

    every_ns: int = 5 * NS_PER_S
    fill: Fill = "hold"
    hold_ns: int | None = None
    with_flags: bool = False
    trim: bool = False

    def checked(self) -> Settings:
        """DayfilesError where hours cannot be cut into such bins, or too much would be held."""
        if self.every_ns <= 0 or HOUR_NS % self.every_ns or HOUR_NS // self.every_ns > _BINS_MAX:
            raise DayfilesError(
                f"bins of {self.every_ns / NS_PER_S:g} s: expected a whole part of an hour, such "
                "as 5s, 10s or 1m, and no less than a millisecond"
            )
        if self.hold_ns is not None and not 0 <= self.hold_ns <= _HOLD_NS_MAX:
            raise DayfilesError("hold: expected at most 7 days")
        if self.every_ns % 1000:
            raise DayfilesError("bins: expected whole microseconds")
        return self

    def hold_bins(self, column: Column) -> int:
        """For how many bins a value of that column stands."""
        own_ns = int(column.measure.hold_s * NS_PER_S)
        return (own_ns if self.hold_ns is None else self.hold_ns) // self.every_ns

    def margin_bins(self, hold_s_max: float) -> int:
        """How many bins before a stretch may matter to it, and with linear filling behind it."""
        hold_ns = int(hold_s_max * NS_PER_S) if self.hold_ns is None else self.hold_ns
        return 0 if self.fill == "none" else hold_ns // self.every_ns


class Lattice(NamedTuple):
    """The bins of a stretch, with those before and behind it that matter to it."""

    start_ns: int
    every_ns: int
    lead: int
    bins: int
    tail: int

    @property
    def window(self) -> Window:
        """All of it, in time."""
        first = self.start_ns - self.lead * self.every_ns
        return Window(first, self.start_ns + (self.bins + self.tail) * self.every_ns)

    @property
    def inner(self) -> Window:
        """The stretch itself."""
        return Window(self.start_ns, self.start_ns + self.bins * self.every_ns)


def lattice(start_ns: int, length_ns: int, settings: Settings, hold_s_max: float) -> Lattice:
    """The bins of that stretch, which begins and ends with a bin."""
    margin = settings.margin_bins(hold_s_max)
    tail = margin if settings.fill == "linear" else 0
    return Lattice(start_ns, settings.every_ns, margin, length_ns // settings.every_ns, tail)


class Bins(NamedTuple):
    """A tree's bins, a row a column: values, NaN for none, and whether there are readings."""

    tree: str
    columns: Sequence[Column]
    values: Floats
    seen: Flags


class Filled(NamedTuple):
    """A tree's inner bins, filled, with a flag each."""

    tree: str
    columns: Sequence[Column]
    values: Floats
    flags: Bytes
    seen: Flags


def binned(merged: Merged, grid: Lattice) -> Iterator[Bins]:
    """The bins of each tree that has readings, trees in the order of their names."""
    total = grid.lead + grid.bins + grid.tail
    places = (merged.times_ns - grid.window.start_ns) // grid.every_ns
    starts, cells, values = _aggregated(merged, places)
    bounds = np.searchsorted(merged.codes[starts], np.arange(len(merged.series) + 1))
    numbered = enumerate(merged.series)
    for tree, group in itertools.groupby(numbered, key=lambda item: item[1].tree):
        codes = [code for code, _ in group if bounds[code] < bounds[code + 1]]
        if not codes:
            continue
        if len(codes) * total > _CELLS_MAX:
            raise DayfilesError(
                f"{tree}: {len(codes)} columns of {total} bins do not fit into memory: use longer "
                "bins (--every), or see whether a tag is another one in each row"
            )
        bins = Bins(
            tree,
            [merged.series[code].column for code in codes],
            np.full((len(codes), total), np.nan),
            np.zeros((len(codes), total), np.bool_),
        )
        for row, code in enumerate(codes):
            part = slice(bounds[code], bounds[code + 1])
            bins.values[row, cells[part]] = values[part]
            bins.seen[row, cells[part]] = True
        yield bins


def _aggregated(merged: Merged, places: Ints) -> tuple[Ints, Ints, Floats]:
    """For each bin with readings: where its readings begin, which bin it is, and its value."""
    codes, values = merged.codes, merged.values
    first = np.ones(len(codes), np.bool_)
    first[1:] = (codes[1:] != codes[:-1]) | (places[1:] != places[:-1])
    starts = np.flatnonzero(first)
    if not len(starts):
        return starts, starts, np.empty(0)
    is_last = np.array([one.column.measure.rule == "last" for one in merged.series], np.bool_)
    result = _means(values, first, len(starts))
    lasts = is_last[codes[starts]]
    if lasts.any():
        result[lasts] = _lasts(values, starts)[lasts]
    return starts, places[starts], result


def _means(values: Floats, first: Flags, count: int) -> Floats:
    """Bincount adds one after the other; numpy's own sums go pairwise from eight on."""
    groups = np.cumsum(first) - 1
    there = ~np.isnan(values)
    if not there.all():
        groups, values = groups[there], values[there]
    counts = np.bincount(groups, minlength=count)
    sums = np.bincount(groups, weights=values, minlength=count)
    with np.errstate(invalid="ignore"):
        return sums / counts


def _lasts(values: Floats, starts: Ints) -> Floats:
    rows = np.where(np.isnan(values), -1, np.arange(len(values)))
    latest = np.maximum.reduceat(rows, starts)
    return np.where(latest < 0, np.nan, values[latest])


# ---- filling ----


def filled(bins: Bins, grid: Lattice, settings: Settings) -> Filled:
    """The inner bins with what stands where no readings are."""
    values, flags = _held(bins, settings)
    if settings.fill == "linear":
        _interpolate(bins, settings, values, flags)
    inner = slice(grid.lead, grid.lead + grid.bins)
    return Filled(bins.tree, bins.columns, values[:, inner], flags[:, inner], bins.seen[:, inner])


def _held(bins: Bins, settings: Settings) -> tuple[Floats, Bytes]:
    """Each value for as long as it stands, then nothing up to the next bin with readings."""
    rows, total = bins.seen.shape
    points = bins.seen.copy()
    points[:, 0] = True  # so that nothing reaches into the next row
    places = np.flatnonzero(points)
    found = bins.values.ravel()[places]
    reach = np.diff(places, append=rows * total)
    stands = np.array([_held_bins(column, settings) for column in bins.columns])
    runs = np.minimum(reach, 1 + stands[places // total])
    runs[np.isnan(found)] = 0
    lengths = np.stack([runs, reach - runs], axis=1).ravel()
    pieces = np.full((len(places), 2), np.nan)
    pieces[:, 0] = found
    flags = np.repeat(np.tile(np.array([HELD, MISSING], np.int8), len(places)), lengths)
    flags[places[runs > 0]] = OBSERVED
    return np.repeat(pieces.ravel(), lengths).reshape(rows, total), flags.reshape(rows, total)


def _held_bins(column: Column, settings: Settings) -> int:
    is_line = settings.fill == "linear" and column.measure.kind == "continuous"
    if settings.fill == "none" or is_line:
        return 0
    return settings.hold_bins(column)


def _interpolate(bins: Bins, settings: Settings, values: Floats, flags: Bytes) -> None:
    """Between neighbours with readings, where both have values: straight lines."""
    for row, column in enumerate(bins.columns):
        if column.measure.kind != "continuous":
            continue
        known = np.flatnonzero(bins.seen[row])
        steps = np.diff(known)
        near = np.flatnonzero((steps > 1) & (steps <= settings.hold_bins(column)))
        gaps = steps[near] - 1
        left = np.repeat(known[near], gaps)
        steps_of = np.repeat(steps[near], gaps)
        offset = np.arange(len(left)) - np.repeat(np.cumsum(gaps) - gaps, gaps) + 1
        a = bins.values[row, left]
        b = bins.values[row, left + steps_of]
        between = a + (b - a) * (offset / steps_of)
        values[row, left + offset] = between
        flags[row, left + offset] = np.where(np.isnan(between), MISSING, INTERPOLATED)
