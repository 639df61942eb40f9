"""The loop: what it gathers, what it commits, and what it does where that goes wrong.

The sink is a real store; the source is a list of chunks, and calls what a source may call.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager

import numpy as np
import pytest
import telemetry_data as data
from telemetry_model import state_of
from test_telemetry_stream_sink import fresh_store

from kvstore.errors import CommitUnknown, Fenced, SinkError, SourceError, TooManyRejected
from kvstore.telemetry import pipeline as loop
from kvstore.telemetry.pipeline import Limits, Pipeline
from kvstore.telemetry.records import Chunk, Place, Position

POLLS_MAX = 100_000
P0, P1 = Place("kafka:c/t", 0), Place("kafka:c/t", 1)


def event(number, **values):
    made = {
        "device_id": f"d{number % 3}",
        "timestamp": f"2025-01-20T10:{number // 60 % 60:02}:{number % 60:02}Z",
        "temperature": 20.0 + number,
        "humidity": 50,
        "firmware_version": "v1",
    }
    return json.dumps(made | values).encode()


class Script:
    """A source that does as it is told: each step is (place, count), or a function of itself."""

    def __init__(self, steps, *, ends=True):
        self.steps = list(steps)
        self.ends_ = ends
        self.next = {}
        self.committed_ = []
        self.polls = []
        self.started = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, on_assigned, on_revoked):
        self.assigned, self.revoked = on_assigned, on_revoked
        self.started += 1
        self.next = {}

    def assign(self, *places):
        for position in self.assigned(places):
            self.next[position.place] = max(position.next, 0)

    def poll(self, **limits):
        self.polls.append(limits)
        assert len(self.polls) < POLLS_MAX, "who should have stopped goes on"
        if not self.steps:
            time.sleep(0 if self.ends_ else 0.001)
            return None if self.ends_ else []
        step = self.steps.pop(0)
        if callable(step):
            step(self)
            return []
        place, payloads = step
        if place not in self.next:
            self.assign(place)
        payloads = [event(n) for n in payloads] if isinstance(payloads, range) else payloads
        first = self.next[place]
        self.next[place] = first + len(payloads)
        offsets = np.arange(first, first + len(payloads))
        return [Chunk(place, offsets, payloads, Position(place, self.next[place]))]

    def committed(self, positions):
        self.committed_.append(positions)

    def ends(self):
        return {P0: 100}


@pytest.fixture
def sink():
    with fresh_store() as open_sink, open_sink(data.BRIEF) as sink:
        sink.evolve(data.BRIEF)
        yield sink


def pipe(source, sink, **options):
    options.setdefault("limits", Limits(wait_s=1000.0, retry_s=1000.0))
    return Pipeline(
        lambda: source, sink, data.BRIEF, sleep=lambda _: None, clock=lambda: data.NOW_US, **options
    )


def totals(sink):
    found = {}
    for count in sink.counts():
        found[count.name] = found.get(count.name, 0) + count.value
    return found


@contextmanager
def failing(sink, name, *errors, after=False):
    """The method raises these, one a call, before or after it is done; then it works."""
    original, waiting = getattr(sink, name), list(errors)

    def method(*args):
        if not waiting:
            return original(*args)
        error = waiting.pop(0)
        if after:
            original(*args)
        raise error

    setattr(sink, name, method)
    yield waiting
    setattr(sink, name, original)


# ---- gathering ----


def test_all_of_a_source_is_committed_with_its_positions(sink):
    source = Script([(P0, range(5)), (P1, range(10, 13)), (P0, range(5, 8))])
    progress = pipe(source, sink).run()
    assert (progress.received, progress.stored) == (11, 11)
    assert sink.positions() == [Position(P0, 8), Position(P1, 3)]
    assert progress.commits.commits == 1
    assert source.committed_ == [(Position(P0, 8), Position(P1, 3))]
    assert progress.lag == {P0: 92}
    assert progress.oldest_unsent_us is None


@pytest.mark.parametrize(
    ("limits", "commits"),
    [
        (Limits(rows_max=4, wait_s=1000.0), 3),
        (Limits(rows_max=1, wait_s=1000.0), 6),
        (Limits(bytes_max=700, wait_s=1000.0), 2),
        (Limits(wait_s=0.0), 6),
        (Limits(wait_s=1000.0), 1),
    ],
)
def test_a_commit_is_due_by_rows_bytes_or_time(sink, limits, commits):
    source = Script([(P0, range(2 * n, 2 * n + 2)) for n in range(6)])
    progress = pipe(source, sink, limits=limits).run()
    assert progress.commits.commits == commits
    assert progress.stored == 12


def test_a_source_is_asked_for_no_more_than_there_is_room_for(sink):
    source = Script([(P0, range(3)), (P0, range(3, 5)), (P0, range(5, 6))])
    pipe(source, sink, limits=Limits(rows_max=5, wait_s=1000.0)).run()
    assert [limits["events_max"] for limits in source.polls] == [5, 2, 5, 4]


def test_an_idle_source_never_delays_a_commit_beyond_its_time(sink):
    source = Script([(P0, range(2))], ends=False)
    limits = Limits(wait_s=0.05)
    done = pipe(source, sink, limits=limits, stopped=lambda: bool(source.committed_))
    assert done.run().stored == 2
    assert max(limits["wait_s"] for limits in source.polls[1:]) <= 0.05


def test_positions_move_where_nothing_is_valid(sink):
    pipe(Script([(P0, [b"x", b"y"]), (P0, [])]), sink).run()
    assert sink.positions() == [Position(P0, 2)]
    assert len(list(sink.dead_letters())) == 2


def test_received_is_stored_and_duplicates_and_rejected(sink):
    payloads = [
        event(1),
        event(1),
        event(1, temperature=1.0),
        b"{",
        event(2),
        event(3, humidity=900),
    ]
    events = []
    progress = pipe(Script([(P0, payloads)] * 2), sink, report=events.append).run()
    assert progress.received == 12
    assert progress.received == progress.stored + progress.duplicates + progress.rejected
    assert (progress.stored, progress.rejected, progress.conflicts) == (2, 6, 2)
    assert progress.reasons == {"conflict": 2, "json": 2, "range": 2}
    found = totals(sink)
    assert found["received"] == found["stored"] + found["duplicates"] + found["rejected"] == 12
    assert len(list(sink.dead_letters())) == found["rejected"]
    (said,) = [event for event in events if event.name == "committed"]
    assert said.fields["rejected"] == 6


def test_the_clock_stands_still_within_a_commit(sink):
    ticks = iter(range(data.NOW_US, data.NOW_US + 10**12, 10**6))
    source = Script([(P0, [event(1), b"{"]), (P0, [event(2), b"["])])
    pipeline = Pipeline(lambda: source, sink, data.BRIEF, clock=lambda: next(ticks),
                        limits=Limits(wait_s=1000.0))  # fmt: skip
    pipeline.run()
    seen = {letter.first_seen_us for letter in sink.dead_letters()}
    seen |= {int(us) for batch in sink.read() for us in batch.lineage.ingested_us}
    assert len(seen) == 1


# ---- the sink fails ----


@pytest.mark.parametrize("method", ["commit", "claim"])
def test_a_sink_that_cannot_be_reached_is_tried_again(sink, method):
    events = []
    with failing(sink, method, SinkError("down"), SinkError("down")):
        progress = pipe(Script([(P0, range(5))]), sink, report=events.append).run()
    assert progress.stored == 5
    retries = [event for event in events if event.name == "retry"]
    assert len(retries) == 2
    assert retries[0].fields["oldest_unsent_s"] == (None if method == "claim" else 0.0)


def test_trying_ends_at_the_deadline_and_nothing_is_lost(sink):
    limits = Limits(wait_s=1000.0, retry_s=0.0)
    with failing(sink, "commit", SinkError("down")), pytest.raises(SinkError, match="down"):
        pipe(Script([(P0, range(5))]), sink, limits=limits).run()
    assert sink.positions() == []
    assert pipe(Script([(P0, range(5))]), sink).run().stored == 5


def test_a_signal_ends_trying(sink):
    with failing(sink, "commit", *[SinkError("down")] * 99) as waiting:
        source = Script([(P0, range(5))])
        pipeline = pipe(source, sink, stopped=lambda: len(waiting) < 97)
        with pytest.raises(SinkError):
            pipeline.run()
        assert len(waiting) == 96


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize("settle", [(), (SinkError("still down"),), (CommitUnknown("again"),)])
def test_a_lost_reply_is_settled_not_repeated(sink, arrived, settle):
    with (
        failing(sink, "commit", CommitUnknown("lost"), after=arrived),
        failing(sink, "settle", *settle),
    ):
        progress = pipe(Script([(P0, [*map(event, range(5)), b"{"])]), sink).run()
    assert (progress.received, progress.stored, progress.duplicates) == (6, 5, 0)
    assert totals(sink)["received"] == 6
    assert progress.unknown_commits >= 1


def test_a_commit_that_arrives_after_we_looked_is_found(sink):
    """The first look finds nothing, then the lost commit lands, then ours is fenced by it."""
    original = sink.settle
    late = []

    def settle(work):
        found = original(work)
        if not late:
            late.append(work)
            sink.commit(work)
            assert found is None
            return None
        return found

    sink.settle = settle
    with failing(sink, "commit", CommitUnknown("lost")):
        original_commit = sink.commit
        progress = pipe(Script([(P0, range(5))]), sink).run()
    assert progress.stored == 5
    assert progress.fenced == 0
    assert original_commit


# ---- fences, places that come and go ----


def test_who_is_fenced_drops_what_it_has_and_begins_anew(sink):
    def steal(source):
        claim = sink.claim([P0])[0]
        row = data.row("other", place=P0, offset=0)
        sink.commit(data.work(claim, [row]))

    source = Script([(P0, range(3)), steal, (P0, range(50, 52))])
    progress = pipe(source, sink).run()
    assert source.started == 2
    assert progress.fenced == 1
    assert progress.stored == 0  # of the dropped ones; the script has no more
    assert sink.positions() == [Position(P0, 1)]


def test_fences_without_end_are_an_error(sink):
    def steal(source):
        source.assign(P0)
        source.steps = [(P0, range(3)), lambda _: sink.claim([P0]), steal]
        source.ends_ = True
        source.steps.pop()

    class Contended(Script):
        def start(self, *args):
            super().start(*args)
            steal(self)

    source = Contended([])
    with pytest.raises(Fenced):
        pipe(source, sink).run()
    assert source.started == loop.FENCES_MAX + 1


def test_what_is_held_of_a_revoked_place_is_committed_before(sink):
    source = Script([(P0, range(3)), (P1, range(10, 12)), lambda s: s.revoked([P0], False)])
    pipe(source, sink).run()
    assert sink.positions() == [Position(P0, 3), Position(P1, 2)]


def test_what_is_held_of_a_lost_place_is_dropped(sink):
    source = Script([(P0, range(3)), (P1, range(10, 12)), lambda s: s.revoked([P0], True)])
    progress = pipe(source, sink).run()
    assert sink.positions() == [Position(P1, 2)]
    assert progress.received == 2
    assert totals(sink)["received"] == 2


# ---- ends ----


@pytest.mark.parametrize(
    ("limits", "stops"),
    [
        (Limits(rejected_max=2), False),
        (Limits(rejected_max=1), True),
        (Limits(rejected_max=0), True),
        (Limits(rejected_share_max=0.5), False),
        (Limits(rejected_share_max=0.3), True),
    ],
)
def test_too_many_rejects_stop_it_after_committing(sink, limits, stops):
    source = Script([(P0, [b"{", b"[", *map(event, range(3))])])
    pipeline = pipe(source, sink, limits=limits)
    if stops:
        with pytest.raises(TooManyRejected, match="2 of 5"):
            pipeline.run()
    else:
        pipeline.run()
    assert sink.positions() == [Position(P0, 5)]
    assert len(list(sink.dead_letters())) == 2


def test_a_share_of_few_events_stops_nothing_before_the_end(sink):
    limits = Limits(wait_s=0.0, rejected_share_max=0.5)
    source = Script([(P0, [b"{"]), (P0, range(3))])
    assert pipe(source, sink, limits=limits).run().stored == 3


def test_a_source_that_fails_late_takes_nothing_with_it(sink):
    def fail(_):
        raise SourceError("the second file is gone")

    with pytest.raises(SourceError):
        pipe(Script([(P0, range(3)), fail]), sink).run()
    assert sink.positions() == [Position(P0, 3)]


def test_a_signal_commits_what_was_gathered(sink):
    source = Script([(P0, range(3)), (P0, range(3, 6))], ends=False)
    progress = pipe(source, sink, stopped=lambda: len(source.polls) == 2).run()
    assert progress.stored == 6
    assert len(source.polls) == 2


def test_a_second_run_stores_nothing_and_counts_only_what_is_new(sink):
    pipe(Script([(P0, [*map(event, range(5)), b"{"])]), sink).run()
    before = state_of(sink)
    source = Script([lambda s: s.assign(P0)])
    assert pipe(source, sink).run().received == 0
    assert source.next == {P0: 6}
    assert state_of(sink) == before
