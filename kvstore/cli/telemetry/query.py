"""``kvstore telemetry query``: readings of a sink, by device and time."""

from __future__ import annotations

import sys
from itertools import islice
from typing import Annotated, Literal

import typer

from kvstore.cli.options import Last, Limit, Start, Stop, epoch_seconds
from kvstore.cli.query import check_range
from kvstore.cli.telemetry.ingest import contract_of
from kvstore.cli.terminal import quiet_if_closed
from kvstore.telemetry.opening import open_sink


def query(
    sink: Annotated[str, typer.Argument(metavar="SINK", help="A store, a lake, postgresql://…")],
    *,
    device: Annotated[str | None, typer.Option(metavar="ID", help="Of that device only.")] = None,
    start: Start = None,
    stop: Stop = None,
    last: Last = None,
    limit: Limit = None,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="With where each came from, and when.")
    ] = False,
    format_: Annotated[Literal["csv", "jsonl"], typer.Option("--format")] = "csv",
) -> None:
    """Print readings in order of time, both ends of the range included."""
    from kvstore.telemetry import query as queries  # noqa: PLC0415

    check_range(start, stop, last)
    first_us = None if start is None else round(epoch_seconds(start) * 1e6)
    behind_us = None if stop is None else round(epoch_seconds(stop) * 1e6) + 1
    with open_sink(sink, contract_of(None), "r") as opened, quiet_if_closed():
        if last is not None:
            newest_us = queries.newest_us(opened, device)
            first_us = None if newest_us is None else newest_us - last // 1000
        found = queries.rows(opened.read(first_us, behind_us, device_id=device), lineage=lineage)
        if limit is not None:
            found = islice(found, limit)
        lines = queries.csv_lines(found) if format_ == "csv" else queries.jsonl(found)
        for line in lines:
            sys.stdout.write(line)
