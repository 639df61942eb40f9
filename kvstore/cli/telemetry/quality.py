"""``kvstore telemetry quality``: what a sink's data are worth, for people, programs and a page."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvstore.cli.options import Json, duration_s, epoch_seconds
from kvstore.cli.telemetry.ingest import Contracts, contract_of
from kvstore.cli.telemetry.simulate import share
from kvstore.cli.terminal import LOSS, complain, quiet_if_closed, say

if TYPE_CHECKING:
    from kvstore.telemetry.report import DeviceReport, Report, Tally

_DEVICES_SHOWN: Final = 10


def quality(
    target: Annotated[str, typer.Argument(metavar="SINK", help="A store, a lake, or PostgreSQL.")],
    *,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|DURATION",
            help="Begin there, or so long before now; rounded down to the hour.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one self-contained page as well.")
    ] = None,
    fail_under: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="Exit with 3 where the score is lower, such as 99."),
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=duration_s,
            help="How often a device publishes; as the contract has it if not given.",
        ),
    ] = None,
    contract: Contracts = None,
    as_json: Json = False,
) -> None:
    """Report on quality: what was received and what became of it, and what it is worth.

    validity, completeness, timeliness, consistency, by device and hour; silent devices, gaps,
    stuck values, jumps, after QARTOD. The score is the lowest of the four. Exit code 3 where it is
    under --fail-under, or where received = stored + duplicates + rejected does not hold.
    """
    from kvstore.telemetry import report as reports  # noqa: PLC0415
    from kvstore.telemetry.opening import open_sink, redacted  # noqa: PLC0415

    least = None if fail_under is None else _percent(fail_under)
    agreed = contract_of(contract)
    with open_sink(target, agreed, "r") as sink:
        report = reports.survey(
            sink,
            agreed,
            name=redacted(target),
            now_us=lambda: time.time_ns() // 1000,
            since_us=None if since is None else _since_us(since, time.time()),
            interval_s=interval,
        )
    if html is not None:
        from kvstore.telemetry.report_html import page  # noqa: PLC0415

        html.write_text(page(report), encoding="utf-8")
        say(f"written to {html}")
    with quiet_if_closed():
        if as_json:
            print(json.dumps(plain(report), indent=2, ensure_ascii=False))
        else:
            for line in lines(report):
                print(line)
    _judge(report, least)


def _judge(report: Report, least: float | None) -> None:
    if report.imbalances:
        device, _ = report.imbalances[0]
        complain(
            f"received = stored + duplicates + rejected does not hold for {len(report.imbalances)} "
            f"devices and hours, the first {device or '(unknown)'!r}: run `kvstore telemetry audit`"
        )
        raise typer.Exit(LOSS)
    if least is not None and (report.score is None or report.score < least):
        found = "nothing to score" if report.score is None else f"score {report.score * 100:.2f} %"
        complain(f"{found}, expected at least {least * 100:g} %: see the lowest figure above")
        raise typer.Exit(LOSS)


def _percent(text: str) -> float:
    """99, 99% and 99.5: percent, with the sign or without."""
    return share(text if text.endswith("%") else f"{text}%")


def _since_us(text: str, now_s: float) -> int:
    try:
        return round((now_s - duration_s(text)) * 1e6)
    except typer.BadParameter:
        return round(epoch_seconds(text) * 1e6)


# ---- for people ----


def lines(report: Report) -> Iterator[str]:
    """The report for a terminal or a log: words separated by tabs below the headings."""
    from kvstore.telemetry.report_html import percent, stamp  # noqa: PLC0415

    total = report.total
    yield f"Quality of {report.sink}, contract version {report.contract.version}"
    yield (
        f"  {total.received:,} received = {total.stored:,} stored + {total.duplicates:,} duplicates"
        f" + {total.rejected:,} rejected" + ("" if not report.imbalances else "  DOES NOT HOLD")
    )
    yield f"  {total.late:,} late, {total.drift:,} with unknown fields"
    through, newest = stamp(report.complete_through_us), stamp(report.newest_us)
    yield f"  complete through {through}, newest {newest}"
    for name, found in report.dimensions.items():
        yield f"  {name:13} {percent(found)}"
    yield f"  {'score':13} {percent(report.score)}"
    if report.reasons:
        yield "Rejected"
    for each in report.reasons:
        states = ", ".join(f"{count:,} {state}" for state, count in each.states.items())
        where = f"; such as {each.examples[0].name}" if each.examples else ""
        yield f"  {each.code:14} {each.events:8,}  {states}{where}"
    yield from _device_lines(report)


def _device_lines(report: Report) -> Iterator[str]:
    from kvstore.telemetry.report_html import percent, troubles  # noqa: PLC0415

    troubled = [each for each in report.devices if each.device_id and each.troubles]
    there = sum(bool(each.device_id) for each in report.devices)
    yield f"Devices: {there:,}, {len(report.silent):,} silent"
    for each in troubled[:_DEVICES_SHOWN]:
        complete = "" if each.completeness is None else f"complete {percent(each.completeness)}; "
        yield f"  {each.device_id:20}  {complete}{'; '.join(troubles(each))}"
    if len(troubled) > _DEVICES_SHOWN:
        more = len(troubled) - _DEVICES_SHOWN
        yield f"  and {more:,} more with a test not passed: --html, --json"
    if report.untested:
        yield f"  {report.untested:,} further devices were not tested"


# ---- for programs ----


def plain(report: Report) -> dict[str, Any]:
    """The report as JSON has it. Times are µs since 1970; shares 0 to 1."""
    return {
        "sink": report.sink,
        "made_us": report.made_us,
        "since_us": report.since_us,
        "contract_version": report.contract.version,
        "balanced": not report.imbalances,
        "imbalances": report.imbalances,
        "total": _plain_tally(report.total),
        "dimensions": report.dimensions,
        "score": report.score,
        "complete_through_us": report.complete_through_us,
        "newest_us": report.newest_us,
        "silent": [each.device_id for each in report.silent],
        "hours": [{"hour_us": at, **_plain_tally(tally)} for at, tally in report.hours.items()],
        "reasons": [
            {
                "reason": each.code,
                "events": each.events,
                **{str(state): count for state, count in each.states.items()},
                "examples": [
                    {"name": example.name, "found": example.found} for example in each.examples
                ],
            }
            for each in report.reasons
        ],
        "devices": [_plain_device(each) for each in report.devices],
        "device_hours": [
            {"device_id": device_id, "hour_us": hour_us, "completeness": found}
            for (device_id, hour_us), found in sorted(report.grid.items())
        ],
        "fields": [
            {
                "name": each.name,
                "unit": each.unit,
                "rows": each.rows,
                "nulls": each.nulls,
                "lowest": each.low,
                "highest": each.high,
            }
            for each in report.fields
        ],
        "unknown_fields": report.unknown_fields,
        "versions": {str(version): count for version, count in report.versions.items()},
        "positions": [
            {"source": each.place.source, "partition": each.place.partition, "next": each.next}
            for each in report.positions
        ],
    }


def _plain_tally(tally: Tally) -> dict[str, Any]:
    return {
        "received": tally.received,
        "stored": tally.stored,
        "duplicates": tally.duplicates,
        "rejected": tally.rejected,
        **dict(sorted(tally.others.items())),
    }


def _plain_device(device: DeviceReport) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device_id": device.device_id,
        **_plain_tally(device.tally),
        "completeness": device.completeness,
        "silent": device.silent,
        "tests": device.tests,
    }
    if device.series is not None:
        series = device.series
        found |= {
            "rows": series.rows,
            "first_us": series.first_us,
            "last_us": series.last_us,
            "gaps": series.gaps,
            "gap_us": series.gap_us,
            "longest_gap_us": series.longest_gap_us,
            "fields": {
                name: {
                    "flat_runs": each.flat_runs,
                    "flat_readings": each.flat_readings,
                    "jumps": each.jumps,
                    "largest_step": each.largest_step,
                    "largest_step_us": each.largest_step_us,
                }
                for name, each in series.fields.items()
            },
        }
    return found
