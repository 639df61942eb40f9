"""``kvstore telemetry maintain``: upkeep of a lake, beside ingestion."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore.cli.options import Json, duration_s
from kvstore.cli.terminal import say, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.telemetry.sinks.iceberg_maintain import Upkeep

ORPHANS_MIN_S = 3600.0  # a commit that is being made has its files there already

Lakes = Annotated[str, typer.Argument(metavar="LAKE", help="The lake's folder, or its URI.")]
SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", metavar="FILE", help="TOML that names the lake's [catalog]."),
]


def maintain(
    lake: Lakes,
    *,
    keep: Annotated[
        float,
        typer.Option(
            parser=duration_s,
            metavar="DURATION",
            help="Snapshots younger than this stay: for readers that are at it.",
            show_default="1d",
        ),
    ] = 86_400.0,
    orphans_after: Annotated[
        float,
        typer.Option(
            parser=duration_s,
            metavar="DURATION",
            help="Files that nothing refers to go once they are so old; an hour at least.",
            show_default="3d",
        ),
    ] = 259_200.0,
    compact: Annotated[
        bool, typer.Option("--compact/--no-compact", help="Make few files of many small ones.")
    ] = True,
    accept_rollback: Annotated[
        bool,
        typer.Option(
            "--accept-rollback",
            help="Only this: where somebody rolled the table back, set the positions back too.",
        ),
    ] = False,
    settings: SettingsFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compact small files, expire snapshots with their files, remove orphans.

    Ingestion may go on meanwhile. Run it by a timer: every commit adds files and a snapshot.
    """
    from kvstore.telemetry.sinks import iceberg_maintain  # noqa: PLC0415
    from kvstore.telemetry.sinks.iceberg_lake import open_lake  # noqa: PLC0415

    if orphans_after < ORPHANS_MIN_S:
        raise typer.BadParameter("--orphans-after below an hour would take files of commits")
    opened = open_lake(lake, catalog=catalog_of(settings))
    try:
        if accept_rollback:
            positions = iceberg_maintain.accept_rollback(opened)
            for place, next_, _ in positions:
                print(f"{place.source} {place.partition}: goes on at {next_}")
            return
        done = iceberg_maintain.maintain(
            opened, keep_s=keep, orphans_s=orphans_after, compact=compact, dry_run=dry_run
        )
    finally:
        opened.close()
    if as_json:
        print(json.dumps(asdict(done)))
    else:
        say(_text(lake, done, dry_run=dry_run))


def _text(lake: str, done: Upkeep, *, dry_run: bool) -> str:
    would = "would make" if dry_run else "made"
    removed = f"{done.files_removed:,} files removed ({size_text(done.bytes_removed)})"
    return (
        f"{lake}: {would} {done.into:,} files of {done.compacted:,}; {done.expired:,} snapshots "
        f"expired, {done.orphans:,} orphans; {removed}"
    )


def catalog_of(settings: Path | None) -> Mapping[str, str] | None:
    """The catalog that a file of settings names; None is the one in the lake's folder."""
    if settings is None:
        return None
    from kvstore.telemetry.settings import load  # noqa: PLC0415

    return load(settings).catalog or None
