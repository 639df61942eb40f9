"""Axes of time: dates in UTC for long ranges, seconds and less after the start for short ones.

matplotlib's dates are days in a float64, exact to about 0.3 µs: too coarse for a
range of a millisecond, and unreadable in the ticks of one of a second.
"""

from __future__ import annotations

from datetime import UTC
from typing import Any, Final

import numpy as np
from matplotlib import dates

from kvstore.schema import Array
from kvstore.survey import Span
from kvstore.timestamps import format_time

RELATIVE_BELOW_S: Final = 60.0
_UNITS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (0.0, "ns"))
_DAY_S: Final = 86400.0


class TimeAxis:
    """Where seconds after a span's start lie on its axis, and how that is labelled."""

    def __init__(self, span: Span):
        self._start_ns = span.start_ns
        self._length_s = span.length_s
        self._relative = self._length_s < RELATIVE_BELOW_S
        scale, self._unit = next(each for each in _UNITS if self._length_s >= each[0])
        self._scale = scale or 1e-9

    def at(self, seconds: Array | float) -> Any:
        """The place of seconds after the start."""
        if self._relative:
            return np.asarray(seconds) / self._scale
        return (self._start_ns / 1e9 + np.asarray(seconds)) / _DAY_S

    def label(self, axes: Any, width_in: float) -> None:
        """Limits, ticks and label of the x axis."""
        margin = self._length_s * 0.01
        axes.set_xlim(self.at(-margin), self.at(self._length_s + margin))
        if self._relative:
            axes.set_xlabel(f"Time after {text_of(self._start_ns)} / {self._unit}")
        else:
            dated(axes.xaxis, int(width_in * 0.9))
            axes.set_xlabel("Time / UTC")


def dated(axis: Any, ticks_max: int) -> None:
    """Ticks of an axis in days since 1970, in UTC; up to five at any rate.

    With fewer, AutoDateLocator finds no interval for two days: it has none between 12 h and one.
    """
    locator = dates.AutoDateLocator(tz=UTC, minticks=2, maxticks=max(ticks_max, 5))
    axis.set_major_locator(locator)
    axis.set_major_formatter(dates.ConciseDateFormatter(locator, tz=UTC))


def text_of(ns: int, digits: int = 9) -> str:
    """A time for a title, cut to so many digits: 2026-02-17 15:32:37.25 UTC."""
    text = format_time(np.int64(ns), np.dtype(np.int64)).removesuffix("+00:00")
    whole, _, fraction = text.replace("T", " ").partition(".")
    fraction = fraction[:digits].rstrip("0")
    return f"{whole}{'.' if fraction else ''}{fraction} UTC"
