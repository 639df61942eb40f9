"""The pipeline commits on a thread of its own while it reads on: when, and what if that fails."""

from __future__ import annotations

import threading

import pytest
from test_telemetry_pipeline import P0, Script, pipe, sink  # noqa: F401 - a fixture

from kvstore.errors import SinkError
from kvstore.telemetry.pipeline import Limits
from kvstore.telemetry.records import Position

WAIT_S = 60
FULL = Limits(rows_max=4, wait_s=1000.0)


def batches(count):
    return [(P0, range(4 * n, 4 * n + 4)) for n in range(count)]


def held_up(monkeypatch, target, source):
    """Each commit waits until the source was asked again after it began."""
    commit, poll, asked = target.commit, source.poll, threading.Event()

    def committing(work):
        asked.clear()
        assert asked.wait(WAIT_S), "nothing was read meanwhile"
        return commit(work)

    def polling(**limits):
        asked.set()
        return poll(**limits)

    monkeypatch.setattr(target, "commit", committing)
    monkeypatch.setattr(source, "poll", polling)


def test_the_next_batch_is_read_while_one_commits(monkeypatch, sink):  # noqa: F811
    source = Script(batches(1), ends=False)
    held_up(monkeypatch, sink, source)
    done = pipe(source, sink, limits=FULL, stopped=lambda: bool(source.committed_))
    assert done.run().stored == 4
    assert sink.positions() == [Position(P0, 4)]


def test_a_commit_that_fails_beside_reading_ends_the_run(monkeypatch, sink):  # noqa: F811
    """And the batch that was read meanwhile is not committed in its place."""
    source = Script(batches(3))
    calls = []

    def failing(work):
        calls.append(work)
        raise SinkError("broken")

    monkeypatch.setattr(sink, "commit", failing)
    with pytest.raises(SinkError, match="broken"):
        pipe(source, sink, limits=Limits(rows_max=4, wait_s=1000.0, retry_s=0.0)).run()
    assert len(calls) == 1
    assert sink.positions() == []


def test_a_fence_beside_reading_drops_what_was_read_meanwhile(monkeypatch, sink):  # noqa: F811
    source = Script(batches(3))
    commit, fenced = sink.commit, []

    def overtaken(work):
        if not fenced:
            fenced.append(sink.claim([P0]))
        return commit(work)

    monkeypatch.setattr(sink, "commit", overtaken)
    made = iter([source, Script(batches(3))])
    done = pipe(source, sink, limits=FULL)
    done._open_source = lambda: next(made)
    progress = done.run()
    assert (progress.fenced, progress.stored, progress.duplicates) == (1, 12, 0)
    assert sink.positions() == [Position(P0, 12)]
