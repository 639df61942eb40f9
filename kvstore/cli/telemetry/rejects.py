"""``kvstore telemetry rejects``: list, show, replay and discard dead letters, of any sink."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore.cli.options import Json
from kvstore.cli.telemetry.ingest import Contracts, contract_of, stamp
from kvstore.cli.terminal import quiet_if_closed, say
from kvstore.errors import SinkError
from kvstore.telemetry.opening import open_sink

if TYPE_CHECKING:
    from kvstore.telemetry.records import DeadLetter
    from kvstore.telemetry.rejects import Wanted

_SHOWN_CHARS = 60

Sinks = Annotated[
    str,
    typer.Argument(metavar="SINK", help="A store, a lake, or postgresql://…", show_default=False),
]
Reasons = Annotated[
    str | None, typer.Option("--reason", metavar="CODE", help="Those refused for that reason.")
]
Sources = Annotated[
    str | None, typer.Option("--source", metavar="NAME", help="Those of that source.")
]
States = Annotated[
    str, typer.Option("--state", metavar="STATE", help="open, replayed, discarded or all.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]


def list_(
    sink: Sinks,
    *,
    reason: Reasons = None,
    source: Sources = None,
    state: States = "open",
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most this many.")] = 1000,
    count: Annotated[
        bool, typer.Option("--count", help="How many there are of each reason, only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List dead letters: name, state, when first seen, reasons, and the begin of the event."""
    from kvstore.telemetry import rejects  # noqa: PLC0415

    wanted = _wanted(reason, source, state)
    with open_sink(sink, contract_of(None), "r") as opened, quiet_if_closed():
        letters = rejects.select(opened, wanted)
        if count:
            _print_counts(letters, as_json=as_json)
            return
        for letter in islice(letters, limit):
            print(json.dumps(record(letter)) if as_json else _line(letter))
        if next(letters, None) is not None:
            say(f"kvstore: there are more than {limit}; see --limit and --count")


def show(
    sink: Sinks,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `list` prints it.")],
    *,
    as_json: Json = False,
) -> None:
    """Show one dead letter with all that is kept of its event."""
    from kvstore.telemetry import rejects  # noqa: PLC0415

    place, offset = rejects.parse_name(name)
    with open_sink(sink, contract_of(None), "r") as opened:
        letter = next(iter(opened.dead_letters(place=place, offset=offset)), None)
    if letter is None:
        raise SinkError(f"{sink}: has no dead letter {name}; see `kvstore telemetry rejects list`")
    found = record(letter)
    if as_json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:17}{value if isinstance(value, str | int | None) else json.dumps(value)}")


def replay(
    sink: Sinks,
    *,
    contract: Contracts = None,
    reason: Reasons = None,
    source: Sources = None,
    state: States = "open",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Send dead letters through today's contract; what passes becomes readings, once."""
    from kvstore.telemetry import rejects  # noqa: PLC0415

    found = contract_of(contract)
    with open_sink(sink, found, "r" if dry_run else "w") as opened:
        if not dry_run:
            opened.evolve(found)
        done = rejects.replay(
            opened,
            found,
            _wanted(reason, source, state),
            clock=lambda: time.time_ns() // 1000,
            dry_run=dry_run,
        )
    figures: dict[str, Any] = {
        "letters": done.letters,
        "passing": done.passing,
        "stored": done.stored,
        "duplicates": done.duplicates,
        "conflicts": done.conflicts,
        "again": dict(done.again),
    }
    if as_json:
        print(json.dumps(figures))
    refused = ", ".join(f"{code} {n:,}" for code, n in done.again.most_common())
    became = f"{done.stored:,} stored, {done.duplicates:,} duplicates, {done.conflicts:,} conflicts"
    say(
        f"{done.letters:,} dead letters: {done.passing:,} "
        f"{'would pass' if dry_run else f'pass ({became})'}, "
        f"{done.letters - done.passing:,} refused again{f' ({refused})' if refused else ''}"
    )


def discard(
    sink: Sinks,
    *,
    reason: Reasons = None,
    source: Sources = None,
    undo: Annotated[bool, typer.Option("--undo", help="Open discarded ones again.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Put open dead letters aside; they stay in the sink, and can be opened again."""
    from kvstore.telemetry import rejects  # noqa: PLC0415
    from kvstore.telemetry.records import State  # noqa: PLC0415

    wanted = _wanted(reason, source, "discarded" if undo else "open")
    target = State.OPEN if undo else State.DISCARDED
    with open_sink(sink, contract_of(None), "r" if dry_run else "w") as opened:
        count = rejects.discard(opened, wanted, state=target, dry_run=dry_run)
    verb = "would be" if dry_run else "are"
    say(f"{count:,} dead letters {verb} {target.value}")


def record(letter: DeadLetter) -> dict[str, Any]:
    """A letter as plain values; bytes as text, with what is no UTF-8 escaped."""
    from kvstore.telemetry.rejects import name_of  # noqa: PLC0415

    rejection = letter.rejection
    return {
        "name": name_of(rejection.place, rejection.offset),
        "state": letter.state.value,
        "replays": letter.replays,
        "first_seen": stamp(letter.first_seen_us),
        "reasons": [list(reason) for reason in rejection.reasons],
        "device_id": rejection.device_id,
        "time": None if rejection.ts_us is None else stamp(rejection.ts_us),
        "key": _text(rejection.key),
        "headers": {name: _text(value) for name, value in rejection.headers},
        "contract_version": letter.contract_version,
        "run": letter.run,
        "payload": _text(rejection.payload),
    }


def _line(letter: DeadLetter) -> str:
    found = record(letter)
    reasons = ", ".join(":".join(filter(None, reason[:2])) for reason in found["reasons"])
    payload = ascii(found["payload"] or "")[1:-1]
    return "\t".join(
        [found["name"], found["state"], found["first_seen"], reasons, payload[:_SHOWN_CHARS]]
    )


def _print_counts(letters: Any, *, as_json: bool) -> None:
    total, codes = 0, Counter[str]()
    for letter in letters:
        total += 1
        codes.update({reason.code for reason in letter.rejection.reasons})
    if as_json:
        print(json.dumps({"letters": total, "reasons": dict(sorted(codes.items()))}))
        return
    for code, number in codes.most_common():
        print(f"{code}\t{number}")
    print(f"letters\t{total}")


def _wanted(reason: str | None, source: str | None, state: str) -> Wanted:
    from kvstore.telemetry.records import State  # noqa: PLC0415
    from kvstore.telemetry.rejects import Wanted  # noqa: PLC0415

    states = {"all": None, **{each.value: each for each in State}}
    if state not in states:
        raise typer.BadParameter(f"--state {state}: expected {', '.join(states)}")
    return Wanted(states[state], reason, source)


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "backslashreplace")
