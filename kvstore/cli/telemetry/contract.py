"""``kvstore telemetry contract``: what an event has to be, and what a new version would change."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli.options import Json
from kvstore.cli.terminal import LOSS, quiet_if_closed, say

if TYPE_CHECKING:
    from kvstore.telemetry.compatibility import Change, Fare
    from kvstore.telemetry.contract import Contract

File = Annotated[
    str, typer.Argument(metavar="FILE", help="YAML after ODCS 3; v1 and v2 come with kvstore.")
]


def show(path: File = "v2", *, as_json: Json = False) -> None:
    """Show a contract: fields, types, units, ranges, since which version."""
    from kvstore.telemetry import contract as contracts  # noqa: PLC0415

    contract = contracts.load(path)
    with quiet_if_closed():
        if as_json:
            print(json.dumps(dataclasses.asdict(contract), indent=2, ensure_ascii=False))
            return
        for line in _lines(contract):
            print(line)


def check(
    path: File,
    old: Annotated[
        str | None, typer.Argument(metavar="[OLD]", help="Refuse what breaks this one.")
    ] = None,
) -> None:
    """Check that a contract can be read, and that it breaks nothing of an older one."""
    from kvstore.telemetry import compatibility  # noqa: PLC0415
    from kvstore.telemetry import contract as contracts  # noqa: PLC0415

    contract = contracts.load(path)
    if old is not None:
        compatibility.check(contracts.load(old), contract)
    words = "is sound" if old is None else f"is sound, and breaks nothing of {old}"
    say(f"{path}: version {contract.version} {words}")


def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="The contract in use.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The one that shall follow.")],
    *,
    against: Annotated[
        str | None,
        typer.Option(metavar="SINK", help="Try what this sink holds under the new one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a new contract changes, and how stored rows and rejects would fare.

    Exit code 3 where it breaks the old one, or would reject rows that are stored.
    """
    from kvstore.telemetry import compatibility  # noqa: PLC0415
    from kvstore.telemetry import contract as contracts  # noqa: PLC0415

    before, after = contracts.load(old), contracts.load(new)
    found = compatibility.changes(before, after)
    tried = None if against is None else _fare(against, before, after)
    with quiet_if_closed():
        if as_json:
            print(json.dumps(_plain(found, tried), indent=2))
        else:
            for line in _difference(found, tried):
                print(line)
    if any(each.breaking for each in found) or (tried and tried.rows_rejected):
        raise typer.Exit(LOSS)


def _fare(target: str, before: Contract, after: Contract) -> Fare:
    from kvstore.telemetry import compatibility  # noqa: PLC0415
    from kvstore.telemetry.opening import open_sink  # noqa: PLC0415

    with open_sink(target, before, "r") as sink:
        return compatibility.fare(sink, after, now_us=lambda: time.time_ns() // 1000)


def _lines(contract: Contract) -> list[str]:
    lines = [f"version {contract.version}, unknown fields: {contract.unknown}"]
    if contract.interval_s:
        lines.append(f"a device publishes every {contract.interval_s:g} s")
    if contract.latency_s:
        lines.append(f"an event arrives within {contract.latency_s:g} s")
    rows = [
        ("field", "type", "", "unit", "minimum", "maximum", "since"),
        ("device_id", "string", "required", "", "", "", "1"),
        ("timestamp", "timestamp", "required", "", "", "", "1"),
    ]
    for each in contract.values:
        low, high = (
            "" if limit is None else f"{limit:g}" for limit in (each.minimum, each.maximum)
        )
        required = "required" if each.required else "optional"
        rows.append((each.name, each.type, required, each.unit or "", low, high, str(each.since)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return lines + ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _difference(found: list[Change], tried: Fare | None) -> list[str]:
    lines = [
        f"{'BREAKS' if each.breaking else 'fine'}\t{each.field or '(contract)'}\t{each.text}"
        for each in found
    ] or ["no difference"]
    if tried is not None:
        lines += [
            f"rows\t{tried.rows:,}, of which {tried.rows_rejected:,} would be rejected"
            + _reasons(tried.row_reasons),
            f"open rejects\t{tried.letters:,}, of which {tried.letters_accepted:,} would pass"
            + _reasons(tried.letter_reasons),
        ]
    return lines


def _reasons(codes: Any) -> str:
    words = ", ".join(f"{code} {count:,}" for code, count in codes.most_common())
    return f" (rejected for: {words})" if words else ""


def _plain(found: list[Change], tried: Fare | None) -> dict[str, Any]:
    return {
        "changes": [each._asdict() for each in found],
        "breaking": any(each.breaking for each in found),
        "against": None
        if tried is None
        else {
            "rows": tried.rows,
            "rows_rejected": tried.rows_rejected,
            "row_reasons": dict(tried.row_reasons),
            "letters": tried.letters,
            "letters_accepted": tried.letters_accepted,
            "letter_reasons": dict(tried.letter_reasons),
        },
    }
