"""``kvstore replay``: a time range again, at its pace."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.follow import send_packets, stop_or_closed, stop_signals
from kvstore.cli.options import FieldNames, Start, Stop, StorePath, StreamName, field_names
from kvstore.cli.query import check_range, stream_name
from kvstore.cli.terminal import LOSS, complain, progress_bar, quiet_if_closed, say
from kvstore.errors import KvstoreError
from kvstore.replay import Lateness


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
) -> None:
    """Send the rows of a time range again, at the pace of their times.

    As packets to a pipe, as `kvstore write` takes them; rows leave within a millisecond of their
    own time where the reader keeps up. How late they were is said on stderr at the end. SIGINT
    and SIGTERM end it. Exit code 3 says that damaged batches had to be left out.
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

    with stores.open_store(path) as store, stop_signals() as stopped, quiet_if_closed():
        paced = store[stream_name(store, stream)].replay(
            start,
            stop,
            speed=speed,
            loop=loop,
            fields=field_names(fields),
            on_damage=report,
            stop_when=stop_or_closed(stopped),
        )
        began = time.perf_counter()
        try:
            with progress_bar(lambda _: f"{paced.lateness().rows:,} rows"):
                send_packets(iter(paced), [], sys.stdout.buffer)
        finally:
            _summarise(paced.lateness(), time.perf_counter() - began, paced=speed > 0)
    if damaged:
        raise typer.Exit(LOSS)


def _summarise(late: Lateness, elapsed_s: float, *, paced: bool) -> None:
    said = f"Replayed {late.pieces} packets ({late.rows} rows) in {elapsed_s:.3f} s"
    if paced:
        said += f"; late by at most {late.max_s * 1e3:.2f} ms, p99 {late.p99_s * 1e3:.2f} ms"
    say(said + ".")
