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
from bench import capture, lookup, memory, pipes, reading, report, startup
from bench.figure import Measurement, Setting
from bench.host import filesystem
from bench.process import ROOT
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
        for measurement in MEASUREMENTS:
            print(f"{measurement.name:22}{measurement.about}")
        return 0
    kvstore.keep_freed_memory()  # as a program that captures should: see its docstring
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        setting = _setting(options, Path(folder))
        wanted = [m for m in MEASUREMENTS if m.name in options.names or not options.names]
        done = measure_all(wanted, setting, disk_bytes=setting.size_bytes)
    print("\n" + report.table(done.figures, done.failures), file=sys.stderr)
    if options.json or not options.tiny:
        path = options.json or _results_path(done)
        report.save(done, path)
        print(f"written to {path}", file=sys.stderr)
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


def _results_path(done: report.Report) -> Path:
    stamp = done.started.strftime("%Y-%m-%dT%H%M")
    return ROOT / "bench" / "results" / f"{stamp}-{done.host.slug()}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = [measurement.name for measurement in MEASUREMENTS]
    parser.add_argument(
        "names", nargs="*", metavar="NAME", choices=[*names, []], help="default: all"
    )
    parser.add_argument("--list", action="store_true", help="name the measurements")
    parser.add_argument("--size", type=size_bytes, default=size_bytes("2GB"), help="bytes a run")
    parser.add_argument("--pairs", type=int, default=5, help="runs of either side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="8 MB, one pair: does it work at all")
    parser.add_argument("--json", type=Path, help="default: bench/results/, nothing with --tiny")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk to measure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
