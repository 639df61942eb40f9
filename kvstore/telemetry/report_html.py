"""The report as one page that needs nothing else: no script, no network, charts as inline SVG.

What comes from events is escaped, whatever it is. Long lists are cut, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final

import numpy as np

from kvstore.telemetry.qartod import (
    FLAT_READINGS,
    GAP_INTERVALS,
    HOUR_US,
    JUMP_FACTOR,
    STEPS_MIN,
)
from kvstore.telemetry.records import State
from kvstore.telemetry.report import (
    DIMENSIONS,
    SILENT_INTERVALS,
    TESTS,
    DeviceReport,
    Report,
    Tally,
)

DEVICES_MAX: Final = 100
HOURS_MAX: Final = 72
HEAT_DEVICES_MAX: Final = 40
_BAR_MAX: Final = 90  # of 960; a single hour is no wall

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb;
  --page: #ffffff; --card: #f9fafb; --stored: #2f7d5b; --duplicates: #c9a227; --rejected: #c2410c;
  --heat: 47 125 91; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151;
  --page: #111827; --card: #1f2937; --stored: #4ea888; --duplicates: #e0bd4f; --rejected: #ea7a45;
  --heat: 78 168 136; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 70rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .soft, small { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .9rem; } .card b { display: block; font-size: 1.45rem; }
.card code { font-size: .72rem; color: var(--soft); }
.bad { color: var(--rejected); } .good { color: var(--stored); }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
.wide { overflow-x: auto; } code { font-size: .85em; overflow-wrap: anywhere; }
"""
_WORDS: Final = (
    (
        "expected: seconds of the hour between a device's first reading and the newest of all, "
        "over the contract's interval"
    ),
    "timed: readings whose arrival the source knows; delayed: longer under way than agreed",
    "late: more than a limit older than the newest reading of its device that came before it",
    "drift: readings with fields that the contract does not know",
    "complete through: the earliest newest reading of the devices that are not silent",
    f"silent: more than {SILENT_INTERVALS} intervals behind the newest of all devices",
    f"gap (QARTOD timing/gap): readings more than {GAP_INTERVALS} intervals apart",
    f"flat line (QARTOD): {FLAT_READINGS} readings or more of one value",
    (
        f"rate of change (QARTOD): a step above {JUMP_FACTOR} times the median step of that device "
        f"and field, rounded up to a power of the root of 2; at least {STEPS_MIN} steps"
    ),
    "syntax, gross range (QARTOD): events rejected for what they are, or for a value too far out",
)
_COLOURS: Final = ("stored", "duplicates", "rejected")


def page(report: Report) -> str:
    """The whole page."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Quality of {escape(report.sink)}</title><style>{_STYLE}</style></head><body>",
            *_head(report),
            *_cards(report),
            *_hours(report),
            *_reasons(report),
            *_heat(report),
            *_devices(report),
            *_fields(report),
            *_sources(report),
            *_formulas(),
            "</body></html>",
        ]
    )


def stamp(us: int | None) -> str:
    """A time in UTC, to the second."""
    return "-" if us is None else f"{np.datetime64(us // 1_000_000, 's')}Z".replace("T", " ")


def percent(share: float | None) -> str:
    """A share; never 100 % where something is missing."""
    if share is None:
        return "not measured"
    return "100 %" if share == 1 else f"{min(share * 100, 99.99):.2f} %"


# ---- the parts ----


def _head(report: Report) -> Iterator[str]:
    since = f", since {stamp(report.since_us)}" if report.since_us is not None else ""
    yield f"<h1>Quality of {escape(report.sink)}</h1>"
    yield (
        f'<p class="soft">made {stamp(report.made_us)}{since}; contract version '
        f"{report.contract.version}</p>"
    )
    total = report.total
    words = (
        f"{total.received:,} received = {total.stored:,} stored + {total.duplicates:,} duplicates "
        f"+ {total.rejected:,} rejected"
    )
    if report.imbalances:
        yield (
            f'<p class="bad"><b>{len(report.imbalances):,} devices and hours do not add up</b>: '
            f"{words}</p>"
        )
    else:
        yield f'<p><b class="good">Everything adds up</b>: {words}</p>'
    yield (
        f"<p>Complete through <b>{stamp(report.complete_through_us)}</b>, newest reading "
        f"{stamp(report.newest_us)}, {len(report.silent)} silent devices.</p>"
    )


def _cards(report: Report) -> Iterator[str]:
    yield '<div class="cards">'
    for name, share in report.dimensions.items():
        yield (
            f'<div class="card">{name}<b>{percent(share)}</b><code>{DIMENSIONS[name]}</code></div>'
        )
    total = report.total
    for name, count in (("late", total.late), ("drift", total.drift)):
        yield f'<div class="card">{name}<b>{count:,}</b><small>readings</small></div>'
    yield "</div>"


def _hours(report: Report) -> Iterator[str]:
    """Bars of what became of events, by hour; what is beyond the readings' times is named only."""
    shown = _shown_hours(report)
    yield "<h2>Events by hour</h2>"
    if not shown:
        yield '<p class="soft">none</p>'
        return
    yield _legend(_COLOURS)
    yield _bars([(hour_us, report.hours.get(hour_us, Tally())) for hour_us in shown])
    others = sum(
        tally.received for hour_us, tally in report.hours.items() if hour_us not in set(shown)
    )
    if others:
        yield f'<p class="soft">{others:,} events are of other hours.</p>'


def _shown_hours(report: Report) -> list[int]:
    """The last hours up to the newest reading, without holes."""
    if report.newest_us is None:
        return list(report.hours)[-HOURS_MAX:]
    last = report.newest_us // HOUR_US * HOUR_US
    there = [hour_us for hour_us, tally in report.hours.items() if tally.stored]
    first = max(min(there, default=last), last - (HOURS_MAX - 1) * HOUR_US)
    return list(range(first, last + 1, HOUR_US))


def _legend(names: Iterable[str]) -> str:
    marks = "&ensp;".join(
        f'<span style="color:var(--{name})">&#9632;</span> {name}' for name in names
    )
    return f'<p class="soft">{marks}</p>'


def _bars(hours: Sequence[tuple[int, Tally]]) -> str:
    width, height, left, bottom = 960, 220, 60, 34
    top = _round_up(max(tally.stored + tally.duplicates + tally.rejected for _, tally in hours))
    step = (width - left) / len(hours)
    parts = [
        f'<svg viewBox="0 0 {width} {height + bottom}" role="img" aria-label="events by hour">'
    ]
    for share in (0.5, 1):
        y = height - (height - 12) * share
        parts.append(
            f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        )
        parts.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{top * share:,.0f}</text>'
        )
    for place, (hour_us, tally) in enumerate(hours):
        y, x = float(height), left + place * step
        for name in _COLOURS:
            tall = getattr(tally, name) / top * (height - 12)
            y -= tall
            parts.append(
                f'<rect x="{x + step * 0.1:.1f}" y="{y:.1f}" width="{step * 0.8:.1f}" '
                f'height="{tall:.1f}" fill="var(--{name})"><title>{stamp(hour_us)}: '
                f"{getattr(tally, name):,} {name}</title></rect>"
            )
        if place % max(1, len(hours) // 8) == 0:
            day, hour = stamp(hour_us)[5:16].split(" ")
            parts.append(f'<text x="{x:.1f}" y="{height + 15}">{hour}</text>')
            parts.append(f'<text x="{x:.1f}" y="{height + 29}">{day}</text>')
    return "".join([*parts, "</svg>"])


def _round_up(count: int) -> int:
    """The next number that reads well on an axis: 1, 2, 4, 6, 8, 10 times a power of ten."""
    power: int = 10 ** (len(str(count)) - 1)
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= count)


def _reasons(report: Report) -> Iterator[str]:
    yield "<h2>Rejected, by reason</h2>"
    if not report.reasons:
        yield '<p class="soft">none</p>'
        return
    yield '<p class="soft">One event may have several. A dead letter is looked up with '
    yield f"<code>kvstore telemetry rejects show {escape(report.sink)} NAME</code>.</p>"
    top = max(each.events for each in report.reasons) or 1
    yield '<div class="wide"><table><tr><th>reason</th><th></th><th class="n">events</th>'
    yield '<th class="n">open</th><th class="n">replayed</th><th class="n">discarded</th>'
    yield "<th>the first ones: name, what was found</th></tr>"
    for each in report.reasons:
        bar = (
            '<svg viewBox="0 0 100 10" style="width:7rem" preserveAspectRatio="none"><rect '
            f'width="{100 * each.events / top:.1f}" height="10" fill="var(--rejected)"/></svg>'
        )
        examples = "<br>".join(
            f"<code>{escape(name)}</code> {escape(found)}" for name, found in each.examples
        )
        states = "".join(f'<td class="n">{each.states[state]:,}</td>' for state in State)
        yield (
            f'<tr><td>{escape(each.code)}</td><td>{bar}</td><td class="n">{each.events:,}</td>'
            f"{states}<td><small>{examples}</small></td></tr>"
        )
    yield "</table></div>"


def _heat(report: Report) -> Iterator[str]:
    """Completeness by device and hour, the worst devices on top."""
    devices = [each for each in report.devices if each.expected][:HEAT_DEVICES_MAX]
    hours = _shown_hours(report)
    if not devices or not hours:
        return
    yield "<h2>Completeness by device and hour</h2>"
    there = sum(bool(each.expected) for each in report.devices)
    yield (
        f'<p class="soft">{_of(len(devices), there)} devices, those with most trouble first; dark: '
        "all readings are there, pale: few, orange: none.</p>"
    )
    width, left, row = 960, 130, 14
    step = (width - left) / len(hours)
    size, label = f"{width} {row * len(devices) + 18}", "completeness by device and hour"
    parts = [f'<svg viewBox="0 0 {size}" role="img" aria-label="{label}">']
    for line, device in enumerate(devices):
        y = line * row
        parts.append(f'<text x="0" y="{y + 11}">{escape(device.device_id[:20])}</text>')
        for place, hour_us in enumerate(hours):
            share = _share(report, device, hour_us)
            if share is None:
                continue
            # The third power: what lacks a tenth shall be seen.
            fill = f"rgb(var(--heat) / {0.1 + 0.9 * share**3:.2f})" if share else "var(--rejected)"
            parts.append(
                f'<rect x="{left + place * step:.1f}" y="{y + 1}" width="{max(step - 1, 0.5):.1f}" '
                f'height="{row - 2}" fill="{fill}"><title>{escape(device.device_id)} '
                f"{stamp(hour_us)}: {percent(share)}</title></rect>"
            )
    y = row * len(devices) + 13
    for place in range(0, len(hours), max(1, len(hours) // 8)):
        x = left + place * step
        parts += [f'<text x="{x:.1f}" y="{y}">{stamp(hours[place])[11:16]}</text>']
    yield "".join([*parts, "</svg>"])


def _share(report: Report, device: DeviceReport, hour_us: int) -> float | None:
    """None before the device's first reading, and where hardly anything was expected."""
    assert device.series is not None
    assert report.newest_us is not None
    if hour_us + HOUR_US <= device.series.first_us:
        return None
    found = report.grid.get((device.device_id, hour_us))
    began = hour_us > device.series.first_us
    return 0.0 if found is None and began and hour_us + HOUR_US <= report.newest_us else found


def _devices(report: Report) -> Iterator[str]:
    shown = report.devices[:DEVICES_MAX]
    yield "<h2>Devices</h2>"
    there = _of(len(shown), len(report.devices))
    yield f'<p class="soft">{there}, those with most trouble first.</p>'
    yield '<div class="wide"><table><tr><th>device</th>'
    for name in ("received", "stored", "duplicates", "rejected", "late", "drift", "complete"):
        yield f'<th class="n">{name}</th>'
    yield "<th>newest reading</th><th>tests not passed</th></tr>"
    for each in shown:
        tally = each.tally
        numbers = (tally.received, tally.stored, tally.duplicates, tally.rejected, tally.late)
        cells = "".join(f'<td class="n">{number:,}</td>' for number in (*numbers, tally.drift))
        complete = "-" if each.completeness is None else percent(each.completeness)
        newest = stamp(each.series.last_us) if each.series else "-"
        yield (
            f"<tr><td>{escape(each.device_id) or '(unknown)'}</td>{cells}"
            f'<td class="n">{complete}</td><td>{newest}</td>'
            f"<td>{'; '.join(troubles(each))}</td></tr>"
        )
    yield "</table></div>"
    if report.untested:
        yield f'<p class="bad">{report.untested:,} further devices were not tested.</p>'


def troubles(device: DeviceReport) -> Iterator[str]:
    """What a device's tests found, in words, escaped for HTML."""
    verdicts = device.tests
    for test in TESTS[:2]:
        if verdicts[test] == "fail":
            yield f"{test}: {device.rejected_by(test):,} reasons"
    if device.series is None:
        return
    series = device.series
    if device.silent:
        yield f"gap: fail, silent since {stamp(series.last_us)}"
    if series.gaps:
        yield (
            f"gap: {series.gaps:,}, longest {series.longest_gap_us / 1e6:,.0f} s up to "
            f"{stamp(series.longest_gap_end_us)}"
        )
    for name, each in series.fields.items():
        shown = escape(name)
        if each.flat_runs:
            yield (
                f"flat line: {shown}, {each.flat_readings:,} readings, longest run up to "
                f"{stamp(each.longest_run_end_us)}"
            )
        if each.jumps:
            yield (
                f"rate of change: {shown}, {each.jumps:,} jumps, largest {each.largest_step:.4g} "
                f"at {stamp(each.largest_step_us)}"
            )


def _fields(report: Report) -> Iterator[str]:
    yield "<h2>Fields</h2><table><tr><th>field</th><th>unit</th><th class='n'>readings</th>"
    yield "<th class='n'>null</th><th class='n'>lowest</th><th class='n'>highest</th></tr>"
    for each in report.fields:
        nulls = percent(each.nulls / each.rows) if each.nulls else "0 %"
        low, high = ("-" if limit is None else f"{limit:g}" for limit in (each.low, each.high))
        yield (
            f"<tr><td>{escape(each.name)}</td><td>{escape(each.unit or '')}</td>"
            f'<td class="n">{each.rows:,}</td><td class="n">{nulls}</td>'
            f'<td class="n">{low}</td><td class="n">{high}</td></tr>'
        )
    for name, count in report.unknown_fields.items():
        yield (
            f"<tr><td>{escape(name)}</td><td></td><td class='n'>{count:,}</td>"
            "<td colspan=3>unknown to the contract, kept in extras</td></tr>"
        )
    yield "</table>"
    versions = ", ".join(
        f"{count:,} of version {number}" for number, count in report.versions.items()
    )
    yield f'<p class="soft">Readings by contract: {versions or "none"}.</p>'


def _sources(report: Report) -> Iterator[str]:
    yield "<h2>Sources</h2><table><tr><th>source</th><th class='n'>partition</th>"
    yield "<th class='n'>read up to</th></tr>"
    for position in report.positions:
        yield (
            f"<tr><td><code>{escape(position.place.source)}</code></td>"
            f'<td class="n">{position.place.partition}</td>'
            f'<td class="n">{position.next:,}</td></tr>'
        )
    yield "</table>"


def _formulas() -> Iterator[str]:
    yield "<h2>What the figures mean</h2><ul>"
    for name, formula in DIMENSIONS.items():
        yield f"<li>{name} = <code>{formula}</code></li>"
    for text in _WORDS:
        yield f"<li>{text}</li>"
    yield "</ul>"


def _of(shown: int, there: int) -> str:
    return f"{shown:,} of {there:,}" if shown < there else f"all {there:,}"
