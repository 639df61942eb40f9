"""Rolling to the next segment: when any of its steps fails, and what it carries along."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import kvstore
from kvstore import Field, Schema, StoreError, active, layout
from kvstore.segment import Segment

TINY = {"segment_bytes": 64 << 10, "flush_interval_s": None}


def append(store, number):
    """One batch of 50 numbered rows, 16 kB of noise."""
    v = np.arange(number * 50, number * 50 + 50)
    noise = np.random.default_rng(number).integers(0, 2**62, (50, 40))
    store.stream("s").append({"time": v / 50, "v": v, "noise": noise})


def check_batches(store, count):
    """Exactly these batches, in order, with what they held."""
    batches = list(store["s"].read())
    rows = np.concatenate([batch["v"] for batch in batches])
    assert np.array_equal(rows, np.arange(count * 50))
    noise = [np.random.default_rng(n).integers(0, 2**62, (50, 40)) for n in range(count)]
    assert np.array_equal(np.concatenate([batch["noise"] for batch in batches]), np.vstack(noise))


class Failing:
    """A step of the roll that fails, before or after it did its work, while switched on."""

    def __init__(self, real, when):
        self.real = real
        self.when = when
        self.on = False
        self.failures = 0
        self.error: Exception = OSError(errno.EMFILE, "Too many open files")

    def __call__(self, *args, **options):
        if self.on and self.when == "before":
            self.fail()
        result = self.real(*args, **options)
        if self.on:
            if isinstance(result, Segment):
                result.close()
            self.fail()
        return result

    def fail(self):
        self.failures += 1
        raise self.error


STEPS = ["create_segment", "reserve_lock_file", "rename", "sync_folder", "open"]


def failing(monkeypatch, step, when):
    if step == "rename":
        made = Failing(Path.rename, when)
        monkeypatch.setattr(Path, "rename", lambda old, new: made(old, new))  # noqa: PLW0108  # a method
    elif step == "open":
        made = Failing(Segment.open, when)
        made.error = StoreError("Too many open files")
        monkeypatch.setattr(active, "Segment", SimpleNamespace(open=made))
    else:
        made = Failing(getattr(layout, step), when)
        monkeypatch.setattr(layout, step, made)
    return made


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_roll_that_fails_at_any_step_loses_nothing(path, monkeypatch, step, when):
    """Rows went to a segment that readers took for sealed, or were put twice and refused."""
    step = failing(monkeypatch, step, when)
    store, durable = kvstore.open(path, "w", **TINY), 0
    reader = kvstore.open(path)
    for number in range(20):
        step.on = 5 <= number < 12
        append(store, number)
        try:
            store.flush()
        except StoreError:
            break
        durable = number + 1
        check_batches(reader, durable)
    assert step.failures >= 1
    assert durable >= 5
    check_batches(store, durable)
    if durable < 20:  # what failed once may not be needed again
        step.on = True
        with pytest.raises(StoreError, match="Too many open files"):
            store.flush()
        check_batches(reader, durable)
    step.on = False
    store.flush()
    for number in range(durable + 1, 20):
        append(store, number)
        store.flush()
        check_batches(reader, number + 1)
    assert store.info().segments > 3
    store.close()
    check_batches(reader, 20)
    reader.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_store_that_is_given_up_in_the_middle_of_a_roll_goes_on(path, monkeypatch, step, when):
    durable = 0
    with monkeypatch.context() as patch:
        step = failing(patch, step, when)
        step.on = True
        with pytest.raises(StoreError, match="Too many"):  # a new store's first segment, too
            kvstore.open(path, "w", **TINY)
        step.on = False
        store = kvstore.open(path, "w", **TINY)
        step.on = True
        with suppress(StoreError), store:
            for number in range(20):
                append(store, number)
                store.flush()
                durable = number + 1
        assert step.failures > 1
    with kvstore.open(path, "w", **TINY) as store:
        check_batches(store, durable)
        for number in range(durable, 20):
            append(store, number)
            store.flush()
        check_batches(store, 20)


def test_a_segment_carries_streams_sequences_and_marks(path):
    with kvstore.open(path, "w", **TINY) as store:
        store.stream("idle", Schema((Field("time", "i8"), Field("v", "i4", fill=3))))
        store.stream("early").append({"time": [1.0, 2.0], "v": [1, 2]}, marks={"early": 1})
        for number in range(20):
            append(store, number)
            store.flush({"number": number})
        assert store.info().segments > 3
    with kvstore.open(path, "w", **TINY) as store:
        assert store.marks == {"early": 1, "number": 19}
        assert store["idle"].schema.fields[1].fill == 3
        assert store["early"].count() == 2
        store.stream("early").append({"time": [0.0], "v": [0]})
        store.stream("idle").append({"time": np.array([5]), "v": np.array([5], "i4")})
        store.flush()
        early = [value for b in store["early"].read(ordered=True) for value in b["v"].tolist()]
        assert early == [0, 1, 2]
        sequences = [t.next_sequence for t in store.state().totals.values()]
        assert sorted(sequences) == [1, 2, 20]


def test_a_segment_that_is_full_of_what_it_carries_still_takes_rows(path):
    """It rolled for ever: each new segment was full before its first row."""
    with kvstore.open(path, "w", **TINY) as store:
        schema = Schema((Field("time", "f8", description="x" * 200),))
        for number in range(300):
            store.stream(f"stream {number:03}", schema)
        store.flush()
        for number in range(5):
            append(store, number)
            store.flush()
        check_batches(store, 5)
        assert store.info().segments <= 6


def test_late_rows_are_merged_over_segments(path):
    """Every segment overlaps every other in time; equal times keep their order of arrival."""
    rng = np.random.default_rng(5)
    times = rng.integers(0, 200, 3000) / 8
    with kvstore.open(path, "w", **TINY) as store:
        for part in np.split(np.arange(3000), 60):
            noise = rng.integers(0, 2**62, (50, 40))
            store.stream("s").append({"time": times[part], "v": part, "noise": noise})
            store.flush()
        assert store.info().segments > 10
        merged = np.concatenate([b["v"] for b in store["s"].read(ordered=True)])
        assert np.array_equal(merged, np.argsort(times, kind="stable"))
        for start, stop in ((3.0, 3.0), (3.0, 17.125), (0.0, 0.0), (24.875, 99.0), (7.0, 6.0)):
            inside = (times >= start) & (times <= stop)
            found = np.concatenate([[], *(b["v"] for b in store["s"].read(start, stop))])
            assert sorted(found) == np.flatnonzero(inside).tolist()
            assert store["s"].count(start, stop) == inside.sum()
