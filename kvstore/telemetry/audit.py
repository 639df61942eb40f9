"""Every line of a file that was read has exactly one fate in a sink; this finds where it has not.

    stored      a reading of the sink names the line as its origin
    rejected    a dead letter does
    duplicate   neither: then the sink has the reading's identity, with equal values

What was replayed is a letter and a reading (or a duplicate). Validate with the contract under
which the file was read: what an event's values are is decided by it. Over any sink; the sink is
read twice, memory is 8 bytes for each of the file's readings and about 200 for each duplicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from kvstore.errors import SourceError
from kvstore.telemetry.records import Chunk, Place, Position, Readings, State
from kvstore.telemetry.sink import Sink
from kvstore.telemetry.sinks.identities import digests_of
from kvstore.telemetry.sources.files import located
from kvstore.telemetry.sources.lines import LineReader
from kvstore.telemetry.validate import Validator

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.telemetry.contract import Contract

EXAMPLES_MAX: Final = 10  # lines named of each fault
_EVENTS: Final = 10_000
_BYTES: Final = 8 << 20

_Identity = tuple[str, int]


@dataclass(slots=True)
class Audit:
    """Lines by fate, and those without one or with several; unread: behind the position."""

    lines: int = 0
    stored: int = 0
    duplicates: int = 0
    rejected: int = 0
    replayed: int = 0
    unread: int = 0
    missing: list[int] = field(default_factory=list)  # no fate
    twice: list[int] = field(default_factory=list)  # several
    strange: list[int] = field(default_factory=list)  # in the sink, and no event in the file

    @property
    def is_sound(self) -> bool:
        """Whether each line that was read has its one fate."""
        return not (self.missing or self.twice or self.strange)


def audit(path: Path, sink: Sink, contract: Contract, *, now_us: int) -> Audit:
    """Hold a file against a sink. SourceError where the sink has not read this very file."""
    with path.open("rb") as file:
        position = located(file.fileno(), path, sink.positions())
        if position is None:
            raise SourceError(
                f"{path}: nothing of this file is in the sink: it was read from another path, or "
                "not at all, or has been changed since"
            )
        stored = _stored_lines(sink, position.place)
        letters = _letters(sink, position.place)
        found = Audit(twice=_repeated(stored))
        events: list[NDArray[np.int64]] = []
        wanted: dict[_Identity, list[tuple[int, int]]] = {}
        for chunk in _chunks(file.fileno(), position, found):
            events.append(chunk.offsets)
            rest = _sort(chunk, np.unique(stored), letters, found)
            valid = Validator(contract, now_us=lambda: now_us).validate(rest, run="")
            found.missing += [each.offset for each in valid.rejections]  # refused, and not kept
            for identity, digest, line in _identities(valid.readings):
                wanted.setdefault(identity, []).append((digest, line))
    _look_up(sink, wanted, found)
    _find_strange(np.concatenate([np.empty(0, np.int64), *events]), stored, letters, found)
    return found


def _stored_lines(sink: Sink, place: Place) -> NDArray[np.int64]:
    """Lines that readings name as their origin, sorted; each as often as it is named."""
    parts = [np.empty(0, np.int64)]
    for batch in sink.read():
        mine = batch.lineage.partition == place.partition
        mine &= np.fromiter((s == place.source for s in batch.lineage.source), bool, len(batch))
        parts.append(batch.lineage.offset[mine])
    return np.sort(np.concatenate(parts))


def _letters(sink: Sink, place: Place) -> dict[int, State]:
    return {each.rejection.offset: each.state for each in sink.dead_letters(place=place)}


def _repeated(stored: NDArray[np.int64]) -> list[int]:
    repeated: list[int] = np.unique(stored[1:][stored[1:] == stored[:-1]]).tolist()
    return repeated


def _chunks(fd: int, position: Position, found: Audit) -> Iterator[Chunk]:
    """The lines that were read; the others are counted."""
    reader = LineReader(fd)
    while (lines := reader.read(_EVENTS, _BYTES)) is not None or reader.unfinished:
        lines = reader.take_unfinished() if lines is None else lines
        read = int(np.searchsorted(lines.numbers, position.next))
        found.lines += read
        found.unread += len(lines.numbers) - read
        if read:
            yield Chunk(position.place, lines.numbers[:read], lines.payloads[:read], position)


def _sort(
    chunk: Chunk, stored: NDArray[np.int64], letters: Mapping[int, State], found: Audit
) -> Chunk:
    """Give each line its fate, as far as it shows by its number; the lines of which it does not."""
    is_stored = np.isin(chunk.offsets, stored, assume_unique=True)
    rest = []
    for at, (line, here) in enumerate(zip(chunk.offsets.tolist(), is_stored.tolist(), strict=True)):
        state = letters.get(line)
        is_refused = state in (State.OPEN, State.DISCARDED)
        found.stored += here
        found.replayed += state == State.REPLAYED
        found.rejected += is_refused
        if here and is_refused:
            found.twice.append(line)
        if not (here or is_refused):
            rest.append(at)
    payloads = [chunk.payloads[at] for at in rest]
    return Chunk(chunk.place, chunk.offsets[rest], payloads, chunk.after)


def _identities(readings: Readings) -> Iterator[tuple[_Identity, int, int]]:
    digests = digests_of(readings.values, readings.extras).tolist()
    identities = zip(readings.device_id, readings.ts_us.tolist(), strict=True)
    yield from zip(identities, digests, readings.lineage.offset.tolist(), strict=True)


def _look_up(sink: Sink, wanted: dict[_Identity, list[tuple[int, int]]], found: Audit) -> None:
    """Lines that are in the sink by the values of another one are duplicates, others missing."""
    if wanted:
        times = [ts_us for _, ts_us in wanted]
        for batch in sink.read(min(times), max(times) + 1):
            for identity, digest, _ in _identities(batch):
                lines = wanted.get(identity)
                if lines is not None:
                    equal = [line for each, line in lines if each == digest]
                    found.duplicates += len(equal)
                    wanted[identity] = [pair for pair in lines if pair[0] != digest]
    found.missing += [line for lines in wanted.values() for _, line in lines]
    found.missing.sort()


def _find_strange(
    events: NDArray[np.int64],
    stored: NDArray[np.int64],
    letters: Mapping[int, State],
    found: Audit,
) -> None:
    named = np.union1d(stored, np.fromiter(letters, np.int64, len(letters)))
    found.strange = np.setdiff1d(named, events).tolist()
