"""A report of one run: a table for people, JSON for comparisons. Pure but for `save`."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from bench.figure import Figure, Setting
    from bench.host import Host

_HEADINGS = ("measurement", "value", "limit", "ratio", "target", "met")
_VERDICTS = {True: "yes", False: "NO", None: "-"}


class Failure(NamedTuple):
    """A measurement that could not be made, and why."""

    name: str
    reason: str


class Report(NamedTuple):
    """Everything one run of the bench found out. disk_write_gb_s: bare writes at its start."""

    started: dt.datetime
    host: Host
    disk_write_gb_s: float
    setting: Setting
    figures: Sequence[Figure]
    failures: Sequence[Failure]


def header(host: Host, disk_write_gb_s: float, setting: Setting) -> str:
    """Describe the machine and the run in a few lines."""
    busy = " (NOT IDLE: expect scatter)" if host.load_average > host.cores / 4 else ""
    versions = " ".join(f"{name} {version}" for name, version in host.libraries.items())
    return (
        f"{host.cpu}, {host.cores} cores, {host.memory_gb} GB, load {host.load_average}{busy}\n"
        f"{host.kernel}, {host.filesystem}, bare writes {disk_write_gb_s:.2f} GB/s\n"
        f"Python {host.python}, {versions}, commit {host.commit}\n"
        f"{setting.size_bytes / 1e9:g} GB a run, {setting.pairs} pairs, seed {setting.seed}"
    )


def table(figures: Sequence[Figure], failures: Sequence[Failure]) -> str:
    """Lay the figures out in columns, limits beside them, then what could not be measured."""
    rows = [_HEADINGS, *map(_row, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"NOT MEASURED {name}: {reason}" for name, reason in failures)])


def line(figure: Figure) -> str:
    """Say one figure in one line, its details in brackets."""
    details = ", ".join(f"{name} {value:.4g}" for name, value in figure.details.items())
    return "  ".join(_row(figure)) + (f"  ({details})" if details else "")


def save(report: Report, path: Path) -> None:
    """Write the report as JSON, every single run included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_record(report), indent=1) + "\n", encoding="utf-8")


def as_record(report: Report) -> dict[str, Any]:
    """Turn a report into plain values."""
    return {
        "started": report.started.isoformat(timespec="seconds"),
        "host": report.host._asdict(),
        "disk_write_gb_s": report.disk_write_gb_s,
        "size_bytes": report.setting.size_bytes,
        "pairs": report.setting.pairs,
        "seed": report.setting.seed,
        "figures": [_figure_record(figure) for figure in report.figures],
        "not_measured": [failure._asdict() for failure in report.failures],
    }


def _figure_record(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "unit": figure.unit,
        "value": figure.value,
        "limit": figure.limit,
        "limit_name": figure.limit_name,
        "ratio": figure.ratio,
        "targets": [rule.text(figure.unit) for rule in figure.rules],
        "met": figure.met,
        "values": list(figure.values),
        "limits": list(figure.limits),
        "details": dict(figure.details),
    }


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.name,
        f"{_number(figure.value)} {figure.unit}",
        f"{_number(figure.limit)} ({figure.limit_name})",
        f"{figure.ratio:.3g}",
        " and ".join(rule.text(figure.unit) for rule in figure.rules) or "report",
        _VERDICTS[figure.met],
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
