"""What every sink promises. Three keep it: stream.py, postgres.py and iceberg.py in sinks/.

One fenced commit: readings, dead letters, counts and positions become durable and visible
together. A commit names the positions that it read from and the epochs of its claims; where
either has moved in the sink, nothing of it is kept and Fenced is raised. So a worker that slept
through a rebalance can do no harm, and reading an event again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

from kvstore.telemetry.contract import Contract
from kvstore.telemetry.records import (
    Claim,
    Count,
    DeadLetter,
    LetterChange,
    Outcome,
    Place,
    Position,
    Readings,
    State,
    Work,
)


class Sink(Protocol):
    """Where readings go. One process drives one sink; open one in a ``with``."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def evolve(self, contract: Contract) -> None:
        """Make room for what the contract has and the sink lacks, as nullable columns."""

    def positions(self, source: str | None = None) -> list[Position]:
        """How far each place was read and committed, of one source or of all."""

    def claim(self, places: Sequence[Place]) -> list[Claim]:
        """Take the places over: any earlier claim of them can commit no more.

        The position of a place never read is ``Position(place, -1)``: the source decides where
        it begins. Durable before it returns.
        """

    def commit(self, work: Work) -> Outcome:
        """Decide on each reading, and make all of it durable.

        Fenced: a claim or a position is no longer what the work says; nothing was kept.
        CommitUnknown: the reply was lost, it may or may not be there; call ``settle``, and
        neither repeat the commit nor clean anything up.
        """

    def settle(self, work: Work) -> Outcome | None:
        """What the commit of that id did, or None where it is not there; loads afresh."""

    def read(
        self,
        start_us: int | None = None,
        stop_us: int | None = None,
        *,
        device_id: str | None = None,
    ) -> Iterator[Readings]:
        """Readings with start_us <= ts_us < stop_us, in bounded batches, in order of time."""

    def dead_letters(
        self,
        *,
        state: State | None = None,
        reason: str | None = None,
        place: Place | None = None,
        offset: int | None = None,
    ) -> Iterator[DeadLetter]:
        """Dead letters in the order of their places and offsets."""

    def change_letters(self, changes: Sequence[LetterChange]) -> None:
        """Discard dead letters, or open them again: without rows, in a commit of its own."""

    def counts(self, start_us: int | None = None, stop_us: int | None = None) -> Iterator[Count]:
        """Figures of quality by device and hour, added up; start_us <= hour < stop_us."""
