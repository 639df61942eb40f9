"""The store's own claims, one by one; test_store_model.py has their combinations."""

from __future__ import annotations

import os
import pickle
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import (
    Field,
    NoFillError,
    Schema,
    SchemaError,
    StoreClosed,
    StoreError,
    StoreFormatError,
    StoreNotFound,
    StreamNotFound,
    TimeError,
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


@pytest.mark.parametrize("rows_each", [1, 5, 100_000])
def test_marks_and_rows_of_an_append_are_one_commit(path, rows_each):
    """A reader that looks all the time never sees one without the other."""
    with kvstore.open(path, "w", flush_interval_s=0) as store, kvstore.open(path) as reader:
        batch = {"time": np.zeros(rows_each), "v": np.zeros((rows_each, 2))}
        stream = store.stream("s")
        for number in range(60 if rows_each < 1000 else 8):
            stream.append(batch, marks={"rows": (number + 1) * rows_each})
            for _ in range(5):
                state = reader.state()
                found = sum(totals.rows for totals in state.totals.values())
                assert found == state.marks.get("rows", 0)


# ---- when rows become visible ----


def eventually(condition):
    """Waits for at most a generous time."""
    deadline = time.monotonic() + 30
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
    for module in (segment, commit):
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


# ---- handles ----


def test_no_store_is_made_by_reading(path):
    with pytest.raises(StoreNotFound, match="no store here") as caught:
        kvstore.open(path)
    assert isinstance(caught.value, FileNotFoundError)
    assert not path.exists()


def test_a_folder_of_something_else_is_left_alone(path):
    path.mkdir()
    (path / "thesis.tex").write_text("")
    with pytest.raises(StoreFormatError, match=r"thesis\.tex"):
        kvstore.open(path, "w")
    with pytest.raises(StoreNotFound):
        kvstore.open(path)
    assert os.listdir(path) == ["thesis.tex"]


def test_paths_that_cannot_be_a_store(path):
    with pytest.raises(StoreError, match="No such file"):
        kvstore.open(path / "deeper", "w")
    path.write_text("a file")
    with pytest.raises(StoreError, match="Not a directory"):
        kvstore.open(path, "w")
    with pytest.raises(StoreNotFound):
        kvstore.open(path)
    path.unlink()


def test_a_closed_handle_says_so(path):
    store = kvstore.open(path, "w")
    stream = store.stream("s")
    stream.append(ROWS)
    store.flush()
    batches = stream.read()
    store.close()
    store.close()
    uses = [
        store.flush, store.info, store.state, store.writer, lambda: store.marks,
        lambda: store.stream("s").append(ROWS), lambda: store["s"], lambda: list(store),
        lambda: stream.append(ROWS), stream.read, stream.count, stream.first, stream.last,
        stream.span, lambda: len(stream), lambda: stream.schema, lambda: next(batches),
        lambda: stream.add_fields(Field("x", "f8")),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(StoreClosed, match="was closed"):
            use()


def test_a_reading_handle_does_not_write(path, writer, rows):
    with kvstore.open(path) as store:
        for use in (
            store.flush,
            lambda: store["s"].append(ROWS),
            lambda: store.stream("s").append(ROWS),
            lambda: store["s"].add_fields(Field("x", "f8")),
        ):
            with pytest.raises(StoreError, match="opened for reading"):
                use()
        with pytest.raises(StreamNotFound):
            store.stream("other")


def test_handles_pickle_as_their_path(path, writer, rows, monkeypatch):
    monkeypatch.chdir(path.parent)
    relative = kvstore.open(path.name)
    data = [pickle.dumps(each) for each in (writer, rows, relative, relative["s"])]
    relative.close()
    monkeypatch.chdir("/")
    for store in (pickle.loads(data[0]), pickle.loads(data[2])):
        assert store.mode == "r"
        assert len(store["s"]) == 4
        store.close()
    for stream in (pickle.loads(data[1]), pickle.loads(data[3])):
        assert values(stream.read()) == [0, 1, 2, 3]


def test_reads_that_are_broken_off_leave_nothing_open(path):
    with kvstore.open(path, "w", segment_bytes=64 << 10) as store:
        for start in range(5):
            noise = np.random.default_rng(start).random((1000, 10))
            store.stream("s").append({"time": np.arange(1000.0) + start, "v": noise})
            store.flush()
        assert store.info().segments > 3
    with kvstore.open(path) as store:
        held = [store["s"].read() for _ in range(3)]
        for batches in held:
            next(batches)
            next(batches)
        for _ in store["s"].read(ordered=True):
            break
        with suppress(ZeroDivisionError):
            for batch in store["s"].read():
                len(batch) / 0
    del held, batches, batch
    assert not [name for name in open_files() if name.startswith(str(path))]


def open_files():
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(str(fd.readlink()))
    return names


def test_a_store_that_is_only_dropped_is_closed_and_committed(path):
    kvstore.open(path, "w", flush_interval_s=None).stream("s").append(ROWS)
    with kvstore.open(path) as store:
        assert len(store["s"]) == 4


def test_a_store_without_its_identity_file_keeps_its_rows(path, writer, rows):
    """Opening it for writing once began the store anew, over the rows."""
    writer.close()
    (path / "store.msgpack").unlink()
    with pytest.raises(StoreNotFound):
        kvstore.open(path)
    with kvstore.open(path, "w") as store:
        assert store.info().store_id == writer._store_id.hex()
        assert len(store["s"]) == 4


# ---- threads ----


def test_appends_from_many_threads(path):
    """Nothing lost or doubled, and each thread's rows in its own order."""

    def append(thread):
        stream = store.stream("s")
        for number in range(400):
            width = 40_000 if number % 100 == 50 else number % 7
            times = np.full(width, 1.0)
            stream.append({"time": times, "v": np.full(width, thread * 1000 + number)})
            stream.append({"time": 1.0, "v": thread * 1000 + number})

    with kvstore.open(path, "w", flush_interval_s=0.01, segment_bytes=1 << 20) as store:
        store.stream("s").append({"time": [0.5], "v": [-1]})
        threads = [threading.Thread(target=append, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with kvstore.open(path) as store:
        found = np.array(values(store["s"].read(1.0, 1.0, ordered=True)))
        for thread in range(4):
            mine = found[found // 1000 == thread] - thread * 1000
            expected = [
                number
                for number in range(400)
                for _ in range((40_000 if number % 100 == 50 else number % 7) + 1)
            ]
            assert mine.tolist() == expected


def test_relative_paths_and_text_paths(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with kvstore.open("run.kv", "w") as store:
        store.stream("s").append(ROWS)
        store.flush()
        with kvstore.open(Path("run.kv")) as reader:
            assert len(reader["s"]) == 4
