"""``python -m bench dayfiles [NAMES…]``: measure the day-file ETL, print a table, write JSON.

month: a synthetic month (--days) of the real data's shape; sample: a folder of real exports
(--sample), where there is one. Each as whole processes, start included, on two workers, beside a
bare Polars read of the same columns. memory: the peak of all processes, for a day and for all days.
pandas: one day, naively. Exit codes as the bench's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from bench import cli
from bench.dayfiles import exports
from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import interleaved
from bench.process import anon_bytes, kvstore, run
from bench.session import measure_all

ROWS_S_MIN: Final = 4.0  # million
TIMES_BARE_MAX: Final = 2.5
MEMORY_MB_MAX: Final = 1000.0
WORKERS: Final = 2
_SAMPLE: Final = Path("/work/shared/data/dayfiles")
_INTERVAL_S: Final = 0.02
_TINY_FILES: Final = 3


class Month(NamedTuple):
    """Exports to measure with."""

    folder: Path
    rows: int


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit code."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        setting = Setting(
            Path(folder), 10_000_000, 1 if options.tiny else options.pairs, options.seed
        )
        month = _month(Path(folder), options)
        wanted = cli.chosen(options, _measurements(month, options))
        done = measure_all(wanted, setting, disk_bytes=setting.size_bytes)
    cli.concluded(done, options, "dayfiles")
    return 1 if done.failures else 0


def _month(folder: Path, options: argparse.Namespace) -> Month:
    days = 2 if options.tiny else options.days
    files = _TINY_FILES if options.tiny else exports.FILES_A_DAY
    source = folder / "month"
    rows = exports.make(source, days=days, seed=options.seed, files_a_day=files)
    size_mb = sum(path.stat().st_size for path in source.rglob("*.parquet")) / 1e6
    print(f"{days} days, {days * files} files, {rows:,} rows, {size_mb:,.0f} MB", file=sys.stderr)
    return Month(source, rows)


def _measurements(month: Month, options: argparse.Namespace) -> list[Measurement]:
    found = [
        Measurement("month", "a synthetic month", lambda s: [_rate("month", month, s)]),
        Measurement("again", "the same once more, nothing new", lambda s: [_again(month, s)]),
        Measurement("memory", "peak memory of all processes", lambda s: [_memory(month, s)]),
        Measurement("pandas", "one day, naively", lambda s: [_pandas(month, s)]),
    ]
    if options.sample.is_dir():
        sample = Month(options.sample, _rows_of(options.sample))
        found.append(Measurement("sample", "real exports", lambda s: [_rate("sample", sample, s)]))
    return found


def _rows_of(folder: Path) -> int:
    import pyarrow.parquet as pq  # noqa: PLC0415

    return sum(pq.read_metadata(path).num_rows for path in folder.rglob("*.parquet"))


# ---- the figures ----


def _rate(name: str, month: Month, setting: Setting) -> Figure:
    cpu_s: list[float] = []

    def ours() -> float:
        wall_s, cpu = _convert(month.folder, setting.folder / "out")
        cpu_s.append(cpu)
        return wall_s

    bare_cpu_s: list[float] = []

    def bare() -> float:
        wall_s, cpu = _side("bare", month, setting.folder / "none")
        bare_cpu_s.append(cpu)
        return wall_s

    walls = interleaved(setting.pairs, ours, bare)
    millions = month.rows / 1e6
    return Figure(
        name=f"dayfiles-{name}",
        unit="M rows/s",
        limit_name="bare Polars read",
        values=[millions / wall_s for wall_s in walls[0]],
        limits=[millions / wall_s for wall_s in walls[1]],
        rules=(Rule("value", ">=", ROWS_S_MIN), Rule("ratio", ">=", 1 / TIMES_BARE_MAX)),
        details={
            "rows": float(month.rows),
            "cpu_s": min(cpu_s),
            "bare_cpu_s": min(bare_cpu_s),
            "cpu_us_per_row": min(cpu_s) / month.rows * 1e6,
            "times_bare_cpu": min(cpu_s) / min(bare_cpu_s),
        },
    )


def _again(month: Month, setting: Setting) -> Figure:
    """A run with nothing to do, beside the first."""
    output = setting.folder / "out"
    first, _ = _convert(month.folder, output, keep=True)
    again, _ = _convert(month.folder, output)
    return Figure(
        name="dayfiles-again",
        unit="s",
        limit_name="the first run",
        values=[again],
        limits=[first],
        rules=(Rule("ratio", "<", 0.5),),
    )


def _memory(month: Month, setting: Setting) -> Figure:
    """Anonymous memory of the command and its workers, all days beside one."""
    one = min(path for path in month.folder.iterdir() if path.is_dir())
    one_mb = _peak_mb(one, setting.folder / "out")
    all_mb = _peak_mb(month.folder, setting.folder / "out")
    return Figure(
        name="dayfiles-memory",
        unit="MB",
        limit_name=f"{MEMORY_MB_MAX:.0f} MB",
        values=[all_mb],
        limits=[MEMORY_MB_MAX],
        rules=(Rule("ratio", "<", 1.0),),
        details={"of_one_day_mb": one_mb},
    )


def _pandas(month: Month, setting: Setting) -> Figure:
    """Both on one day and one core: the naive version knows no more of them."""
    one = min(path for path in month.folder.iterdir() if path.is_dir())
    day = Month(one, _rows_of(one))
    ours, _ = _convert(one, setting.folder / "out", workers=1)
    naive, _ = _side("pandas", day, setting.folder / "naive")
    shutil.rmtree(setting.folder / "naive")
    return Figure(
        name="dayfiles-pandas",
        unit="M rows/s",
        limit_name="naive pandas",
        values=[day.rows / ours / 1e6],
        limits=[day.rows / naive / 1e6],
    )


# ---- the sides ----


def _convert(
    source: Path, output: Path, *, keep: bool = False, workers: int = WORKERS
) -> tuple[float, float]:
    """Wall and CPU seconds of a conversion into that folder."""
    done = run(kvstore("dayfiles", "convert", source, output, "--workers", str(workers)))
    if not any(output.rglob("*.parquet")):
        raise BenchError(f"nothing in {output}: {done.ended[0].stderr}")
    if not keep:
        shutil.rmtree(output)
    return done.wall_s, done.ended[0].cpu_s


def _side(name: str, month: Month, output: Path) -> tuple[float, float]:
    command = [sys.executable, "-m", "bench.dayfiles.sides", name, str(month.folder), str(output)]
    done = run(command)
    return done.wall_s, done.ended[0].cpu_s


def _peak_mb(source: Path, output: Path) -> float:
    watch = _TreeWatch()
    _convert(source, output)
    return watch.stop() / 1e6


class _TreeWatch:
    """Samples the anonymous memory of all our descendants together, and keeps the peak."""

    def __init__(self) -> None:
        self._bytes_max = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak, in bytes."""
        self._done.set()
        self._thread.join()
        return self._bytes_max

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            total = sum(anon_bytes(pid) or 0 for pid in _descendants(os.getpid()))
            self._bytes_max = max(self._bytes_max, total)


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("dayfiles", __doc__, tiny="six files, one pair")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--days", type=int, default=30, help="of the synthetic month")
    parser.add_argument("--sample", type=Path, default=_SAMPLE, help="folder of real exports")
    parser.add_argument("--pairs", type=int, default=3, help="runs of either side")
    return parser
