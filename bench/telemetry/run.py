"""``python -m bench telemetry [NAMES…]``: measure telemetry, print tables, write JSON.

Exit codes as the bench's: 0 everything was measured, 1 something could not be, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import kvstore
from bench import cli
from bench.figure import Measurement, Setting
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
        return cli.listed(MEASUREMENTS)
    kvstore.keep_freed_memory()  # as `kvstore telemetry ingest` does
    collect_rarely()
    wanted = cli.chosen(options, MEASUREMENTS)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        setting = _setting(options, Path(folder))
        done = measure_all(wanted, setting, disk_bytes=max(setting.size_bytes, 8_000_000))
    cli.concluded(done, options, "telemetry")
    return 1 if done.failures else 0


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    events, pairs = (TINY_EVENTS, 1) if options.tiny else (options.events, options.pairs)
    return Setting(folder, events * EVENT_BYTES, pairs, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("telemetry", __doc__, tiny="2,000 events")
    cli.add_measurements(parser, MEASUREMENTS, pairs=5)
    parser.add_argument("--events", type=int, default=1_000_000, help="events a run")
    return parser
