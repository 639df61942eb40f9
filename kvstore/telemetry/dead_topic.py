"""Dead letters on a Kafka topic as well, for teams that watch one: a sink around the sink.

The sink's own dead letters stay the truth: they are in the commit, this topic is a copy, sent
after the commit and **at least once**. Sending is done before the next commit begins, so that a
crash can leave out the letters of the last commit of a place alone; whoever claims the place next
sends these again (those with the newest ``first_seen_us``), sent before or not.

Value, key and headers are the event's own; behind its headers stand Kafka Connect's
``__connect.errors.*``, so that its tools find what they look for, and ``kvstore.reasons``.

Cost: letters of conflicts are known to the sink only, and are read back among all conflicts of
the place, where a commit made some. What cannot be sent ends the run: the next one begins with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from confluent_kafka import KafkaError, KafkaException, Producer

from kvstore.errors import TelemetryError
from kvstore.telemetry import counts
from kvstore.telemetry.kafka import (
    REGISTRY,
    Address,
    Options,
    environment_options,
    made,
    parse_address,
    translated,
)
from kvstore.telemetry.records import Claim, DeadLetter, Outcome, Place, Rejection, Work

if TYPE_CHECKING:
    from kvstore.telemetry.sink import Sink

SENT_S: Final = 60.0  # for the letters of one commit: a broker's restart; then the run ends
_PREFIX: Final = "__connect.errors."
_STAGES: Final = {True: "TASK_PUT", False: "VALUE_CONVERTER"}  # whether it is a conflict


class DeadTopic:
    """Sends letters; ``send`` returns when all of them are acknowledged."""

    def __init__(self, address: Address, options: Options):
        self._address = address
        self._failed: str = ""
        config = {
            "client.id": "kvstore",
            "compression.type": "lz4",
            "message.timeout.ms": int(SENT_S * 1000),
            **options,
            "enable.idempotence": True,
            "log_level": 2,
            "bootstrap.servers": address.servers,
            "on_delivery": self._delivered,
        }
        self._producer = made(Producer, config, address)

    @classmethod
    def open(cls, url: str, options: Options) -> DeadTopic:
        """As the command line has it, with the consumer's options: they may say how to log in."""
        given = {**options, **environment_options(os.environ)}
        return cls(
            parse_address(url),
            {name: value for name, value in given.items() if name not in {"group.id", REGISTRY}},
        )

    def send(self, letters: Iterable[DeadLetter]) -> int:
        """How many were sent; TelemetryError where one was not."""
        count = 0
        for letter in letters:
            self._produce(letter.rejection, headers_of(letter))
            count += 1
        if left := self._producer.flush(SENT_S):
            self._failed = f"{left} letters were not acknowledged within {SENT_S:.0f} s"
        if self._failed:
            why, self._failed = self._failed, ""
            raise TelemetryError(
                f"{self._address}: dead letters not sent: {why}; all is committed, and they are "
                "sent again at the next start"
            )
        return count

    def _produce(self, rejection: Rejection, headers: list[tuple[str, bytes | None]]) -> None:
        while True:
            try:
                self._producer.produce(
                    self._address.topic, rejection.payload, rejection.key, headers=headers
                )
            except BufferError:
                self._producer.poll(0.1)
            except KafkaException as error:
                self._failed = str(translated(error, self._address))
                return
            else:
                return

    def _delivered(self, error: KafkaError | None, _: Any) -> None:
        if error is not None:
            self._failed = error.str()


class Publishing:
    """The sink, and behind each of its commits the dead letters of it on a topic."""

    def __init__(self, sink: Sink, topic: DeadTopic):
        self._sink = sink
        self._topic = topic

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """The sink is closed by whoever opened it."""

    def __getattr__(self, name: str) -> Any:
        """All else is the sink's."""
        return getattr(self._sink, name)

    def claim(self, places: Sequence[Place]) -> list[Claim]:
        """The sink's claims, once the last letters of these places are surely sent."""
        claims = self._sink.claim(places)
        for place in places:
            self._topic.send(self._newest(place))
        return claims

    def commit(self, work: Work) -> Outcome:
        """The sink's commit, and then its letters."""
        outcome = self._sink.commit(work)
        self._publish(work, outcome)
        return outcome

    def settle(self, work: Work) -> Outcome | None:
        """What the sink says; the letters of a commit that is there are sent."""
        outcome = self._sink.settle(work)
        if outcome is not None:
            self._publish(work, outcome)
        return outcome

    def _publish(self, work: Work, outcome: Outcome) -> None:
        if work.rejections:
            self._topic.send(_letter(each, work) for each in work.rejections)
        if outcome.conflicts:
            self._topic.send(self._conflicts(work))

    def _conflicts(self, work: Work) -> Iterator[DeadLetter]:
        for claim in work.claims:
            place = claim.position.place
            for letter in self._sink.dead_letters(reason=counts.CONFLICT, place=place):
                if (letter.first_seen_us, letter.run) == (work.committed_us, work.run):
                    yield letter

    def _newest(self, place: Place) -> list[DeadLetter]:
        found: list[DeadLetter] = []
        for letter in self._sink.dead_letters(place=place):
            if found and letter.first_seen_us > found[0].first_seen_us:
                found = []
            if not found or letter.first_seen_us == found[0].first_seen_us:
                found.append(letter)
        return found


def _letter(rejection: Rejection, work: Work) -> DeadLetter:
    return DeadLetter(rejection, work.committed_us, work.contract_version, work.run)


def headers_of(letter: DeadLetter) -> list[tuple[str, bytes | None]]:
    """The event's own headers, and then what Kafka Connect says of an error."""
    rejection = letter.rejection
    place = rejection.place
    topic = place.source.partition("/")[2] if place.source.startswith("kafka:") else place.source
    is_conflict = any(reason.code == counts.CONFLICT for reason in rejection.reasons)
    message = "; ".join(" ".join(filter(None, reason)) for reason in rejection.reasons)
    said = {
        "topic": topic,
        "partition": place.partition,
        "offset": rejection.offset,
        "connector.name": "kvstore",
        "task.id": 0,
        "stage": _STAGES[is_conflict],
        "class.name": "kvstore.telemetry",
        "exception.class.name": "kvstore.telemetry.records.Rejection",
        "exception.message": message,
        "exception.stacktrace": "",
    }
    reasons = json.dumps([reason._asdict() for reason in rejection.reasons])
    return [
        *rejection.headers,
        *((_PREFIX + name, str(value).encode()) for name, value in said.items()),
        ("kvstore.reasons", reasons.encode()),
        ("kvstore.run", letter.run.encode()),
        ("kvstore.contract.version", str(letter.contract_version).encode()),
    ]
