"""The Kafka source, driven by hand against a real broker: positions are a dict, not a sink."""

from __future__ import annotations

import contextlib
import json
import signal
import time

import numpy as np
import pytest
from kafka_server import started

from kvstore.errors import SourceError
from kvstore.telemetry.dead_topic import DeadTopic
from kvstore.telemetry.kafka import Cluster, environment_options, group_of, parse_address
from kvstore.telemetry.produce import LineProducer
from kvstore.telemetry.records import Place, Position
from kvstore.telemetry.sources.kafka import KafkaSource, consumer_options

pytestmark = pytest.mark.slow  # servers, processes or many files: CI runs it

WAIT_S = 60.0
LIMITS = {"events_max": 10_000, "bytes_max": 1 << 20, "wait_s": 0.2}


class Notebook:
    """Where a sink would stand: positions as they were committed, events as they were read."""

    def __init__(self):
        self.positions = {}
        self.events = {}
        self.chunks = []
        self.revoked = []
        self.told = []

    def assigned(self, places):
        return [self.positions.get(place, Position(place, -1)) for place in places]

    def gone(self, places, lost):
        self.revoked.append((list(places), lost))

    def keep(self, chunks):
        for chunk in chunks:
            self.chunks.append(chunk)
            pairs = zip(chunk.offsets.tolist(), chunk.payloads, strict=True)
            self.events.setdefault(chunk.place, []).extend(pairs)
            self.positions[chunk.place] = chunk.after

    def payloads(self, partition):
        return [
            payload
            for place, events in self.events.items()
            if place.partition == partition
            for _, payload in events
        ]

    def losses(self):
        return sum(event.name == "lost" for event in self.told)

    @property
    def count(self):
        return sum(map(len, self.events.values()))


class Alone(KafkaSource):
    """Takes all partitions at once, without a group: for that one waits a second and more."""

    def _join(self):
        self._take(list(range(self._topic.partitions)))


@contextlib.contextmanager
def reading(kafka, topic, notebook, *, kind=Alone, **options):
    source = kind(
        parse_address(kafka.url(topic)),
        group=options.pop("group", "g-" + topic),
        options={**kafka.member, **options.pop("options", {})},
        report=notebook.told.append,
        **options,
    )
    with source:
        source.start(notebook.assigned, notebook.gone)
        yield source


def read_until(source, notebook, is_done, **limits):
    deadline_s = time.monotonic() + WAIT_S
    while not is_done():
        assert time.monotonic() < deadline_s
        chunks = source.poll(**{**LIMITS, **limits})
        notebook.keep(chunks)
        source.committed([chunk.after for chunk in chunks])


def read(kafka, topic, notebook, count, **options):
    """A consumer's whole life: until that many events are in the notebook."""
    with reading(kafka, topic, notebook, **options) as source:
        read_until(source, notebook, lambda: notebook.count >= count)
        return source


def numbered(count, of=0):
    return [f"{of}:{number}".encode() for number in range(count)]


# ---- what arrives ----


def test_events_arrive_with_all_that_kafka_knows_of_them(kafka):
    topic = kafka.create(partitions=2)
    sent = [b"first", b"", None]
    kafka.produce(topic, sent, partition=1, keys=[b"k", None, b"k"], headers=[("trace", b"\xff")])
    notebook = Notebook()
    read(kafka, topic, notebook, 3)
    (chunk,) = notebook.chunks
    assert chunk.place.source.startswith("kafka:")
    assert chunk.place.source.endswith("/" + topic)
    assert chunk.place.partition == 1
    assert chunk.offsets.tolist() == [0, 1, 2]
    assert chunk.payloads == sent
    assert chunk.keys == [b"k", None, b"k"]
    assert chunk.headers == [(("trace", b"\xff"),)] * 3
    assert np.all(np.abs(chunk.appended_us / 1e6 - time.time()) < 3600)
    assert chunk.after.next == 3
    assert chunk.after.token == Cluster(parse_address(kafka.url(topic)), {}).topic().topic_id


def test_an_idle_partition_delays_no_other(kafka):
    """Four partitions, events in one: a poll within its time brings them, none waits for more."""
    topic = kafka.create(partitions=4)
    kafka.produce(topic, numbered(100), partition=2)
    notebook = Notebook()
    read(kafka, topic, notebook, 100)
    assert [place.partition for place in notebook.events] == [2]
    assert notebook.payloads(2) == numbered(100)


def test_a_poll_keeps_to_its_limits_and_hands_out_every_event_once(kafka):
    topic = kafka.create(partitions=2)
    sent = [b"x" * 1000, b"y" * 5000, b"z" * 1000, *numbered(500)]
    kafka.produce(topic, sent, partition=0)
    kafka.produce(topic, numbered(300, of=1), partition=1)
    notebook = Notebook()
    polls = []
    with reading(kafka, topic, notebook) as source:
        while notebook.count < 803:
            chunks = source.poll(events_max=50, bytes_max=2500, wait_s=0.2)
            polls.append([len(p) for chunk in chunks for p in chunk.payloads])
            notebook.keep(chunks)
            assert len({chunk.place for chunk in chunks}) == len(chunks)
    assert max(map(len, polls)) == 50
    assert [sum(sizes) for sizes in polls if sum(sizes) > 2500] == [5000]  # alone
    assert notebook.payloads(0) == sent
    assert notebook.payloads(1) == numbered(300, of=1)


def test_a_poll_without_events_ends_empty(kafka):
    topic = kafka.create()
    notebook = Notebook()
    with reading(kafka, topic, notebook) as source:
        assert source.poll(**LIMITS) == []


def test_a_group_hands_over_its_partitions_and_leaves_without_a_word(kafka):
    """Whoever closes has committed, or must not: an error may be on its way."""
    topic = kafka.create(partitions=3)
    for partition in range(3):
        kafka.produce(topic, numbered(10, of=partition), partition=partition)
    notebook = Notebook()
    read(kafka, topic, notebook, 30, kind=KafkaSource)
    assert [notebook.payloads(partition) for partition in range(3)] == [
        numbered(10, of=partition) for partition in range(3)
    ]
    assert notebook.revoked == []


# ---- where reading begins ----


def test_the_sink_alone_says_where_reading_begins(kafka):
    """Kafka's own offsets say 10, the sink 4 and never: 4 and the earliest it is."""
    topic = kafka.create(partitions=2)
    for partition in (0, 1):
        kafka.produce(topic, numbered(10, of=partition), partition=partition)
    notebook = Notebook()
    with reading(kafka, topic, notebook) as source:
        read_until(source, notebook, lambda: notebook.count == 20)
        read_until(
            source, notebook, lambda: kafka.group_offsets("g-" + topic, topic, 2) == [10, 10]
        )
    again = Notebook()
    for place, position in notebook.positions.items():
        if place.partition == 0:
            again.positions[place] = position._replace(next=4)
    read(kafka, topic, again, 16)
    assert again.payloads(0) == numbered(10)[4:]
    assert again.payloads(1) == numbered(10, of=1)


def test_lag_is_what_lies_between_the_position_and_the_end(kafka):
    topic = kafka.create()
    kafka.produce(topic, numbered(30), partition=0)
    notebook = Notebook()
    with reading(kafka, topic, notebook) as source:
        read_until(source, notebook, lambda: notebook.count >= 10, events_max=10)
        assert list(source.ends().values()) == [30]
        assert [position.next for position in notebook.positions.values()] == [10]


def test_a_recreated_topic_is_an_error_until_its_loss_is_accepted(kafka):
    topic = kafka.create(partitions=2)
    kafka.produce(topic, numbered(5), partition=0)
    notebook = Notebook()
    read(kafka, topic, notebook, 5)
    kafka.recreate(topic, partitions=2)
    kafka.produce(topic, numbered(8, of=1), partition=0)

    with pytest.raises(SourceError, match=r"deleted and created again.*--accept-loss"):
        read(kafka, topic, notebook, 13)
    assert notebook.count == 5

    # Offsets 0 to 4 exist twice now: the places have to differ.
    read(kafka, topic, notebook, 13, accept_loss=True)
    assert notebook.losses() == 1
    old, new = notebook.events
    assert new.source.startswith(old.source + "@")
    assert [payload for _, payload in notebook.events[new]] == numbered(8, of=1)

    kafka.produce(topic, numbered(2, of=2), partition=0)  # accepted once is accepted
    read(kafka, topic, notebook, 15)
    assert notebook.events[new][8:] == [(8, b"2:0"), (9, b"2:1")]


def test_that_a_recreated_topic_was_accepted_is_remembered_without_any_event(kafka):
    topic = kafka.create()
    kafka.produce(topic, numbered(5), partition=0)
    notebook = Notebook()
    read(kafka, topic, notebook, 5)
    kafka.recreate(topic)
    with reading(kafka, topic, notebook, accept_loss=True) as source:
        read_until(source, notebook, lambda: len(notebook.positions) == 2)
    kafka.produce(topic, numbered(3, of=1), partition=0)
    read(kafka, topic, notebook, 8)
    assert notebook.payloads(0) == numbered(5) + numbered(3, of=1)


def test_a_topic_recreated_while_it_is_read_hands_out_nothing_of_the_new_one(kafka, monkeypatch):
    """Before topic ids, librdkafka went on at the old offset, in the middle of the new topic.

    Tansu answers a fetch of a topic that is gone so that librdkafka 2.16 crashes (a null name in
    rd_kafka_metadata_update_op): there, only what the cluster says of the topic is exchanged.
    """
    topic = kafka.create()
    kafka.produce(topic, numbered(5), partition=0)
    notebook = Notebook()
    with reading(kafka, topic, notebook) as source:
        read_until(source, notebook, lambda: notebook.count == 5)
        if kafka.process:
            told = source._cluster.topic()._replace(topic_id="another")
            monkeypatch.setattr(Cluster, "topic", lambda self, **_: told)
        else:
            kafka.recreate(topic)
        kafka.produce(topic, numbered(20, of=1), partition=0)
        with pytest.raises(SourceError, match="created again while it was read"):
            read_until(source, notebook, lambda: notebook.count > 5)
    assert notebook.count == 5


LARGE = [f"{number:02}".encode() * 400_000 for number in range(20)]


def test_events_past_their_retention_are_an_error_unless_the_loss_is_accepted(forgetful):
    forgetful.produce("large", LARGE[:3])
    notebook = Notebook()
    read(forgetful, "large", notebook, 3)
    forgetful.produce("large", LARGE[3:])
    with pytest.raises(SourceError, match=r"offsets 3 to 1\d were deleted .*--accept-loss"):
        read(forgetful, "large", notebook, 4)
    read(forgetful, "large", notebook, 5, accept_loss=True)
    assert notebook.losses() == 1
    (events,) = notebook.events.values()
    first = events[3][0]
    assert first > 3
    assert f"offsets 3 to {first - 1} " in notebook.told[-1].message
    assert [payload for _, payload in events] == LARGE[:3] + LARGE[first : first + len(events) - 3]


def test_retention_that_overtakes_a_reader_is_found_as_well(forgetful):
    """Its queue is full of what it has read; meanwhile the broker drops what comes next."""
    forgetful.produce("slow", LARGE[:2])
    notebook = Notebook()
    small = {"queued.max.messages.kbytes": 1, "queued.min.messages": 1}  # prefetch next to nothing
    small["fetch.queue.backoff.ms"] = 10
    with reading(forgetful, "slow", notebook, options=small, accept_loss=True) as source:
        read_until(source, notebook, lambda: notebook.count == 1, events_max=1)
        forgetful.produce("slow", LARGE[2:])
        read_until(source, notebook, lambda: notebook.chunks[-1].after.next == len(LARGE))
    assert notebook.losses()
    (events,) = notebook.events.values()
    assert [payload for _, payload in events] == [LARGE[offset] for offset, _ in events]
    assert [offset for offset, _ in events] == sorted({offset for offset, _ in events})


def test_a_position_behind_the_end_is_an_error(forgetful):
    """Tansu just waits for such an offset; Kafka and the mock refuse it."""
    forgetful.produce("short", LARGE[:2])
    notebook = Notebook()
    read(forgetful, "short", notebook, 2)
    ((place, position),) = notebook.positions.items()
    notebook.positions[place] = position._replace(next=9)
    with pytest.raises(SourceError, match="read up to offset 9, but the partition ends before"):
        read(forgetful, "short", notebook, 3, accept_loss=True)


# ---- what can go wrong ----


def test_a_broker_that_stops_answering_for_a_while_loses_nothing():
    with started() as kafka:
        topic = kafka.create()
        kafka.produce(topic, numbered(10), partition=0)
        notebook = Notebook()
        with reading(kafka, topic, notebook) as source:
            read_until(source, notebook, lambda: notebook.count == 10)
            kafka.process.send_signal(signal.SIGSTOP)
            notebook.keep(source.poll(events_max=10, bytes_max=10**6, wait_s=0.5))
            kafka.process.send_signal(signal.SIGCONT)
            kafka.produce(topic, numbered(10, of=1), partition=0)
            read_until(source, notebook, lambda: notebook.count >= 20)
    assert notebook.payloads(0) == numbered(10) + numbered(10, of=1)


def test_a_topic_that_is_not_there_is_an_error(kafka):
    with pytest.raises(SourceError, match="has no topic 'nowhere'"):
        read(kafka, "nowhere", Notebook(), 1)


def test_an_error_of_the_sink_ends_the_poll(kafka):
    topic = kafka.create()
    notebook = Notebook()

    def assigned(_):
        raise SourceError("the sink is gone")

    notebook.assigned = assigned
    with pytest.raises(SourceError, match="the sink is gone"):
        read(kafka, topic, notebook, 1, kind=KafkaSource)


def test_a_topic_recreated_before_a_rebalance_is_found_in_it(kafka, monkeypatch):
    """Else the new id would be believed, and the partitions of before be read on as of the new."""
    topic = kafka.create(partitions=2)
    notebook = Notebook()
    with reading(kafka, topic, notebook) as source:
        told = source._cluster.topic()._replace(topic_id="another")
        monkeypatch.setattr(Cluster, "topic", lambda self, **_: told)
        with pytest.raises(SourceError, match="created again while it was read"):
            source._take([1])


@pytest.mark.parametrize("make", [Cluster, LineProducer, DeadTopic])
def test_an_option_that_librdkafka_does_not_know_is_an_error(make):
    with pytest.raises(SourceError, match=r"kafka://h:1/t: .*no\.such\.option"):
        make(parse_address("kafka://h:1/t"), {"no.such.option": "secret"})


# ---- addresses and options ----


def test_an_address_names_brokers_and_a_topic():
    address = parse_address("kafka://one:9092,two:9092/device.events")
    assert address.servers == "one:9092,two:9092"
    assert address.topic == "device.events"
    assert str(address) == "kafka://one:9092,two:9092/device.events"


@pytest.mark.parametrize(
    "url", ["kafka://host:9092", "kafka:///t", "kafka://h/a/b", "http://h/t", "kafka://h/t?x=1"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(SourceError, match="expected"):
        parse_address(url)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(SourceError, match="KVSTORE_KAFKA_SASL_PASSWORD") as caught:
        parse_address("kafka://me:secret@host:9092/t")
    assert "secret" not in str(caught.value)


def test_options_come_from_the_environment():
    environ = {"KVSTORE_KAFKA_SASL_PASSWORD": "s", "KVSTORE_OTHER": "x", "PATH": "/bin"}
    assert environment_options(environ) == {"sasl.password": "s"}


def test_any_option_passes_through_but_those_that_promises_rest_on():
    address = parse_address("kafka://h:9092/t")
    options = consumer_options(address, "g", {"client.rack": "eu", "isolation.level": "x"})
    assert options["client.rack"] == "eu"
    assert options["isolation.level"] == "x"
    assert options["auto.offset.reset"] == "error"
    for name in ("auto.offset.reset", "enable.auto.commit", "group.id", "bootstrap.servers"):
        with pytest.raises(SourceError, match=name):
            consumer_options(address, "g", {name: "latest"})
    with pytest.raises(SourceError, match="expected cooperative-sticky"):
        consumer_options(address, "g", {"partition.assignment.strategy": "range"})
    newer = consumer_options(address, "g", {"group.protocol": "consumer"})
    assert "partition.assignment.strategy" not in newer


def test_the_workers_of_a_sink_are_one_group_and_no_other_sink_is_in_it(tmp_path):
    one = group_of("postgres", "postgresql://me:secret@db:5432/ops?sslmode=require")
    assert one == group_of("postgres", "postgresql://you@db:5432/ops")
    assert one.startswith("kvstore-postgres-ops-")
    others = [
        group_of("postgres", "postgresql://db2:5432/ops"),
        group_of("postgres", "postgresql://db:5432/ops?schema=beside"),
        group_of("postgres", "postgresql:///ops?host=/run/one"),
        group_of("postgres", "postgresql:///ops?host=/run/two"),
        group_of("lake", str(tmp_path / "ops")),
        group_of("lake", str(tmp_path / "a" / "ops")),
    ]
    assert len({one, *others}) == 7
    assert group_of("lake", f"{tmp_path}/x/../ops/") == group_of("lake", f"{tmp_path}/ops")


def test_json_is_not_looked_at(kafka):
    """What an event is, the contract says: the source hands on bytes."""
    topic = kafka.create()
    kafka.produce(topic, [b"\xff\x00", json.dumps({"a": 1}).encode()], partition=0)
    notebook = Notebook()
    read(kafka, topic, notebook, 2)
    assert notebook.payloads(0) == [b"\xff\x00", b'{"a": 1}']


def test_places_are_named_after_the_cluster_not_after_an_address(kafka):
    """Another bootstrap server, or localhost for 127.0.0.1, is still the same place."""
    topic = kafka.create()
    kafka.produce(topic, numbered(1), partition=0)
    notebook = Notebook()
    read(kafka, topic, notebook, 1)
    cluster = Cluster(parse_address(kafka.url(topic)), {}).topic().cluster_id
    assert list(notebook.events) == [Place(f"kafka:{cluster}/{topic}", 0)]
