"""Dead letters on a topic: Kafka Connect's headers, after the commit, at least once."""

from __future__ import annotations

import json

import pytest
import telemetry_data as data
from test_telemetry_kafka import Notebook, read

from kvstore.errors import CommitUnknown, TelemetryError
from kvstore.telemetry import counts
from kvstore.telemetry.contract import brief
from kvstore.telemetry.dead_topic import DeadTopic, Publishing
from kvstore.telemetry.kafka import parse_address
from kvstore.telemetry.records import Place, Reason
from kvstore.telemetry.sinks.stream import StreamSink

pytestmark = pytest.mark.slow  # servers, processes or many files: CI runs it

PLACE = Place("kafka:cluster/telemetry", 2)
OTHER = Place("kafka:cluster/telemetry", 3)


@pytest.fixture
def sink(path):
    with StreamSink.open(path, brief()) as sink:
        yield sink


@pytest.fixture
def topic(kafka):
    return kafka.create()


@pytest.fixture
def publishing(kafka, sink, topic):
    return Publishing(sink, DeadTopic(parse_address(kafka.url(topic)), {}))


def rejected(offset, place=PLACE):
    return data.rejection(offset, place=place)


def published(kafka, topic, count):
    """The letters on the topic, once there are that many: key, value and headers of each."""
    notebook = Notebook()
    read(kafka, topic, notebook, count)
    return [
        (key, value, dict(headers))
        for chunk in notebook.chunks
        for key, value, headers in zip(chunk.keys, chunk.payloads, chunk.headers, strict=True)
    ]


def offsets(kafka, topic, count):
    letters = published(kafka, topic, count)
    return [int(headers["__connect.errors.offset"]) for _, _, headers in letters]


def test_a_letter_has_its_event_and_the_headers_of_kafka_connect(kafka, topic, publishing):
    reasons = [Reason("range", "humidity", "170"), Reason("missing", "temperature")]
    letter = data.rejection(7, place=PLACE, reasons=reasons)
    publishing.commit(data.work(publishing.claim([PLACE]), (), [letter]))
    ((key, value, headers),) = published(kafka, topic, 1)
    assert (key, value) == (letter.key, letter.payload)
    assert headers.pop("trace") == b"\x00\xfe"  # the event's own
    assert headers.pop("empty") is None
    assert json.loads(headers.pop("kvstore.reasons")) == [
        {"code": "range", "field": "humidity", "found": "170"},
        {"code": "missing", "field": "temperature", "found": ""},
    ]
    assert headers == {
        "__connect.errors.topic": b"telemetry",
        "__connect.errors.partition": b"2",
        "__connect.errors.offset": b"7",
        "__connect.errors.connector.name": b"kvstore",
        "__connect.errors.task.id": b"0",
        "__connect.errors.stage": b"VALUE_CONVERTER",
        "__connect.errors.class.name": b"kvstore.telemetry",
        "__connect.errors.exception.class.name": b"kvstore.telemetry.records.Rejection",
        "__connect.errors.exception.message": b"range humidity 170; missing temperature",
        "__connect.errors.exception.stacktrace": b"",
        "kvstore.run": b"run-1",
        "kvstore.contract.version": b"2",
    }


def test_a_conflict_is_sent_as_well(kafka, topic, publishing):
    rows = [
        data.row("a", 0, place=PLACE, offset=0, temperature=1),
        data.row("a", 0, place=PLACE, offset=1, temperature=2),
    ]
    work = data.work(publishing.claim([PLACE]), rows, [rejected(2)])
    assert publishing.commit(work).conflicts == 1
    letters = published(kafka, topic, 2)
    assert {headers["__connect.errors.offset"] for _, _, headers in letters} == {b"1", b"2"}
    (conflict,) = [each for each in letters if each[2]["__connect.errors.offset"] == b"1"]
    assert conflict[1] == data.raw(rows[1])
    assert conflict[2]["__connect.errors.stage"] == b"TASK_PUT"
    assert json.loads(conflict[2]["kvstore.reasons"])[0]["code"] == counts.CONFLICT


def test_what_a_crash_left_unsent_is_sent_by_the_next_worker(kafka, topic, publishing, sink):
    """Only the last commit of a place can be unsent: it alone is sent again."""
    claims = publishing.claim([PLACE, OTHER])
    first = data.work(claims, (), [rejected(0), rejected(1)], now_us=data.NOW_US)
    publishing.commit(first)
    second = data.next_work(first, (), [rejected(2), rejected(3)])
    second = second.__class__(**{**fields_of(second), "committed_us": data.NOW_US + 1})
    sink.commit(second)  # and then the process dies
    publishing.claim([PLACE, OTHER])
    assert offsets(kafka, topic, 4) == [0, 1, 2, 3]


def fields_of(work):
    return {name: getattr(work, name) for name in work.__slots__}


def test_nothing_is_sent_of_a_commit_that_is_not_there(kafka, topic, publishing, sink, monkeypatch):
    work = data.work(publishing.claim([PLACE]), (), [rejected(0)])

    def lost(_):
        raise CommitUnknown("the reply was lost")

    monkeypatch.setattr(sink, "commit", lost)
    with pytest.raises(CommitUnknown):
        publishing.commit(work)
    assert publishing.settle(work) is None
    monkeypatch.undo()
    sink.commit(work)
    assert publishing.settle(work).rejected == 1  # it is there after all: so is its letter
    assert offsets(kafka, topic, 1) == [0]


def test_a_topic_that_takes_nothing_ends_the_run_and_loses_no_letter(kafka, topic, sink):
    nowhere = DeadTopic(parse_address("kafka://127.0.0.1:1/dead"), {"message.timeout.ms": 300})
    broken = Publishing(sink, nowhere)
    work = data.work(sink.claim([PLACE]), (), [rejected(5)])
    with pytest.raises(TelemetryError, match="all is committed, and they are sent again"):
        broken.commit(work)
    assert [letter.rejection.offset for letter in sink.dead_letters()] == [5]
    Publishing(sink, DeadTopic(parse_address(kafka.url(topic)), {})).claim([PLACE])
    assert offsets(kafka, topic, 1) == [5]
