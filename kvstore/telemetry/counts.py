"""Figures of quality by device and hour: what is known before a sink decides, and what it decides.

received = stored + duplicates + rejected, always, by device and hour. A reading that meets another
of its identity with other values is ``rejected``, with the reason ``conflict``. An event that was
rejected and later replayed moves from ``rejected`` to what became of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from kvstore.telemetry.records import Count, Fate, Readings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECEIVED: Final = "received"
STORED: Final = "stored"
DUPLICATES: Final = "duplicates"
REJECTED: Final = "rejected"
CONFLICT: Final = "conflict"
LATE: Final = "late"  # more than a limit older than the newest of the same device before it
DRIFT: Final = "drift"  # valid events with fields that the contract does not know
FINER: Final = "finer"  # time stamps finer than a microsecond, cut off
TIMED: Final = "timed"  # the source knows when it took the event
DELAYED: Final = "delayed"  # of those, longer under way than the contract allows

HOUR_US: Final = 3_600_000_000

NAMES: Final = {
    Fate.STORED: (STORED,),
    Fate.DUPLICATE: (DUPLICATES,),
    Fate.CONFLICT: (REJECTED, f"reason:{CONFLICT}"),
}


def reason(code: str) -> str:
    """Name of the count of events rejected for that reason; one event may have several."""
    return f"reason:{code}"


def unknown(field: str) -> str:
    """Name of the count of valid events with that field, which the contract does not know."""
    return f"unknown:{field}"


def decided(readings: Readings, fates: NDArray[np.uint8]) -> list[Count]:
    """The counts of what a sink made of each reading; fates: one Fate each."""
    hours = readings.ts_us // HOUR_US * HOUR_US
    return named(
        Counter(zip(readings.device_id, hours.tolist(), fates.tolist(), strict=True)).items()
    )


def named(groups: Iterable[tuple[tuple[str, int, int], int]]) -> list[Count]:
    """Counts of groups (device, begin of the hour, Fate), however they were grouped."""
    return [
        Count(device_id, hour_us, name, value)
        for (device_id, hour_us, fate), value in groups
        for name in NAMES[Fate(fate)]
    ]


def summed(counts: Iterable[Count]) -> list[Count]:
    """One count for each device, hour and name; those that come to nothing are left out."""
    totals: Counter[tuple[str, int, str]] = Counter()
    for device_id, hour_us, name, value in counts:
        totals[device_id, hour_us, name] += value
    return [Count(*key, value) for key, value in sorted(totals.items()) if value]
