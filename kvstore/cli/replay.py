"""``kvstore replay``: a time range again, at its pace."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager
from typing import Annotated, NamedTuple

import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.follow import letting_go, send_packets, stop_or_closed, stop_signals
from kvstore.cli.options import FieldNames, Start, Stop, StorePath, StreamName, field_names
from kvstore.cli.query import check_range, stream_name
from kvstore.cli.terminal import LOSS, complain, progress_bar, quiet_if_closed, say
from kvstore.errors import KvstoreError
from kvstore.replay import Replay


def replay(
    path: StorePath,
    *,
    speed: Annotated[
        float,
        typer.Option(
            min=0, metavar="X", help="1 is the original pace, 2 twice that, 0 as fast as possible."
        ),
    ] = 1.0,
    start: Start = None,
    stop: Stop = None,
    stream: StreamName = None,
    fields: FieldNames = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Begin anew at the end; the times stay as stored.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Report as JSON at the end, on stderr: packets go to stdout."),
    ] = False,
) -> None:
    """Send the rows of a time range again, at the pace of their times.

    As packets to a pipe, as `kvstore write` takes them; rows leave within a millisecond of their
    own time where the reader keeps up. How late they were is said on stderr at the end. SIGINT
    and SIGTERM end it. Exit code 3 says that rows had to be left out: damaged, or dropped by
    retention before their turn.
    """
    check_range(start, stop, None)
    if sys.stdout.isatty():
        raise typer.BadParameter(
            "packets are binary: pipe them, as in: kvstore replay run.kv | kvstore write copy.kv"
        )
    libc.keep_freed_memory()
    damaged: list[str] = []

    def report(error: KvstoreError) -> None:
        damaged.append(str(error))
        complain(str(error))

    with (
        stores.open_store(path) as store,
        stop_signals() as stopped,
        quiet_if_closed(),
        letting_go(store),
    ):
        source = store[stream_name(store, stream)]
        paced = source.replay(
            start,
            stop,
            speed=speed,
            loop=loop,
            fields=field_names(fields),
            on_damage=report,
            stop_when=stop_or_closed(stopped),
        )
        expected_rows = source.count(start, stop) if sys.stderr.isatty() and not loop else None
        began = time.perf_counter()
        try:
            with _shown(paced, expected_rows):
                send_packets(iter(paced), [], sys.stdout.buffer)
        finally:
            done = _Report(
                **paced.lateness()._asdict(),
                elapsed_s=time.perf_counter() - began,
                speed=speed,
                damaged=len(damaged),
            )
            say(json.dumps(done._asdict()) if as_json else _text(done))
    if damaged:
        raise typer.Exit(LOSS)


class _Report(NamedTuple):
    """What was sent, and how late."""

    pieces: int
    rows: int
    max_s: float
    p99_s: float
    elapsed_s: float
    speed: float
    damaged: int


def _shown(paced: Replay, expected_rows: int | None) -> AbstractContextManager[None]:
    """A bar of the rows sent, with the time left where the replay has an end."""

    def describe(elapsed_s: float) -> str:
        return f"{paced.rows:,} rows  {paced.rows / elapsed_s / 1000:.1f} k/s"

    if expected_rows is None:
        return progress_bar(describe)
    return progress_bar(describe, lambda: paced.rows / max(expected_rows, 1))


def _text(done: _Report) -> str:
    said = f"Replayed {done.pieces} packets ({done.rows} rows) in {done.elapsed_s:.3f} s"
    if done.speed:
        said += f"; late by at most {done.max_s * 1e3:.2f} ms, p99 {done.p99_s * 1e3:.2f} ms"
    return said + "."
