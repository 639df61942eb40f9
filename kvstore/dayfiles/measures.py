"""What is measured: the one table of measures, and from it the columns of a file.

A measure's row says its unit, its kind, how the readings of a bin become one value, for how long
that value stands where none follows, and what is plausible. All else (columns, their order and
types, metadata, labels of plots) follows from this table and from a column's name alone, never
from the data: so files of one kind agree, whichever run made them.

A measure that is not in the table is taken as continuous and without limits. Such a measure is
*open*: values of it that are no numbers go to a column of their own, ``NAME_text``.

Pure.
"""

from __future__ import annotations

import functools
import re
from typing import Final, Literal, NamedTuple

Level = Literal["module", "phase", "system"]
Kind = Literal["continuous", "step"]
Rule = Literal["mean", "last"]

HOLD_S: Final = 30.0  # the real data is silent for 9-30 s after each burst of readings
CELLS: Final = 14
TEXT_SUFFIX: Final = "_text"


class Measure(NamedTuple):
    """One row of the table.

    rule: what a bin's readings become, their mean or the last of them. hold_s: for how long a
    bin's value stands in bins without readings, unless --hold says otherwise. low, high: the
    plausible range, both ends in; readings outside are counted, never changed.
    """

    name: str
    level: Level
    unit: str
    kind: Kind
    rule: Rule
    hold_s: float = HOLD_S
    low: float = float("-inf")
    high: float = float("inf")
    is_text: bool = False
    is_open: bool = False


# ruff: noqa: E501
# fmt: off
MEASURES: Final = (
    #       name                              level     unit  kind          rule    hold    low     high
    Measure("module_voltage",                 "module", "V",  "continuous", "mean", HOLD_S, 35.0,   60.0),
    Measure("module_current",                 "module", "A",  "continuous", "mean", HOLD_S, -200.0, 200.0),
    Measure("module_state_of_charge",         "module", "1",  "continuous", "mean", HOLD_S, 0.0,    1.0),
    Measure("module_temperature",             "module", "°C", "continuous", "mean", HOLD_S, -30.0,  80.0),
    Measure("battery_voltage",                "module", "V",  "continuous", "mean", HOLD_S, 35.0,   60.0),
    Measure("battery_sensor_temperature",     "module", "°C", "continuous", "mean", HOLD_S, -30.0,  80.0),
    Measure("cell_voltage",                   "module", "V",  "continuous", "mean", HOLD_S, 2.5,    4.3),
    Measure("phase_current",                  "phase",  "A",  "continuous", "mean", HOLD_S, -600.0, 600.0),
    Measure("phase_module_count",             "phase",  "1",  "step",       "last", HOLD_S, 0.0,    8.0),
    Measure("phase_count",                    "system", "1",  "step",       "last", HOLD_S, 0.0,    3.0),
    Measure("system_state",                   "system", "",   "step",       "last", HOLD_S, is_text=True),
    Measure("system_frequency_freq_hz",       "system", "Hz", "continuous", "mean", HOLD_S, 45.0,   55.0),
    Measure("system_derating_charging_amp",   "system", "A",  "continuous", "mean", HOLD_S, 0.0,    600.0),
    Measure("system_derating_discharging_amp", "system", "A", "continuous", "mean", HOLD_S, 0.0,    600.0),
    Measure("system_timing_worst_us",         "system", "µs", "continuous", "mean", HOLD_S, 0.0,    1e6),
    Measure("debug_value",                    "system", "",   "continuous", "mean", HOLD_S, is_open=True),
)
# fmt: on
_BY_NAME: Final = {measure.name: measure for measure in MEASURES}

# What tags may add to a measure's name, in this order: see series.py.
_SUFFIX: Final = r"(_\d+)?(_battery_[^.]+)?(_sensor_[^.]+)?(_from_[^.]+)?(\..+)?"
_COLUMN: Final = re.compile(f"({'|'.join(_BY_NAME)}){_SUFFIX}")
_KEYED: Final = "debug_value"  # followed by any key


class Column(NamedTuple):
    """A column of a file, but for the timestamp."""

    name: str
    measure: Measure


@functools.cache
def column(name: str) -> Column:
    """The column of that name: one of the table's measures, or an open one."""
    found = _COLUMN.fullmatch(name)
    if found:
        return Column(name, _BY_NAME[found[1]])
    if name.endswith(TEXT_SUFFIX):
        return Column(name, Measure(name, "system", "", "step", "last", is_text=True))
    if name.startswith(f"{_KEYED}_"):
        return Column(name, _BY_NAME[_KEYED])
    return Column(name, Measure(name, "system", "", "continuous", "mean", is_open=True))


def text_column(open_column: Column) -> Column:
    """Where the values of an open measure go that are no numbers."""
    return column(f"{open_column.name}{TEXT_SUFFIX}")


def level_of(tree: str) -> Level:
    """Whether a tree is a module's ({phase}_{module}), a phase's, or the system's."""
    if tree == "system":
        return "system"
    return "module" if "_" in tree else "phase"


@functools.cache
def table_columns(level: Level) -> tuple[str, ...]:
    """The columns that every file of that kind has, in their order."""
    names: list[str] = []
    for measure in MEASURES:
        if measure.level != level or measure.name == _KEYED:
            continue
        if measure.name == "cell_voltage":
            names += [f"cell_voltage_{cell}" for cell in range(1, CELLS + 1)]
        else:
            names.append(measure.name)
    return tuple(names)


def columns_of(level: Level, extra: frozenset[str]) -> tuple[Column, ...]:
    """All columns of files of that kind: the table's, then those that the data adds, by name."""
    known = table_columns(level)
    added = sorted(extra.difference(known), key=_natural)
    return tuple(column(name) for name in (*known, *added))


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """cell_voltage_15 before cell_voltage_100; the name itself decides where that is a draw."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name
