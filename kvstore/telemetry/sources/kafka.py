"""Events of a Kafka topic, as one member of a consumer group: its share of the partitions.

Where each partition is read from is the sink's word alone, asked for whenever partitions become
ours (kafka_begin.py): Kafka's committed offsets are written for lag graphs and never read, and
``auto.offset.reset`` is "error".

Rules for consuming in batches. librdkafka has returned events of an assignment that had ended in
the middle of a call (its release notes, 2.0 and later). So partitions that a call brings are
fetched only once it has returned, and what it returned of them is thrown away. (Assigning them
paused lost: an error that comes between the two leaves the partition silent for ever.)
Memory: QUEUE_BYTES inside librdkafka, what one poll may return, and one slice.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from kvstore.errors import SourceError
from kvstore.events import Event, Report
from kvstore.telemetry.kafka import (
    ANSWER_S,
    REGISTRY,
    Address,
    Cluster,
    Options,
    Topic,
    environment_options,
    made,
    parse_address,
    relay,
    translated,
)
from kvstore.telemetry.records import Chunk, Place, Position
from kvstore.telemetry.source import OnAssigned, OnRevoked
from kvstore.telemetry.sources.kafka_begin import Begin, Beginnings

if TYPE_CHECKING:
    from kvstore.telemetry.avro import Decoder

QUEUE_BYTES: Final = 32 << 20  # prefetched and not yet polled: a second at 300 MB/s is not needed
SLICE_EVENTS: Final = (
    2_000  # asked for at once; what overshoots bytes_max is held for the next poll
)
SLICE_S: Final = 0.1  # so that a signal is seen: nothing interrupts librdkafka while it waits
IDLE_CHECK_S: Final = 5.0  # between two looks at the topic's id while no events come

DEFAULTS: Final[Options] = {
    "client.id": "kvstore",
    "partition.assignment.strategy": "cooperative-sticky",
    "isolation.level": "read_committed",
    "queued.max.messages.kbytes": QUEUE_BYTES >> 10,
}
# What the promises above rest on: not for the user to change.
FIXED: Final[Options] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": False,
    "auto.offset.reset": "error",
}


def consumer_options(address: Address, group: str, options: Options) -> dict[str, Any]:
    """Librdkafka's options: ours, the user's, and those that nobody may change."""
    if fixed := sorted(options.keys() & (FIXED.keys() | {"bootstrap.servers", "group.id"})):
        raise SourceError(f"option {fixed[0]}: is set by kvstore and cannot be changed")
    merged = {**DEFAULTS, **options}
    if merged.get("group.protocol") == "consumer":  # KIP-848: the broker assigns
        merged.pop("partition.assignment.strategy")
    elif merged["partition.assignment.strategy"] != "cooperative-sticky":
        raise SourceError(
            f"partition.assignment.strategy {merged['partition.assignment.strategy']!r}: "
            "expected cooperative-sticky, or group.protocol=consumer"
        )
    return {**merged, **FIXED, "bootstrap.servers": address.servers, "group.id": group}


class KafkaSource:
    """One consumer of a topic.

    group: one for each sink; members of it share the partitions, so two sinks in one group would
    get half of the events each. accept_loss: go on where events are gone for good, and say so.
    A loss that was accepted is reported as the event ``lost``.
    """

    def __init__(
        self,
        address: Address,
        *,
        group: str,
        options: Options | None = None,
        accept_loss: bool = False,
        decoder: Decoder | None = None,
        report: Report = lambda _: None,
    ):
        self._address = address
        self._config = consumer_options(address, group, options or {})
        self._cluster = Cluster(address, options or {})
        self._accept_loss = accept_loss
        self._decoder = decoder
        self._report = report
        self._on_revoked: OnRevoked = _nobody
        self._begins: Any = None  # once it has started
        self._consumer: Any = None
        self._topic = Topic("", "", 0)
        self._checked_s = 0.0
        self._places: dict[int, Place] = {}  # of the partitions that are ours
        self._next: dict[int, int] = {}  # offset below which an event of the partition was seen
        self._held: list[Any] = []  # fetched, not yet handed out
        self._fresh: dict[int, Any] = {}  # given to us inside the running call, not yet fetched
        self._event_bytes = 1.0  # on average, of the last slice: how many to ask for
        self._moved: dict[int, Position] = {}  # positions to be recorded though nothing was read

    @classmethod
    def open(
        cls, url: str, options: Options, *, accept_loss: bool = False, report: Report
    ) -> KafkaSource:
        """As the command line has it: options with ``group.id`` and ``schema.registry.url``.

        Options in the environment (KVSTORE_KAFKA_…) come before those, for they hold secrets.
        """
        given = {**options, **environment_options(os.environ)}
        group, registry = given.pop("group.id", None), given.pop(REGISTRY, None)
        if not group:
            raise SourceError(f"{url}: no consumer group; expected group.id among the options")
        decoder = None
        if registry:
            from kvstore.telemetry.avro import Decoder, Registry  # noqa: PLC0415

            decoder = Decoder(Registry(registry))
        return cls(
            parse_address(url),
            group=group,
            options=given,
            accept_loss=accept_loss,
            decoder=decoder,
            report=report,
        )

    # ---- the protocol ----

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Leave the group. What was polled and not committed is read again, by whoever is next."""
        self._on_revoked = _nobody
        if self._consumer is not None:
            self._consumer.close()

    def start(self, on_assigned: OnAssigned, on_revoked: OnRevoked) -> None:
        """Join the group; partitions come while polling. SourceError where there is no topic."""
        self._on_revoked = on_revoked
        self._begins = Beginnings(
            self._address,
            on_assigned=on_assigned,
            on_revoked=on_revoked,
            low=self._low,
            accept_loss=self._accept_loss,
            report=self._report,
        )
        self._topic = self._ask()
        logger = relay(self._report)
        self._consumer = made(Consumer, {**self._config, "logger": logger}, self._address)
        self._join()

    def poll(self, *, events_max: int, bytes_max: int, wait_s: float) -> list[Chunk] | None:
        """Events of all our partitions together, until a limit is reached or wait_s have passed."""
        deadline_s = time.monotonic() + wait_s
        self._gather(events_max, bytes_max, deadline_s)
        if not self._is_same_topic():
            return []
        return self._chunks(self._within(events_max, bytes_max))

    def committed(self, positions: Sequence[Position]) -> None:
        """Write Kafka's own offsets: nothing depends on them, so that nobody waits for it."""
        ours = set(self._places.values())
        offsets = [self._at(p.place.partition, p.next) for p in positions if p.place in ours]
        try:
            if offsets:
                self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._warn("kafka-offsets", f"offsets for lag graphs not written: {error}")

    def ends(self) -> dict[Place, int]:
        """Behind the last event that could be read now, as the last answer of the broker said."""
        found = {}
        for number, place in self._places.items():
            _, high = self._consumer.get_watermark_offsets(self._at(number), cached=True)
            if high >= 0:
                found[place] = high
        return found

    # ---- which partitions are ours, and where they begin ----

    def _join(self) -> None:
        self._consumer.subscribe(
            [self._address.topic],
            on_assign=lambda _, given: self._take(_numbers(given)),
            on_revoke=lambda _, taken: self._give(_numbers(taken), lost=False),
            on_lost=lambda _, taken: self._give(_numbers(taken), lost=True),
        )

    def _take(self, numbers: list[int]) -> None:
        """Partitions have become ours: called inside ``consume``."""
        if numbers:  # a rebalance may leave us with what we have
            self._topic = self._same(self._ask())
            for begin in self._begins.of(numbers, self._topic):
                self._fresh[begin.place.partition] = self._remembered(begin)
        self._consumer.incremental_assign([])  # says that we have heard

    def _remembered(self, begin: Begin) -> Any:
        """The partition and the offset to fetch from."""
        number = begin.place.partition
        self._places[number] = begin.place
        self._next[number] = begin.offset
        if begin.moved is not None:
            self._moved[number] = begin.moved
        return self._at(number, begin.offset)

    def _low(self, number: int) -> int:
        """The partition's first offset."""
        try:
            low, _ = self._consumer.get_watermark_offsets(self._at(number), timeout=ANSWER_S)
        except KafkaException as error:
            raise translated(error, self._address) from error
        return int(low)

    def _give(self, numbers: list[int], *, lost: bool) -> None:
        """Partitions are ours no longer: called inside ``consume``."""
        places = [self._places[number] for number in numbers if number in self._places]
        try:
            if places:
                self._on_revoked(places, lost)
        finally:
            fetched = [self._at(number) for number in numbers if number not in self._fresh]
            self._forget(numbers)
            self._consumer.incremental_unassign(fetched)

    def _forget(self, numbers: Iterable[int]) -> None:
        gone = set(numbers)
        for number in gone:
            self._places.pop(number, None)
            self._next.pop(number, None)
            self._moved.pop(number, None)
            self._fresh.pop(number, None)
        self._held = [message for message in self._held if message.partition() not in gone]

    def _ask(self) -> Topic:
        topic = self._cluster.topic()
        if topic is None:
            raise SourceError(f"{self._address}: no broker answers; check host, port and options")
        return topic

    def _is_same_topic(self) -> bool:
        """Whether what we hold may be handed out; SourceError where the topic was recreated.

        Asked for each poll that has events: librdkafka goes on silently in the new topic, from
        the old offset. False where no broker answers: the events wait for the next poll.
        """
        now_s = time.monotonic()
        if not self._held and now_s < self._checked_s + IDLE_CHECK_S:
            return True
        topic = self._cluster.topic()
        self._checked_s = now_s
        return topic is not None and bool(self._same(topic))

    def _same(self, topic: Topic) -> Topic:
        """The topic, if it is the one of the partitions that are ours."""
        if self._places and topic.topic_id != self._topic.topic_id:
            raise SourceError(
                f"{self._address}: the topic was deleted and created again while it was read; "
                "start anew to see what that means for the sink"
            )
        return topic

    # ---- events ----

    def _gather(self, events_max: int, bytes_max: int, deadline_s: float) -> None:
        """Fetch until there is enough, or the time is over."""
        size = sum(map(len, self._held))
        while len(self._held) < events_max and size < bytes_max and not self._moved:
            left_s = deadline_s - time.monotonic()
            fitting = math.ceil((bytes_max - size) / self._event_bytes)
            wanted = min(SLICE_EVENTS, events_max - len(self._held), fitting)
            messages = self._fetched(wanted, max(0.0, min(SLICE_S, left_s)))
            self._held += messages
            if messages:
                more = sum(map(len, messages))
                size += more
                self._event_bytes = max(more / len(messages), 1.0)
            if left_s <= 0:
                break

    def _fetched(self, wanted: int, wait_s: float) -> list[Any]:
        """One call to librdkafka: only what may be handed out comes back."""
        try:
            messages = self._consumer.consume(wanted, wait_s)
        except KafkaException as error:
            raise translated(error, self._address) from error
        if self._fresh:
            messages = [m for m in messages if m.partition() not in self._fresh]
            self._consumer.incremental_assign(list(self._fresh.values()))
            self._fresh.clear()
        return [message for message in messages if self._is_ours(message)]

    def _is_ours(self, message: Any) -> bool:
        """Whether an event comes next in a partition of ours; errors are dealt with."""
        if message.error() is not None:
            self._failed(message)
            return False
        number, offset = message.partition(), message.offset()
        if offset < self._next.get(number, offset + 1):
            return False
        self._next[number] = offset + 1
        return True

    def _failed(self, message: Any) -> None:
        error = message.error()
        if error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001 - public, by librdkafka
            self._out_of_range(message.partition())
        elif error.fatal() or error.code() in _ENDING:
            raise translated(error, self._address)
        else:  # librdkafka tries again by itself
            self._warn("kafka", f"{self._address}: {error.str()}", code=error.name())

    def _out_of_range(self, number: int) -> None:
        """The broker refuses an offset: retention overtook us, or the log ends before it.

        Where a log ends is not asked for in advance: the broker's word on a fetch is the surer.
        """
        if (place := self._places.get(number)) is None:
            return
        begin = self._begins.passed(Position(place, self._next[number]), self._topic)
        if begin.moved is None:
            raise SourceError(
                f"{self._address} partition {number}: the sink has read up to offset "
                f"{begin.offset}, but the partition ends before that: its log was truncated or "
                "restored; see docs/runbook.md, Recreated topic"
            )
        # Not ``seek``: only a new assignment surely ends what is on its way (PR 4117).
        fetched = self._remembered(begin)
        self._consumer.incremental_unassign([fetched])
        self._consumer.incremental_assign([fetched])

    def _within(self, events_max: int, bytes_max: int) -> list[Any]:
        """Take from what is held as much as fits; one event at least."""
        size = 0
        for count, message in enumerate(self._held):
            size += len(message)
            if count == events_max or (count and size > bytes_max):
                taken, self._held = self._held[:count], self._held[count:]
                return taken
        taken, self._held = self._held, []
        return taken

    def _chunks(self, messages: list[Any]) -> list[Chunk]:
        by_partition = defaultdict(list)
        for message in messages:
            by_partition[message.partition()].append(message)
        moved, self._moved = self._moved, {}
        for number in moved.keys() - by_partition.keys():
            by_partition[number] = []
        return [self._chunk(number, group, moved) for number, group in by_partition.items()]

    def _chunk(self, number: int, messages: list[Any], moved: Mapping[int, Position]) -> Chunk:
        place = self._places[number]
        payloads = [message.value() for message in messages]
        headers = [tuple(message.headers() or ()) for message in messages]
        if self._decoder is not None:
            payloads, headers = self._decoder.decode(payloads, headers)
        after = (
            Position(place, messages[-1].offset() + 1, self._topic.topic_id)
            if messages
            else moved[number]
        )
        stamps_ms = [message.timestamp()[1] for message in messages]
        return Chunk(
            place,
            np.array([message.offset() for message in messages], np.int64),
            payloads,
            after,
            keys=[message.key() for message in messages],
            headers=headers,
            appended_us=np.array(stamps_ms, np.int64) * 1000
            if min(stamps_ms, default=0) >= 0
            else None,
        )

    # ---- small things ----

    def _at(self, number: int, offset: int = -1) -> Any:
        return TopicPartition(self._address.topic, number, offset)

    def _warn(self, name: str, message: str, **fields: object) -> None:
        self._report(Event("warning", name, message, fields))


_ENDING: Final = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError._FATAL,  # noqa: SLF001 - public, by librdkafka
}


def _numbers(partitions: Iterable[Any]) -> list[int]:
    return [partition.partition for partition in partitions]


def _nobody(places: Sequence[Place], lost: bool) -> None:  # noqa: FBT001  # OnRevoked
    """A closing source tells nobody that its partitions go: all was committed, or must not be."""
