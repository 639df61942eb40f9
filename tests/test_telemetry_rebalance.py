"""Consumers come and go while events arrive: what is committed is every offset once, in order.

The sink is a dict with claims, in this process, so that a hole or an event read twice shows itself
at once; real sinks and dying processes are in test_telemetry_workers.py. The broker is librdkafka's
mock: Tansu's coordinator hands out no partitions any more once a member has left in a rebalance,
with bare consumers as well.
"""

from __future__ import annotations

import random
import threading
import time

import pytest

from kvstore.errors import Fenced
from kvstore.telemetry.kafka import parse_address
from kvstore.telemetry.records import Position
from kvstore.telemetry.sources.kafka import KafkaSource

PARTITIONS = 4  # the mock's
CHANGES = 8
MEMBER = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 100}
WAIT_S = 120.0


class Shared:
    """Positions, epochs and offsets, for all consumers together."""

    def __init__(self):
        self._lock = threading.Lock()
        self._epochs = {}
        self._positions = {}
        self.claims = 0
        self.offsets = {number: [] for number in range(PARTITIONS)}

    def claim(self, places):
        with self._lock:
            self.claims += len(places)
            for place in places:
                self._epochs[place] = self._epochs.get(place, 0) + 1
            return {
                place: (self._positions.get(place, Position(place, -1)), self._epochs[place])
                for place in places
            }

    def commit(self, claim, chunk):
        position, epoch = claim
        with self._lock:
            known = self._positions.get(chunk.place, Position(chunk.place, -1))
            if (known, self._epochs[chunk.place]) != (position, epoch):
                raise Fenced(f"{chunk.place} was claimed by another")
            self.offsets[chunk.place.partition] += chunk.offsets.tolist()
            self._positions[chunk.place] = chunk.after
            return chunk.after, epoch


class Consumer(threading.Thread):
    """One member of the group, until it is told to leave."""

    def __init__(self, kafka, topic, shared):
        super().__init__()
        self._kafka, self._topic, self._shared = kafka, topic, shared
        self._leaving = threading.Event()
        self._claims = {}
        self.read = 0
        self.error = None
        self.start()

    def run(self):
        try:
            while not self._leaving.is_set():
                self._claims = {}
                try:
                    self._consume()
                except Fenced:
                    continue
        except Exception as error:  # noqa: BLE001 - raised in the test
            self.error = error

    def _consume(self):
        address = parse_address(self._kafka.url(self._topic))
        source = KafkaSource(address, group="g-" + self._topic, options=MEMBER)
        with source:
            source.start(self._assigned, self._revoked)
            while not self._leaving.is_set():
                for chunk in source.poll(events_max=20, bytes_max=1 << 20, wait_s=0.05):
                    claim = self._claims[chunk.place]
                    self._claims[chunk.place] = self._shared.commit(claim, chunk)
                    self.read += len(chunk.offsets)

    def _assigned(self, places):
        found = self._shared.claim(places)
        self._claims |= found
        return [position for position, _ in found.values()]

    def _revoked(self, places, lost):
        for place in places:
            del self._claims[place]

    def leave(self):
        self._leaving.set()
        self.join(WAIT_S)
        if self.error is not None:
            raise self.error


@pytest.mark.slow
def test_members_come_and_go_and_every_offset_is_committed_once_in_order(forgetful):
    kafka, topic, shared, rng = forgetful, "events", Shared(), random.Random(5)
    kafka.produce(topic, [b"x"])  # makes the topic
    members, sent = [Consumer(kafka, topic, shared) for _ in range(2)], 0
    try:
        for _ in range(CHANGES):
            for number in range(PARTITIONS):
                kafka.produce(topic, [b"x"] * 50, partition=number)
            sent += 50
            if len(members) == 1 or (len(members) < 3 and rng.random() < 0.5):
                members.append(Consumer(kafka, topic, shared))
            else:
                members.pop(rng.randrange(len(members))).leave()
            time.sleep(rng.random() * 3)  # wherever the group is by then
        deadline_s = time.monotonic() + WAIT_S
        while any(len(offsets) < sent + (not n) for n, offsets in shared.offsets.items()):
            assert all(member.is_alive() for member in members), [m.error for m in members]
            assert time.monotonic() < deadline_s, shared.offsets
            time.sleep(0.05)
    finally:
        for member in members:
            member.leave()
    ends = {number: sent + (number == 0) for number in range(PARTITIONS)}
    assert shared.offsets == {number: list(range(end)) for number, end in ends.items()}
    assert shared.claims > PARTITIONS  # partitions changed hands
