"""Validation on one core: bytes to columns of readings, beside msgspec's decoding alone.

In seconds of the processor: nothing here waits, and other processes do not count. The limit
decodes the same payloads into the same struct and drops it; it neither checks for keys that
stand twice, NUL and ranges nor reads times, and gives no columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec

from bench.figure import Figure, Measurement, Rule, Setting
from bench.measure import interleaved
from bench.telemetry.events import START_US, chunks, count_of, payloads
from kvstore.telemetry.contract import brief
from kvstore.telemetry.examine import Limits, examine
from kvstore.telemetry.pipeline import ROWS_MAX
from kvstore.telemetry.validate import Validator

YEAR_US: Final = 31_536_000_000_000
SLOW_EVENTS_MAX: Final = 50_000  # of the slow way alone; its rate does not depend on how many


class _Event(msgspec.Struct, gc=False):
    """What the validator decodes to, written out."""

    device_id: str
    timestamp: str
    temperature: float
    humidity: float
    firmware_version: str
    pressure: float | None = None


def validation(setting: Setting) -> list[Figure]:
    """Good events, the simulation's usual mix, and the slow way alone."""
    good = payloads(count_of(setting), setting.seed, trouble=False)
    usual = payloads(count_of(setting), setting.seed, trouble=True)
    some = good[:SLOW_EVENTS_MAX]
    rows = interleaved(
        setting.pairs,
        lambda: _rate(len(good), lambda: _decode(good)),
        lambda: _rate(len(good), lambda: _validate(good, bad_max=0)),
        lambda: _rate(len(usual), lambda: _validate(usual, bad_max=len(usual) // 20)),
        lambda: _rate(len(some), lambda: _examine(some)),
    )
    limit = "bare msgspec decode"
    target = (Rule("value", ">=", 1_000_000),)
    return [
        Figure(
            name="validation",
            unit="events/s",
            limit_name=limit,
            values=rows[1],
            limits=rows[0],
            rules=target,
        ),
        Figure(
            name="validation-usual",
            unit="events/s",
            limit_name=limit,
            values=rows[2],
            limits=rows[0],
        ),
        Figure(
            name="validation-slow",
            unit="events/s",
            limit_name=limit,
            values=rows[3],
            limits=rows[0],
        ),
    ]


def _rate(events: int, act: Callable[[], None]) -> float:
    started = time.process_time_ns()
    act()
    return events / max((time.process_time_ns() - started) / 1e9, 1e-9)


def _decode(events: tuple[bytes, ...]) -> None:
    decode = msgspec.json.Decoder(_Event).decode
    for event in events:
        decode(event)


def _validate(events: tuple[bytes, ...], *, bad_max: int) -> None:
    validator = Validator(brief(), now_us=lambda: START_US + YEAR_US)
    stored = bad = 0
    for chunk in chunks(events, ROWS_MAX):
        done = validator.validate(chunk, run="bench")
        stored += len(done.readings)
        bad += len(done.rejections)
    assert stored + bad == len(events)
    assert bad <= bad_max


def _examine(events: tuple[bytes, ...]) -> None:
    contract, limits = brief(), Limits(None, None)
    assert not any(examine(event, contract, limits).reasons for event in events)


MEASUREMENTS: Final = (
    Measurement("validation", "bytes to readings, beside bare decoding", validation),
)
