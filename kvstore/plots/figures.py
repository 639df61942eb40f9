"""Whole figures: which panels a range or a row gets, how large they are, what the titles say."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kvstore.errors import DamageError, KvstoreError
from kvstore.ingest import PARTICLES
from kvstore.plots import panels, words
from kvstore.plots.axes import TimeAxis, text_of
from kvstore.plots.digest import (
    Digest,
    Elements,
    Line,
    OnProgress,
    digest,
    is_scalar,
    numbers_of,
    plottable,
)
from kvstore.plots.panels import Mark
from kvstore.plots.rows import Row, find_row
from kvstore.reading import Scan
from kvstore.schema import Array, Field
from kvstore.segment import OnDamage
from kvstore.store import Store
from kvstore.stream import Stream
from kvstore.survey import Span, Survey, scan_of, survey
from kvstore.timestamps import NS_PER_S, TimeLike, Unit

PERCENTILES: Final = (5.0, 50.0, 95.0)
PANELS_MAX: Final = 12  # without a choice of fields: more would be a wall
_WIDTH_IN: Final = 10.0
_HEADER_IN: Final = 0.9
_RATE_IN: Final = 2.2
_LINE_IN: Final = 1.6
_PROFILE_IN: Final = 2.6
_IMAGE_IN: Final = 3.0
_ROW_IMAGE_IN: Final = 4.0
_IMAGES_ACROSS: Final = 3
_TEXT_IN: Final = 0.19
_READABLE: Final = 0.55  # of these sizes
_WIDTH_IN_MIN: Final = 4.0


class _Section(NamedTuple):
    """A part of a figure from side to side; draw gets its subfigure and the width in inches."""

    height_in: float
    draw: Callable[[Any, float], None]


def overview(
    store: Store,
    stream: str,
    start: TimeLike | None = None,
    stop: TimeLike | None = None,
    *,
    unit: Unit | None = None,
    fields: Sequence[str] | None = None,
    percentiles: Sequence[float] = PERCENTILES,
    size_in: tuple[float, float] | None = None,
    on_damage: OnDamage | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Figure:
    """A range of a stream: its rate over time with gaps, and what each field holds.

    A scalar field gives a line over time, a one-dimensional one the mean and a band of
    percentiles by index, a two-dimensional one images of the mean and of each percentile; of
    more dimensions, the later ones are laid side by side. Text has no picture.

    start, stop, unit, on_damage: as in ``Stream.read``. fields: which ones, in this order; by
    default the first PANELS_MAX that can be plotted. percentiles: from 0 to 100. size_in: width
    and height in inches, by default as much as the panels need. on_progress: called with the
    part done, 0 to 1.
    """
    target = store[stream]
    chosen = _chosen(target, fields)
    ranks = _checked(percentiles)
    damages = _Damages(on_damage)
    scan = scan_of(target, start, stop, unit=unit, on_damage=damages)
    found = survey(scan)
    if found is None:
        return _empty(store, target, scan, size_in)
    summary = digest(scan, found, [f for f in chosen if plottable(f)], ranks, on_progress)
    marks = _marks(store, target, found)
    sections = [*_over_time(target, found, summary, marks), *_by_element(summary)]
    heading = f"{words.name(store, target)}\n{words.extent(target, found)}"
    notes = [words.share(found, summary), words.left_out(target, chosen), damages.note()]
    return _composed(heading, notes, sections, size_in)


def row(
    store: Store,
    stream: str,
    number: int,
    start: TimeLike | None = None,
    stop: TimeLike | None = None,
    *,
    unit: Unit | None = None,
    fields: Sequence[str] | None = None,
    size_in: tuple[float, float] | None = None,
) -> Figure:
    """One row of a range, such as one particle: scalars in words, the others as pictures.

    number: from 0, in the order in which ``Stream.read`` gives the rows; negative ones count
    from the end. The other arguments are those of ``overview``. KvstoreError where there is no
    such row.
    """
    target = store[stream]
    chosen = _chosen(target, fields)
    scan = scan_of(target, start, stop, unit=unit)
    if number < 0:
        number += target.count(start, stop, unit=unit)
    found = find_row(scan, number, chosen)
    noun = "Particle" if stream == PARTICLES else "Row"
    heading = f"{words.name(store, target)}\n{noun} {number:,}, {text_of(found.time_ns)}"
    notes = [words.left_out(target, [field for field in chosen if field.name in found.values])]
    return _composed(heading, notes, _of_row(found, chosen), size_in)


# ---- what is asked for ----


class _Damages:
    """Reports each damage once, though two passes may meet it."""

    def __init__(self, report: OnDamage | None):
        self._report = report
        self._seen: set[str] = set()

    def __call__(self, error: DamageError) -> None:
        if self._report is None:
            raise error
        if str(error) not in self._seen:
            self._seen.add(str(error))
            self._report(error)

    def note(self) -> str:
        """A line for the figure."""
        count = len(self._seen)
        return f"{count} damaged part{'s' if count > 1 else ''} left out." if count else ""


def _chosen(target: Stream, names: Sequence[str] | None) -> list[Field]:
    schema = target.schema
    if names is None:
        there = [each for each in schema.fields if plottable(each) and each.name != schema.time]
        return there[:PANELS_MAX]
    chosen = [schema.fields[schema.number(name)] for name in names]
    for field in chosen:
        if not plottable(field):
            raise KvstoreError(
                f"field {field.name!r} of shape {field.shape} has no picture: text, dates with "
                "a shape and rows of over 4 million values have none; leave it out"
            )
    return chosen


def _checked(percentiles: Sequence[float]) -> list[float]:
    for each in percentiles:
        if not 0 <= each <= 100:  # noqa: PLR2004
            raise KvstoreError(f"percentile {each}: use numbers from 0 to 100")
    return sorted(set(percentiles))


# ---- panels ----


def _marks(store: Store, target: Stream, found: Survey) -> list[Mark]:
    """The gaps that the store recorded in this range, and silences that the rows show.

    A silence as rows arrive that late ones filled is none here.
    """
    recorded = [
        mark
        for mark in _recorded(store, target, found.span)
        if mark.kind != panels.SILENCE or found.is_empty(mark.start_s, mark.stop_s)
    ]
    known = [mark for mark in recorded if mark.kind == panels.SILENCE]
    seen = [
        Mark(panels.SILENCE, start, stop)
        for start, stop in found.silences()
        if not any(mark.start_s < stop and start < mark.stop_s for mark in known)
    ]
    return seen + recorded


def _recorded(store: Store, target: Stream, span: Span) -> Iterator[Mark]:
    for gap in store.gaps():
        start, stop = max(gap.start_ns, span.start_ns), min(gap.stop_ns, span.stop_ns)
        if gap.stream not in ("", target.name) or start > stop:
            continue
        if gap.kind == "clock_ahead":  # nothing is in between: a line where it arrived
            start = stop
        ends = ((end - span.start_ns) / NS_PER_S for end in (start, stop))
        kind = panels.SILENCE if gap.kind == "silence" else gap.kind.replace("_", " ")
        yield Mark(kind, *ends)


def _over_time(
    target: Stream, found: Survey, summary: Digest, marks: Sequence[Mark]
) -> list[_Section]:
    lines = [each for each in summary.fields if isinstance(each, Line)]
    if found.span.start_ns == found.span.stop_ns:
        return _worded([words.line_words(each) for each in lines])
    time = TimeAxis(found.span)
    silences = [mark[1:] for mark in marks if mark.kind == panels.SILENCE]
    banded = [number for number, line in enumerate(lines) if panels.has_band(line)]
    heights = [_RATE_IN, *[_LINE_IN] * len(lines)]

    def draw(part: Any, width_in: float) -> None:
        axes = part.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[
            :, 0
        ]
        panels.rate(axes[0], found, words.noun(target), time, marks)
        for each, line in zip(axes[1:], lines, strict=True):
            panels.line(each, line, time, silences)
            panels.shade(each, time, marks)
        if banded:
            panels.legend(axes[1 + banded[0]], ("least to greatest", "mean"))
        time.label(axes[-1], width_in)

    return [_Section(sum(heights), draw)]


def _by_element(summary: Digest) -> list[_Section]:
    return [_element_section(each) for each in summary.fields if isinstance(each, Elements)]


def _element_section(found: Elements) -> _Section:
    ranks = list(found.percentiles.items())
    if _flat(found.mean).ndim == 1:
        band = (ranks[0][1].reshape(-1), ranks[-1][1].reshape(-1)) if len(ranks) > 1 else None
        legend = f"{ranks[0][0]:g} % to {ranks[-1][0]:g} %" if band else ""
        return _Section(
            _PROFILE_IN,
            lambda part, _: panels.profile(
                part.subplots(), found.field, _flat(found.mean), band, legend
            ),
        )
    mean = "share true" if found.field.np_dtype.kind == "b" else "mean"
    images = [(mean, found.mean), *((words.rank_name(rank), each) for rank, each in ranks)]
    labelled = [(title, found.field, _flat(each)) for title, each in images]
    return _images(_IMAGE_IN, labelled, f"{panels.short(found.field.name)}\nfirst index")


def _images(
    height_in: float, images: Sequence[tuple[str, Field, Array]], first_index: str = "first index"
) -> _Section:
    """Images side by side, each with its title; first_index: the label of their y axes."""

    def draw(part: Any, _: float) -> None:
        axes = part.subplots(1, len(images), squeeze=False)[0]
        for each, (title, field, values) in zip(axes, images, strict=True):
            panels.image(each, values, title, field.unit)
            later = (
                "later indices" if np.squeeze(values).ndim < len(field.shape) else "second index"
            )
            each.set_xlabel(later, fontsize=8)
        axes[0].set_ylabel(first_index)

    return _Section(height_in, draw)


def _flat(values: Array) -> Array:
    """At most two axes, none of length one; later axes side by side."""
    values = np.squeeze(values)
    return values if values.ndim <= 2 else values.reshape(len(values), -1)  # noqa: PLR2004


def _of_row(found: Row, fields: Sequence[Field]) -> list[_Section]:
    there = [field for field in fields if field.name in found.values]
    lines = [
        f"{panels.quantity(field)}:  {words.value_text(found.values[field.name], field)}"
        for field in there
        if is_scalar(field)
    ]
    sections = _worded(lines)
    images = []
    for field in there:
        values = _flat(numbers_of(found.values[field.name])[0])
        if values.ndim == 1:
            sections.append(_profile_of_row(field, values))
        elif values.ndim == 2:  # noqa: PLR2004
            images.append((panels.short(field.name), field, values))
    for at in range(0, len(images), _IMAGES_ACROSS):
        sections.append(_images(_ROW_IMAGE_IN, images[at : at + _IMAGES_ACROSS]))
    return sections


def _profile_of_row(field: Field, values: Array) -> _Section:
    return _Section(
        _PROFILE_IN, lambda part, _: panels.profile(part.subplots(), field, values, None, "")
    )


def _worded(lines: list[str]) -> list[_Section]:
    if not lines:
        return []
    height_in = _TEXT_IN * (len(lines) + 1)
    return [_Section(height_in, lambda part, _: panels.values(part.subplots(), lines))]


# ---- the whole ----


def _empty(store: Store, target: Stream, scan: Scan, size_in: tuple[float, float] | None) -> Figure:
    def draw(part: Any, _: float) -> None:
        axes = part.subplots()
        axes.set_axis_off()
        panels.nothing(axes, "No rows in this range.")

    return _composed(
        f"{words.name(store, target)}\n{words.whereabouts(target, scan)}",
        [],
        [_Section(_RATE_IN, draw)],
        size_in,
    )


def _wrapped(lines: Sequence[str], width: float) -> str:
    return "\n".join(textwrap.fill(line, int(width)) for line in lines if line)


def _composed(
    heading: str,
    notes: Sequence[str],
    sections: Sequence[_Section],
    size_in: tuple[float, float] | None,
) -> Figure:
    needed_in = _HEADER_IN + sum(section.height_in for section in sections)
    width_in, height_in = size_in or (_WIDTH_IN, needed_in)
    if width_in < _WIDTH_IN_MIN or height_in < needed_in * _READABLE:
        raise KvstoreError(
            f"a figure of {width_in:g} x {height_in:g} inches is too small for its panels: they "
            f"need {_WIDTH_IN_MIN:g} x {needed_in * _READABLE:.1f}; fewer fields, or a larger size"
        )
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    figure.suptitle(_wrapped(heading.split("\n"), width_in * 10), fontsize=11, parse_math=False)
    if said := _wrapped(notes, width_in * 14):
        figure.supxlabel(said, fontsize=8, color="#555555", x=0.01, ha="left", parse_math=False)
    heights = [section.height_in for section in sections]
    if heights:
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for section, part in zip(sections, parts, strict=True):
            section.draw(part, width_in)
    for axes in figure.axes:
        panels.finish(axes, height_in / needed_in)
    return figure
