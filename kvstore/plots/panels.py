"""One panel each: rate, line, profile, image, values. They draw into axes that they are given.

Colours are Okabe and Ito's, which colour-blind people can tell apart; images use cividis. Names
and units are shown as they are stored, with no markup in them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore.plots.axes import TimeAxis, dated
from kvstore.plots.digest import Line
from kvstore.schema import Array, Field
from kvstore.survey import Survey, rate_unit

BLUE: Final = "#0072B2"
_OTHER: Final = "#F0E442"
SILENCE: Final = "no data"
_KINDS: Final = {
    SILENCE: "#BBBBBB",
    "dropped": "#CC79A7",
    "damaged": "#D55E00",
    "rejected": "#E69F00",
    "clock back": "#009E73",
    "clock ahead": "#56B4E9",
    "unclean stop": "#000000",
}
_MAP: Final = "cividis"
_RATE_BINS_MAX: Final = 256
_MARKED_POINTS_MAX: Final = 120  # more than that, and points are a thick line
_NAME_MAX: Final = 40
_LABEL_MAX: Final = 20
_SMALL: Final = 8
_SCALE_MIN: Final = 0.7
_BAND: Final[dict[str, Any]] = {"color": BLUE, "alpha": 0.25, "linewidth": 0}


class Mark(NamedTuple):
    """A stretch to be shaded, in seconds after the start; kind is its word in the legend."""

    kind: str
    start_s: float
    stop_s: float


def quantity(field: Field) -> str:
    """A field's name and unit as an axis says them: voltage / V."""
    unit = field.unit
    if field.np_dtype.kind == "m" and not unit:
        unit = np.datetime_data(field.np_dtype)[0]
    name = short(field.name)
    return f"{name} / {short(unit)}" if unit and field.np_dtype.kind != "M" else name


def short(text: str) -> str:
    """A name that fits into a line."""
    return text if len(text) <= _NAME_MAX else text[: _NAME_MAX - 1] + "…"


def beside(text: str) -> str:
    """A label that fits beside an axis, in lines."""
    return textwrap.fill(text, _LABEL_MAX, max_lines=3, placeholder="…")


def _drawn_quantity(field: Field) -> str:
    drawn = quantity(field)
    return beside(f"magnitude of {drawn}" if field.np_dtype.kind == "c" else drawn)


def rate(axes: Any, survey: Survey, noun: str, time: TimeAxis, marks: Sequence[Mark]) -> None:
    """Rows per time as steps from zero; needs a span that is longer than nothing."""
    edges_s, rows = survey.steps(_RATE_BINS_MAX)
    per_s = rows / np.diff(edges_s)
    typical = float(np.median(per_s[per_s > 0]))
    every_s, unit = rate_unit(typical)
    edges = time.at(edges_s)
    axes.stairs(per_s * every_s, edges, fill=True, color=BLUE, alpha=0.35, linewidth=0)
    axes.stairs(per_s * every_s, edges, color=BLUE, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{noun} per {unit}")
    shade(axes, time, marks)
    if marks:
        legend(axes)


def line(axes: Any, found: Line, time: TimeAxis, breaks: Sequence[tuple[float, float]]) -> None:
    """The mean over time in a band from least to greatest, open where there are no rows."""
    seconds, mean, low, high = _opened(found, breaks)
    if found.field.np_dtype.kind == "M":
        mean, low, high = (values / 86400 for values in (mean, low, high))
        dated(axes.yaxis, 5)
    x = time.at(seconds)
    few = len(found.seconds) <= _MARKED_POINTS_MAX
    if has_band(found):
        axes.fill_between(x, low, high, label="least to greatest", **_BAND)
    axes.plot(x, mean, color=BLUE, linewidth=1, marker="." if few else "", label="mean")
    alone = _alone(mean)
    axes.plot(x[alone], mean[alone], ".", color=BLUE, markersize=3)
    axes.vlines(x[alone], low[alone], high[alone], color=BLUE, alpha=0.4, linewidth=2)
    if found.field.np_dtype.kind == "b":
        axes.set_ylim(-0.05, 1.05)
        axes.set_yticks([0, 1], ["false", "true"])
    axes.set_ylabel(_drawn_quantity(found.field))
    if not len(found.seconds):
        nothing(axes, "no values")


def has_band(found: Line) -> bool:
    """Whether there is more to a line than its mean."""
    return found.field.np_dtype.kind != "b" and bool((found.low < found.high).any())


def _opened(found: Line, breaks: Sequence[tuple[float, float]]) -> tuple[Array, ...]:
    """The line with a NaN in each break, where the pen is lifted."""
    silent = [(start + stop) / 2 for start, stop in breaks]
    middles = np.sort(np.concatenate([silent, found.breaks]))
    at = np.searchsorted(found.seconds, middles)
    columns = (found.mean, found.low, found.high)
    opened = (np.insert(column, at, np.nan) for column in columns)
    return np.insert(found.seconds, at, middles), *opened


def _alone(mean: Array) -> Array:
    """Points without a neighbour, which a line does not show."""
    there = np.r_[False, ~np.isnan(mean), False]
    alone: Array = there[1:-1] & ~there[:-2] & ~there[2:]
    return alone


def profile(
    axes: Any, field: Field, mean: Array, band: tuple[Array, Array] | None, words: str
) -> None:
    """A one-dimensional field against its index, in a band of percentiles."""
    x = np.arange(len(mean))
    few = len(mean) <= _MARKED_POINTS_MAX
    if band is not None:
        axes.fill_between(x, *band, label=words, **_BAND)
    axes.plot(x, mean, color=BLUE, linewidth=1, marker="." if few else "", label="mean")
    axes.set_xlabel("index")
    share = field.np_dtype.kind == "b"
    axes.set_ylabel(beside(f"{field.name}, share true") if share else _drawn_quantity(field))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.01)
    if band is not None:
        legend(axes)


def image(axes: Any, values: Array, title: str, unit: str) -> None:
    """A two-dimensional field: first index downwards, second to the right."""
    shown = axes.imshow(values, aspect="auto", cmap=_MAP, interpolation="auto")
    axes.set_title(title, fontsize=_SMALL + 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    bar = axes.figure.colorbar(shown, ax=axes, pad=0.02, aspect=25)
    bar.ax.tick_params(labelsize=_SMALL)
    bar.formatter.set_powerlimits((-3, 4))
    if unit:
        bar.set_label(short(unit))


def values(axes: Any, lines: Sequence[str]) -> None:
    """Scalars in words, one a line."""
    axes.set_axis_off()
    axes.text(0, 1, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=10)


def nothing(axes: Any, words: str) -> None:
    """Say in the middle of an empty panel why it is empty."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="#555555")


def shade(axes: Any, time: TimeAxis, marks: Sequence[Mark]) -> None:
    """Shade stretches, a colour for each kind; thin ones keep an outline that can be seen."""
    for kind in dict.fromkeys(mark.kind for mark in marks):
        ends = [(mark.start_s, mark.stop_s, np.nan) for mark in marks if mark.kind == kind]
        colour = _KINDS.get(kind, _OTHER)
        axes.fill_between(
            time.at(np.ravel(ends)),
            0,
            1,
            transform=axes.get_xaxis_transform(),
            facecolor=(colour, 0.4),
            edgecolor=(colour, 0.9),
            linewidth=0.8,
            zorder=0.5,
            label=kind,
        )


def finish(axes: Any, scale: float) -> None:
    """Show words as they are, a $ in a name is no markup; smaller in a small figure."""
    axes.yaxis.label.set_fontsize(10 * min(max(scale, _SCALE_MIN), 1))
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts):
        text.set_parse_math(False)


def legend(axes: Any, wanted: Sequence[str] = ()) -> None:
    """Above the panel, at its right end: there it covers nothing. wanted: labels, or all."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in found if not wanted or label in wanted]
    axes.legend(
        [found[label] for label in labels],
        labels,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=8,
        frameon=False,
        fontsize=_SMALL,
        borderaxespad=0.1,
    )
