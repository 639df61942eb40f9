"""A Kafka topic by its address: what the source, ``produce`` and the dead-letter topic share.

``kafka://host:port[,host:port…]/topic``. Any librdkafka option passes through; secrets come from
the environment: ``KVSTORE_KAFKA_SASL_PASSWORD`` becomes ``sasl.password``, and so on. Options are
never printed. librdkafka's errors are translated here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from kvstore.errors import SourceError
from kvstore.events import Event, Level, Report

SCHEME: Final = "kafka"
ANSWER_S: Final = 15.0  # for a question to the cluster: a broker's own limit for most is 10 s
REGISTRY: Final = (
    "schema.registry.url"  # among librdkafka's options, as Confluent's clients have it
)
_PREFIX: Final = "KVSTORE_KAFKA_"
_TOPIC: Final = re.compile(r"[a-zA-Z0-9._-]{1,249}")  # Kafka's own rule
_NO_ID: Final = "AAAAAAAAAAAAAAAAAAAAAA"  # all zeros: a broker older than topic ids
# Names with an underscore are librdkafka's own codes, and public.
_GONE: Final = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC}  # noqa: SLF001
_SILENT: Final = {
    KafkaError._TIMED_OUT,  # noqa: SLF001
    KafkaError._TRANSPORT,  # noqa: SLF001
    KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
    KafkaError._RESOLVE,  # noqa: SLF001
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.NETWORK_EXCEPTION,
}
Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a topic is. servers: as librdkafka wants them, host:port,host:port."""

    servers: str
    topic: str

    def __str__(self) -> str:
        return f"{SCHEME}://{self.servers}/{self.topic}"


class Topic(NamedTuple):
    """What a cluster says of a topic. topic_id: "" where the broker knows none (before 2.8)."""

    cluster_id: str
    topic_id: str
    partitions: int


def parse_address(url: str) -> Address:
    """The address in a URL; SourceError says what is wrong with it."""
    parts = urlsplit(url)
    topic = parts.path.removeprefix("/")
    if parts.scheme != SCHEME or not parts.netloc or not _TOPIC.fullmatch(topic):
        raise SourceError(f"{url!r}: expected kafka://host:port/topic")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SourceError(
            f"kafka://…/{topic}: expected no user, password or options in the address; "
            f"give {_PREFIX}SASL_USERNAME and {_PREFIX}SASL_PASSWORD in the environment"
        )
    return Address(parts.netloc, topic)


def environment_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Librdkafka's options from variables: KVSTORE_KAFKA_SSL_CA_LOCATION is ssl.ca.location."""
    return {
        name.removeprefix(_PREFIX).lower().replace("_", "."): value
        for name, value in environ.items()
        if name.startswith(_PREFIX)
    }


def group_of(kind: str, target: str) -> str:
    """The consumer group of a sink: all its workers share it, and no other sink does.

    Named after what the target says of server and path, not of user, password or parameters, so
    that workers may log in differently. Two spellings of one sink make two groups: their workers
    fence each other out, which is loud; half of the events each would not be.
    """
    parts = urlsplit(target)
    given = parse_qs(parts.query)  # PostgreSQL's may say there where its server is
    host = parts.hostname or "".join(given.get("host", ()))
    where = f"{host}:{parts.port or ''.join(given.get('port', ()))}{parts.path}"
    if not parts.scheme:
        where = os.path.realpath(target)
    name = re.sub(r"[^a-zA-Z0-9._-]", "-", where.rstrip("/").rpartition("/")[2])
    return f"kvstore-{kind}-{name}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


class Cluster:
    """Answers what a topic is, through a connection of its own; close by letting go."""

    def __init__(self, address: Address, options: Options):
        self._address = address
        # Options of consumers and producers are among ours: it would warn of each.
        config = {"log_level": 2, **options, "bootstrap.servers": address.servers}
        self._admin = made(AdminClient, config, address)
        self._cluster_id = ""

    def topic(self, *, wait_s: float = ANSWER_S) -> Topic | None:
        """The topic as it is now; None where nobody answers. SourceError where there is none."""
        name = self._address.topic
        asked = TopicCollection([name])
        try:
            found = self._admin.describe_topics(asked, request_timeout=wait_s)[name].result()
            if not self._cluster_id:
                self._cluster_id = self._admin.list_topics(name, timeout=wait_s).cluster_id or "-"
        except KafkaException as error:
            if error.args[0].code() in _SILENT:
                return None
            raise translated(error, self._address) from error
        told = str(found.topic_id or "")
        return Topic(self._cluster_id, "" if told == _NO_ID else told, len(found.partitions))


def made(client: Callable[[dict[str, Any]], Any], config: dict[str, Any], address: Address) -> Any:
    """A client of librdkafka; SourceError where it refuses an option, whose value is not shown."""
    try:
        return client(config)
    except KafkaException as error:
        raise translated(error, address) from error


def translated(error: KafkaException | KafkaError, address: Address) -> SourceError:
    """Librdkafka's error in our words."""
    cause = error.args[0] if isinstance(error, KafkaException) else error
    if cause.code() in _GONE:
        return SourceError(
            f"{address}: the cluster has no topic {address.topic!r}; check the name, or create it"
        )
    if cause.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        return SourceError(f"{address}: not allowed to read the topic; grant READ and DESCRIBE")
    return SourceError(f"{address}: {cause.str()}")


class _Relay(logging.Handler):
    def __init__(self, report: Report):
        super().__init__(logging.WARNING)
        self._tell = report

    def emit(self, record: logging.LogRecord) -> None:
        level: Level = "error" if record.levelno >= logging.ERROR else "warning"
        self._tell(Event(level, "librdkafka", record.getMessage()))


def relay(report: Report) -> logging.Logger:
    """What librdkafka is to log to: of warnings and errors it makes events."""
    logger = logging.Logger("kvstore.kafka")  # noqa: LOG001 - each source has its own listener
    logger.addHandler(_Relay(report))
    return logger
