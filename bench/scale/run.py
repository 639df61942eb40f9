"""``python -m bench scale [NAMES…]``: measure what grows, print tables, write JSON.

--tb sets the size of everything: the terabyte itself, of which a ninetieth has to be free on the
disk, one append per 100 kB, and a five-hundredth, 2 GB of 1 TB, for all other measurements. Exit
codes as the bench's: 0 everything was measured, 1 something could not be, 2 wrong usage.
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
from bench.scale import cores, late, picture, readers, small, streams, terabyte
from bench.scale.rows import part_bytes
from bench.session import measure_all

MEASUREMENTS: Final[tuple[Measurement, ...]] = (
    *terabyte.MEASUREMENTS,
    *small.MEASUREMENTS,
    *late.MEASUREMENTS,
    *streams.MEASUREMENTS,
    *readers.MEASUREMENTS,
    *cores.MEASUREMENTS,
)
TINY_BYTES: Final = 100_000_000
_TB: Final = 10**12


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit code."""
    options = _parser().parse_args(arguments)
    if options.list:
        for measurement in MEASUREMENTS:
            print(f"{measurement.name:22}{measurement.about}")
        return 0
    kvstore.keep_freed_memory()  # as in the bench
    wanted = [m for m in MEASUREMENTS if m.name in options.names or not options.names]
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        setting = _setting(options, Path(folder))
        done = measure_all(wanted, setting, disk_bytes=part_bytes(setting))
    print("\n" + report.table(done.figures, done.failures), file=sys.stderr)
    if options.json or not options.tiny:
        _save(done, options.json or _results_path(done))
    return 1 if done.failures else 0


def _save(done: report.Report, path: Path) -> None:
    report.save(done, path)
    print(f"written to {path}", file=sys.stderr)
    drawn = path.with_suffix(".svg")
    if picture.draw(done.figures, drawn):
        print(f"drawn to {drawn}", file=sys.stderr)


def _results_path(done: report.Report) -> Path:
    stamp = done.started.strftime("%Y-%m-%dT%H%M")
    return ROOT / "bench" / "results" / f"scale-{stamp}-{done.host.slug()}.json"


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    if options.tiny:
        return Setting(folder, TINY_BYTES, 1, options.seed)
    return Setting(folder, int(options.tb * _TB), options.pairs, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__)
    names = [measurement.name for measurement in MEASUREMENTS]
    parser.add_argument(
        "names", nargs="*", metavar="NAME", choices=[*names, []], help="default: all"
    )
    parser.add_argument("--list", action="store_true", help="name the measurements")
    parser.add_argument("--tb", type=float, default=1.0, help="TB of raw rows in the largest store")
    parser.add_argument("--pairs", type=int, default=3, help="runs of either side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="100 MB, one pair: does it work at all")
    parser.add_argument("--json", type=Path, help="default: bench/results/, nothing with --tiny")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk to measure")
    return parser
