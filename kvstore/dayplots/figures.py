"""The figures of day files, each a function of what it shows. Titles, axes with units, UTC.

Held bins are lighter: a pale line through all values, a dark point where there were readings.
A gap stays open. Colours are Okabe and Ito's, which colour-blind people can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kvstore.dayfiles.measures import column as described
from kvstore.dayplots import grids
from kvstore.dayplots.grids import Floats, Grid
from kvstore.plots.axes import dated
from kvstore.timestamps import NS_PER_S

COLOURS: Final = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A900",
)  # fmt: skip
_DAY_S: Final = 86400.0
_WIDTH_IN: Final = 11.0
_PANEL_IN: Final = 1.9
_TICKS: Final = 10
_PALE: Final[dict[str, Any]] = {"linewidth": 1.0, "alpha": 0.4, "solid_capstyle": "butt"}
_DARK: Final[dict[str, Any]] = {"linestyle": "", "marker": ".", "markersize": 2.5}
_BAR: Final[dict[str, Any]] = {"width": 0.8, "align": "edge"}
_HEX: Final[dict[str, Any]] = {"gridsize": 60, "mincnt": 1, "bins": "log", "cmap": "cividis"}
_POINTS_HEX: Final = 3000  # fewer points than that are shown as points
_HOURS: Final = 24
_COLUMNS: Final = 288  # of an image of a day: five minutes each
_LABELS_MAX: Final = 14


class Chosen(NamedTuple):
    """What figures are of: a module's tree in a folder of day files, on one day."""

    output: Path
    tree: str
    day: date

    @property
    def phase(self) -> str:
        """The phase that the module belongs to."""
        return self.tree.partition("_")[0]

    def title(self, what: str) -> str:
        """A figure's title."""
        return f"{what}, {named(self.tree)}, {self.day} UTC"


def named(tree: str) -> str:
    """A tree as people say it: phase 1, module 3."""
    phase, _, module = tree.partition("_")
    if tree == "system":
        return "system"
    return f"phase {phase}, module {module}" if module else f"phase {phase}"


def label(name: str) -> str:
    """A column as an axis says it: Module voltage / V."""
    unit = described(name).measure.unit
    text = name.replace("_", " ").capitalize()
    return f"{text} / {unit}" if unit not in {"", "1"} else text


# ---- axes ----


def _panels(title: str, count: int, *, height_in: float = _PANEL_IN) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH_IN, max(3.2, height_in * count + 0.9)), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]


def _days(grid: Grid) -> Floats:
    """Begins of the bins in matplotlib's unit, days since 1970."""
    days: Floats = (grid.start_ns / NS_PER_S + grid.seconds) / _DAY_S
    return days


def _time_axis(axes: Any, grid: Grid) -> None:
    start = grid.start_ns / NS_PER_S / _DAY_S
    axes.set_xlim(start, start + len(grid) * grid.every_s / _DAY_S)
    dated(axes.xaxis, _TICKS)
    axes.set_xlabel("Time / UTC")


def _line(axes: Any, grid: Grid, name: str, colour: str, text: str | None = None) -> None:
    """A column over time: pale where held, dark where read."""
    days = _days(grid)
    axes.plot(days, grid.column(name), color=colour, **_PALE)
    if name in grid.values:
        axes.plot(days, grid.observed(name), color=colour, label=text, **_DARK)


def _empty(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#666666")


def _say_held(figure: Any, title: str, grid: Grid) -> None:
    """Says below the title how held bins look, or why they look like all others."""
    note = "dark: bins with readings, pale: held"
    if not grid.told_apart:
        note = "held bins look like read ones: convert --with-flags tells them apart"
    figure.suptitle(f"{title}\n{note}", fontsize=11)


def _legend(axes: Any, **more: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=4, fontsize=8, **more)


# ---- one module ----


def measures(chosen: Chosen) -> Figure:
    """Each measure of a module over a day; cell voltages as their median and range."""
    grid = grids.load(*chosen)
    cells = grid.cells()
    names = [name for name in grid.values if not name.startswith("cell_voltage_")]
    title = chosen.title("Measures")
    figure, axes = _panels(title, len(names) + bool(cells))
    for each, name, colour in zip(axes, names, COLOURS * 9, strict=False):
        _line(each, grid, name, colour)
        each.set_ylabel(label(name), fontsize=8)
    if cells:
        low, middle, high = spread_of(cells)
        axes[-1].vlines(_days(grid), low, high, colors="#AAAAAA", label="all cells")
        axes[-1].plot(_days(grid), middle, color=COLOURS[0], label="median", **_DARK)
        axes[-1].set_ylabel("Cell voltage / V", fontsize=8)
        _legend(axes[-1])
    _time_axis(axes[-1], grid)
    _say_held(figure, title, grid)
    return figure


def spread_of(cells: Mapping[int, Floats]) -> tuple[Floats, Floats, Floats]:
    """Least, median and greatest of the cells in each bin; NaN where fewer than two are known."""
    stacked = np.vstack([*cells.values()])
    known = np.count_nonzero(~np.isnan(stacked), axis=0) > 1
    low, middle, high = np.full((3, stacked.shape[1]), np.nan)
    some = stacked[:, known]
    low[known], high[known] = np.nanmin(some, axis=0), np.nanmax(some, axis=0)
    middle[known] = np.nanmedian(some, axis=0)
    return low, middle, high


def cells(chosen: Chosen) -> Figure:
    """Least, median and greatest cell voltage, and each cell's deviation from the median."""
    grid = grids.load(*chosen)
    found = grid.cells()
    figure, (above, below) = _panels(chosen.title("Cell voltages"), 2, height_in=3.4)
    days = _days(grid)
    if not found:
        _empty(above, "no cell voltages")
        _empty(below, "no cell voltages")
        return figure
    low, middle, high = spread_of(found)
    lines = (
        (high, "maximum", COLOURS[1]),
        (middle, "median", COLOURS[6]),
        (low, "minimum", COLOURS[0]),
    )
    for values, text, colour in lines:
        above.plot(days, values, color=colour, **_PALE)
        above.plot(days, values, color=colour, label=text, **_DARK)
    above.set_ylabel("Cell voltage / V")
    above.legend(loc="upper right", ncols=3, markerscale=4, fontsize=8)
    deviation = pooled((np.vstack([*found.values()]) - middle) * 1000, _COLUMNS)
    known = np.abs(deviation[~np.isnan(deviation)])
    limit = max(float(np.percentile(known, 99)), 1.0) if len(known) else 1.0
    below.set_facecolor("#DDDDDD")
    image = below.imshow(
        deviation, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-limit, vmax=limit,
        extent=(days[0], days[-1] + grid.every_s / _DAY_S, len(found) + 0.5, 0.5),
    )  # fmt: skip
    below.set_yticks(range(1, len(found) + 1), [*map(str, found)])
    below.set_ylabel("Cell")
    figure.colorbar(image, ax=below, label="Deviation from median / mV (grey: none)", extend="both")
    _time_axis(below, grid)
    return figure


def pooled(rows: Floats, columns: int) -> Floats:
    """Means of neighbouring columns, at most so many; NaN only where all of them are.

    Cells are read a few times a day: a column a bin would be too thin to be seen.
    """
    width = -(-rows.shape[1] // columns)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % width)), constant_values=np.nan)
    parts = padded.reshape(len(rows), -1, width)
    known = np.count_nonzero(~np.isnan(parts), axis=2)
    means: Floats = np.where(known, np.nansum(parts, axis=2) / np.maximum(known, 1), np.nan)
    return means


def spread_current(chosen: Chosen) -> Figure:
    """The spread of a module's cells against its current."""
    grid = grids.load(*chosen)
    found = grid.cells()
    spread = np.full(len(grid), np.nan)
    if found:
        low, _, high = spread_of(found)
        spread = (high - low) * 1000
    return _against(
        chosen.title("Cell spread against current"),
        (grid.column("module_current"), label("module_current")),
        (spread, "Range of cell voltages / mV"),
    )


def charge_current(chosen: Chosen) -> Figure:
    """State of charge against current."""
    grid = grids.load(*chosen)
    return _against(
        chosen.title("State of charge against current"),
        (grid.column("module_current"), label("module_current")),
        (grid.column("module_state_of_charge") * 100, "State of charge / %"),
    )


def _against(title: str, across: tuple[Floats, str], up: tuple[Floats, str]) -> Figure:
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes: Any = figure.subplots()
    known = ~np.isnan(across[0]) & ~np.isnan(up[0])
    count = int(np.count_nonzero(known))
    if not count:
        _empty(axes, "no bin has both")
    elif count < _POINTS_HEX:
        axes.plot(across[0][known], up[0][known], color=COLOURS[0], alpha=0.5, **_DARK)
    else:
        drawn = axes.hexbin(across[0][known], up[0][known], **_HEX)
        figure.colorbar(drawn, ax=axes, label="Bins of the grid")
    axes.set_xlabel(across[1])
    axes.set_ylabel(up[1])
    axes.set_title(f"{title}\n{count:,} bins that have both", fontsize=10)
    return figure


# ---- a phase ----


def _modules(chosen: Chosen) -> dict[str, Grid]:
    """All modules of the phase that have files of the day."""
    found = {}
    for tree in grids.trees(chosen.output):
        if tree.startswith(f"{chosen.phase}_") and any(
            grids.files(chosen.output, tree, chosen.day)
        ):
            found[tree] = grids.load(chosen.output, tree, chosen.day)
    return found


def _compared(chosen: Chosen, title: str, names: Sequence[str]) -> Figure:
    """A panel for each column, a line for each module of the phase."""
    modules = _modules(chosen)
    text = f"{title}, phase {chosen.phase}, {chosen.day} UTC"
    figure, axes = _panels(text, len(names), height_in=2.6)
    for each, name in zip(axes, names, strict=True):
        for (tree, grid), colour in zip(modules.items(), COLOURS * 9, strict=False):
            _line(each, grid, name, colour, f"module {tree.partition('_')[2]}")
        each.set_ylabel(label(name))
        _legend(each)
    for grid in [*modules.values()][:1]:
        _time_axis(axes[-1], grid)
        _say_held(figure, text, grid)
    return figure


def phase(chosen: Chosen) -> Figure:
    """The modules of a phase beside each other."""
    names = ("module_voltage", "module_current", "module_state_of_charge")
    return _compared(chosen, "Modules compared", names)


def temperatures(chosen: Chosen) -> Figure:
    """Temperatures of the modules of a phase, and of their batteries' sensors."""
    names = ("module_temperature", "battery_sensor_temperature")
    return _compared(chosen, "Temperatures", names)


# ---- all days ----


def calendar(chosen: Chosen) -> Figure:
    """Which hours of which module have readings: the share of bins, by the files' metadata."""
    modules = [tree for tree in grids.trees(chosen.output) if "_" in tree]
    shares = grids.coverage(chosen.output, modules, "module_voltage")
    days = sorted({day for each in shares.values() for day, _ in each})
    image = np.full((len(modules), len(days) * _HOURS), np.nan)
    for row, tree in enumerate(modules):
        for (day, hour), share in shares[tree].items():
            image[row, days.index(day) * _HOURS + hour] = share * 100
    figure = Figure(figsize=(_WIDTH_IN, max(3.0, 0.22 * len(modules) + 1.6)), layout="constrained")
    axes: Any = figure.subplots()
    axes.set_facecolor("#DDDDDD")
    drawn = axes.imshow(
        image, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0,
        extent=(0, len(days), len(modules) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(range(len(modules)), [tree.replace("_", ".") for tree in modules], fontsize=7)
    axes.set_ylabel("Phase.module")
    _day_labels(axes, days)
    axes.set_title("Coverage: bins of each hour with a reading of the module voltage")
    figure.colorbar(drawn, ax=axes, label="Share of bins / % (grey: no file)")
    return figure


def _day_labels(axes: Any, days: Sequence[date]) -> None:
    """The days that have files, one beside the other; some of them are named."""
    step = -(-len(days) // _LABELS_MAX)
    axes.set_xticks(range(0, len(days), step), [f"{day}" for day in days[::step]], rotation=30)
    axes.set_xlim(0, len(days))
    axes.set_xlabel("Day (those with files), from 00:00 UTC")


class Energy(NamedTuple):
    """What went through a module on a day, by the sign of its current; known_h: hours summed."""

    positive_wh: float
    negative_wh: float
    positive_ah: float
    negative_ah: float
    known_h: float


def energy_of(grid: Grid) -> Energy:
    """Sums over bins of which voltage and current are known; gaps add nothing."""
    current, hours = grid.column("module_current"), grid.every_s / 3600
    power = current * grid.column("module_voltage")
    known = ~np.isnan(power)
    current, power = current[known], power[known]
    return Energy(
        float(power[current > 0].sum() * hours),
        float(power[current < 0].sum() * hours),
        float(current[current > 0].sum() * hours),
        float(current[current < 0].sum() * hours),
        len(power) * hours,
    )


def energy(chosen: Chosen) -> Figure:
    """Energy and charge of a module on each day, gaps left out."""
    days = grids.days_of(chosen.output, chosen.tree)
    found = [energy_of(grids.load(chosen.output, chosen.tree, day)) for day in days]
    text = f"Energy and charge of each day, {named(chosen.tree)}; gaps left out"
    figure, axes = _panels(text, 3, height_in=2.1)
    _bars(axes[0], [e.positive_wh for e in found], [e.negative_wh for e in found])
    axes[0].set_ylabel("Energy / Wh")
    _bars(axes[1], [e.positive_ah for e in found], [e.negative_ah for e in found])
    axes[1].set_ylabel("Charge / Ah")
    axes[2].bar(range(len(days)), [e.known_h for e in found], color="#888888", **_BAR)
    axes[2].set_ylim(0, _HOURS)
    axes[2].set_ylabel("Known / h")
    _day_labels(axes[2], days)
    return figure


def _bars(axes: Any, up: Sequence[float], down: Sequence[float]) -> None:
    axes.bar(range(len(up)), up, color=COLOURS[0], label="current > 0", **_BAR)
    axes.bar(range(len(up)), down, color=COLOURS[1], label="current < 0", **_BAR)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


FIGURES: Final[Mapping[str, Callable[[Chosen], Figure]]] = {
    "measures": measures,
    "phase": phase,
    "cells": cells,
    "spread-current": spread_current,
    "charge-current": charge_current,
    "temperatures": temperatures,
    "coverage": calendar,
    "energy": energy,
}


def figures(
    output: str | Path, tree: str, day: str | date, names: Sequence[str] = tuple(FIGURES)
) -> Iterator[tuple[str, Figure]]:
    """The figures of those names for a module's tree (1_3) and a day, one after the other."""
    chosen = Chosen(Path(output), tree, date.fromisoformat(day) if isinstance(day, str) else day)
    for name in names:
        yield name, FIGURES[name](chosen)
