"""``kvstore telemetry audit``: whether each line of a file has its one fate in a sink."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.options import Json
from kvstore.cli.telemetry.ingest import Contracts, contract_of
from kvstore.cli.terminal import LOSS, complain, say
from kvstore.telemetry.opening import open_sink


def audit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines that were ingested.")],
    sink: Annotated[str, typer.Argument(metavar="SINK", help="A store, a lake, postgresql://…")],
    *,
    contract: Contracts = None,
    as_json: Json = False,
) -> None:
    """Hold a file against a sink: each line read is stored, a duplicate or rejected, once.

    Exit code 3 where a line has no fate, or several.
    """
    from kvstore.telemetry import audit as audits  # noqa: PLC0415

    found_contract = contract_of(contract)
    with open_sink(sink, found_contract, "r") as opened:
        found = audits.audit(file, opened, found_contract, now_us=time.time_ns() // 1000)
    if as_json:
        print(json.dumps(asdict(found)))
    say(
        f"{found.lines:,} lines read: {found.stored:,} stored, {found.duplicates:,} duplicates, "
        f"{found.rejected:,} rejected; {found.replayed:,} of them replayed; {found.unread:,} not "
        "read yet"
    )
    faults = {
        "have no fate": found.missing,
        "have two fates": found.twice,
        "are in the sink, and no event in the file": found.strange,
    }
    for words, lines in faults.items():
        if lines:
            shown = ", ".join(map(str, lines[: audits.EXAMPLES_MAX]))
            complain(f"{file}: {len(lines):,} lines {words}: {shown}")
    if not found.is_sound:
        raise typer.Exit(LOSS)
