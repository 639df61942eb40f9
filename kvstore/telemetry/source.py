"""What every source promises. Three keep it: files.py, stream.py and kafka.py in sources/.

A source never decides where to begin: whenever places become its own it calls ``claim``, and
reads each from the position that comes back (the sink's), or from its very beginning where
``next`` is -1. It keeps nothing durable itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self

from kvstore.telemetry.records import Chunk, Place, Position

# Called with places that have become ours: gives the position to read each from.
OnAssigned = Callable[[Sequence[Place]], Sequence[Position]]
# Called before places are given up (lost=False: commit what is held of them; True: too late).
OnRevoked = Callable[[Sequence[Place], bool], None]


class Source(Protocol):
    """Where events come from; open one in a ``with``."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def start(self, on_assigned: OnAssigned, on_revoked: OnRevoked) -> None:
        """Begin; both may be called from here and from inside ``poll``, on the calling thread."""

    def poll(self, *, events_max: int, bytes_max: int, wait_s: float) -> list[Chunk] | None:
        """What there is, within the limits: at most one chunk a place.

        An empty list where nothing came within wait_s; None at the end of a source that ends
        (files without --follow). A single event above bytes_max comes alone.
        """

    def committed(self, positions: Sequence[Position]) -> None:
        """The sink holds all up to there: for lag graphs (Kafka's own offsets). May be nothing."""

    def ends(self) -> dict[Place, int]:
        """How far each assigned place could be read now, for lag; places may be missing."""
