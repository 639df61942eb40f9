"""What the commands of the bench share: their options, the choice of measurements, the end."""

from __future__ import annotations

import argparse
import datetime as dt
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.figure import Measurement
from bench.host import Host
from bench.process import ROOT


def parser(family: str, about: str | None, *, tiny: str) -> argparse.ArgumentParser:
    """The options that all have. family: the word behind ``python -m bench``. tiny: how small."""
    made = argparse.ArgumentParser(prog=f"python -m bench {family}".strip(), description=about)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--tiny", action="store_true", help=f"{tiny}: does it work at all")
    made.add_argument("--json", type=Path, help="default: bench/results/, nothing with --tiny")
    made.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk to measure")
    return made


def add_measurements(
    to: argparse.ArgumentParser, measurements: Sequence[Measurement], *, pairs: int
) -> None:
    """Options of a command that makes measurements in pairs, each by its name."""
    names = [measurement.name for measurement in measurements]
    to.add_argument("names", nargs="*", metavar="NAME", choices=[*names, []], help="default: all")
    to.add_argument("--list", action="store_true", help="name the measurements")
    to.add_argument("--pairs", type=int, default=pairs, help="runs of either side")


def listed(measurements: Sequence[Measurement]) -> int:
    """Name them, and return the exit code."""
    for measurement in measurements:
        print(f"{measurement.name:22}{measurement.about}")
    return 0


def chosen(options: argparse.Namespace, measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those that were named, or all."""
    return [m for m in measurements if m.name in options.names or not options.names]


def results_path(family: str, started: dt.datetime, host: Host) -> Path:
    """Where a run's record goes by default."""
    words = [family, started.strftime("%Y-%m-%dT%H%M"), host.slug()]
    return ROOT / "bench" / "results" / ("-".join(filter(None, words)) + ".json")


def concluded(done: report.Report, options: argparse.Namespace, family: str = "") -> Path | None:
    """Print the table and write the record; returns where, None where none was asked for."""
    print("\n" + report.table(done.figures, done.failures), file=sys.stderr)
    if options.tiny and not options.json:
        return None
    path: Path = options.json or results_path(family, done.started, done.host)
    report.save(done, path)
    print(f"written to {path}", file=sys.stderr)
    return path
