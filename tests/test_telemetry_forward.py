"""Store and forward: a gateway's store as the source of another sink, each reading once."""

from __future__ import annotations

import random

import numpy as np
import pytest
import telemetry_data as data
from stores import scratch
from telemetry_model import read_all

import kvstore
from kvstore.errors import SinkError, SourceError
from kvstore.telemetry.pipeline import Limits, Pipeline
from kvstore.telemetry.records import Position
from kvstore.telemetry.sinks.stream import StreamSink
from kvstore.telemetry.sources.stream import StreamSource


@pytest.fixture
def folder():
    with scratch() as folder:
        yield folder


def fill(path, *groups):
    """One commit for each group of rows."""
    with StreamSink.open(path, data.BRIEF) as sink:
        for rows in groups:
            claim = sink.claim([data.PLACE])[0]
            sink.commit(data.work(claim, rows))


def many(first, count):
    return [
        data.row(f"d{n % 3}", n, offset=n, temperature=n / 7) for n in range(first, first + count)
    ]


def forward(folder, *, limits=None, sink=None, **options):
    with StreamSink.open(folder / "centre.kv", data.BRIEF) as centre:
        pipeline = Pipeline(
            lambda: StreamSource(folder / "ops.kv", **options),
            sink(centre) if sink else centre,
            data.BRIEF,
            limits=limits or Limits(wait_s=1000.0),
            sleep=lambda _: None,
        )
        return pipeline.run()


def held(path):
    with StreamSink.open(path, data.BRIEF, mode="r") as sink:
        return sorted(row[:2] for row in read_all(sink))


def test_every_reading_arrives_with_its_values(folder):
    odd = [
        data.row(
            "späce d", 1, offset=1, firmware_version='"v\\1"', extras='{"a":100000,"ü":[1,null]}'
        ),
        data.row("b", 2.000001, offset=2, temperature=0.1, pressure=1013.0),
        data.row("b", 3, offset=3, temperature=-0.0, pressure=300.0000000000001),
    ]
    fill(folder / "ops.kv", odd)
    assert forward(folder).stored == 3
    assert held(folder / "centre.kv") == held(folder / "ops.kv")


def test_it_goes_on_where_it_stopped_and_sends_nothing_twice(folder):
    fill(folder / "ops.kv", many(0, 50))
    assert forward(folder).received == 50
    assert forward(folder).received == 0
    fill(folder / "ops.kv", many(50, 10), many(60, 5))
    assert forward(folder).received == 15
    assert held(folder / "centre.kv") == held(folder / "ops.kv")


@pytest.mark.parametrize("rows_max", [1, 7, 64])
def test_batches_are_cut_and_gone_on_with_from_any_row(folder, rows_max):
    fill(folder / "ops.kv", many(0, 40), many(40, 23))
    received = 0
    while True:
        polls = []
        source = StreamSource(folder / "ops.kv")
        with StreamSink.open(folder / "centre.kv", data.BRIEF) as centre:
            pipeline = Pipeline(lambda s=source: s, centre, data.BRIEF,
                                limits=Limits(rows_max=rows_max, wait_s=1000.0),
                                stopped=lambda p=polls: bool(p) or p.append(1))  # fmt: skip
            polls.clear()
            progress = pipeline.run()
        received += progress.received
        assert progress.duplicates == 0
        if not progress.received:
            break
        assert progress.received <= rows_max
    assert received == 63
    assert held(folder / "centre.kv") == held(folder / "ops.kv")


def test_a_dead_link_is_waited_for_and_the_oldest_unsent_row_is_told(folder):
    fill(folder / "ops.kv", many(0, 20))
    events, failures = [], [SinkError("no route to host")] * 3

    class Link:
        def __init__(self, centre):
            self._centre = centre

        def commit(self, work):
            if failures:
                raise failures.pop()
            return self._centre.commit(work)

        def __getattr__(self, name):
            return getattr(self._centre, name)

    with StreamSink.open(folder / "centre.kv", data.BRIEF) as centre:
        pipeline = Pipeline(
            lambda: StreamSource(folder / "ops.kv"),
            Link(centre),
            data.BRIEF,
            limits=Limits(wait_s=0.0, retry_s=float("inf")),
            report=events.append,
            clock=lambda: data.NOW_US + 90_000_000,
            sleep=lambda _: None,
        )
        assert pipeline.run().stored == 20
    told = [event.fields["oldest_unsent_s"] for event in events if event.name == "retry"]
    assert told == [90.0] * 3


def test_it_follows_what_a_gateway_goes_on_to_take_in(folder):
    fill(folder / "ops.kv", many(0, 10))
    polls = []

    def stopped():
        polls.append(1)
        if len(polls) == 3:
            fill(folder / "ops.kv", many(10, 10))
        assert len(polls) < 500
        return progress() == 20

    with StreamSink.open(folder / "centre.kv", data.BRIEF) as centre:
        pipeline = Pipeline(lambda: StreamSource(folder / "ops.kv", follow=True), centre,
                            data.BRIEF, limits=Limits(wait_s=0.0), stopped=stopped)  # fmt: skip
        progress = lambda: pipeline.progress.received  # noqa: E731
        pipeline.run()
    assert held(folder / "centre.kv") == held(folder / "ops.kv")


def test_what_retention_dropped_before_its_turn_is_an_error_unless_accepted(folder):
    fill(folder / "ops.kv", many(0, 20))
    assert forward(folder).stored == 20
    fill(folder / "ops.kv", many(20, 20))
    assert kvstore.drop(folder / "ops.kv", "2200-01-01")["rows"] > 0
    fill(folder / "ops.kv", many(40, 20))
    with pytest.raises(SourceError, match="--accept-loss"):
        forward(folder)
    events = []
    assert forward(folder, accept_loss=True, report=events.append).stored == 20
    assert [event.name for event in events] == ["lost"]
    assert len(held(folder / "centre.kv")) == 40
    assert forward(folder).received == 0


def test_a_store_put_back_to_an_earlier_state_is_an_error(folder):
    fill(folder / "ops.kv", many(0, 20))
    with StreamSource(folder / "ops.kv") as source, pytest.raises(SourceError, match="behind"):
        source.start(lambda places: [Position(places[0], 99 << 24)], lambda *_: None)


def test_a_store_without_readings_is_an_error(folder):
    with kvstore.open(folder / "ops.kv", "w") as store:
        store.stream("s").append({"time": np.arange(3.0)})
    with StreamSource(folder / "ops.kv") as source, pytest.raises(SourceError, match="readings"):
        source.start(lambda _: [], lambda *_: None)


def test_what_retention_leaves_is_whole_and_known_again(folder):
    """Devices and origins are named in each segment that refers to them."""
    rng, path = random.Random(1), folder / "ops.kv"
    with StreamSink.open(path, data.BRIEF) as sink:
        sink.store.set(max_bytes=2 << 20, when_full="drop-oldest")
        claim = sink.claim([data.PLACE])[0]
        made = data.work(claim, next_=0)
        sink.commit(made)
        for first in range(0, 24_000, 1000):
            rows = [noisy(n, rng) for n in range(first, first + 1000)]
            made = data.next_work(made, rows)
            sink.commit(made)
    with StreamSink.open(path, data.BRIEF) as sink:
        left = read_all(sink)
        assert 1000 < len(left) < 24_000
        assert [row for row in left if row[0][0] == "d1"] == read_all(sink, device_id="d1")
        assert {lineage[:2] for _, _, lineage in left} == {tuple(data.PLACE)}
        again = [
            data.Row(*identity, dict(values), extras, data.PLACE, 50_000 + n)
            for n, (identity, (values, extras), _) in enumerate(left)
        ]
        made = data.work(sink.claim([data.PLACE]), again)
        assert sink.commit(made).duplicates == len(left)


def noisy(number, rng):
    text = f"{rng.getrandbits(800):x}"
    return data.row(f"d{number % 3}", number, offset=number, firmware_version=text)
