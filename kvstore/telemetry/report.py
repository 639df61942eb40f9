"""What a sink's data are worth: figures of quality, each with its formula, over any Sink.

    received      = stored + duplicates + rejected, by device and hour; a sink where that does not
                    hold has lost or doubled something, and the report says so first
    validity      = (received - rejected + conflicts) / received
    completeness  = sum of min(rows, expected) / sum of expected, over devices and hours; expected =
                    seconds of the hour that lie between the device's first reading in the window
                    and the newest of all devices, over the contract's interval
    timeliness    = 1 - delayed / timed; timed: readings whose arrival the source knows, delayed:
                    of those, longer under way than the contract allows
    consistency   = 1 - conflicts / (received - rejected + conflicts)
    score         = the lowest of these; one that cannot be computed is left out

A device is *silent* where its newest reading is further behind the newest of all than
SILENT_INTERVALS intervals. A sink is *complete through* the earliest newest reading of those that
are not silent: up to there every living device has reported, late events aside.

One pass over counts, readings and dead letters each; memory by device and hour, not by row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvstore.telemetry import counts as names
from kvstore.telemetry.contract import Contract
from kvstore.telemetry.qartod import HOUR_US, DeviceSeries, Series
from kvstore.telemetry.records import DeadLetter, Position, State
from kvstore.telemetry.rejects import name_of
from kvstore.telemetry.sink import Sink

if TYPE_CHECKING:
    from kvstore.telemetry.records import Count, Readings

SILENT_INTERVALS: Final = 20  # of 5 s: 100 s
EXAMPLES_MAX: Final = 3  # dead letters shown for each reason
DIMENSIONS: Final = {
    "validity": "(received - rejected + conflicts) / received",
    "completeness": "sum of min(rows, expected) / sum of expected, by device and hour",
    "timeliness": "1 - delayed / timed",
    "consistency": "1 - conflicts / (received - rejected + conflicts)",
}


TESTS: Final = ("syntax", "gross range", "gap", "flat line", "rate of change")


@dataclass(slots=True)
class Tally:
    """What became of events; others: the counts of any other name."""

    received: int = 0
    stored: int = 0
    duplicates: int = 0
    rejected: int = 0
    others: Counter[str] = field(default_factory=Counter)

    def add(self, count: Count) -> None:
        """Add one of a sink's counts."""
        if count.name in _TOLD_APART:
            setattr(self, count.name, getattr(self, count.name) + count.value)
        else:
            self.others[count.name] += count.value

    @property
    def balanced(self) -> bool:
        """Whether each event that was received has one fate."""
        return self.received == self.stored + self.duplicates + self.rejected

    @property
    def conflicts(self) -> int:
        """Those of the rejected that met another of their identity."""
        return self.others[names.reason(names.CONFLICT)]

    @property
    def late(self) -> int:
        """Well behind newer ones of their device."""
        return self.others[names.LATE]

    @property
    def drift(self) -> int:
        """With fields that the contract does not know."""
        return self.others[names.DRIFT]


_TOLD_APART: Final = {names.RECEIVED, names.STORED, names.DUPLICATES, names.REJECTED}


class Example(NamedTuple):
    """A dead letter, by the name that ``rejects show`` takes, and what was found in it."""

    name: str
    found: str


@dataclass(slots=True)
class ReasonReport:
    """Dead letters of one reason. events: as counted; open, replayed, discarded: as they stand."""

    code: str
    events: int = 0
    states: Counter[State] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)


@dataclass(slots=True)
class DeviceReport:
    """One device. series: None where it has no reading in the window, or was not tested."""

    device_id: str
    tally: Tally
    series: DeviceSeries | None
    expected: float = 0.0
    present: float = 0.0
    silent: bool = False

    @property
    def completeness(self) -> float | None:
        """Share of the expected readings that are there."""
        return self.present / self.expected if self.expected else None

    @property
    def tests(self) -> dict[str, str]:
        """QARTOD's tests and their verdicts: pass, suspect, fail, not evaluated."""
        if not self.device_id:  # events of which not even the device could be made out
            return dict.fromkeys(TESTS, "not evaluated")
        found = {test: "fail" if self.rejected_by(test) else "pass" for test in TESTS[:2]}
        if self.series is None:
            return found | dict.fromkeys(TESTS[2:], "not evaluated")
        fields = self.series.fields.values()
        found["gap"] = "fail" if self.silent else "suspect" if self.series.gaps else "pass"
        found["flat line"] = "suspect" if any(each.flat_runs for each in fields) else "pass"
        found["rate of change"] = "suspect" if any(each.jumps for each in fields) else "pass"
        return found

    def rejected_by(self, test: str) -> int:
        """How often an event of the device was rejected for a reason of that test."""
        codes = {"syntax": _SYNTAX, "gross range": {"range"}}[test]
        return sum(self.tally.others[names.reason(code)] for code in codes)

    @property
    def troubles(self) -> int:
        """How many tests it did not pass."""
        return sum(verdict in ("fail", "suspect") for verdict in self.tests.values())


_SYNTAX: Final = {"json", "utf8", "nul", "duplicate_key", "missing", "type", "number"} | {
    "timestamp",
    "offset",
}


@dataclass(slots=True)
class FieldReport:
    """One field of the contract over all readings in the window."""

    name: str
    unit: str | None
    rows: int = 0
    nulls: int = 0
    low: float | None = None
    high: float | None = None


@dataclass(slots=True)
class Report:
    """Everything; shares are 0 to 1, None where they cannot be computed."""

    sink: str
    made_us: int
    since_us: int | None
    contract: Contract
    total: Tally
    hours: dict[int, Tally]
    devices: list[DeviceReport]
    reasons: list[ReasonReport]
    fields: list[FieldReport]
    unknown_fields: dict[str, int]
    versions: dict[int, int]
    positions: list[Position]
    grid: dict[tuple[str, int], float]
    imbalances: list[tuple[str, int]]
    complete_through_us: int | None
    newest_us: int | None
    untested: int

    @property
    def dimensions(self) -> dict[str, float | None]:
        """The four of them, as DIMENSIONS has their formulas."""
        total = self.total
        valid = total.received - total.rejected + total.conflicts
        expected = sum(each.expected for each in self.devices)
        present = sum(each.present for each in self.devices)
        timed, delayed = total.others[names.TIMED], total.others[names.DELAYED]
        return {
            "validity": valid / total.received if total.received else None,
            "completeness": present / expected if expected else None,
            "timeliness": 1 - delayed / timed if timed else None,
            "consistency": 1 - total.conflicts / valid if valid else None,
        }

    @property
    def score(self) -> float | None:
        """The lowest of the dimensions."""
        known = [share for share in self.dimensions.values() if share is not None]
        return min(known, default=None)

    @property
    def silent(self) -> list[DeviceReport]:
        """The devices that have fallen silent."""
        return [each for each in self.devices if each.silent]


def survey(
    sink: Sink,
    contract: Contract,
    *,
    name: str,
    now_us: Callable[[], int],
    since_us: int | None = None,
    interval_s: float | None = None,
) -> Report:
    """Look at all that a sink holds, or at what is not older than since_us.

    since_us: rounded down to its hour, as counts are by the hour. interval_s: instead of the
    contract's.
    """
    interval_s = interval_s or contract.interval_s
    since_us = None if since_us is None else since_us // HOUR_US * HOUR_US
    numbers = [each.name for each in contract.values if each.is_number]
    series = Series(numbers, interval_s)
    columns = _Columns(contract)
    for readings in sink.read(since_us):
        series.add(readings)
        columns.add(readings)
    total, hours, tallies, imbalances = _tallied(sink.counts(since_us))
    devices = _devices(tallies, series.devices())
    newest_us = max((each.series.last_us for each in devices if each.series), default=None)
    grid: dict[tuple[str, int], float] = {}
    if newest_us is not None and interval_s is not None:
        grid = _complete(devices, series.per_hour, newest_us, round(interval_s * 1e6))
    living = [each.series.last_us for each in devices if each.series and not each.silent]
    return Report(
        name,
        now_us(),
        since_us,
        contract,
        total,
        hours,
        sorted(devices, key=lambda each: (-each.troubles, each.completeness or 0, each.device_id)),
        _reasons(total, sink.dead_letters(), since_us),
        columns.fields,
        {
            key.removeprefix("unknown:"): value
            for key, value in total.others.most_common()
            if key.startswith("unknown:")
        },
        dict(sorted(columns.versions.items())),
        sink.positions(),
        grid,
        imbalances,
        min(living, default=None),
        newest_us,
        len(series.untested),
    )


class _Columns:
    """Nulls and extremes of each field, and the versions of the contract that rows came under."""

    def __init__(self, contract: Contract) -> None:
        self.fields = [FieldReport(each.name, each.unit) for each in contract.values]
        self.versions: Counter[int] = Counter()

    def add(self, readings: Readings) -> None:
        found = np.unique(readings.lineage.contract_version, return_counts=True)
        self.versions.update(dict(zip(*(each.tolist() for each in found), strict=True)))
        for each in self.fields:
            column = readings.values.get(each.name)
            each.rows += len(readings)
            if column is None:  # the sink had no such column yet
                each.nulls += len(readings)
            elif isinstance(column, np.ndarray):
                known = column[~np.isnan(column)]
                each.nulls += len(column) - len(known)
                if len(known):
                    low, high = float(known.min()), float(known.max())
                    each.low = low if each.low is None else min(each.low, low)
                    each.high = high if each.high is None else max(each.high, high)
            else:
                each.nulls += column.count(None)


def _tallied(
    found: Iterable[Count],
) -> tuple[Tally, dict[int, Tally], dict[str, Tally], list[tuple[str, int]]]:
    """In total, by hour, by device; and the devices and hours that do not add up."""
    total = Tally()
    hours: defaultdict[int, Tally] = defaultdict(Tally)
    devices: defaultdict[str, Tally] = defaultdict(Tally)
    cells: Counter[tuple[str, int]] = Counter()
    for count in found:
        for tally in (total, hours[count.hour_us], devices[count.device_id]):
            tally.add(count)
        if count.name in _TOLD_APART:
            sign = 1 if count.name == names.RECEIVED else -1
            cells[count.device_id, count.hour_us] += sign * count.value
    imbalances = sorted(cell for cell, rest in cells.items() if rest)
    return total, dict(sorted(hours.items())), dict(devices), imbalances


def _devices(tallies: dict[str, Tally], found: dict[str, DeviceSeries]) -> list[DeviceReport]:
    ids = [*tallies, *(each for each in found if each not in tallies)]
    return [DeviceReport(each, tallies.get(each, Tally()), found.get(each)) for each in ids]


def _complete(
    devices: list[DeviceReport],
    rows: dict[tuple[str, int], int],
    newest_us: int,
    interval_us: int,
) -> dict[tuple[str, int], float]:
    """Fill in what was expected and what is there; the share by device and hour with rows.

    Only hours with rows are gone through: a device may have been silent for years.
    """
    by_device: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for (device_id, hour_us), count in rows.items():
        by_device[device_id].append((hour_us, count))
    grid = {}
    for device in devices:
        if device.series is None:
            continue
        first_us = device.series.first_us
        device.silent = newest_us - device.series.last_us > SILENT_INTERVALS * interval_us
        device.expected = (newest_us - first_us) / interval_us
        for hour_us, count in by_device[device.device_id]:
            span_us = min(hour_us + HOUR_US, newest_us) - max(hour_us, first_us)
            expected = span_us / interval_us
            present = min(count, expected)
            device.present += present
            if expected >= 1:
                grid[device.device_id, hour_us] = present / expected
    return grid


def _reasons(
    total: Tally, letters: Iterator[DeadLetter], since_us: int | None
) -> list[ReasonReport]:
    found: dict[str, ReasonReport] = {}
    for name, events in total.others.items():
        if name.startswith("reason:"):
            code = name.removeprefix("reason:")
            found[code] = ReasonReport(code, events)
    for letter in letters:
        rejection = letter.rejection
        at_us = letter.first_seen_us if rejection.ts_us is None else rejection.ts_us
        if since_us is not None and at_us < since_us:
            continue
        told = {reason.code: reason for reason in reversed(rejection.reasons)}
        for code, reason in told.items():
            report = found.setdefault(code, ReasonReport(code))
            report.states[letter.state] += 1
            if len(report.examples) < EXAMPLES_MAX:
                what = f"{reason.field}: {reason.found}" if reason.field else reason.found
                name = name_of(rejection.place, rejection.offset)
                report.examples.append(Example(name, what))
    return sorted(found.values(), key=lambda each: (-each.events, each.code))
