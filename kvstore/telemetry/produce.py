"""JSON lines -> a Kafka topic, keyed by device: a device's events stay in their order.

The producer is idempotent, so that a retry inside librdkafka makes no second event; starting the
command again does, which the sink finds. What waits to be sent is bounded by QUEUE_BYTES. The
partitioner is the Java clients', so that a device has one partition whoever sends. A line that is
no event is sent as it is, without a key: to refuse it is the contract's business.

Given a schema registry, events are sent as Avro of the contract's schema instead; a line that
does not fit it cannot be sent, and is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from kvstore.errors import SourceError
from kvstore.events import Event, Report
from kvstore.telemetry.kafka import Address, Options, made, translated

QUEUE_BYTES: Final = 64 << 20  # a second and more at 50 MB/s
FULL_S: Final = 0.1  # between two tries at a full queue: deliveries make room meanwhile
FLUSH_S: Final = 0.2  # of one wait for what is on its way, so that a signal is seen
ENDING_S: Final = 60.0  # for what is on its way at the end; librdkafka itself gives up after 300 s
SERVE_EVERY: Final = 1_000  # events between two looks at what failed

DEFAULTS: Final[Options] = {
    "client.id": "kvstore",
    "compression.type": "lz4",
    "linger.ms": 20,
    "batch.size": 1 << 20,
    "partitioner": "murmur2_random",
    "queue.buffering.max.kbytes": QUEUE_BYTES >> 10,
    "queue.buffering.max.messages": 1_000_000,
}
FIXED: Final[Options] = {
    "enable.idempotence": True,
    "delivery.report.only.error": True,
    "log_level": 2,  # what matters comes back as an error
}

Encode = Callable[[bytes], bytes]  # a line as it is sent; ValueError where it cannot be


class _Keyed(msgspec.Struct):
    device_id: str


_decode_key = msgspec.json.Decoder(_Keyed).decode


@dataclass(slots=True)
class Produced:
    """What became of the lines. unsent: refused by the broker, too large, or of no schema."""

    sent: int = 0
    unkeyed: int = 0
    unsent: int = 0
    bytes: int = 0


class LineProducer:
    """Sends lines; ``figures`` is true once ``finish`` has returned."""

    def __init__(
        self,
        address: Address,
        options: Options,
        *,
        encode: Encode = lambda line: line,
        report: Report = lambda _: None,
    ):
        if fixed := sorted(options.keys() & (FIXED.keys() | {"bootstrap.servers"})):
            raise SourceError(f"option {fixed[0]}: is set by kvstore and cannot be changed")
        self.figures = Produced()
        self._address = address
        self._encode = encode
        self._report = report
        config = {
            **DEFAULTS,
            **options,
            **FIXED,
            "bootstrap.servers": address.servers,
            "on_delivery": self._undelivered,
            "error_cb": self._fatal,
        }
        self._producer = made(Producer, config, address)
        self._fatal_error: Any = None

    def send(self, lines: Iterable[bytes], *, rate_hz: float = 0.0) -> None:
        """Queue the lines, at most so many a second if a rate is given; waits at a full queue."""
        begin_s = time.monotonic()
        for count, line in enumerate(lines):
            if count % SERVE_EVERY == 0 or rate_hz:
                self._serve(begin_s + count / rate_hz if rate_hz else 0.0)
            self._send(line)

    def finish(self) -> Produced:
        """Wait until what was queued is acknowledged, or has failed for good."""
        until_s = time.monotonic() + ENDING_S
        while (left := self._producer.flush(FLUSH_S)) and time.monotonic() < until_s:
            self._check()
        self.figures.sent -= left
        self.figures.unsent += left
        self._check()
        return self.figures

    def _serve(self, due_s: float) -> None:
        while True:
            left_s = due_s - time.monotonic()
            self._producer.poll(min(max(left_s, 0.0), FLUSH_S))
            self._check()
            if left_s <= 0:
                return

    def _send(self, line: bytes) -> None:
        key = _key_of(line)
        try:
            value = self._encode(line)
        except ValueError as error:
            self._unsent(str(error))
            return
        while True:
            try:
                self._producer.produce(self._address.topic, value, key)
            except BufferError:
                self._producer.poll(FULL_S)
                self._check()
            except KafkaException as error:
                self._unsent(str(translated(error, self._address)))
                return
            else:
                break
        self.figures.sent += 1
        self.figures.unkeyed += key is None
        self.figures.bytes += len(value)

    def _undelivered(self, error: KafkaError, message: Any) -> None:
        """Called by librdkafka for those alone that failed for good."""
        self.figures.sent -= 1
        self.figures.bytes -= len(message)
        self._unsent(error.str())

    def _unsent(self, why: str) -> None:
        self.figures.unsent += 1
        self._report(Event("warning", "unsent", f"{self._address}: an event was not sent: {why}"))

    def _fatal(self, error: KafkaError) -> None:
        if error.fatal():
            self._fatal_error = error

    def _check(self) -> None:
        if self._fatal_error is not None:
            raise translated(self._fatal_error, self._address)


def _key_of(line: bytes) -> bytes | None:
    try:
        return _decode_key(line).device_id.encode()
    except (msgspec.MsgspecError, UnicodeError):
        return None
