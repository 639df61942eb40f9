"""``kvstore telemetry produce``, against a real broker, and Avro from end to end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_telemetry_kafka import Notebook, read

from kvstore.errors import SourceError
from kvstore.telemetry import avro
from kvstore.telemetry.kafka import parse_address
from kvstore.telemetry.produce import LineProducer

pytestmark = pytest.mark.slow  # servers or many files: CI runs it

LINES = [
    json.dumps(
        {
            "device_id": f"sensor-{number % 5}",
            "timestamp": f"2025-01-20T10:{number // 60:02}:{number % 60:02}Z",
            "temperature": 21.4,
            "humidity": 68,
            "firmware_version": "v1.2.0",
        }
    ).encode()
    for number in range(200)
]


def run(*args, stdin=None):
    command = [sys.executable, "-m", "kvstore", "telemetry", "produce", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def test_events_of_a_device_go_to_one_partition_in_their_order(kafka, tmp_path):
    topic = kafka.create(partitions=3)
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\n".join(LINES[:150]) + b"\n\n")
    done = run(kafka.url(topic), path, "-", "--json", stdin=b"\n".join([*LINES[150:], b"{bad"]))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["sent"], figures["unkeyed"], figures["unsent"]) == (201, 1, 0)
    notebook = Notebook()
    read(kafka, topic, notebook, 201)
    by_device = {}
    for partition in range(3):
        for payload in notebook.payloads(partition):
            if payload != b"{bad":
                device = json.loads(payload)["device_id"]
                by_device.setdefault((device, partition), []).append(payload)
    assert len(by_device) == 5
    for (device, _), events in by_device.items():
        assert events == [line for line in LINES if json.loads(line)["device_id"] == device]
    keys = {key for chunk in notebook.chunks for key in chunk.keys}
    assert keys == {None, *(f"sensor-{number}".encode() for number in range(5))}


def test_a_device_has_the_partition_that_java_clients_give_it(kafka):
    """murmur2, as Kafka's own: 21 keys of the Java client's tests would do; these three differ."""
    topic = kafka.create(partitions=4)
    producer = LineProducer(parse_address(kafka.url(topic)), {})
    devices = ["sensor-123", "a", "device-7"]
    producer.send([json.dumps({"device_id": device}).encode() for device in devices])
    assert producer.finish().sent == 3
    notebook = Notebook()
    read(kafka, topic, notebook, 3)
    for device in devices:
        expected = murmur2(device.encode()) % 4
        assert json.dumps({"device_id": device}).encode() in notebook.payloads(expected)


def murmur2(key):
    """org.apache.kafka.common.utils.Utils.murmur2, toPositive."""
    mask, factor = 0xFFFFFFFF, 0x5BD1E995
    found = 0x9747B28C ^ len(key)
    whole = len(key) // 4 * 4
    for at in range(0, whole, 4):
        word = int.from_bytes(key[at : at + 4], "little") * factor & mask
        word = (word ^ word >> 24) * factor & mask
        found = (found * factor & mask) ^ word
    if rest := key[whole:]:
        found = (found ^ int.from_bytes(rest, "little")) * factor & mask
    found = (found ^ found >> 13) * factor & mask
    return (found ^ found >> 15) & 0x7FFFFFFF


def test_what_is_too_large_is_told_and_the_rest_is_sent(kafka):
    topic = kafka.create()
    sent = [LINES[0], b"x" * 3_000_000, LINES[1]]
    done = run(kafka.url(topic), "--json", stdin=b"\n".join(sent))
    assert done.returncode == 3
    assert json.loads(done.stdout)["unsent"] == 1
    assert b"was not sent" in done.stderr
    notebook = Notebook()
    read(kafka, topic, notebook, 2)
    assert notebook.payloads(0) == LINES[:2]


def test_more_than_the_queue_holds_waits_for_room(kafka):
    topic = kafka.create()
    producer = LineProducer(
        parse_address(kafka.url(topic)), {"queue.buffering.max.messages": 10, "linger.ms": 1}
    )
    producer.send(LINES)
    assert producer.finish().sent == 200
    notebook = Notebook()
    read(kafka, topic, notebook, 200)
    assert notebook.payloads(0) == LINES


def test_what_cannot_be_acknowledged_is_not_counted_as_sent():
    producer = LineProducer(
        parse_address("kafka://127.0.0.1:1/t"), {"message.timeout.ms": 300, "linger.ms": 0}
    )
    producer.send(LINES[:3])
    done = producer.finish()
    assert (done.sent, done.unsent, done.bytes) == (0, 3, 0)


@pytest.mark.parametrize("name", ["enable.idempotence", "bootstrap.servers"])
def test_idempotence_is_not_for_the_user_to_give_away(name):
    with pytest.raises(SourceError, match=name):
        LineProducer(parse_address("kafka://127.0.0.1:1/t"), {name: "false"})


def test_avro_from_end_to_end(kafka, registry):
    topic = kafka.create()
    options = ("--kafka-option", f"schema.registry.url={registry.url}")
    misfit = b'{"device_id": 7}'
    done = run(kafka.url(topic), *options, "--json", stdin=b"\n".join([*LINES[:20], misfit]))
    assert done.returncode == 3
    assert json.loads(done.stdout)["unsent"] == 1
    notebook = Notebook()
    decoder = avro.Decoder(avro.Registry(registry.url))
    read(kafka, topic, notebook, 20, decoder=decoder)
    found = list(map(json.loads, notebook.payloads(0)))
    assert found == [{**json.loads(line), "pressure": None} for line in LINES[:20]]
    assert {headers for chunk in notebook.chunks for headers in chunk.headers} == {
        ((avro.SCHEMA_ID, b"1"),)
    }
