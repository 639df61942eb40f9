"""Where a worker begins to read partitions that have become its own.

The sink's position decides; one never read begins with the earliest event. What stands between the
sink and the topic is an error, or a loss that was accepted aloud:

    events past their retention      the position moves to the first that is there
    the topic was created again      its id differs from the one in Position.token

An event is known by (source, partition, offset), so the offsets of a recreated topic must not meet
those of the one before it: its places are named ``…/topic@<topic id>``. That a loss was accepted is
recorded in the sink at once, by a position that moves though nothing was read: else an empty
partition would ask for it at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from kvstore.errors import SourceError
from kvstore.events import Event, Report
from kvstore.telemetry.kafka import Address, Topic
from kvstore.telemetry.records import Place, Position
from kvstore.telemetry.source import OnAssigned, OnRevoked

EARLIEST: Final = -2  # librdkafka's OFFSET_BEGINNING


class Begin(NamedTuple):
    """Where a partition is read from.

    offset: the first to fetch, or EARLIEST. moved: the position to be recorded though nothing was
    read up to it, or None.
    """

    place: Place
    offset: int
    moved: Position | None = None


class Beginnings:
    """Asks the sink, and holds its answers against what is there.

    low: the first offset of a partition of that number, asked of the broker.
    """

    def __init__(
        self,
        address: Address,
        *,
        on_assigned: OnAssigned,
        on_revoked: OnRevoked,
        low: Callable[[int], int],
        accept_loss: bool,
        report: Report,
    ):
        self._address = address
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._low = low
        self._accept_loss = accept_loss
        self._report = report

    def of(self, numbers: Iterable[int], topic: Topic) -> list[Begin]:
        """One for each partition; SourceError where it would be a loss that nobody accepted."""
        return [self._begin(position, topic) for position in self._positions(numbers, topic)]

    def passed(self, position: Position, topic: Topic) -> Begin:
        """From that position on, unless what is there has been deleted."""
        place, number = position.place, position.place.partition
        low = self._low(number)
        if position.next >= low:
            return Begin(place, position.next)
        self._accept(
            f"{self._address} partition {number}: the offsets {position.next} to {low - 1} "
            "were deleted (retention) before they were read"
        )
        return Begin(place, low, Position(place, low, topic.topic_id))

    def _positions(self, numbers: Iterable[int], topic: Topic) -> list[Position]:
        """What the sink says; of a recreated topic, what it says of the topic as it is now."""
        name = f"kafka:{topic.cluster_id}/{self._address.topic}"
        claimed = self._on_assigned([Place(name, number) for number in numbers])
        stale = [each for each in claimed if each.token and each.token != topic.topic_id != ""]
        if not stale:
            return list(claimed)
        self._on_revoked([position.place for position in stale], True)
        renamed = f"{name}@{topic.topic_id}"
        anew = self._on_assigned([Place(renamed, old.place.partition) for old in stale])
        if all(position.next < 0 for position in anew):
            self._accept(
                f"{self._address}: the topic was deleted and created again: the sink knows it by "
                f"the id {stale[0].token}, now it is {topic.topic_id}; whatever of the old one "
                "had not been read is gone"
            )
        return [position for position in claimed if position not in stale] + [*anew]

    def _begin(self, position: Position, topic: Topic) -> Begin:
        place = position.place
        if position.next >= 0:
            return self.passed(position, topic)
        if "@" not in place.source:
            return Begin(place, EARLIEST)
        return Begin(place, EARLIEST, Position(place, self._low(place.partition), topic.topic_id))

    def _accept(self, loss: str) -> None:
        if not self._accept_loss:
            raise SourceError(f"{loss}; --accept-loss goes on with what is there")
        self._report(Event("warning", "lost", loss))
