"""The events that all measurements of telemetry read: a simulated fleet's, made once a process."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

from bench.figure import Setting
from kvstore.telemetry.records import Chunk, Place, Position
from kvstore.telemetry.simulate import Fleet, Simulation

EVENT_BYTES: Final = 135  # of a simulated one, on average
START_US: Final = 1_767_225_600_000_000  # 2026-01-01: in the past of any run, whole hours
DEVICES: Final = 1000
PLACE: Final = Place("bench:events", 0)


def count_of(setting: Setting) -> int:
    """How many events a run of that size has."""
    return max(setting.size_bytes // EVENT_BYTES, 1)


@lru_cache(maxsize=2)  # the good and the usual ones of one run
def payloads(count: int, seed: int, *, trouble: bool) -> tuple[bytes, ...]:
    """So many events; trouble: with the simulation's usual share of it, else all are good."""
    usual = Fleet(devices=DEVICES, events=count, start_us=START_US, seed=seed)
    if trouble:
        return tuple(Simulation(usual))
    good = Fleet(
        devices=DEVICES,
        events=count,
        start_us=START_US,
        seed=seed,
        bad=0,
        duplicates=0,
        conflicts=0,
        late=0,
        extras=0,
    )
    return tuple(Simulation(good))


def chunks(events: tuple[bytes, ...], events_max: int) -> list[Chunk]:
    """The events as a source would give them."""
    found = []
    for first in range(0, len(events), events_max):
        part = events[first : first + events_max]
        after = Position(PLACE, first + len(part))
        found.append(Chunk(PLACE, np.arange(first, first + len(part)), part, after))
    return found
