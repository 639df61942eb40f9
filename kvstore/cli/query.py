"""``kvstore read``: the rows of a time range, as packets, files or a summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal, cast

import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.follow import Begin, Following, send_packets
from kvstore.cli.options import (
    STDIN,
    FieldNames,
    Last,
    Limit,
    Ordered,
    Start,
    Stop,
    StorePath,
    StreamName,
    epoch_seconds,
    field_names,
)
from kvstore.cli.terminal import LOSS, complain, progress_bar, quiet_if_closed
from kvstore.errors import DamageError
from kvstore.export import csv, jsonl, npz
from kvstore.export.atomic import replacing
from kvstore.ingest import PARTICLES
from kvstore.reading import limited
from kvstore.schema import Batch, Field
from kvstore.stream import Stream
from kvstore.timestamps import format_time, subtract, to_time

Format = Literal["packets", "npz", "csv", "jsonl", "summary"]
_EXPORTS: Final = {"npz": npz.write, "csv": csv.write, "jsonl": jsonl.write}
_STDOUT: Final = STDIN  # the same dash


@dataclass(slots=True)
class Reading:
    """What to read, and how far it got."""

    stream: Stream
    start: Any
    stop: Any
    fields: Sequence[str] | None
    limit: int | None
    ordered: bool
    rows: int = 0
    damaged: int = 0

    def batches(self) -> Iterator[Batch]:
        """The batches, counted; damaged ones are reported and left out."""
        batches = self.stream.read(
            self.start, self.stop, fields=self.fields, ordered=self.ordered, on_damage=self._report
        )
        for batch in batches if self.limit is None else limited(batches, self.limit):
            self.rows += len(next(iter(batch.values())))
            yield batch

    def selected(self) -> list[Field]:
        """The schema of what is read."""
        schema = self.stream.schema
        return [schema.fields[schema.number(name)] for name in self.fields or schema.names]

    def expected_rows(self) -> int:
        """How many rows there will be, unless some are damaged."""
        rows = self.stream.count(self.start, self.stop)
        return rows if self.limit is None else min(rows, self.limit)

    def _report(self, error: DamageError) -> None:
        self.damaged += 1
        complain(str(error))


def read(
    path: StorePath,
    *,
    start: Start = None,
    stop: Stop = None,
    last: Last = None,
    stream: StreamName = None,
    fields: FieldNames = None,
    limit: Limit = None,
    count: Annotated[
        bool, typer.Option("--count", help="Only print how many rows there are, from the index.")
    ] = False,
    ordered: Ordered = False,
    format_: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="By default what the name of the output file ends in; packets to a pipe, a "
            "summary to a terminal.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="File to write, complete or not at all."
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Every committed batch in commit order, and those to come, to stdout."
        ),
    ] = False,
    cursor_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --follow: where to keep how far it got, and to go on from. After a kill "
            "the last moments come again.",
        ),
    ] = None,
    from_: Annotated[
        Begin,
        typer.Option(
            "--from", help="With --follow, where to begin if there is no cursor file yet."
        ),
    ] = "start",
) -> None:
    """Read the rows of a time range, both ends included.

    A pipe gets them as packets, as `kvstore write` takes them; a terminal gets a summary. Exit
    code 3 says that damaged batches had to be left out.
    """
    check_range(start, stop, last)
    if follow:
        _check_follow(start, stop, last, limit, count, ordered, output)
        following = Following(
            path,
            lambda store, known: stream_name(store, stream or known),
            field_names(fields),
            cursor_file,
            from_,
        )
        _follow(following, format_ or "packets")
        return
    if cursor_file or from_ != "start":
        raise typer.BadParameter("--cursor-file and --from go with --follow")
    if count and (limit or format_ or output):
        raise typer.BadParameter("--count goes without --limit, --format and --output")
    format_ = format_ or _default_format(output)
    to_terminal = output in (None, _STDOUT) and sys.stdout.isatty()
    if format_ in ("packets", "npz") and to_terminal and not count:
        raise typer.BadParameter(f"{format_} is binary: pipe it, or name a file with -o")
    libc.keep_freed_memory()
    with stores.open_store(path) as store:
        target = store[stream_name(store, stream)]
        reading = Reading(target, start, stop, field_names(fields), limit, ordered)
        reading.selected()  # an unknown field is found before an output file is begun
        if last is not None:
            reading.start = start_of_last(target, last)
        with quiet_if_closed():
            if count:
                print(target.count(reading.start, reading.stop))
            elif format_ == "summary":
                _summary(reading, output)
            else:
                _send(reading, format_, output, quietly=to_terminal)
    if reading.damaged:
        raise typer.Exit(LOSS)


def _check_follow(*others: object) -> None:
    if any(others):
        raise typer.BadParameter(
            "--follow goes with --stream, --fields, --format, --cursor-file and --from only: it "
            "sends all that was committed, in that order, to stdout"
        )


def _follow(following: Following, format_: Format) -> None:
    sends = {"packets": send_packets, "csv": csv.write, "jsonl": jsonl.write}
    if format_ not in sends:
        raise typer.BadParameter(f"--follow has no end, and {format_} needs one: use jsonl or csv")
    if format_ == "packets" and sys.stdout.isatty():
        raise typer.BadParameter("packets are binary: pipe them, or use --format jsonl")
    libc.keep_freed_memory()
    with quiet_if_closed():
        following.send(sends[format_])
    if following.losses:
        raise typer.Exit(LOSS)


def check_range(start: str | None, stop: str | None, last: int | None) -> None:
    """Refuse ends that contradict each other."""
    if last is not None and (start is not None or stop is not None):
        raise typer.BadParameter("--last goes without --start and --stop")
    if start is not None and stop is not None and epoch_seconds(start) > epoch_seconds(stop):
        raise typer.BadParameter(f"--start {start} is after --stop {stop}")


def _default_format(output: Path | None) -> Format:
    if output is None or output == _STDOUT:
        return "summary" if sys.stdout.isatty() else "packets"
    suffix = output.suffix[1:]
    if suffix in _EXPORTS:
        return cast("Format", suffix)
    if suffix in ("", "packets"):
        return "packets"
    raise typer.BadParameter(
        f"{output}: in which format? Name it .packets, .{' or .'.join(_EXPORTS)}, or say --format"
    )


def stream_name(store: stores.Store, given: str | None) -> str:
    """The stream that was named, or particles, or the only one."""
    if given is None and PARTICLES not in store and len(store) == 1:
        return next(iter(store))
    return PARTICLES if given is None else given


def start_of_last(stream: Stream, last_ns: int) -> Any:
    """The start of the stretch before the last row; None where there is no row.

    An int64 as a range end needs its unit said, so it goes as datetime64.
    """
    span = stream.span()
    if span is None:
        return None
    start = subtract(span[1], last_ns, stream.schema.time_dtype)
    return start.view("M8[ns]") if start.dtype.kind == "i" else start


def _send(reading: Reading, format_: Format, output: Path | None, *, quietly: bool) -> None:
    with row_progress(reading, wanted=not quietly), opened(output) as file:
        if format_ == "packets":
            send_packets(reading.batches(), reading.selected(), file)
        else:
            _EXPORTS[format_](reading.batches(), reading.selected(), file)


def row_progress(reading: Reading, *, wanted: bool) -> Any:
    """A bar of the rows read so far, on a terminal."""
    if not (wanted and sys.stderr.isatty()):
        return nullcontext()  # counting is quick, but not for nothing
    expected = max(reading.expected_rows(), 1)
    return progress_bar(
        lambda elapsed: f"{reading.rows:,} rows  {reading.rows / elapsed / 1000:.1f} k/s",
        lambda: reading.rows / expected,
    )


@contextmanager
def opened(output: Path | None) -> Iterator[BinaryIO]:
    """stdout, or a file that takes its name only once it is complete and on the disk."""
    if output is None or output == _STDOUT:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if output.exists() and not output.is_file():  # /dev/null or a named pipe is written to
        with output.open("wb") as file:
            yield file
        return
    with replacing(output) as fresh, fresh.open("wb") as file:
        yield file


def _summary(reading: Reading, output: Path | None) -> None:
    """What the brief's reader prints; reads every row to say how fast that goes."""
    with opened(output) as file:
        for line in _summary_lines(reading):
            file.write(f"{line}\n".encode())


def _summary_lines(reading: Reading) -> Iterator[str]:
    stream, dtype = reading.stream, reading.stream.schema.time_dtype
    span = stream.span()
    if span is None:
        yield f"The storage holds no data in stream {stream.name!r}."
        return
    noun = "particles" if stream.name == PARTICLES else "rows"
    ends = [_spaced(format_time(end, dtype)) for end in span]
    shown = [
        end if given is None else _shown(given, dtype)
        for given, end in zip((reading.start, reading.stop), ends, strict=True)
    ]
    yield f"Reading data between {shown[0]} and {shown[1]}"
    yield f"Found storage data from {ends[0]} to {ends[1]}"
    started = time.perf_counter()
    with row_progress(reading, wanted=True):
        for _ in reading.batches():
            pass
    elapsed = time.perf_counter() - started
    yield f"Found {reading.rows} {noun}."
    yield f"Read bandwidth {reading.rows / elapsed / 1000:.2f} k{noun.capitalize()}/s."


def _shown(given: Any, dtype: Any) -> str:
    return _spaced(format_time(to_time(given, dtype, side="start"), dtype))


def _spaced(text: str) -> str:
    return text.replace("T", " ")
