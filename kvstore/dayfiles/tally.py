"""What a day's readings and bins amount to: counts that add up over days, and what was odd.

Records here travel between processes and into the manifest, as JSON. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore.dayfiles.chunk import Window
from kvstore.dayfiles.grid import HELD, INTERPOLATED, OBSERVED, Filled
from kvstore.dayfiles.readings import Ints, Merged
from kvstore.timestamps import NS_PER_S

FLAT_S: Final = 600  # readings that are all equal for this long are a flat line


class SeriesTally(NamedTuple):
    """A series in a day.

    observed, held, interpolated, missing: bins, of the hours that have a file. flat_runs: stretches
    of at least FLAT_S in which all readings are equal. first_ns, last_ns: of its readings, 0 where
    there are none. gap_ns: the longest time between two of them.
    """

    readings: int = 0
    out_of_range: int = 0
    flat_runs: int = 0
    first_ns: int = 0
    last_ns: int = 0
    gap_ns: int = 0
    observed: int = 0
    held: int = 0
    interpolated: int = 0
    missing: int = 0


def reading_tallies(merged: Merged, inner: Window) -> dict[str, SeriesTally]:
    """What the readings of the stretch itself say, by series."""
    kept = inner.holds(merged.times_ns)
    codes, times, values = merged.codes[kept], merged.times_ns[kept], merged.values[kept]
    count = len(merged.series)
    bounds = np.searchsorted(codes, np.arange(count + 1)).tolist()
    outside = _outside(merged, codes, values)
    flat = _flat_runs(codes, times, values, count)
    tallies = {}
    for code, (first, stop) in enumerate(itertools.pairwise(bounds)):
        if first == stop:
            continue
        series, own = merged.series[code], times[first:stop]
        gap = int(np.diff(own).max(initial=0))
        is_continuous = series.column.measure.kind == "continuous"
        tallies[series.key] = SeriesTally(
            readings=stop - first,
            out_of_range=int(outside[code]),
            flat_runs=int(flat[code]) if is_continuous else 0,
            first_ns=int(own[0]),
            last_ns=int(own[-1]),
            gap_ns=gap,
        )
    return tallies


def _outside(merged: Merged, codes: Ints, values: Any) -> Ints:
    measures = [one.column.measure for one in merged.series]
    low = np.array([m.low for m in measures])[codes]
    high = np.array([m.high for m in measures])[codes]
    return np.bincount(codes[(values < low) | (values > high)], minlength=len(measures))


def _flat_runs(codes: Ints, times: Ints, values: Any, count: int) -> Ints:
    if not len(codes):
        return np.zeros(count, np.int64)
    changes = np.ones(len(codes), np.bool_)
    changes[1:] = (codes[1:] != codes[:-1]) | (values[1:] != values[:-1])
    starts = np.flatnonzero(changes)
    ends = np.append(starts[1:], len(codes)) - 1
    is_long = times[ends] - times[starts] >= FLAT_S * NS_PER_S
    return np.bincount(codes[starts[is_long]], minlength=count)


def with_bins(
    tallies: Mapping[str, SeriesTally], tree: Filled, bins_written: int
) -> dict[str, SeriesTally]:
    """A tree's tallies with its bins counted, in the hours that have a file."""
    counts = np.stack(
        [np.count_nonzero(tree.flags == flag, axis=1) for flag in (OBSERVED, HELD, INTERPOLATED)],
        axis=1,
    ).tolist()
    counted = {}
    for column, (observed, held, interpolated) in zip(tree.columns, counts, strict=True):
        key = f"{tree.tree}/{column.name}"
        missing = bins_written - observed - held - interpolated
        counted[key] = tallies.get(key, SeriesTally())._replace(
            observed=observed, held=held, interpolated=interpolated, missing=missing
        )
    return counted


def summed(days: Iterable[Mapping[str, SeriesTally]]) -> dict[str, SeriesTally]:
    """Days together, given in their order: gaps reach from one into the next."""
    total: dict[str, SeriesTally] = {}
    for day in days:
        for key, tally in day.items():
            total[key] = _sum(total[key], tally) if key in total else tally
    return dict(sorted(total.items()))


def _sum(before: SeriesTally, after: SeriesTally) -> SeriesTally:
    between = after.first_ns - before.last_ns if before.readings and after.readings else 0
    first = before if before.readings else after
    last = after if after.readings else before
    return SeriesTally(
        before.readings + after.readings,
        before.out_of_range + after.out_of_range,
        before.flat_runs + after.flat_runs,
        first.first_ns,
        last.last_ns,
        max(before.gap_ns, after.gap_ns, between),
        *(a + b for a, b in zip(before[6:], after[6:], strict=True)),
    )


def by_measure(tallies: Mapping[str, SeriesTally]) -> dict[str, SeriesTally]:
    """All trees together, by column; the longest gap is that of one of them."""
    total: dict[str, SeriesTally] = {}
    for key, tally in tallies.items():
        name = key.partition("/")[2]
        other = total.get(name)
        total[name] = tally if other is None else _beside(other, tally)
    return total


def _beside(one: SeriesTally, other: SeriesTally) -> SeriesTally:
    timed = [tally for tally in (one, other) if tally.readings]
    return SeriesTally(
        one.readings + other.readings,
        one.out_of_range + other.out_of_range,
        one.flat_runs + other.flat_runs,
        min((tally.first_ns for tally in timed), default=0),
        max((tally.last_ns for tally in timed), default=0),
        max(one.gap_ns, other.gap_ns),
        *(a + b for a, b in zip(one[6:], other[6:], strict=True)),
    )
