"""The store's own claims, one by one; test_store_model.py has their combinations."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

import kvstore
from kvstore import (
    Field,
    NoFillError,
    Schema,
    SchemaError,
    StoreError,
    StreamNotFound,
    TimeError,
    active,
    commit,
    segment,
)

TIMES = np.array([1.0, 2.0, 2.0, 3.0])
ROWS = {"time": TIMES, "v": np.arange(4)}


def values(batches, field="v"):
    return [value for batch in batches for value in batch[field].tolist()]


@pytest.fixture
def writer(path):
    with kvstore.open(path, "w") as store:
        yield store


@pytest.fixture
def rows(writer):
    """A stream of four committed rows."""
    stream = writer.stream("s")
    stream.append(ROWS)
    writer.flush()
    return stream


# ---- the main path ----


def test_write_flush_read(path):
    t = 1771342357.0 + np.arange(1000) / 100
    spectral = np.arange(1000 * 8, dtype="i4").reshape(1000, 8)
    with kvstore.open(path, mode="w") as store:
        store.stream("particles").append({"timestamps": t, "spectral": spectral})
        store.flush(marks={"input": 123})
    with kvstore.open(path) as store:
        particles = store["particles"]
        batches = list(particles.read(t[10], t[20], fields=["spectral", "timestamps"]))
        assert [list(batch) for batch in batches] == [["spectral", "timestamps"]]
        assert np.array_equal(batches[0]["timestamps"], t[10:21])
        assert np.array_equal(batches[0]["spectral"], spectral[10:21])
        assert particles.count(t[10], t[20]) == 11
        assert particles.count(t[10], t[20], inclusive="left") == 10
        assert particles.first()["timestamps"] == t[:1]
        assert particles.last()["timestamps"] == t[-1:]
        assert particles.span() == (t[0], t[-1])
        assert len(particles) == 1000
        assert store.marks == {"input": 123}


def test_arrays_that_are_read_belong_to_the_reader(rows):
    batch = next(rows.read())
    batch["v"][:] = -1
    assert values(rows.read()) == [0, 1, 2, 3]


def test_arrays_may_be_reused_after_append(writer):
    noise = np.random.default_rng(1).integers(0, 2**63, (4000, 512))
    times, before = np.arange(4000.0), noise.copy()
    for part in (slice(0, 10), slice(10, 4000)):  # staged, and cut into several batches
        batch = {"time": times[part], "v": noise[part]}
        writer.stream("s").append(batch)
        noise[part] = 0
        times[part] = -1
    writer.flush()
    found = list(writer["s"].read(ordered=True))
    assert np.array_equal(np.concatenate([batch["time"] for batch in found]), np.arange(4000.0))
    assert np.array_equal(np.concatenate([batch["v"] for batch in found]), before)
    assert len(found) > 3


def test_times_as_users_give_them(writer):
    stream = writer.stream("s")
    stream.append({"time": 1771342357.0 + np.arange(10), "v": np.arange(10)})
    writer.flush()
    middle = datetime(2026, 2, 17, 15, 32, 39, tzinfo=UTC)
    same = [
        1771342359.0,
        "2026-02-17T15:32:39",
        "2026-02-17T16:32:39+01:00",
        middle,
        middle.astimezone(timezone(timedelta(hours=5))),
        middle.replace(tzinfo=None),
        np.datetime64("2026-02-17T15:32:39"),
        np.float64(1771342359),
    ]
    for end in same:
        assert values(stream.read(end, end)) == [2]
    assert values(stream.read(1771342359000000000, 1771342360000, unit="ns")) == []
    assert values(stream.read(1771342359, 1771342360, unit="s")) == [2, 3]
    with pytest.raises(TimeError, match="unit"):
        stream.read(1771342359)
    with pytest.raises(TimeError):
        stream.count("yesterday")


@pytest.mark.parametrize("time_dtype", ["f8", "i8", "M8[ms]"])
def test_every_end_at_and_next_to_every_row(writer, time_dtype):
    """Against a comparison of the stored values; batches overlap, and times are equal."""
    times = np.array([-7, -7, 0, 3, 4, 4, 4, 9, 1771342357, 1771342358], "i8")
    if time_dtype == "f8":
        times = times / 10
        ends = np.concatenate([np.nextafter(times, -np.inf), times, np.nextafter(times, np.inf)])
    else:
        ends = np.concatenate([times - 1, times, times + 1]).view(time_dtype)
    times = times.view(time_dtype)
    for part in ([0, 4, 7], [1, 2, 3, 8], [5], [6, 9]):
        writer.stream("s").append({"time": times[part], "v": np.array(part)})
        writer.flush()
    unit = "ns" if time_dtype == "i8" else None
    for start in np.unique(ends):
        for stop in np.unique(ends):
            for inclusive in ("both", "left"):
                inside = (times >= start) & (times < stop)
                if inclusive == "both":
                    inside = (times >= start) & (times <= stop)
                options = {"unit": unit, "inclusive": inclusive}
                found = values(writer["s"].read(start, stop, **options))
                assert sorted(found) == np.flatnonzero(inside).tolist(), (start, stop, inclusive)
                assert writer["s"].count(start, stop, **options) == len(found)


def test_ends_beyond_the_outermost_rows(writer):
    """Such an end is clamped to the outermost time that can be stored: there may be a row."""
    stream = writer.stream("s", Schema((Field("time", "i8"), Field("v", "i8"))))
    edge = 2**63 - 1
    stream.append({"time": np.array([-edge, 0, edge]), "v": [0, 1, 2]})
    writer.flush()
    for beyond in (edge + 1, 1e10, float("inf"), "2300-01-01"):
        for inclusive in ("both", "left"):
            options = {"unit": "ns" if beyond == edge + 1 else "s", "inclusive": inclusive}
            assert values(stream.read(None, beyond, **options)) == [0, 1, 2]
            assert values(stream.read(beyond, None, **options)) == []
            before = beyond if isinstance(beyond, str) else -beyond
            before = "1600-01-01" if before == beyond else before
            assert values(stream.read(before, None, **options)) == [0, 1, 2]
            assert values(stream.read(None, before, **options)) == []
    assert values(stream.read(-edge, edge, unit="ns", inclusive="left")) == [0, 1]


def test_rows_closer_than_a_nanosecond_are_merged_in_order(writer):
    """Their batches share a key's time, and so come in the order of their arrival."""
    for number, times in enumerate(([0.0, 2e-10], [3e-10], [1e-10], [-1e-10])):
        writer.stream("s").append({"time": times, "v": [number] * len(times)})
        writer.flush()
    assert values(writer["s"].read(ordered=True)) == [3, 0, 2, 0, 1]
    assert values([writer["s"].first(), writer["s"].last()]) == [3, 1]


def test_a_read_is_a_snapshot_of_when_it_began(writer, rows):
    before, ordered = rows.read(), rows.read(ordered=True)
    rows.append({"time": [0.0, 2.0, 9.0], "v": [7, 8, 9]})
    writer.flush()
    assert values(before) == values(ordered) == [0, 1, 2, 3]
    assert sorted(values(rows.read())) == [0, 1, 2, 3, 7, 8, 9]


def test_one_row_batches_of_scalars(writer):
    stream = writer.stream("s")
    stream.append({"time": 1.5, "v": 7, "image": np.ones((2, 3), "f4"), "text": "a"})
    stream.append({"time": 0.5, "v": 8, "image": np.zeros((2, 3), "f4"), "text": None})
    writer.flush()
    (batch,) = stream.read()
    assert batch["time"].tolist() == [0.5, 1.5]
    assert batch["image"].shape == (2, 2, 3)
    assert batch["text"].tolist() == [None, "a"]


@pytest.mark.parametrize("shape", [(1,), (0,)])
def test_arrays_of_one_or_no_row_are_no_scalars(writer, shape):
    """struct packs an array of one value as if it were a number, with a warning."""
    stream = writer.stream("s")
    stream.append({"time": 1.0, "v": 1.0})
    stream.append({"time": np.full(shape, 2.0), "v": np.full(shape, 2.0)})
    writer.flush()
    assert len(stream) == 1 + shape[0]


# ---- streams and schemas ----


def test_streams_of_a_store(writer):
    writer.stream("b").append(ROWS)
    writer.stream("a", Schema((Field("time", "i8"),)))
    assert "b" in writer
    assert writer["a"].schema.names == ("time",)
    writer.flush()
    assert list(writer) == ["a", "b"]
    assert len(writer) == 2
    with pytest.raises(StreamNotFound, match=r"no stream 'c'; there are: a, b"):
        writer["c"]
    assert "c" not in writer
    assert writer["a"].span() is writer["a"].first() is writer["a"].last() is None
    assert list(writer["a"].read()) == []
    assert writer["a"].count() == len(writer["a"]) == 0


def test_a_refused_first_batch_leaves_no_stream(writer):
    stream = writer.stream("s")
    for bad in ({"time": [np.nan], "v": [1]}, {"time": [1.0, 2.0], "v": [1]}):
        with pytest.raises((TimeError, SchemaError)):
            stream.append(bad)
    assert "s" not in writer
    stream.append({"time": [1.0], "v": np.zeros((1, 4))})


def test_a_refused_batch_leaves_no_row(rows):
    with pytest.raises(SchemaError):
        rows.append({"time": [1.0, 2.0], "v": [1, 2.5]})
    with pytest.raises(SchemaError):
        rows.append({"time": [1.0, 2.0]})
    rows._store.flush()
    assert len(rows) == 4


def test_a_declared_schema_may_be_declared_again(path):
    schema = Schema((Field("at", "M8[ns]"), Field("v", "f8", fill=float("nan"))), "at")
    for _ in range(2):
        with kvstore.open(path, "w") as store:
            store.stream("s", schema).append({"at": np.array([1], "M8[ns]"), "v": [1.0]})
    other = Schema((Field("at", "M8[ns]"), Field("v", "i8")), "at")
    with kvstore.open(path, "w") as store, pytest.raises(SchemaError, match="unchanged"):
        store.stream("s", other)


def test_the_time_field_may_be_named(writer):
    writer.stream("s", time="at").append({"at": [2.0, 1.0], "v": [1, 2]})
    writer.flush()
    assert writer["s"].schema.time == "at"
    assert values(writer["s"].read()) == [2, 1]


def test_added_fields_read_as_their_fill(path):
    with kvstore.open(path, "w") as store:
        stream = store.stream("s")
        stream.append(ROWS)
        stream.add_fields(Field("x", "f4"), Field("n", "i4", (2,), fill=5), Field("bare", "u1"))
        stream.append({"time": [9.0], "v": [4], "x": [1.0], "n": [[1, 2]], "bare": [3]})
        stream.append({"time": [0.0], "v": [5]})  # the earlier version still fits
        stream.append({"time": np.zeros(0), "v": np.zeros(0, int)})
        store.flush()
        old, added = stream.read(0.5, 5.0, fields=["n", "x"]), stream.read(9.0, 9.0)
        assert [batch["n"].tolist() for batch in old] == [[[5, 5]] * 4]
        assert next(added)["bare"].tolist() == [3]
        assert np.isnan(next(stream.read(fields=["x"]))["x"]).all()
        with pytest.raises(NoFillError, match=r"'bare' \(uint8\)"):
            list(stream.read(fields=["bare"]))
        assert len(stream) == 6
        with pytest.raises(SchemaError, match="missing bare, n, x"):
            stream.append({"time": [0.0], "v": [5], "w": [1]})


def test_adding_fields_while_others_append(path):
    """Rows checked under the old schema and staged under the new one once broke the writer."""
    with kvstore.open(path, "w", flush_interval_s=0) as store:
        stream = store.stream("s")
        batch = {"time": [1.0, 2.0], "v": [1, 2]}
        stream.append(batch)

        def append():
            for _ in range(300):
                stream.append(batch)

        threads = [threading.Thread(target=append) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(30):
            stream.add_fields(Field(f"x{number}", "f8"))
        for thread in threads:
            thread.join()
        store.flush()
        assert len(stream) == 1202


# ---- marks ----


@pytest.mark.parametrize(
    "value", [0, -(2**63), 2**64 - 1, 1.5, float("inf"), "\u00e9", b"\x00", None, True]
)
def test_marks_keep_their_type(path, value):
    with kvstore.open(path, "w") as store:
        store.flush(marks={"m": value, "nested": [value, {"a": value, 1: [value]}]})
    with kvstore.open(path) as store:
        assert store.marks == {"m": value, "nested": [value, {"a": value, 1: [value]}]}
        assert type(store.marks["m"]) is type(value)


@pytest.mark.parametrize(
    "marks",
    [
        {"m": object()},
        {"m": 2**64},
        {"m": "\ud800"},
        {"m": "x" * 70_000},
        {"": 1},
        {"\n": 1},
        {3: 1},
    ],
)
def test_marks_that_cannot_be_kept_are_refused(rows, marks):
    with pytest.raises(SchemaError, match="mark"):
        rows._store.flush(marks=marks)
    with pytest.raises(SchemaError, match="mark"):
        rows.append(ROWS, marks=marks)
    rows._store.flush()
    assert rows._store.marks == {}
    assert len(rows) == 4


def test_marks_are_copied(path):
    with kvstore.open(path, "w", flush_interval_s=None) as store:
        offsets = [1, 2]
        store.stream("s").append(ROWS, marks={"offsets": offsets})
        offsets.append(3)
        store.flush()
        assert store.marks == {"offsets": [1, 2]}


@pytest.mark.parametrize("rows_each", [1, 5, 100_000, 400_000])
def test_marks_and_rows_of_an_append_are_one_commit(path, monkeypatch, rows_each):
    """No commit shows one without the other, however many batches the rows are."""
    monkeypatch.setattr(commit, "GROUP_BYTES", 1 << 20)
    real, shown = segment.Segment.commit, []

    def committed(self, *args):
        real(self, *args)
        state = self.state()
        shown.append((state.stream_totals(1).rows, state.marks.get("rows", 0)))

    monkeypatch.setattr(segment.Segment, "commit", committed)
    with kvstore.open(path, "w", flush_interval_s=0) as store:
        batch = {"time": np.zeros(rows_each), "v": np.zeros((rows_each, 2))}
        count = 60 if rows_each < 1000 else 4
        for number in range(count):
            store.stream("s").append(batch, marks={"rows": (number + 1) * rows_each})
    assert shown[-1] == (count * rows_each, count * rows_each)
    assert [rows for rows, _ in shown] == [marked for _, marked in shown]


# ---- when rows become visible ----


def eventually(condition):
    """Waits for at most a generous time."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("rows_each", [1, 3, 50_000])
def test_rows_appear_without_flush(path, rows_each):
    with kvstore.open(path, "w", flush_interval_s=0.05) as store:
        stream = store.stream("s")
        for number in (1, 2):
            times = 1.0 if rows_each == 1 else np.ones(rows_each)
            value = 1 if rows_each == 1 else np.ones(rows_each, int)
            stream.append({"time": times, "v": value})
            eventually(lambda expected=number * rows_each: len(stream) == expected)


def test_without_an_interval_only_flush_commits(path):
    with kvstore.open(path, "w", flush_interval_s=None) as store:
        stream = store.stream("s")
        for _ in range(3):
            stream.append(ROWS)
            stream.append({"time": np.ones(50_000), "v": np.ones(50_000, int)})
        time.sleep(0.3)
        assert len(stream) == 0
        assert list(store) == []
        store.flush(marks={"m": 1})
        assert len(stream) == 150_012
        assert store.state().last_commit_ns > 0


def test_without_an_interval_memory_is_bounded(path, monkeypatch):
    monkeypatch.setattr(commit, "COMMIT_BYTES_MAX", 1 << 20)
    with kvstore.open(path, "w", flush_interval_s=None) as store:
        stream, batch = store.stream("s"), {"time": np.ones(40_000), "v": np.ones(40_000)}
        stream.append(batch)
        with pytest.raises(StoreError, match="flush more often"):
            stream.append(batch)
        store.flush()
        assert len(stream) == 40_000
        appended = 0
        with suppress(StoreError):
            while appended < 200_000:
                stream.append({"time": 1.0, "v": 1.0})
                appended += 1
        assert appended < 200_000
        store.flush()
        assert len(stream) == 40_000 + appended
        stream.append(batch)
        with pytest.raises(StoreError, match="one transaction"):
            stream.append({name: np.tile(each, 3) for name, each in batch.items()}, marks={"m": 1})
        assert "m" not in store.marks


@pytest.mark.parametrize("copy", [True, False])
def test_an_append_of_any_size_is_cut_into_commits(path, monkeypatch, copy):
    """One that outgrew the segment's address range was retried for ever."""
    for module in (segment, active):
        monkeypatch.setattr(module, "MAP_SPARE_BYTES", 12 << 20)
    monkeypatch.setattr(commit, "GROUP_BYTES", 4 << 20)
    noise = np.random.default_rng(1).random(2 << 20)
    with kvstore.open(path, "w", segment_bytes=1 << 20) as store:
        store.stream("s").append({"time": np.arange(2 << 20), "v": noise}, copy=copy)
        store.flush()
        assert store.info().segments > 3
        assert np.array_equal(np.concatenate([b["v"] for b in store["s"].read()]), noise)


@pytest.mark.parametrize("options", [{"segment_bytes": 1000}, {"flush_interval_s": -1}])
@pytest.mark.parametrize(
    "more", [{}, {"flush_interval_s": float("nan")}, {"flush_interval_s": 1e9}]
)
def test_options_have_bounds(path, options, more):
    with pytest.raises(StoreError, match="use"):
        kvstore.open(path, "w", **{**options, **more})
    with pytest.raises(StoreError, match="'r' to read"):
        kvstore.open(path, "a")
