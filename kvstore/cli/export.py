"""``kvstore export`` and ``kvstore import``: a time range to a file of another kind, and back."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.dayfiles import Every, Fill, Hold, Trim, WithFlags
from kvstore.cli.options import (
    FieldNames,
    Json,
    Last,
    Limit,
    Ordered,
    Start,
    Stop,
    StorePath,
    StreamName,
    field_names,
    input_file,
)
from kvstore.cli.query import Reading, check_range, row_progress, start_of_last, stream_name
from kvstore.cli.terminal import LOSS, progress_bar, quiet_if_closed, say
from kvstore.export.extras import needed_for
from kvstore.export.files import FORMATS, LOADABLE, check_format, write_file
from kvstore.ingest import PARTICLES
from kvstore.stream import Stream
from kvstore.timestamps import Unit

_GRID_OPTIONS: Final = ("every", "fill", "hold", "with_flags", "trim")
_FORMATS: Final = "Its end says the format: .npz .npy .csv .jsonl .parquet .arrow .h5 .zarr"


def export(
    context: typer.Context,
    path: StorePath,
    *,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help=f"File to write. {_FORMATS}"),
    ],
    start: Start = None,
    stop: Stop = None,
    last: Last = None,
    stream: StreamName = None,
    fields: FieldNames = None,
    limit: Limit = None,
    ordered: Ordered = False,
    layout: Annotated[
        Literal["file", "hourly"],
        typer.Option(
            help="hourly: a regular grid, in a folder, STREAM/YEAR/MONTH/DAY/HOUR.parquet."
        ),
    ] = "file",
    every: Every = "5s",  # type: ignore[assignment]  # typer parses defaults
    fill: Fill = "hold",
    hold: Hold = None,
    with_flags: WithFlags = False,
    trim: Trim = False,
    as_json: Json = False,
) -> None:
    """Write a time range to a file for other tools.

    Both ends are included. Values are exact, times included. The file appears complete or not at
    all, replacing one of that name, and memory stays bounded whatever the range. Exit code 3 says
    that damaged batches had to be left out.
    """
    check_range(start, stop, last)
    if layout == "hourly":
        if limit or ordered:
            raise typer.BadParameter("--limit and --ordered do not go with --layout hourly")
        chosen = (every, fill, hold, with_flags, trim)
        span = (start, stop, last)
        _export_hourly(path, output, span, stream, fields, chosen=chosen, as_json=as_json)
        return
    _refuse_grid_options(context)
    _check_suffix(output, FORMATS)
    check_format(output)
    libc.keep_freed_memory()
    began = time.perf_counter()
    with stores.open_store(path) as store:
        target = store[stream_name(store, stream)]
        reading = Reading(target, start, stop, field_names(fields), limit, ordered)
        if last is not None:
            reading.start = start_of_last(target, last)
        selected = reading.selected()
        with row_progress(reading, wanted=True):
            rows = write_file(reading.batches(), selected, output, time=target.schema.time)
    if as_json:
        _print_json(
            file=str(output),
            stream=target.name,
            rows=rows,
            damaged_batches=reading.damaged,
            seconds=time.perf_counter() - began,
        )
    say(f"{rows:,} rows to {output}")
    if reading.damaged:
        raise typer.Exit(LOSS)


def _refuse_grid_options(context: typer.Context) -> None:
    """Refuse what a plain file would be silently made without; defaults that were asked for too."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in _GRID_OPTIONS
        if (source := context.get_parameter_source(name)) and source.name != "DEFAULT"
    ]
    if given:
        raise typer.BadParameter(
            f"{', '.join(given)} only with a grid: add --layout hourly, with -o FOLDER"
        )


def _export_hourly(
    path: Path, root: Path, span: tuple[Any, Any, Any], name: str | None, fields: str | None,
    *, chosen: tuple[Any, ...], as_json: bool,
) -> None:  # fmt: skip
    with needed_for("--layout hourly", extra="dayfiles"):
        from kvstore import hourly  # noqa: PLC0415  # loads pyarrow
        from kvstore.dayfiles.grid import Settings  # noqa: PLC0415
    start, stop, last = span
    with stores.open_store(path) as store:
        target = store[stream_name(store, name)]
        start = start if last is None else start_of_last(target, last)
        written = hourly.export(
            target, root, Settings(*chosen), start=start, stop=stop, fields=field_names(fields)
        )
    if as_json:
        _print_json(folder=str(root), stream=target.name, **written._asdict())
    say(f"{written.rows:,} rows on {written.hours:,} hours in {root}/{target.name}")
    if written.left_out:
        say(f"left out, more than a value a row: {', '.join(written.left_out)}")


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The store; made if not there.")],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Files: .parquet .arrow .npz .csv", parser=input_file
        ),
    ],
    *,
    stream: Annotated[str, typer.Option(metavar="NAME", help="Stream to append to.")] = PARTICLES,
    time_field: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Time field of a new stream; if not given the exported one, or timestamps, "
            "timestamp or time.",
            show_default=False,
        ),
    ] = "",
    time_unit: Annotated[
        Unit | None,
        typer.Option(help="What times that are integers count since 1970; never guessed."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Append the rows of files to a stream.

    Parquet, Arrow and .npz files from kvstore bring their schema along; of others it is
    inferred. What was imported before an error is kept: a second run appends it again.
    """
    for file in files:
        _check_suffix(file, LOADABLE)
    libc.keep_freed_memory()
    began = time.perf_counter()
    counts: list[dict[str, Any]] = []
    with stores.open_store(path, mode="w") as store:
        for file in files:
            rows = _import_file(store.stream(stream, time=time_field), file, time_unit)
            store.flush()
            counts.append({"file": str(file), "rows": rows})
            say(f"{rows:,} rows from {file}")
    if as_json:
        _print_json(stream=stream, files=counts, seconds=time.perf_counter() - began)


def _check_suffix(path: Path, known: Sequence[str]) -> None:
    if path.suffix[1:] not in known:
        raise typer.BadParameter(f"{path}: in which format? Name it .{', .'.join(known)}")


def _import_file(target: Stream, file: Path, unit: Unit | None) -> int:
    part = 0.0
    before = len(target)

    def on_progress(done: float) -> None:
        nonlocal part
        part = done

    def describe(elapsed: float) -> str:
        rows = len(target) - before
        return f"{file.name}  {rows:,} rows  {rows / elapsed / 1000:.1f} k/s"

    with progress_bar(describe, lambda: part):
        return target.import_file(file, time_unit=unit, progress=on_progress)


def _print_json(**report: Any) -> None:
    with quiet_if_closed():
        print(json.dumps(report))
