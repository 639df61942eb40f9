"""``kvstore telemetry migrate``: history from the lake into an operational store."""

from __future__ import annotations

import json
import select
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvstore import libc
from kvstore.cli.capture import stop_signal
from kvstore.cli.options import Json, epoch_seconds
from kvstore.cli.telemetry.ingest import Contracts, contract_of, stamp
from kvstore.cli.telemetry.maintain import Lakes, SettingsFile, catalog_of
from kvstore.cli.terminal import LOSS, progress_bar, say

if TYPE_CHECKING:
    from kvstore.telemetry.migrate import Moved, Verdict, Window
    from kvstore.telemetry.sink import Sink
    from kvstore.telemetry.sinks.iceberg import IcebergSink

SHOWN_MAX: Final = 20  # differences on a terminal; --json has a thousand


def migrate(
    lake: Lakes,
    *,
    to: Annotated[
        str, typer.Option(metavar="SINK", help="postgresql://…, or a store such as ops.kv.")
    ],
    start: Annotated[
        float | None,
        typer.Option("--from", metavar="TIME", parser=epoch_seconds, help="First time, included."),
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(metavar="TIME", parser=epoch_seconds, help="Up to there, not included."),
    ] = None,
    contract: Contracts = None,
    batch_rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Readings of one commit, at most.")
    ] = 100_000,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be moved; change nothing.")
    ] = False,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Move nothing; compare both sides.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare both sides afterwards.")
    ] = True,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Move readings from a lake, in order of time, each once; then compare both sides.

    Stop it, or let it be killed: started again it goes on where it was. Live events may come in
    meanwhile. The comparison is by device and day: count, nulls, minimum, maximum and a hash of
    each column. Exit code 3 where the sides differ.
    """
    from kvstore.telemetry import migrate as moving  # noqa: PLC0415
    from kvstore.telemetry.opening import open_sink  # noqa: PLC0415
    from kvstore.telemetry.settings import expanded, without_password  # noqa: PLC0415
    from kvstore.telemetry.sinks.iceberg import IcebergSink  # noqa: PLC0415

    libc.keep_freed_memory()
    name = expanded(without_password(to))
    window = moving.Window(_micros(start), _micros(until))
    found = contract_of(contract)
    report: dict[str, Any] = {}
    mode = "r" if dry_run or verify_only else "w"
    with IcebergSink.open(lake, found, mode="r", catalog=catalog_of(settings)) as source:
        if dry_run:
            report["rows"] = _planned(source, window)
            _say(report, f"{report['rows']:,} readings would be moved to {to}", as_json=as_json)
            return
        with open_sink(name, found, mode) as target:  # type: ignore[arg-type]
            if not verify_only:
                target.evolve(found)
                moved = _move(source, target, window, found.version, batch_rows)
                report["moved"] = asdict(moved)
                _say(report, _moved_text(moved, to), as_json=False)
                if not moved.is_whole:
                    raise typer.Exit(1)
            if verify or verify_only:
                verdict = _compare(source, target, window)
                report["verified"] = asdict(verdict)
                _say(report, _verdict_text(verdict, lake, to), as_json=False)
    if as_json:
        print(json.dumps(report))
    if report.get("verified", {}).get("differing"):
        raise typer.Exit(LOSS)


def _micros(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)


def _say(report: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
    else:
        say(text)


def _planned(source: IcebergSink, window: Window) -> int:
    view = source.view()
    assert view is not None
    return view.rows_between(window.start_us, window.stop_us)


def _move(source: IcebergSink, target: Sink, window: Window, version: int, rows_max: int) -> Moved:
    from kvstore.telemetry import migrate as moving  # noqa: PLC0415
    from kvstore.telemetry.pipeline import new_run  # noqa: PLC0415

    moved = moving.Moved()
    wanted = max(_planned(source, window), 1)

    def describe(elapsed_s: float) -> str:
        return f"{moved.rows:,} of {wanted:,} readings  {moved.rows / elapsed_s / 1000:.1f} k/s"

    with stop_signal() as stop, progress_bar(describe, lambda: moved.rows / wanted):
        return moving.migrate(
            source,
            target,
            window,
            contract_version=version,
            run=new_run(time.time_ns() // 1000),
            rows_max=rows_max,
            stopped=lambda: bool(select.select([stop], [], [], 0)[0]),
            moved=moved,
        )


def _moved_text(moved: Moved, to: str) -> str:
    again = "went on: " if moved.resumed else ""
    end = "" if moved.is_whole else "; stopped, start again to go on"
    return (
        f"{again}{moved.rows:,} readings read, {moved.stored:,} stored in {to}, "
        f"{moved.duplicates:,} were there, {moved.conflicts:,} conflict{end}"
    )


def _compare(source: IcebergSink, target: Sink, window: Window) -> Verdict:
    from kvstore.telemetry import migrate as moving  # noqa: PLC0415

    at = {"day": 0}
    with progress_bar(lambda _: f"comparing {stamp(at['day'])[:10]}"):
        return moving.verify(source, target, window, on_day=lambda day: at.update(day=day))


def _verdict_text(verdict: Verdict, lake: str, to: str) -> str:
    if verdict.is_same:
        return f"the same on both sides: {verdict.rows:,} readings of {verdict.days:,} days"
    lines = [
        f"{each.device_id} {stamp(each.day_us)[:10]} {each.what}: {each.left} in {lake}, "
        f"{each.right} in {to}"
        for each in verdict.differences[:SHOWN_MAX]
    ]
    return "\n".join([*lines, f"{verdict.differing:,} devices and days differ"])
