"""``kvstore verify``, ``recover`` and ``backup``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from kvstore import libc
from kvstore.backup import backup as back_up
from kvstore.cli.options import Json, StorePath, size_bytes
from kvstore.cli.terminal import LOSS, complain, progress_bar, quiet_if_closed, say, size_text
from kvstore.damaged import record_damages
from kvstore.recover import recover as recover_store
from kvstore.untrusted import Damage
from kvstore.verify import verify as verify_store


class _Progress:
    """What a verb says of how far it is, and the bar that shows it."""

    done = 0
    total = 1

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, max(total, 1)

    def bar(self) -> Any:
        return progress_bar(
            lambda elapsed: f"{size_text(self.done)}  {size_text(self.done / elapsed)}/s",
            lambda: self.done / self.total,
        )


def rate(text: str) -> int:
    """Bytes a second: a size, with or without /s."""
    found = size_bytes(text.strip().removesuffix("/s"))
    if not found:
        raise typer.BadParameter("a rate of 0 would never end: leave --rate out for no limit")
    return found


def verify(
    path: StorePath,
    *,
    rate_bytes_s: Annotated[
        int | None,
        typer.Option(
            "--rate", metavar="RATE", parser=rate, help="Read at most so much a second: 100MB/s."
        ),
    ] = None,
    since_last: Annotated[
        bool,
        typer.Option(
            "--since-last",
            help="Leave out sealed segments found sound by a run with this option before, even "
            "one cut short, and not written to since.",
        ),
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="FILE",
            help="Where --since-last remembers them; by default PATH.verified, beside the store.",
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Record what is found as gaps of the store, each once: see kvstore gaps.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every checksum, index entry, total and page of a store.

    Names stream, field and time span of each damage. Changes nothing, unless told to --record;
    a writer may be writing meanwhile, and what it adds then is not looked at. Exit code 3 says
    that damage was found: `kvstore recover` brings the rest into a new store.
    """
    if state and not since_last:
        raise typer.BadParameter("--state goes with --since-last")
    libc.keep_freed_memory()
    progress = _Progress()
    with progress.bar():
        report = verify_store(
            path,
            rate_bytes_s=rate_bytes_s,
            since_last=since_last,
            state_path=state,
            on_progress=progress,
        )
    skipped = f", {report.skipped} verified before" if report.skipped else ""
    verdict = f"{len(report.damages)} damages" if report.damages else "sound"
    for problem in report.notes:
        say(problem)
    text = (
        f"{path}: {verdict}; {report.rows:,} rows, {size_text(report.bytes)} in "
        f"{report.segments} segments{skipped}"
    )
    _show(report, report.damages, text, as_json=as_json)
    if record and report.damages:
        say(f"{record_damages(path, report.damages)} new gaps recorded")
    _exit(report.damages)


def recover(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The damaged store.")],
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="NEW", help="The store to make; a new path.")
    ],
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="STORE",
            help="A sound store with the same streams, such as a backup: its definitions are "
            "used where the damaged store has lost its own.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring out of a damaged store all that can be read.

    It goes into a new store. The source is never written to, and must not be while this runs;
    truncated, torn and missing segments are no obstacle. The new store has an id of its own,
    settings, pins, marks and gaps of the old one, and what was lost as further gaps. It appears
    complete or not at all. Exit code 3 says that something was lost, and what.
    """
    libc.keep_freed_memory()
    progress = _Progress()
    with progress.bar():
        report = recover_store(path, output, like=like, on_progress=progress)
    text = f"{output}: {report.rows:,} rows in {report.batches:,} batches recovered"
    for note in report.notes:
        say(note)
    _show(report, report.losses, text, as_json=as_json)
    _exit(report.losses)


def backup(
    path: StorePath,
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="The backup: a new folder, or an earlier backup.")
    ],
    *,
    as_json: Json = False,
) -> None:
    """Copy a store, also while it is being written.

    To the same place again, only what is new is copied. Every copy is checked and read back; sealed
    segments that are there already are not looked at again: kvstore verify DEST does that. A backup
    is a store: any command can read it. Until the first is complete, DEST is no store; cut short,
    the next run goes on where it ended.

    DEST follows the store: segments that retention or kvstore drop has removed since are removed
    there, too, pinned ones stay. To keep a state for good, back up to another folder.

    Damage in the store is reported, exit code 3, and ends nothing: the rest is backed up, and sound
    copies are not replaced by damaged ones.
    """
    progress = _Progress()
    with progress.bar():
        report = back_up(path, dest, on_progress=progress)
    text = (
        f"{dest}: complete; {report.copied} segments copied ({size_text(report.copied_bytes)}), "
        f"{report.kept} there already"
    )
    _show(report, report.damages, text, as_json=as_json)
    _exit(report.damages)


def _show(report: Any, damages: tuple[Damage, ...], text: str, *, as_json: bool) -> None:
    with quiet_if_closed():
        if as_json:
            print(json.dumps(_plain(report), indent=2))
        else:
            for damage in damages:
                complain(_line(damage))
            print(text)


def _exit(damages: tuple[Damage, ...]) -> None:
    if damages:
        raise typer.Exit(LOSS)


_SHOWN: Final[dict[str, Callable[[Any], str]]] = {
    "segment": lambda number: f"segment {number}",
    "stream": lambda name: f"stream {name!r}",
    "field": lambda name: f"field {name!r}",
    "rows": lambda count: f"{count} rows",
    "start": lambda start: f"from {start}",
    "stop": lambda stop: f"to {stop}",
}


def _line(damage: Damage) -> str:
    where = [show(value) for key, show in _SHOWN.items() if (value := getattr(damage, key))]
    return f"{', '.join(where)}: {damage.what}" if where else damage.what


def _plain(record: Any) -> Any:
    if isinstance(record, tuple) and hasattr(record, "_asdict"):
        return {key: _plain(value) for key, value in record._asdict().items()}
    return [_plain(each) for each in record] if isinstance(record, tuple) else record
