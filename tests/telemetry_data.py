"""Makers of telemetry records for tests: rows, readings, rejections, and the work of one commit.

``work`` counts as the validator would: each row and each rejection was received, and a rejection
was rejected for its reasons. Not a test module.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kvstore.telemetry import counts
from kvstore.telemetry.contract import Contract, brief
from kvstore.telemetry.records import (
    Claim,
    Count,
    LetterChange,
    Lineage,
    Place,
    Readings,
    Reason,
    Rejection,
    Work,
)

BASE_US = 1_737_368_130_000_000  # 2025-01-20T10:15:30Z, the brief's first event
NOW_US = 1_795_780_800_000_000  # 2026-11-27T12:00:00Z
SECOND_US = 1_000_000
PLACE = Place("file:/var/events.jsonl", 0)
OTHER = Place("kafka:abc/telemetry", 3)
BRIEF = brief()
BRIEF_1 = Contract(1, tuple(field for field in BRIEF.values if field.since == 1))

_numbers = itertools.count(1)


class Row(NamedTuple):
    """One reading. values: by field, those that are not null; extras: canonical JSON."""

    device_id: str
    ts_us: int
    values: Mapping[str, float | str]
    extras: str | None
    place: Place
    offset: int


def row(
    device: str = "sensor-1",
    second: float = 0,
    *,
    offset: int = 1,
    place: Place = PLACE,
    extras: str | None = None,
    **values: float | str | None,
) -> Row:
    """A reading ``second`` seconds after BASE_US; a value of None is null."""
    given = {"temperature": 21.4, "humidity": 68.0, "firmware_version": "v1.2.0"} | values
    present = {name: value for name, value in given.items() if value is not None}
    return Row(device, BASE_US + round(second * SECOND_US), present, extras, place, offset)


def raw(each: Row) -> bytes:
    """Some bytes that the reading could have been made of."""
    return f"raw of {each.device_id} at {each.ts_us}, offset {each.offset}".encode()


def readings(
    rows: Iterable[Row],
    *,
    contract: Contract = BRIEF,
    run: str = "run-1",
    ingested_us: int = NOW_US,
) -> Readings:
    """The rows by column."""
    rows = list(rows)
    columns = {}
    for field in contract.values:
        if field.is_number:
            numbers = [each.values.get(field.name, np.nan) for each in rows]
            columns[field.name] = np.array(numbers, np.float64)
        else:
            columns[field.name] = [each.values.get(field.name) for each in rows]
    unknown = {name for each in rows for name in each.values} - columns.keys()
    assert not unknown, f"not in the contract: {unknown}"
    return Readings(
        [each.device_id for each in rows],
        np.array([each.ts_us for each in rows], np.int64),
        columns,
        [each.extras for each in rows],
        Lineage(
            [each.place.source for each in rows],
            np.array([each.place.partition for each in rows], np.int32),
            np.array([each.offset for each in rows], np.int64),
            np.full(len(rows), ingested_us, np.int64),
            np.full(len(rows), contract.version, np.int16),
            [run] * len(rows),
        ),
    )


def rejection(
    offset: int,
    *,
    place: Place = PLACE,
    payload: bytes | None = b'{"device_id": \xff',
    reasons: Sequence[Reason] = (Reason("invalid_utf8", "", "byte 14"),),
    device_id: str = "",
    ts_us: int | None = None,
) -> Rejection:
    """An event that was refused."""
    headers = (("trace", b"\x00\xfe"), ("empty", None))
    return Rejection(place, offset, payload, tuple(reasons), b"key\xff", headers, device_id, ts_us)


def seen_of(rows: Iterable[Row], rejections: Iterable[Rejection], now_us: int) -> list[Count]:
    """What is known of events before a sink decides."""
    found = [Count(each.device_id, hour_of(each.ts_us), counts.RECEIVED, 1) for each in rows]
    for each in rejections:
        hour_us = hour_of(now_us if each.ts_us is None else each.ts_us)
        names = [counts.RECEIVED, counts.REJECTED, *(counts.reason(r.code) for r in each.reasons)]
        found += [Count(each.device_id, hour_us, name, 1) for name in names]
    return counts.summed(found)


def hour_of(ts_us: int) -> int:
    return ts_us // counts.HOUR_US * counts.HOUR_US


def work(
    claims: Claim | Sequence[Claim],
    rows: Sequence[Row] = (),
    rejections: Sequence[Rejection] = (),
    *,
    changes: Sequence[LetterChange] = (),
    seen: Sequence[Count] | None = None,
    commit_id: str | None = None,
    contract: Contract = BRIEF,
    next_: int | None = None,
    token: str = "",
    now_us: int = NOW_US,
    run: str = "run-1",
) -> Work:
    """One commit: each place is read up to behind its last event here, or up to ``next_``."""
    claims = [claims] if isinstance(claims, Claim) else list(claims)
    events = [(each.place, each.offset) for each in [*rows, *rejections]]
    after = []
    for position, _ in claims:
        last = max((offset for place, offset in events if place == position.place), default=-1)
        behind = max(position.next, last + 1) if next_ is None else next_
        after.append(position._replace(next=behind, token=token))
    return Work(
        commit_id=commit_id or f"commit-{next(_numbers)}",
        run=run,
        committed_us=now_us,
        claims=tuple(claims),
        after=tuple(after),
        readings=readings(rows, contract=contract, run=run, ingested_us=now_us),
        raw=[raw(each) for each in rows],
        rejections=list(rejections),
        seen=seen_of(rows, rejections, now_us) if seen is None else list(seen),
        changes=list(changes),
        contract_version=contract.version,
    )


def next_work(done: Work, rows: Sequence[Row] = (), rejections: Sequence[Rejection] = ()) -> Work:
    """The commit behind another one, under the same claims."""
    claims = [
        Claim(position, claim.epoch)
        for position, claim in zip(done.after, done.claims, strict=True)
    ]
    return replace(work(claims, rows, rejections), run=done.run)
