"""From one version of a contract to the next: what changed, what breaks, how stored events fare.

A change is *breaking* where events that were valid would be rejected, or where what is stored
would mean something else to who reads it. A contract may grow (new optional fields), be looser
(wider ranges, required no more, integer to number), and describe itself better. Anything else
needs a new field, or a new topic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

import msgspec
import numpy as np

from kvstore.errors import ContractError
from kvstore.telemetry.contract import DEVICE, TIMESTAMP, Contract, ContractField
from kvstore.telemetry.counts import CONFLICT
from kvstore.telemetry.records import Chunk, Place, Position, Readings, State
from kvstore.telemetry.sink import Sink
from kvstore.telemetry.validate import Validated, Validator

_EVENTS_AT_ONCE: Final = 10_000
_NOWHERE: Final = Place("contract diff", 0)


class Change(NamedTuple):
    """One difference. field: "" where it is about the whole contract."""

    field: str
    text: str
    breaking: bool


def changes(old: Contract, new: Contract) -> list[Change]:
    """Every difference that matters to events or to who reads them, in the order of fields."""
    return list(_changes(old, new))


def check(old: Contract, new: Contract) -> None:
    """Raise ContractError, with all that breaks, where events or readers of the old one would."""
    broken = [each for each in changes(old, new) if each.breaking]
    if broken:
        what = "; ".join(
            f"{each.field}: {each.text}" if each.field else each.text for each in broken
        )
        raise ContractError(
            f"version {new.version} breaks version {old.version}: {what}. Keep the old field and "
            "add a new one, or give the new events a topic of their own"
        )


def _changes(old: Contract, new: Contract) -> Iterator[Change]:
    before = {each.name: each for each in old.values}
    after = {each.name: each for each in new.values}
    if new.version <= old.version and before != after:
        yield Change("", f"version {old.version} -> {new.version}: it has to grow", True)
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            yield Change(name, "removed: its column would never be filled again", True)
        elif name not in before:
            yield from _added(after[name], old)
        else:
            yield from _changed(before[name], after[name])
    yield from _policy(old, new)


def _added(fresh: ContractField, old: Contract) -> Iterator[Change]:
    if fresh.required:
        yield Change(fresh.name, "new and required: events of older devices lack it", True)
    elif fresh.since <= old.version:
        text = f"new, and said to be there since version {fresh.since}, which had none"
        yield Change(fresh.name, text, True)
    else:
        yield Change(fresh.name, f"new, optional, a {fresh.type}", False)


def _changed(before: ContractField, after: ContractField) -> Iterator[Change]:
    name = before.name
    if before.type != after.type:
        widened = (before.type, after.type) == ("integer", "number")
        yield Change(name, f"{before.type} -> {after.type}", not widened)
    if before.required != after.required:
        text = "required from now on" if after.required else "required no more: may be null"
        yield Change(name, text, after.required)
    if before.unit != after.unit:
        yield Change(name, f"unit {before.unit} -> {after.unit}: stored values differ", True)
    if before.since != after.since:
        yield Change(name, f"since {before.since} -> {after.since}: history does not change", True)
    yield from _limit(name, "minimum", before.minimum, after.minimum, rises_break=True)
    yield from _limit(name, "maximum", before.maximum, after.maximum, rises_break=False)
    if before.description != after.description:
        yield Change(name, "described in other words", False)


def _limit(
    name: str, limit: str, before: float | None, after: float | None, *, rises_break: bool
) -> Iterator[Change]:
    if before == after:
        return
    if after is None or before is None:
        breaking = before is None
    else:
        breaking = (after > before) is rises_break
    yield Change(name, f"{limit} {before} -> {after}", breaking)


def _policy(old: Contract, new: Contract) -> Iterator[Change]:
    if old.unknown != new.unknown:
        # Whoever read extras reads none any more; what passed is rejected.
        breaking = old.unknown == "keep" or new.unknown == "reject"
        yield Change("", f"unknown fields: {old.unknown} -> {new.unknown}", breaking)
    for name in ("interval_s", "latency_s"):
        promised, now = getattr(old, name), getattr(new, name)
        if promised != now:
            yield Change("", f"{name} {promised} -> {now}: figures of quality change", False)


# ---- what is stored, under the new one ----


@dataclass(slots=True)
class Fare:
    """How stored readings and open dead letters fare under another contract.

    reasons: of rows and letters that it rejects, by code; an event may have several.
    """

    rows: int = 0
    rows_rejected: int = 0
    row_reasons: Counter[str] = field(default_factory=Counter)
    letters: int = 0
    letters_accepted: int = 0
    letter_reasons: Counter[str] = field(default_factory=Counter)


def fare(sink: Sink, new: Contract, *, now_us: Callable[[], int]) -> Fare:
    """Try everything that a sink holds under another contract; reads all of it, changes nothing.

    Conflicts are left out: a contract says nothing about them.
    """
    found = Fare()
    stored = Validator(new, now_us=now_us, future_limit_s=None)
    for readings in sink.read():
        for done in _tried(stored, events_of(readings)):
            found.rows += len(done.readings) + len(done.rejections)
            found.rows_rejected += len(done.rejections)
            found.row_reasons.update(_codes(done))
    letters = (each.rejection for each in sink.dead_letters(state=State.OPEN))
    payloads = (
        each.payload for each in letters if [found.code for found in each.reasons] != [CONFLICT]
    )
    for done in _tried(Validator(new, now_us=now_us), payloads):
        found.letters += len(done.readings) + len(done.rejections)
        found.letters_accepted += len(done.readings)
        found.letter_reasons.update(_codes(done))
    return found


def events_of(readings: Readings) -> Iterator[bytes]:
    """Readings as the events that they could have come from: nulls left out, extras beside."""
    encode = msgspec.json.Encoder().encode
    stamps = np.datetime_as_string(readings.ts_us.view("datetime64[us]"), unit="us").tolist()
    names = list(readings.values)
    columns = [
        column.tolist() if isinstance(column, np.ndarray) else column
        for column in readings.values.values()
    ]
    for device_id, stamp, extras, *values in zip(
        readings.device_id, stamps, readings.extras, *columns, strict=True
    ):
        pairs = zip(names, values, strict=True)
        present = {name: value for name, value in pairs if value is not None and value == value}  # noqa: PLR0124  # NaN is null
        encoded = encode({DEVICE: device_id, TIMESTAMP: f"{stamp}Z", **present})
        # Spliced, not decoded: its numbers stay as they are written.
        yield encoded if extras is None else encoded[:-1] + b"," + extras.encode()[1:]


def _tried(validator: Validator, payloads: Iterable[bytes | None]) -> Iterator[Validated]:
    rest = iter(payloads)
    while chunk := list(islice(rest, _EVENTS_AT_ONCE)):
        offsets = np.arange(len(chunk))
        yield validator.validate(
            Chunk(_NOWHERE, offsets, chunk, Position(_NOWHERE, len(chunk))), run=""
        )


def _codes(done: Validated) -> Iterator[str]:
    """Each reason once for each event."""
    for rejection in done.rejections:
        yield from {reason.code for reason in rejection.reasons}
