"""``kvstore export`` and ``kvstore import``: a time range to a file of another kind, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.options import duration_ns, input_file, time_text
from kvstore.cli.query import Reading, check_range, row_progress, start_of_last, stream_name
from kvstore.cli.terminal import LOSS, progress_bar, say
from kvstore.export.files import FORMATS, check_format, write_file
from kvstore.export.load import LOADABLE, load
from kvstore.ingest import PARTICLES
from kvstore.schema import Batch
from kvstore.stream import Stream

_FORMATS: Final = "Its end says the format: .npz .npy .csv .jsonl .parquet .arrow .h5 .zarr"


def export(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The store.")],
    *,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help=f"File to write. {_FORMATS}"),
    ],
    start: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            parser=time_text,
            help="First time, included: ISO 8601 (UTC if it names no offset) or epoch seconds.",
        ),
    ] = None,
    stop: Annotated[
        str | None,
        typer.Option(metavar="TIME", parser=time_text, help="Last time, included."),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(
            metavar="DURATION",
            parser=duration_ns,
            help="The stretch before the last row instead, such as 10s, 250ms, 5m or 2h.",
        ),
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Stream to export; if not given particles, or the only one."
        ),
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Fields to export, separated by commas; all if not given."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most this many rows.")
    ] = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Merge rows that arrived late strictly by time.")
    ] = False,
) -> None:
    """Write the rows of a time range, both ends included, to a file for other tools.

    Values are exact, times included. The file appears complete or not at all, and memory stays
    bounded whatever the range. Exit code 3 says that damaged batches had to be left out.
    """
    check_range(start, stop, last)
    _check_suffix(output, FORMATS)
    check_format(output)
    libc.keep_freed_memory()
    with stores.open_store(path) as store:
        target = store[stream_name(store, stream)]
        names = [name.strip() for name in fields.split(",")] if fields is not None else None
        reading = Reading(target, start, stop, names, limit, ordered)
        if last is not None:
            reading.start = start_of_last(target, last)
        selected = reading.selected()
        with row_progress(reading, wanted=True):
            rows = write_file(reading.batches(), selected, output, time=target.schema.time)
    say(f"{rows:,} rows to {output}")
    if reading.damaged:
        raise typer.Exit(LOSS)


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
) -> None:
    """Append the rows of files to a stream.

    Parquet, Arrow and .npz files from kvstore bring their schema along; of others it is
    inferred. What was imported before an error is kept: a second run appends it again.
    """
    for file in files:
        _check_suffix(file, LOADABLE)
    libc.keep_freed_memory()
    with stores.open_store(path, mode="w") as store:
        for file in files:
            rows = _import_file(store, stream, file, time_field)
            store.flush()
            say(f"{rows:,} rows from {file}")


def _check_suffix(path: Path, known: Sequence[str]) -> None:
    if path.suffix[1:] not in known:
        raise typer.BadParameter(f"{path}: in which format? Name it .{', .'.join(known)}")


def _import_file(store: stores.Store, name: str, file: Path, time_field: str) -> int:
    known = store[name].schema if name in store else None
    loaded = load(file, time=time_field, known=known)
    target = store.stream(name) if known else store.stream(name, loaded.schema)
    rows = 0

    def counted() -> Iterator[Batch]:
        nonlocal rows
        for batch in loaded.batches:
            rows += len(next(iter(batch.values())))
            yield batch

    def describe(elapsed: float) -> str:
        return f"{file.name}  {rows:,} rows  {rows / elapsed / 1000:.1f} k/s"

    with progress_bar(describe):
        _append(target, counted())
    return rows


def _append(target: Stream, batches: Iterator[Any]) -> None:
    for batch in batches:
        target.append(batch)
