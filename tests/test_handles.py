"""Handles on a store: what opens, what is refused, closing, pickling, threads."""

from __future__ import annotations

import os
import pickle
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import (
    Field,
    StoreClosed,
    StoreError,
    StoreFormatError,
    StoreNotFound,
    StreamNotFound,
    environment,
)

ROWS = {"time": np.array([1.0, 2.0, 2.0, 3.0]), "v": np.arange(4)}


def values(batches):
    return [value for batch in batches for value in batch["v"].tolist()]


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


def test_a_look_while_a_commit_waits_for_the_disk_is_not_the_last(path, writer, rows, monkeypatch):
    """Its number shows before its rows do: remembered together, the rows stayed unseen."""
    with kvstore.open(path) as reader:
        with monkeypatch.context() as patch:
            real = environment.Environment.last_commit
            patch.setattr(environment.Environment, "last_commit", lambda self: real(self) + 1)
            assert len(reader["s"]) == 4
        rows.append(ROWS)
        writer.flush()
        assert len(reader["s"]) == 8


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
