"""``kvstore telemetry drop``: retention of a database, whole days at a time."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from kvstore.cli.options import Json, epoch_seconds
from kvstore.cli.terminal import quiet_if_closed, say


def drop(
    target: Annotated[str, typer.Argument(metavar="SINK", help="postgresql://user@host/database")],
    *,
    before: Annotated[
        Any,
        typer.Option(
            metavar="TIME",
            parser=epoch_seconds,
            help="Days that end at or before it go: ISO 8601 (UTC if it names no offset).",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Drop old days from PostgreSQL, or chunks from TimescaleDB; readings of them only.

    For a timer: TimescaleDB's Apache edition has no policies. A reading of a dropped day that is
    sent again is stored again. A store has `kvstore drop` and `kvstore set --max-age`; a lake keeps
    its rows.
    """
    from kvstore.telemetry.opening import kind_of  # noqa: PLC0415  # as the others
    from kvstore.telemetry.settings import expanded, without_password  # noqa: PLC0415
    from kvstore.telemetry.sinks.postgres import PostgresSink  # noqa: PLC0415  # loads psycopg

    address = expanded(without_password(target))
    if kind_of(address) != "postgres":
        raise typer.BadParameter(
            f"{target}: days are dropped from PostgreSQL; a store has `kvstore drop`, "
            "and a lake keeps its rows"
        )
    with PostgresSink(address) as sink:
        dropped = sink.drop_before(round(before * 1e6))
    if as_json:
        with quiet_if_closed():
            print(json.dumps({"dropped": dropped}))
    else:
        count = f"{len(dropped)} day{'' if len(dropped) == 1 else 's'}"
        say(f"{count} dropped{': ' if dropped else ''}{', '.join(dropped)}")
