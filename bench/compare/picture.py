"""A comparison as a picture: how many times better this store was, by peer and measurement.

Needs the extra `plot`. Blue where it won, red where it lost, white where both were alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.table import COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.compare.table import Row

_LOG_MAX = 3.0  # eight times better or worse has the full colour
_UNIT = re.compile(r" (GB/s|Mrows/s|ms)$|`")
_PALE = 0.6  # of that: dark text is readable on it


def draw(found: Mapping[str, Sequence[Row]], path: Path) -> bool:
    """Draw all profiles into a file; False where there is nothing to draw, or no matplotlib."""
    measured = {name: [row for row in rows[2:] if row.values] for name, rows in found.items()}
    measured = {name: rows for name, rows in measured.items() if rows}
    if not measured:
        return False
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        return False
    page = Figure(figsize=(11, 0.7 + 4.6 * len(measured)), layout="constrained")
    panels = page.subplots(len(measured), 1, squeeze=False)[:, 0]
    for axes, (profile, rows) in zip(panels, measured.items(), strict=True):
        _panel(axes, profile, rows)
    page.suptitle("How many times better kvstore was than each peer, in the same run")
    page.savefig(path)
    return True


def _panel(axes: Axes, profile: str, rows: Sequence[Row]) -> None:
    ratios = [[row.ratio(column) for column in COLUMNS] for row in rows]
    colours = [[_log(ratio) for ratio in line] for line in ratios]
    axes.imshow(colours, cmap="RdBu", vmin=-_LOG_MAX, vmax=_LOG_MAX, aspect="auto")
    for y, line in enumerate(ratios):
        for x, ratio in enumerate(line):
            if ratio is not None:
                colour = "white" if abs(_log(ratio)) > _PALE * _LOG_MAX else "black"
                text = f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"
                axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(f"{profile}: 1 is alike, blue is better, red is worse", fontsize=10)
    names = [_UNIT.sub("", column.heading).replace("MB", "memory") for column in COLUMNS]
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.tick_params(length=0)


def _log(ratio: float | None) -> float:
    return math.nan if ratio is None else math.log2(ratio)
