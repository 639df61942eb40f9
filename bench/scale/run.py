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
from bench import cli
from bench.figure import Measurement, Setting
from bench.report import Report
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
        return cli.listed(MEASUREMENTS)
    kvstore.keep_freed_memory()  # as in the bench
    wanted = cli.chosen(options, MEASUREMENTS)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        setting = _setting(options, Path(folder))
        done = measure_all(wanted, setting, disk_bytes=part_bytes(setting))
    if path := cli.concluded(done, options, "scale"):
        _draw(done, path.with_suffix(".svg"))
    return 1 if done.failures else 0


def _draw(done: Report, path: Path) -> None:
    if picture.draw(done.figures, path):
        print(f"drawn to {path}", file=sys.stderr)


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    if options.tiny:
        return Setting(folder, TINY_BYTES, 1, options.seed)
    return Setting(folder, int(options.tb * _TB), options.pairs, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("scale", __doc__, tiny="100 MB, one pair")
    cli.add_measurements(parser, MEASUREMENTS, pairs=3)
    parser.add_argument("--tb", type=float, default=1.0, help="TB of raw rows in the largest store")
    return parser
