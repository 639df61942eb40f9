"""``kvstore telemetry check``: whether an ingest would work, before anything moves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.options import Json
from kvstore.cli.telemetry.ingest import Contracts, contract_of, options
from kvstore.cli.terminal import FAILED


def check(
    source: Annotated[
        list[str] | None, typer.Argument(metavar="SOURCE...", help="As for ingest.")
    ] = None,
    *,
    store: Annotated[str | None, typer.Option(metavar="PATH", help="Sink: a store.")] = None,
    postgres: Annotated[str | None, typer.Option(metavar="URL", help="Sink: PostgreSQL.")] = None,
    lake: Annotated[str | None, typer.Option(metavar="PATH", help="Sink: Iceberg.")] = None,
    contract: Contracts = None,
    settings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML, as for ingest.")
    ] = None,
    kafka_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option for librdkafka.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at source, sink, schema and permissions as `ingest` would need them; change nothing.

    Exit code 1 where something is wrong.
    """
    from kvstore.telemetry import preflight  # noqa: PLC0415

    given = options(
        settings,
        source=source,
        store=store,
        postgres=postgres,
        lake=lake,
        contract=contract,
        kafka_options=kafka_option,
    )
    found = list(
        preflight.check(
            given.source,
            given.sink,
            contract_of(given.contract),
            now_us=time.time_ns() // 1000,
            kafka=given.kafka,
            catalog=given.catalog,
        )
    )
    for finding in found:
        if as_json:
            print(json.dumps(finding._asdict()))
        else:
            print(f"{'ok  ' if finding.is_fine else 'FAIL'}  {finding.what:9}{finding.text}")
    if not all(finding.is_fine for finding in found):
        raise typer.Exit(FAILED)
