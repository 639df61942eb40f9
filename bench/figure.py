"""What a measurement hands back: figures, each with its limit and the rules it is held to.

Pure. A figure keeps every single run, so that a median can be doubted later. The ratio is the
median of the paired ratios, never the ratio of the medians: both sides of a pair ran next to
each other, on a disk and a machine in the same mood.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple


class BenchError(Exception):
    """A measurement could not be made; says why and what to do about it."""


class Rule(NamedTuple):
    """A target: the figure's value, or its ratio to the limit, on one side of a bound."""

    of: Literal["value", "ratio"]
    sign: Literal[">=", "<"]
    bound: float

    def met(self, figure: Figure) -> bool:
        """Tell whether the figure keeps the rule."""
        measured = figure.value if self.of == "value" else figure.ratio
        return measured >= self.bound if self.sign == ">=" else measured < self.bound

    def text(self, unit: str) -> str:
        """Spell the rule out, a ratio with a times sign, a value with its unit."""
        return f"{self.sign} {self.bound:,g} {'x limit' if self.of == 'ratio' else unit}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured quantity beside its limit.

    values, limits: one entry per pair, in the same unit. details: further quantities of the
    same runs, named with their units.
    """

    name: str
    unit: str
    limit_name: str
    values: Sequence[float]
    limits: Sequence[float]
    rules: tuple[Rule, ...] = ()
    details: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median of the measured values."""
        return statistics.median(self.values)

    @property
    def limit(self) -> float:
        """The median of the limit's values."""
        return statistics.median(self.limits)

    @property
    def ratio(self) -> float:
        """The median of the paired ratios, value to limit."""
        return statistics.median(
            value / limit for value, limit in zip(self.values, self.limits, strict=True)
        )

    @property
    def met(self) -> bool | None:
        """Whether every rule is kept; None where the figure is only reported."""
        return all(rule.met(self) for rule in self.rules) if self.rules else None


class Setting(NamedTuple):
    """How to measure: folder on the disk under test, bytes per run, pairs, and the seed."""

    folder: Path
    size_bytes: int
    pairs: int
    seed: int


class Measurement(NamedTuple):
    """A measurement by name: run(setting) gives one or more figures, or raises BenchError."""

    name: str
    about: str
    run: Callable[[Setting], list[Figure]]
