"""What the embedded sink knows of each place: position, token and epoch, in a mark of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from kvstore.telemetry.records import Place, Position

_PLACE: Final = "telemetry/place/"


class Held(NamedTuple):
    """What the sink knows of a place. next: -1 before the first commit.

    letters_end: behind its last dead letter, so that later offsets need not be looked up.
    """

    position: Position
    epoch: int
    letters_end: int = 0


def unknown(place: Place) -> Held:
    """A place that nobody has claimed."""
    return Held(Position(place, -1), 0)


def places_in(marks: Mapping[str, Any]) -> dict[Place, Held]:
    """The places that a store's marks know, in order."""
    found = [_held(value) for name, value in marks.items() if name.startswith(_PLACE)]
    return {held.position.place: held for held in sorted(found)}


def mark_name(place: Place) -> str:
    """A mark's name has at most 255 bytes, and a path may have more."""
    digest = hashlib.blake2b(place.source.encode("utf-8", "surrogatepass"), digest_size=16)
    return f"{_PLACE}{digest.hexdigest()}/{place.partition}"


def mark(held: Held) -> list[Any]:
    """The mark's value."""
    (source, partition), position, token = held.position
    return [source, partition, position, token, held.epoch, held.letters_end]


def _held(mark: Sequence[Any]) -> Held:
    source, partition, position, token, epoch, letters_end = mark
    return Held(Position(Place(source, partition), position, token), epoch, letters_end)
