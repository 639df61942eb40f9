"""Which readings a sink has: exact, in bounded memory, however late they come. Pure but numpy.

The identities of one hour are a *window*: sorted 64-bit keys, the device's number above and the
microsecond within the hour below, so that no two readings share one; beside each key a digest of
the reading's values. 16 bytes a reading. Windows that a commit touches and that are not in memory
are loaded from the sink; the least recently used go where there are more than ROWS_MAX readings.

A key decides exactly whether a reading is there. The digest, 64 bits over all values that are not
null, decides whether it is the same: two that differ agree by chance once in 2^64.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstore import codec
from kvstore.telemetry.counts import HOUR_US
from kvstore.telemetry.records import Column, Fate

Keys: TypeAlias = NDArray[np.uint64]
Fates: TypeAlias = NDArray[np.uint8]

ROWS_MAX: Final = 16_000_000  # in memory, beside the windows of the commit at hand: 256 MB
EXTRAS: Final = "_extras"  # no field of a contract begins with an underscore
_DEVICE_SHIFT: Final = np.uint64(32)  # an hour has 3.6e9 µs, below 2^32


class Stored(NamedTuple):
    """Readings of a range as the sink has them: device numbers, µs, digests."""

    device: NDArray[np.int32]
    ts_us: NDArray[np.int64]
    digest: Keys


Load: TypeAlias = Callable[[int, int], Iterable[Stored]]  # of start_us <= ts_us < stop_us


@dataclass(slots=True)
class Window:
    """The identities of one hour, as sorted runs, each at least twice as long as the next."""

    runs: list[tuple[Keys, Keys]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self.runs)

    def add(self, keys: Keys, digests: Keys) -> None:
        """Sorted keys that are not there yet."""
        self.runs.append((keys, digests))
        while len(self.runs) > 1 and len(self.runs[-2][0]) < 2 * len(self.runs[-1][0]):
            pair = self.runs[-2:]
            keys, digests = (np.concatenate(parts) for parts in zip(*pair, strict=True))
            order = np.argsort(keys, kind="stable")
            self.runs[-2:] = [(keys[order], digests[order])]

    def find(self, keys: Keys) -> tuple[NDArray[np.bool_], Keys]:
        """Which of the keys are there, and their digests."""
        found = np.zeros(len(keys), bool)
        digests = np.zeros(len(keys), np.uint64)
        for there, stored in self.runs:
            at = np.minimum(np.searchsorted(there, keys), len(there) - 1)
            hits = there[at] == keys
            found |= hits
            digests[hits] = stored[at[hits]]
        return found, digests


class New(NamedTuple):
    """Identities that a commit adds to a window once it is durable."""

    hour: int
    keys: Keys
    digests: Keys


class Identities:
    """The windows in memory. load: reads identities from the sink."""

    def __init__(self, load: Load, rows_max: int = ROWS_MAX):
        self._load = load
        self._rows_max = rows_max
        self._windows: OrderedDict[int, Window] = OrderedDict()

    def decide(
        self, device: NDArray[np.int64], ts_us: NDArray[np.int64], digests: Keys
    ) -> tuple[Fates, list[New]]:
        """A Fate for each reading in order, and what ``add`` is to be given once it is durable."""
        fates = np.empty(len(ts_us), np.uint8)
        hours = ts_us // HOUR_US
        keys = _keys(device, ts_us, hours)
        new = []
        groups = list(_groups(hours))
        self._ensure([hour for hour, _ in groups])
        for hour, rows in groups:
            mine, added = _decided(self._windows[hour], keys[rows], digests[rows])
            fates[rows] = mine
            if len(added[0]):
                new.append(New(hour, *added))
        return fates, new

    def add(self, new: Iterable[New]) -> None:
        """What ``decide`` gave is durable now."""
        for hour, keys, digests in new:
            self._windows[hour].add(keys, digests)
        total = sum(map(len, self._windows.values()))
        while total > self._rows_max and len(self._windows) > 1:
            total -= len(self._windows.popitem(last=False)[1])

    def _ensure(self, hours: Sequence[int]) -> None:
        """Have these windows in memory, the most recently used."""
        missing = [hour for hour in hours if hour not in self._windows]
        for first, last in _stretches(missing):
            for hour in range(first, last + 1):
                self._windows[hour] = Window()
            for stored in self._load(first * HOUR_US, (last + 1) * HOUR_US):
                self._fill(stored)
        for hour in hours:
            self._windows.move_to_end(hour)

    def _fill(self, stored: Stored) -> None:
        hours = stored.ts_us // HOUR_US
        keys = _keys(stored.device.astype(np.int64), stored.ts_us, hours)
        for hour, rows in _groups(hours):
            order = np.argsort(keys[rows], kind="stable")
            self._windows[hour].add(keys[rows][order], stored.digest[rows][order])


def _keys(device: NDArray[np.int64], ts_us: NDArray[np.int64], hours: NDArray[np.int64]) -> Keys:
    within = (ts_us - hours * HOUR_US).astype(np.uint64)
    return (device.astype(np.uint64) << _DEVICE_SHIFT) | within


def _groups(hours: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp] | slice]]:
    """Each hour with the rows that it has, in their order."""
    if not len(hours):
        return
    if hours[0] == hours[-1] and bool((hours == hours[0]).all()):
        yield int(hours[0]), slice(None)
        return
    order = np.argsort(hours, kind="stable")
    starts = np.flatnonzero(np.diff(hours[order], prepend=hours[order[0]] - 1))
    for start, rows in zip(starts, np.split(order, starts[1:]), strict=True):
        yield int(hours[order[start]]), rows


def _stretches(hours: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring hours as (first, last): one read each."""
    first = last = None
    for hour in sorted(hours):
        if first is None or last is None:
            first = last = hour
        elif hour == last + 1:
            last = hour
        else:
            yield first, last
            first = last = hour
    if first is not None and last is not None:
        yield first, last


def _decided(window: Window, keys: Keys, digests: Keys) -> tuple[Fates, tuple[Keys, Keys]]:
    """Fates in the order of the keys; new keys, sorted, with their digests.

    Among equal keys the first in order leads: the others are held against it, or against what
    is stored.
    """
    order = np.argsort(keys, kind="stable")
    sorted_keys, sorted_digests = keys[order], digests[order]
    leads = np.ones(len(keys), bool)
    leads[1:] = sorted_keys[1:] != sorted_keys[:-1]
    leaders = np.flatnonzero(leads)
    found, stored = window.find(sorted_keys[leaders])
    reference = np.where(found, stored, sorted_digests[leaders])
    group = np.cumsum(leads) - 1
    fates = np.where(sorted_digests == reference[group], Fate.DUPLICATE, Fate.CONFLICT)
    fresh = leaders[~found]
    fates[fresh] = Fate.STORED
    in_order = np.empty(len(keys), np.uint8)
    in_order[order] = fates
    return in_order, (sorted_keys[fresh], sorted_digests[fresh])


# ---- digests ----


def digests_of(values: Mapping[str, Column], extras: Sequence[str | None]) -> Keys:
    """64 bits over the values of each reading that are not null, whatever the fields' order.

    A null adds nothing: a field that was added later leaves earlier digests as they are.
    """
    total = np.zeros(len(extras), np.uint64)
    for name, column in [*values.items(), (EXTRAS, list(extras))]:
        salt = codec.checksum(name.encode())
        total += (
            _of_numbers(column, salt) if isinstance(column, np.ndarray) else _of_text(column, salt)
        )
    return _mixed(total)


def _of_numbers(column: NDArray[np.float64], salt: int) -> Keys:
    bits = (column + 0.0).view(np.uint64)  # makes 0.0 of -0.0
    hashes = _mixed(bits ^ np.uint64(salt))
    hashes[np.isnan(column)] = 0
    return hashes


def _of_text(column: Sequence[str | None], salt: int) -> Keys:
    prefix = salt.to_bytes(8, "big")
    hashes = {
        text: 0 if text is None else codec.checksum(prefix + text.encode("utf-8", "surrogatepass"))
        for text in set(column)
    }
    return np.fromiter(map(hashes.__getitem__, column), np.uint64, len(column))


def _mixed(bits: Keys) -> Keys:
    """The finalizer of splitmix64: each bit of the input changes half of the output's."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
