"""What an output holds and what a run did, as plain data for JSON and for tables. Pure."""

from __future__ import annotations

from typing import Any, Final

from kvstore.dayfiles.day import day_text
from kvstore.dayfiles.etl import Outcome
from kvstore.dayfiles.tally import SeriesTally, by_measure, summed
from kvstore.timestamps import NS_PER_S

_NAMED_MAX: Final = 1000


def summary(outcome: Outcome) -> dict[str, Any]:
    """The whole output, day after day, and this run's part in it."""
    reports = [record.report for record in outcome.records.values()]
    tallies = summed([report.series for report in reports])
    rows, unplaced = (sum(getattr(r, name) for r in reports) for name in ("rows", "unplaced"))
    distinct = sum(report.distinct for report in reports)
    return {
        "files": outcome.files,
        "days": len(reports),
        "rows": rows,
        "duplicates": rows - unplaced - distinct,
        "readings": distinct,
        "conflicts": sum(report.conflicts for report in reports),
        "unplaced_rows": unplaced,
        "unreadable_values": sum(report.unreadable for report in reports),
        "hours": sum(len(sizes) for report in reports for sizes in report.files.values()),
        "run": {
            "days_made": [day_text(day) for day in sorted(report.day for report in outcome.made)],
            "rows_read": sum(report.rows for report in outcome.made),
            "hours_written": outcome.hours_changed,
            "days_removed": [day_text(day) for day in outcome.removed],
            "days_blocked": [day_text(day) for day in outcome.blocked],
        },
        "skipped": [skipped._asdict() for skipped in outcome.skipped],
        "vanished": outcome.vanished,
        "named": [told for report in reports for told in report.named][:_NAMED_MAX],
        "measures": {name: _told(tally) for name, tally in by_measure(tallies).items()},
        "series": {key: _told(tally) for key, tally in tallies.items()},
    }


def _told(tally: SeriesTally) -> dict[str, Any]:
    bins = tally.observed + tally.held + tally.interpolated + tally.missing
    shares = {
        f"{name}_share": round(getattr(tally, name) / bins, 6) if bins else 0.0
        for name in ("observed", "held", "interpolated", "missing")
    }
    return {
        "readings": tally.readings,
        "bins": bins,
        **shares,
        "longest_gap_s": tally.gap_ns / NS_PER_S,
        "flat_runs": tally.flat_runs,
        "out_of_range": tally.out_of_range,
    }
