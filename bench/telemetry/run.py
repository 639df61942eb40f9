"""``python -m bench telemetry [NAMES…]``: measure telemetry, print tables, write JSON.

Exit codes as the bench's: 0 everything was measured, 1 something could not be, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import kvstore
from bench import report
from bench.figure import Measurement, Setting
from bench.process import ROOT
from bench.session import measure_all
from bench.telemetry import embedded, kafka, lake, postgres, validation
from bench.telemetry.events import EVENT_BYTES
from kvstore.telemetry.pipeline import collect_rarely

MEASUREMENTS: Final[tuple[Measurement, ...]] = (
    *validation.MEASUREMENTS,
    *embedded.MEASUREMENTS,
    *postgres.MEASUREMENTS,
    *lake.MEASUREMENTS,
    *kafka.MEASUREMENTS,
)
TINY_EVENTS: Final = 2000


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit code."""
    options = _parser().parse_args(arguments)
    if options.list:
        for measurement in MEASUREMENTS:
            print(f"{measurement.name:22}{measurement.about}")
        return 0
    kvstore.keep_freed_memory()  # as `kvstore telemetry ingest` does
    collect_rarely()
    wanted = [m for m in MEASUREMENTS if m.name in options.names or not options.names]
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        setting = _setting(options, Path(folder))
        done = measure_all(wanted, setting, disk_bytes=max(setting.size_bytes, 8_000_000))
    print("\n" + report.table(done.figures, done.failures), file=sys.stderr)
    if options.json or not options.tiny:
        path = options.json or _results_path(done)
        report.save(done, path)
        print(f"written to {path}", file=sys.stderr)
    return 1 if done.failures else 0


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    events, pairs = (TINY_EVENTS, 1) if options.tiny else (options.events, options.pairs)
    return Setting(folder, events * EVENT_BYTES, pairs, options.seed)


def _results_path(done: report.Report) -> Path:
    stamp = done.started.strftime("%Y-%m-%dT%H%M")
    return ROOT / "bench" / "results" / f"telemetry-{stamp}-{done.host.slug()}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench telemetry", description=__doc__)
    names = [measurement.name for measurement in MEASUREMENTS]
    parser.add_argument(
        "names", nargs="*", metavar="NAME", choices=[*names, []], help="default: all"
    )
    parser.add_argument("--list", action="store_true", help="name the measurements")
    parser.add_argument("--events", type=int, default=1_000_000, help="events a run")
    parser.add_argument("--pairs", type=int, default=5, help="runs of either side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="2,000 events: does it work at all")
    parser.add_argument("--json", type=Path, help="default: bench/results/, nothing with --tiny")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk to measure")
    return parser
