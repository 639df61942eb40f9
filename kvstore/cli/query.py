"""``kvstore read`` and ``kvstore info``: rows by time, and what a store holds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.capture import write_parts
from kvstore.cli.terminal import LOSS, complain, progress_bar, quiet_if_closed
from kvstore.errors import DamageError, KvstoreError
from kvstore.export import csv, jsonl, npz
from kvstore.ingest import PARTICLES
from kvstore.packets import encode
from kvstore.reading import limited
from kvstore.schema import Batch, Field
from kvstore.timestamps import format_time, parse_duration, subtract, to_time

Format = Literal["packets", "npz", "csv", "jsonl", "summary"]
_EXPORTS = {"npz": npz.write, "csv": csv.write, "jsonl": jsonl.write}


@dataclasses.dataclass(slots=True)
class _Reading:
    """What to read, and how far it got."""

    stream: stores.Stream
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

    def _report(self, error: DamageError) -> None:
        self.damaged += 1
        complain(str(error))


def read(
    path: Annotated[Path, typer.Argument(help="The store.")],
    *,
    start: Annotated[
        str | None, typer.Option(help="First time, included: ISO 8601 or epoch seconds.")
    ] = None,
    stop: Annotated[str | None, typer.Option(help="Last time, included.")] = None,
    last: Annotated[
        str | None, typer.Option(help="The last stretch instead, such as 10s, 5m or 2h.")
    ] = None,
    stream: Annotated[
        str | None, typer.Option(help="Stream to read; particles, or the only one.")
    ] = None,
    fields: Annotated[
        str | None, typer.Option(help="Fields to read, separated by commas; all if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many rows.", min=1)] = None,
    count: Annotated[bool, typer.Option("--count", help="Only print how many rows.")] = False,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Merge late rows strictly by time.")
    ] = False,
    format_: Annotated[
        Format | None,
        typer.Option("--format", help="packets in a pipe and summary on a terminal by default."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write, complete or not at all.")
    ] = None,
) -> None:
    """Read the rows of a time range, both ends included.

    To a pipe they go as packets, framed as `kvstore write` takes them; to a terminal goes a
    summary. Exit code 3 if damaged batches had to be left out.

    Example: kvstore read run.kv --last 1s | kvstore write other.kv
    """
    if last is not None and (start is not None or stop is not None):
        raise typer.BadParameter("--last goes without --start and --stop")
    libc.keep_freed_memory()
    with stores.open_store(path) as store:
        target = store[_stream_name(store, stream)]
        reading = _Reading(target, start, stop, fields.split(",") if fields else None,
                           limit, ordered)  # fmt: skip
        reading.selected()
        if last is not None and (span := target.span()):
            dtype = target.schema.time_dtype
            reading.start = _given(subtract(span[1], parse_duration(last), dtype))
        with quiet_if_closed():
            if count:
                print(target.count(reading.start, reading.stop))
            else:
                _send(reading, format_ or _default_format(output), output)
    if reading.damaged:
        raise typer.Exit(LOSS)


def _stream_name(store: stores.Store, given: str | None) -> str:
    if given is None and PARTICLES not in store and len(store) == 1:
        return next(iter(store))
    return given or PARTICLES


def _given(value: Any) -> Any:
    """A stored time as a range end: an int64 needs its unit said, so it goes as datetime64."""
    return value.view("M8[ns]") if value.dtype.kind == "i" else value


def _default_format(output: Path | None) -> Format:
    if output is not None:
        suffix = output.suffix[1:]
        return suffix if suffix in _EXPORTS else "packets"  # type: ignore[return-value]
    return "summary" if sys.stdout.isatty() else "packets"


def _send(reading: _Reading, format_: Format, output: Path | None) -> None:
    if format_ == "summary":
        _summary(reading)
        return
    if output is None and format_ in ("packets", "npz") and sys.stdout.isatty():
        raise typer.BadParameter(f"{format_} is binary: pipe it, or name a file with -o")
    total = reading.stream.count(reading.start, reading.stop) if sys.stderr.isatty() else 0
    with (
        progress_bar(
            lambda elapsed: f"{reading.rows} rows  {reading.rows / elapsed / 1000:.1f} k/s",
            lambda: reading.rows / max(total, 1),
        ),
        _opened(output) as file,
    ):
        if format_ == "packets":
            _send_packets(reading, file)
        else:
            _EXPORTS[format_](reading.batches(), reading.selected(), file)


def _send_packets(reading: _Reading, file: BinaryIO) -> None:
    fd = file.fileno()
    libc.enlarge_pipe(fd)
    for batch in reading.batches():
        write_parts(fd, encode(batch))


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    """stdout, or a file that takes its name only once it is complete."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    fresh = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("wb") as file:
            yield file
        fresh.replace(output)
    except OSError as error:
        raise KvstoreError(f"{output}: {error.strerror}") from error
    finally:
        fresh.unlink(missing_ok=True)


def _summary(reading: _Reading) -> None:
    """What the brief's reader prints; reads every row to say how fast that goes."""
    stream, dtype = reading.stream, reading.stream.schema.time_dtype
    noun = "particles" if stream.name == PARTICLES else "rows"
    span = stream.span()
    ends = [_spaced(format_time(end, dtype)) for end in span] if span else ["nothing"] * 2
    shown = [
        end if given is None else _shown(given, dtype)
        for given, end in zip((reading.start, reading.stop), ends, strict=True)
    ]
    print(f"Reading data between {shown[0]} and {shown[1]}")
    print(f"Found storage data from {ends[0]} to {ends[1]}")
    started = time.perf_counter()
    for _ in reading.batches():
        pass
    elapsed = time.perf_counter() - started
    print(f"Found {reading.rows} {noun}.")
    print(f"Read bandwidth {reading.rows / elapsed / 1000:.2f} k{noun.capitalize()}/s.")


def _shown(given: Any, dtype: Any) -> str:
    return _spaced(format_time(to_time(given, dtype, side="start"), dtype))


def _spaced(text: str) -> str:
    return text.replace("T", " ")


def info(
    path: Annotated[Path, typer.Argument(help="The store.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show what a store holds: streams, fields, rows, time span, bytes, segments.

    Example: kvstore info run.kv --json
    """
    with stores.open_store(path) as store:
        found = store.info()
    if as_json:
        print(json.dumps(_plain(found), indent=2))
        return
    for key, value in _plain(found).items():
        if key != "streams":
            print(f"{key}\t{value}")
    for each in found.streams:
        _print_stream(each)


def _print_stream(each: stores.StreamStats) -> None:
    plain = _plain_stream(each)
    print(f"\nstream\t{each.name}")
    for key in ("rows", "first", "last", "batches", "raw_bytes", "stored_bytes", "ratio"):
        print(f"  {key}\t{plain[key]}")
    for field in plain["fields"]:
        described = " ".join(str(part) for part in (field["unit"], field["description"]) if part)
        shape = "x".join(map(str, field["shape"])) or "1"
        print(f"  field\t{field['name']}\t{field['dtype']}\t{shape}\t{described}".rstrip())


def _plain(found: stores.StoreInfo) -> dict[str, Any]:
    raw = sum(each.raw_bytes for each in found.streams)
    stored = sum(each.stored_bytes for each in found.streams)
    return {
        "path": found.path,
        "store_id": found.store_id,
        "segments": found.segments,
        "file_bytes": found.file_bytes,
        "raw_bytes": raw,
        "stored_bytes": stored,
        "ratio": round(raw / stored, 2) if stored else None,
        "created": _iso(found.created_ns),
        "last_commit": _iso(found.last_commit_ns) if found.last_commit_ns else None,
        "marks": found.marks,
        "streams": [_plain_stream(each) for each in found.streams],
    }


def _plain_stream(each: stores.StreamStats) -> dict[str, Any]:
    dtype = each.schema.time_dtype
    first, last = (None if t is None else format_time(t, dtype) for t in (each.first, each.last))
    return {
        "name": each.name,
        "rows": each.rows,
        "first": first,
        "last": last,
        "batches": each.batches,
        "raw_bytes": each.raw_bytes,
        "stored_bytes": each.stored_bytes,
        "ratio": round(each.raw_bytes / each.stored_bytes, 2) if each.stored_bytes else None,
        "time_field": each.schema.time,
        "fields": [
            {
                "name": field.name,
                "dtype": "text" if field.is_text else str(field.np_dtype),
                "shape": list(field.shape),
                "unit": field.unit,
                "description": field.description,
            }
            for field in each.schema.fields
        ],
    }


def _iso(ns: int) -> str:
    return format_time(np.int64(ns), np.dtype("<i8"))
