"""A made-up fleet: the events that its devices would publish, and all that goes wrong with them.

Device n measures at ``start + tick * interval``, all devices at each tick. Besides good events
there are rejects of every kind that the brief's contract knows, exact repeats (some written
otherwise: 68 as 68.0, other order of keys), conflicts (same identity, other values), late ones,
and such with fields that no contract knows. From ten devices on, three are sick: one falls
silent, one is stuck at a value, one has a hole and jumps.

The same arguments give the same bytes. Pure: time and pace are the caller's.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final

from kvstore.telemetry.contract import DEVICE_CHARS_MAX
from kvstore.telemetry.examine import DEPTH_MAX, EVENT_BYTES_MAX

INTERVAL_S: Final = 5.0
RECENT_EVENTS: Final = 2000  # what a repeat or a conflict is made of
LATE_TICKS: Final = 60  # how long a late event is held back: five minutes at 5 s
SICK_FROM_DEVICES: Final = 10

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_OFFSET: Final = timezone(timedelta(hours=2))
_DAY_S: Final = 86_400
_SILENT_AFTER: Final = 0.7  # of the run
_STUCK_AFTER: Final = 0.6
_HOLE: Final = (0.3, 0.4)
_JUMP_EVERY: Final = 97  # ticks

Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What to make up. Shares are of all events, 0 to 1; evolve_after: of the run, with pressure.

    start_us: time of the first tick. events: how many lines, rejects and repeats included.
    """

    devices: int = 50
    events: int = 100_000
    start_us: int
    interval_s: float = INTERVAL_S
    evolve_after: float = 0.5
    bad: float = 0.01
    duplicates: float = 0.01
    conflicts: float = 0.001
    late: float = 0.001
    extras: float = 0.001
    seed: int = 1


class Simulation:
    """Iterate for the payloads, one event each, without line ends; ``made`` counts the kinds."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.made: Counter[str] = Counter()
        self._random = random.Random(fleet.seed)  # noqa: S311  # made-up weather, no secrets
        self._recent: deque[Event] = deque(maxlen=RECENT_EVENTS)
        self._held: list[tuple[int, int, bytes]] = []
        self._measured = 0

    def __iter__(self) -> Iterator[bytes]:
        """Payload by payload."""
        for number in range(self.fleet.events):
            yield self._next(number)

    def _next(self, number: int) -> bytes:
        if self._held and self._held[0][0] <= number:
            self.made["late"] += 1
            return heapq.heappop(self._held)[2]
        kind, draw = "good", self._random.random()
        for each in ("bad", "duplicates", "conflicts", "extras", "late"):
            share = getattr(self.fleet, each)
            if draw < share:
                kind = each
                break
            draw -= share
        return self._made(kind, number)

    def _made(self, kind: str, number: int) -> bytes:
        if kind == "bad":
            spoilt = SPOILT[self.made["bad"] % len(SPOILT)]
            self.made["bad"] += 1
            return spoilt(self._measurement())
        if kind == "duplicates" and self._recent:
            self.made[kind] += 1
            return _otherwise(self._random.choice(self._recent), self._random.randrange(3))
        if kind == "conflicts" and self._recent:
            self.made[kind] += 1
            event = self._random.choice(self._recent)
            return _json({**event, "temperature": round(event["temperature"] + 0.5, 1)})
        return self._good(kind, number)

    def _good(self, kind: str, number: int) -> bytes:
        event = self._measurement()
        if kind == "late":
            due = number + self.fleet.devices * LATE_TICKS
            heapq.heappush(self._held, (due, number, _json(event)))
            event = self._measurement()
        if kind == "extras":
            self.made["extras"] += 1
            event["battery"] = {"volts": round(3 + self._random.random(), 2), "cells": 2}
        self._recent.append(event)
        self.made["good"] += 1
        return _json(event)

    def _measurement(self) -> Event:
        """The next event that the fleet measures; a sick device may skip its turn."""
        while True:
            tick, device = divmod(self._measured, self.fleet.devices)
            self._measured += 1
            progress = self._measured / max(self.fleet.events, 1)
            if not self._is_dumb(device, progress):
                return self._event(device, tick, progress)

    def _is_dumb(self, device: int, progress: float) -> bool:
        if self.fleet.devices < SICK_FROM_DEVICES:
            return False
        silent = device == 1 and progress > _SILENT_AFTER
        return silent or (device == 3 and _HOLE[0] < progress < _HOLE[1])  # noqa: PLR2004

    def _event(self, device: int, tick: int, progress: float) -> Event:
        seconds = self.fleet.start_us / 1e6 + tick * self.fleet.interval_s
        sun = math.sin(2 * math.pi * seconds / _DAY_S)
        temperature = 21 + device % 7 + 4 * sun + self._random.gauss(0, 0.2)
        humidity = min(max(round(55 - 15 * sun + self._random.gauss(0, 2)), 0), 100)
        if self.fleet.devices >= SICK_FROM_DEVICES:
            if device == 2 and progress > _STUCK_AFTER:  # noqa: PLR2004
                temperature, humidity = 21.0, 55
            elif device == 3 and tick % _JUMP_EVERY == 0:  # noqa: PLR2004
                temperature += 35
        event: Event = {
            "device_id": f"sensor-{device:03d}",
            "timestamp": self._stamp(device, tick),
            "temperature": round(temperature, 1),
            "humidity": humidity,
        }
        if progress > self.fleet.evolve_after:
            self.made["evolved"] += 1
            event["pressure"] = round(1013 + 8 * sun + self._random.gauss(0, 0.3), 1)
            return {**event, "firmware_version": "v1.3.0"}
        return {**event, "firmware_version": "v1.2.0"}

    def _stamp(self, device: int, tick: int) -> str:
        """As firmware of different makes writes it: whole seconds, ms, ns, with an offset."""
        us = self.fleet.start_us + round(tick * self.fleet.interval_s * 1e6) + device * 1000
        at = _EPOCH + timedelta(microseconds=us)
        make = device % 10
        if make == 7:  # noqa: PLR2004
            return at.strftime("%Y-%m-%dT%H:%M:%S.%f") + "789Z"
        if make == 3:  # noqa: PLR2004
            return at.astimezone(_OFFSET).isoformat(timespec="milliseconds")
        precision = "milliseconds" if make > 4 else "seconds"  # noqa: PLR2004
        return at.replace(tzinfo=None).isoformat(timespec=precision) + "Z"


def _json(event: Event) -> bytes:
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()


def _otherwise(event: Event, way: int) -> bytes:
    """The same event, perhaps written in another way."""
    if way == 0:
        return _json(event)
    if way == 1:
        return _json({**event, "humidity": float(event["humidity"])})
    return json.dumps(dict(reversed(event.items()))).encode()


def _changed(**values: Any) -> Callable[[Event], bytes]:
    return lambda event: _json({**event, **values})


def _without(name: str) -> Callable[[Event], bytes]:
    return lambda event: _json({key: value for key, value in event.items() if key != name})


def _replaced(old: bytes, new: bytes) -> Callable[[Event], bytes]:
    return lambda event: _json(event).replace(old, new, 1)


def _naive(event: Event) -> bytes:
    return _json({**event, "timestamp": event["timestamp"][:19]})


def _years_ahead(event: Event) -> bytes:
    return _json({**event, "timestamp": f"2199{event['timestamp'][4:]}"})


def _without_end(event: Event) -> bytes:
    return _json(event)[:-9]


def _all_at_once(event: Event) -> bytes:
    return _json(
        {**event, "device_id": "", "timestamp": "now", "humidity": "wet", "temperature": 99}
    )


# One for each reason that the brief's contract gives, then some with several, in turns.
SPOILT: Final[tuple[Callable[[Event], bytes], ...]] = (
    lambda _: b"  ",
    _replaced(b'version":"v', b'version":"\xff'),
    _without_end,
    lambda event: _json([event]),  # type: ignore[arg-type]
    _replaced(b'"humidity":', b'"humidity":1,"humidity":'),
    _changed(firmware_version="v1.2\0"),
    _without("temperature"),
    _changed(temperature="21.4"),
    _replaced(b'"humidity":', b'"humidity":1e999,"wet":'),
    _changed(humidity=130),
    _changed(temperature=-273.15),
    _changed(device_id="x" * (DEVICE_CHARS_MAX + 1)),
    _changed(timestamp="2026-02-30T10:15:30Z"),
    _naive,
    _years_ahead,
    _changed(device_id=None),
    _changed(timestamp=1_737_368_130),
    _replaced(
        b'"humidity":',
        b'"deep":' + b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1) + b',"humidity":',
    ),
    _all_at_once,
    lambda _: b"\x00\xde\xad\xbe\xef",
)


def too_large(event: Event) -> bytes:
    """An event longer than any may be; not among those that come in turns, for its size."""
    return _json({**event, "note": "x" * EVENT_BYTES_MAX})
