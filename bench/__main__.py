"""``python -m bench [NAMES…]``: measure, print a table on stderr, write JSON.

``python -m bench soak``, ``compare``, ``scale``, ``telemetry`` and ``dayfiles`` are other matters:
see soak.py, compare/run.py, scale/run.py, telemetry/run.py and dayfiles/run.py.

Exit codes: 0 everything was measured, whether the targets were met or not; 1 something could
not be measured; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import kvstore
from bench import capture, cli, lookup, memory, pipes, reading, startup
from bench.figure import Measurement, Setting
from bench.host import filesystem
from bench.session import measure_all

MEASUREMENTS: tuple[Measurement, ...] = (
    *capture.MEASUREMENTS,
    *pipes.MEASUREMENTS,
    *reading.MEASUREMENTS,
    *lookup.MEASUREMENTS,
    *startup.MEASUREMENTS,
    *memory.MEASUREMENTS,
)
# Imported once asked for: each wants an extra of its own, and no environment has them all.
FAMILIES = {
    "soak": "bench.soak",
    "compare": "bench.compare.run",
    "dayfiles": "bench.dayfiles.run",
    "scale": "bench.scale.run",
    "telemetry": "bench.telemetry.run",
}
TINY_BYTES = 8_000_000  # the least that makes more than one packet, whatever the seed
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in FAMILIES:
        family = importlib.import_module(FAMILIES[arguments[0]])
        return int(family.main(arguments[1:]))
    options = _parser().parse_args(arguments)
    if options.list:
        return cli.listed(MEASUREMENTS)
    kvstore.keep_freed_memory()  # as a program that captures should: see its docstring
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        setting = _setting(options, Path(folder))
        wanted = cli.chosen(options, MEASUREMENTS)
        done = measure_all(wanted, setting, disk_bytes=setting.size_bytes)
    cli.concluded(done, options)
    return 1 if done.failures else 0


def size_bytes(text: str) -> int:
    """Read a size such as 2GB (10^9) or 512MiB (2^20); raises argparse's error otherwise."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmg]i?b)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 2GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    if filesystem(folder).startswith("tmpfs"):
        print(f"{folder} is in memory: figures say nothing of a disk", file=sys.stderr)
    if options.tiny:
        return Setting(folder, TINY_BYTES, 1, options.seed)
    return Setting(folder, options.size, options.pairs, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("", __doc__, tiny="8 MB, one pair")
    cli.add_measurements(parser, MEASUREMENTS, pairs=5)
    parser.add_argument("--size", type=size_bytes, default=size_bytes("2GB"), help="bytes a run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
