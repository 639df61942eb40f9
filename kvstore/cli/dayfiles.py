"""``kvstore dayfiles``: raw exports to hourly Parquet files on a regular grid."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np
import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.options import Json, duration_ns
from kvstore.cli.terminal import LOSS, complain, progress_bar, quiet_if_closed, say
from kvstore.errors import TimeError
from kvstore.export.extras import needed_for
from kvstore.timestamps import format_time, to_time

if TYPE_CHECKING:
    from kvstore.dayfiles.etl import Outcome, Progress, Runner
    from kvstore.dayfiles.explain import Explanation
    from kvstore.dayfiles.plan import Shard

_SHOWN_MAX: Final = 10  # of each kind of trouble; --report has all
_SHARD_EXAMPLE: Final = "such as 1/8, from 1/8 to 8/8"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Raw telemetry exports to a regular grid: one Parquet file per hour, phase and module.",
    epilog="\b\nExamples:\n"
    "  kvstore dayfiles convert data/ output/\n"
    "  kvstore dayfiles explain --help",
)


def shard_text(text: str) -> tuple[int, int]:
    """Which part of how many, from 1/8 to 8/8."""
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise typer.BadParameter(f"{text!r}: expected a part and how many there are, {_SHARD_EXAMPLE}")


Every = Annotated[
    int,
    typer.Option(
        "--every", metavar="DURATION", parser=duration_ns, help="Width of a bin of the grid."
    ),
]
Fill = Annotated[
    Literal["none", "hold", "linear"],
    typer.Option(
        help="What stands in bins without readings: nothing, the last value, or (for continuous "
        "measures) a line between two readings. Never further than the hold."
    ),
]
Hold = Annotated[
    Any,
    typer.Option(
        metavar="DURATION",
        parser=duration_ns,
        help="For how long a value stands. If not given each measure's own, 30s.",
        show_default=False,
    ),
]
WithFlags = Annotated[
    bool,
    typer.Option(
        "--with-flags",
        help="Add a column NAME_flag each: 0 observed, 1 held, 2 interpolated, 9 missing.",
    ),
]
Trim = Annotated[
    bool, typer.Option("--trim", help="Leave out bins in which no measure has a value.")
]


@app.command(
    epilog="\b\nExamples:\n"
    "  kvstore dayfiles convert data/ output/\n"
    "  kvstore dayfiles convert data/ output/ --every 10s --fill linear --with-flags\n"
    "  kvstore dayfiles convert data/ output/ --shard 3/8 --report report.json\n"
    "  kvstore dayfiles convert /mnt/data /mnt/output --cluster tcp://scheduler:8786\n"
    "  kvstore dayfiles convert data/ output/ --store modules.kv"
)
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Folder with exports, .parquet or .csv."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to fill.")],
    *,
    every: Every = "5s",  # type: ignore[assignment]  # typer parses defaults
    fill: Fill = "hold",
    hold: Hold = None,
    with_flags: WithFlags = False,
    trim: Trim = False,
    full: Annotated[
        bool, typer.Option("--full", help="Make all days anew, whatever the manifest says.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Make days anew without what vanished inputs gave to them."),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes, a day each; if not given as many as cores.",
            show_default=False,
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="ADDRESS",
            help="A Dask scheduler, such as tcp://host:8786, whose workers make the days; they "
            "must see both folders. Needs pip install 'kvstore[dask]'.",
        ),
    ] = None,
    shard: Annotated[
        Any,
        typer.Option(
            metavar="I/N",
            parser=shard_text,
            show_default=False,
            help="Only the I-th of N parts of the days; others may run elsewhere, into the same "
            "folder.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write all counts to a file, as JSON."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Put the rows into a store, too, a stream per module, phase, system.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a folder of raw exports to hourly files on a regular grid.

    OUTPUT/{phase}_{module}/{year}/{month}/{day}/{hour}.parquet, all times UTC; measures of a phase
    go to {phase}/, those of the system to system/. Running again makes only days whose inputs
    changed. Exit code 3 says that files were skipped, or rows have no place.
    """
    with needed_for("kvstore dayfiles", extra="dayfiles"):
        from kvstore.dayfiles import etl, grid, summary  # noqa: PLC0415  # load pyarrow
        from kvstore.dayfiles.plan import Shard  # noqa: PLC0415
    libc.keep_freed_memory()
    settings = grid.Settings(every, fill, hold, with_flags, trim)
    began = time.perf_counter()
    far = _Far()
    part = Shard(shard[0] - 1, shard[1]) if shard else Shard()
    with progress_bar(far.text, far.fraction):
        outcome = etl.convert(
            source, output, settings, full=full, prune=prune, shard=part,
            run=_runner(workers, cluster), progress=far.note,
        )  # fmt: skip
    told = summary.summary(outcome)
    told["run"]["seconds"] = time.perf_counter() - began
    if report is not None:
        report.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with quiet_if_closed():
        if as_json:
            print(json.dumps(told, ensure_ascii=False))
    _say_all(told, outcome, part)
    is_stored = store is None or _store(output, outcome, store)
    if not (outcome.is_whole and is_stored):
        raise typer.Exit(LOSS)


def _runner(workers: int | None, cluster: str | None) -> Runner:
    """Where days are made: on this machine's cores, or on a cluster's."""
    from kvstore.dayfiles import etl  # noqa: PLC0415  # loads pyarrow

    if cluster is None:
        return etl.in_processes(workers or etl.cores())
    if workers is not None:
        raise typer.BadParameter("--workers is of this machine, --cluster of others: one of them")
    with needed_for("--cluster", extra="dask"):
        from kvstore.daycluster import on_cluster  # noqa: PLC0415  # loads distributed
    return on_cluster(cluster)


def _store(output: Path, outcome: Outcome, path: Path) -> bool:
    """Put the days into a store; whether it now holds what the files say."""
    from kvstore import daystreams  # noqa: PLC0415  # loads pyarrow
    from kvstore.dayfiles.day import day_text  # noqa: PLC0415

    with stores.open_store(path, mode="w", flush_interval_s=None) as store:
        stored = daystreams.store_days(output, outcome.records, store)
    say(f"{path}: {stored.days} days, {stored.rows:,} rows appended")
    _complain_of(
        f"{path} has other rows of a day that has changed since, and keeps them; "
        "convert into a new store to have the new ones",
        [day_text(day) for day in stored.changed],
    )
    return not stored.changed


def bin_time(text: str) -> str:
    """A time as it was given, of a day or of the file's own day."""
    return text if "T" in text or " " in text.strip() or text.count("-") > 1 else f"T{text.strip()}"


@app.command(
    epilog="\b\nExamples:\n"
    "  kvstore dayfiles explain output/1_3/2024/07/29/22.parquet --at 22:10:05 "
    "--column module_voltage"
)
def explain(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="An hour file.")],
    *,
    at: Annotated[str, typer.Option("--at", metavar="TIME", help="22:10:05, or with a date; UTC.")],
    name: Annotated[str, typer.Option("--column", metavar="NAME", help="The column.")],
    as_json: Json = False,
) -> None:
    """Show the input files and rows behind a value.

    Each row with what became of it: used, a duplicate, unreadable, or lost to another value of
    its time. Exit code 3 says that inputs are gone, or give another value now.
    """
    with needed_for("kvstore dayfiles", extra="dayfiles"):
        from kvstore.dayfiles import explain as explaining  # noqa: PLC0415  # loads pyarrow
    found = explaining.explain(path, name, _time_ns(path, at))
    with quiet_if_closed():
        print(json.dumps(_plain(found), ensure_ascii=False) if as_json else _told(found))
    if found.absent or found.remade != found.value:
        complain("the inputs are not what they were when this was made")
        raise typer.Exit(LOSS)


def _time_ns(path: Path, text: str) -> int:
    """A time, of the day of the file's folders where it names none."""
    named = bin_time(text)
    if named.startswith("T"):
        named = "-".join(path.resolve().parts[-4:-1]) + named
    try:
        return int(to_time(named, np.dtype(np.int64), side="start"))
    except TimeError as error:
        raise typer.BadParameter(str(error)) from error


def _plain(found: Explanation) -> dict[str, Any]:
    return {
        **found._asdict(),
        "column": found.column.name,
        "unit": found.column.measure.unit,
        "rule": found.column.measure.rule,
        "time": _iso(found.time_ns),
        "sources": [source._asdict() | {"time": _iso(source.time_ns)} for source in found.sources],
    }


def _iso(time_ns: int) -> str:
    return format_time(time_ns, np.dtype(np.int64))


def _told(found: Explanation) -> str:
    bins = " and ".join(map(_iso, found.bins_ns))
    unit = found.column.measure.unit.replace("1", "")
    lines = [
        f"{found.column.name} at {_iso(found.time_ns)}: {found.value} {unit}".rstrip(),
        f"{found.state}" + (f", of the readings in the bin at {bins}" if bins else ""),
    ]
    if found.sources:
        lines.append(f"rule: {found.column.measure.rule} of what is used")
    lines += [
        f"{source.file} row {source.row}: {_iso(source.time_ns)} {source.text} {source.use}"
        for source in found.sources
    ]
    return "\n".join(lines + [f"gone: {name}" for name in found.absent])


class _Far:
    """How far the run is, for the progress bar."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def note(self, progress: Progress) -> None:
        self._progress = progress

    def text(self, elapsed_s: float) -> str:
        if self._progress is None:
            return "reading the input folder, first days"
        days, total, rows, _ = self._progress
        return f"{days} of {total} days  {rows:,} rows  {rows / elapsed_s / 1e6:.1f} M rows/s"

    def fraction(self) -> float:
        return self._progress.rows / max(1, self._progress.rows_total) if self._progress else 0.0


# ---- what is said of it ----


def _say_all(told: Mapping[str, Any], outcome: Outcome, part: Shard) -> None:
    run = told["run"]
    of_part = f" (part {part.part + 1} of {part.parts})" if part.parts > 1 else ""
    rate = run["rows_read"] / max(run["seconds"], 1e-9) / 1e6
    say(
        f"{len(run['days_made'])} days made{of_part} of {run['rows_read']:,} rows, "
        f"{run['hours_written']:,} hour files written, {run['seconds']:.1f} s, {rate:.1f} M rows/s"
    )
    say(
        f"output: {told['days']} days, {told['hours']:,} hour files from {told['files']:,} files, "
        f"{told['rows']:,} rows, {told['duplicates']:,} of them duplicates, "
        f"{told['conflicts']:,} conflicts, {told['unreadable_values']:,} unreadable values, "
        f"{told['unplaced_rows']:,} rows without a place"
    )
    _say_table(told["measures"])
    _complain_of("skipped", [f"{s.name}: {s.reason}" for s in outcome.skipped])
    _complain_of(
        "vanished; what it gave stays, but for days that --full or --prune made anew",
        told["vanished"],
    )
    _complain_of(
        "day not made again: it would lose what vanished inputs gave; bring them back, or --prune",
        run["days_blocked"],
    )
    _complain_of("odd", told["named"])


def _complain_of(what: str, lines: list[str]) -> None:
    for line in lines[:_SHOWN_MAX]:
        complain(f"{what}: {line}")
    if len(lines) > _SHOWN_MAX:
        complain(f"{what}: {len(lines) - _SHOWN_MAX:,} more, see --report")


def _say_table(measures: Mapping[str, Mapping[str, Any]]) -> None:
    """A line a column of the output; on a terminal only."""
    if not sys.stderr.isatty() or not measures:
        return
    from rich.console import Console  # noqa: PLC0415  # only where something is shown
    from rich.table import Table  # noqa: PLC0415

    table = Table("measure", box=None)
    for name in ("readings", "observed", "held", "missing", "longest gap", "flat", "out of range"):
        table.add_column(name, justify="right")
    for name, found in measures.items():
        held = found["held_share"] + found["interpolated_share"]
        table.add_row(
            name, f"{found['readings']:,}", f"{found['observed_share']:.1%}", f"{held:.1%}",
            f"{found['missing_share']:.1%}", f"{found['longest_gap_s']:,.0f} s",
            f"{found['flat_runs']:,}", f"{found['out_of_range']:,}",
        )  # fmt: skip
    Console(stderr=True).print(table)
