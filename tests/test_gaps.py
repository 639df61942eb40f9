"""Gaps: silence and clock steps as rows arrive, what is told as one, and that they are bounded."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore
from kvstore import DiskFull, Gap, Settings, StoreError, gaps
from kvstore.gaps import GAPS_MAX, Watch, placed
from kvstore.segment import Segment

F8 = np.dtype("f8")
S = 10**9


def seen(watch, times, now_s, **limits):
    limits = {"clock_step_s": None, **limits}
    found = watch.see(np.asarray(times), now_s, Settings(**limits))
    return [(gap.kind, gap.start_ns / S, gap.stop_ns / S, gap.occurrences) for gap in found]


DTYPES = {"f8": 1.0, "i8": 1e9, "M8[ns]": 1e9, "M8[us]": 1e6, "M8[ms]": 1e3, "M8[s]": 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_silence_and_steps_in_every_time_type(dtype):
    def times(*seconds):
        return (
            (np.array(seconds) * DTYPES[dtype]).astype("i8" if dtype != "f8" else "f8").view(dtype)
        )

    watch = Watch("s", np.dtype(dtype))
    limits = {"gap_after_s": 10, "clock_step_s": 60}
    assert seen(watch, times(0, 1, 2), 0, **limits) == []
    assert seen(watch, times(12, 13), 11, **limits) == []  # 10 s are not longer than 10 s
    assert seen(watch, times(24, 40), 22, **limits) == [
        ("silence", 13, 24, 1), ("silence", 24, 40, 1),
    ]  # fmt: skip
    assert seen(watch, times(0, 1), 23, **limits) == []  # 40 s back are less than a step
    assert seen(watch, times(200, 100, 101), 24, **limits) == [
        ("silence", 1, 200, 1), ("clock_back", 100, 200, 1),
    ]  # fmt: skip


def test_a_step_ahead_is_one_only_beyond_the_time_that_passed():
    watch = Watch("s", F8)
    assert seen(watch, [0.0], 1000, clock_step_s=60) == []
    assert seen(watch, [3000.0], 4000, clock_step_s=60) == []  # slow, but as slow as the clock
    assert seen(watch, [3100.0], 4039, clock_step_s=60) == [("clock_ahead", 3000, 3100, 1)]
    assert seen(watch, [3159.0], 4039, clock_step_s=60) == []


def test_many_steps_of_one_batch_are_told_together():
    watch = Watch("s", F8)
    times = np.tile([100.0, 0.0], 500)
    found = seen(watch, times, 0, clock_step_s=60)
    assert len(found) <= 40
    assert sum(count for kind, *_, count in found if kind == "clock_back") == 500
    assert sum(count for kind, *_, count in found if kind == "clock_ahead") == 499


def test_a_silence_that_goes_on_is_told_once_and_then_as_a_whole():
    watch, limits = Watch("s", F8), Settings(gap_after_s=5)
    assert watch.overdue(100, limits) is None  # nothing came yet
    assert list(watch.see(np.array([50.0]), 100, limits)) == []
    assert watch.overdue(105, limits) is None
    gap = watch.overdue(106, limits)
    assert (gap.kind, gap.start_ns, gap.stop_ns) == ("silence", 50 * S, 56 * S)
    assert watch.overdue(200, limits) is None
    (whole,) = watch.see(np.array([70.0]), 120, limits)
    known = dict([placed({}, gap)])
    number, told = placed(known, whole)
    assert number == 1
    assert (told.start_ns, told.stop_ns, told.occurrences) == (50 * S, 70 * S, 1)


@settings(max_examples=300, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=30), max_size=6),
    gap_after=st.sampled_from([None, 5, 50]),
    step=st.sampled_from([None, 20, 100]),
)
def test_the_watch_sees_what_a_plain_loop_sees(batches, gap_after, step):
    watch, last, expected, found = Watch("s", F8), None, {}, {}
    for now_s, batch in enumerate(batches):
        for kind, *_, count in seen(
            watch, np.array(batch, "f8"), now_s, gap_after_s=gap_after, clock_step_s=step
        ):
            found[kind] = found.get(kind, 0) + count
        for place, value in enumerate(batch):
            kind = "" if last is None else judged(value - last, place == 0, gap_after, step)
            if kind:
                expected[kind] = expected.get(kind, 0) + 1
            last = value
    if gap_after is None and step is None:
        expected = {}
    assert found == expected


def judged(ahead, first, gap_after, step):
    if gap_after is not None and ahead > gap_after:
        return "silence"
    if step is not None and ahead < -step:
        return "clock_back"
    waited = 1 if first else 0
    return "clock_ahead" if step is not None and ahead > step + waited else ""


def test_what_touches_is_told_as_one_and_the_rest_is_kept_apart():
    known = {}

    def add(*gap, **more):
        number, told = placed(known, Gap(*gap, **more))
        known[number] = told
        return number

    assert add("rejected", 0, S, "s") == 1
    assert add("rejected", 2 * S, 3 * S, "s") == 1
    assert add("rejected", 2 * S, 3 * S, "other") == 2
    assert add("rejected", 5 * S, 6 * S, "s") == 3
    assert add("silence", 5 * S, 6 * S, "s") == 4
    assert add("silence", 6 * S, 7 * S, "s") == 5  # a reading lies between them
    assert known[1] == Gap("rejected", 0, 3 * S, "s", 0, 2)


def test_a_store_is_not_filled_with_gaps():
    known, rng = {}, np.random.default_rng(1)
    for number in range(5000):
        kind = gaps.KINDS[number % 7]
        place, gap = placed(known, Gap(kind, int(rng.integers(0, 10**18)), 10**18, str(number)))
        known[place] = gap
    for kind in gaps.KINDS:
        mine = [gap for gap in known.values() if gap.kind == kind]
        assert len(mine) <= GAPS_MAX
        assert sum(gap.occurrences for gap in mine) >= 714


# ---- in a store ----


def test_gaps_of_rows_survive_rolls_and_openings(path):
    with kvstore.open(
        path, "w", segment_bytes=64 << 10, settings=Settings(gap_after_s=10)
    ) as store:
        stream = store.stream("s")
        stream.append({"time": 0.0, "v": 1.0})
        stream.append({"time": 100.0, "v": 1.0})
        store.note_gap("rejected", "s", start_ns=5, stop_ns=6, rows=3, detail="x" * 1000)
        store.flush()
        noise = np.random.default_rng(1).random(20_000)
        for _ in range(4):
            stream.append({"time": np.full(20_000, 101.0), "v": noise})
            store.flush()
        assert store.info().segments > 2
        before = store.gaps()
    kvstore.open(path, "w").close()
    with kvstore.open(path) as store:
        assert store.gaps() == before
        silence, rejected = store.gaps()
    assert rejected[:6] == ("rejected", 5, 6, "s", 3, 1)
    assert len(rejected.detail) == 300
    assert silence[:4] == ("silence", 0, 100 * S, "s")
    assert silence.recorded_ns > silence.stop_ns


def test_a_silence_shows_while_it_lasts(path):
    with kvstore.open(path, "w", settings=Settings(gap_after_s=0.3)) as store:
        store.stream("s").append({"time": 1000.0, "v": 1})
        store.flush()
        deadline = time.monotonic() + 120
        while not store.gaps():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (gap,) = store.gaps()
        assert gap.start_ns == 1000 * S
        store.stream("s").append({"time": 1002.0, "v": 1})
        store.flush()
        (gap, *_) = store.gaps()  # on a machine that stands still the next one is there as well
        assert (gap.start_ns, gap.stop_ns, gap.occurrences) == (1000 * S, 1002 * S, 1)


@pytest.mark.parametrize("dtype", ["f8", "M8[us]", "i8"])
def test_a_silence_between_two_sessions_shows_and_no_clock_step(path, dtype):
    def put(*seconds):
        times = np.array(seconds) * (1.0 if dtype == "f8" else 10**9 if dtype == "i8" else 10**6)
        times = times.astype("f8" if dtype == "f8" else "i8").view(dtype)
        with kvstore.open(path, "w", settings=Settings(gap_after_s=600)) as store:
            store.stream("s").append({"time": times, "v": np.zeros(len(times))})

    put(1000, 9000)  # the later one stray
    put(1001, 1002)  # what came last is not known: no step back
    with kvstore.open(path) as store:
        assert [gap.kind for gap in store.gaps()] == ["silence"]
    put(20_000)
    with kvstore.open(path) as store:
        silences = [(gap.start_ns // S, gap.stop_ns // S) for gap in store.gaps()]
        assert silences == [(1000, 9000), (9000, 20_000)]
        assert "in two sessions" in store.gaps()[1].detail


def test_without_a_limit_for_silence_a_new_session_has_no_gap(path):
    for second in (0, 100_000, 50_000):
        with kvstore.open(path, "w") as store:
            store.stream("s").append({"time": float(second), "v": 1})
            store.flush()
            assert store.gaps() == ()


def test_a_clock_step_survives_a_commit_that_fails(path, monkeypatch):
    real, shift_ns = time.time_ns, 0
    monkeypatch.setattr(time, "time_ns", lambda: real() + shift_ns)

    def fail(*_):
        raise DiskFull("no room")

    with kvstore.open(path, "w", flush_interval_s=None) as store:
        shift_ns = 3600 * S
        store.stream("s").append({"time": 1.0, "v": 1})
        with monkeypatch.context() as patch:
            patch.setattr(Segment, "commit", fail)
            with pytest.raises(DiskFull):
                store.flush()
        store.flush()
        assert [gap.kind for gap in store.gaps()] == ["clock_ahead"]


def test_late_rows_do_not_flood_the_gaps(path):
    rng = np.random.default_rng(1)
    with kvstore.open(path, "w") as store:
        for number in range(200):
            late = 3600.0 * (rng.random(100) < 0.1)
            store.stream("s").append({"time": 10_000.0 + number - late, "v": late})
        store.flush()
        assert {gap.kind for gap in store.gaps()} == {"clock_back", "clock_ahead"}
        assert len(store.gaps()) < 30


def test_a_clean_stream_has_no_gaps(path):
    with kvstore.open(path, "w") as store:
        for number in range(100):
            store.stream("s").append({"time": number + np.arange(100) / 100, "v": np.zeros(100)})
        store.flush()
        assert store.gaps() == ()
        with pytest.raises(StoreError, match="kind 'odd'"):
            store.note_gap("odd", start_ns=0, stop_ns=1)
    with kvstore.open(path) as reader, pytest.raises(StoreError, match="reading"):
        reader.note_gap("rejected", start_ns=0, stop_ns=1)
