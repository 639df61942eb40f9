"""Faults that a review of the whole store found: each stays pinned here."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest

import kvstore
from kvstore import active, codec, commit, layout
from kvstore.errors import PacketError, SchemaError, StoreClosed, StoreError
from kvstore.packets import PacketDecoder, encode
from kvstore.schema import Field


def values(path, stream="s", field="v"):
    with kvstore.open(path) as store:
        return [x for batch in store[stream].read() for x in batch[field].tolist()]


def test_a_new_writer_syncs_the_names_that_a_killed_one_left(path, monkeypatch):
    kvstore.open(path, "w").close()
    synced = []
    monkeypatch.setattr(layout, "sync_folder", synced.append)
    kvstore.open(path, "w").close()
    assert {path, path / "segments"} <= set(synced)


def test_what_append_accepted_while_another_thread_closes_is_committed(path):
    for _ in range(10):
        store = kvstore.open(path, "w", flush_interval_s=10)
        stream, accepted = store.stream("s"), []
        stream.append({"time": 0.0, "v": -1})
        before = len(stream) if "s" in store else 0
        started = threading.Event()

        def append(stream=stream, accepted=accepted, started=started):
            try:
                for k in range(10**6):
                    stream.append({"time": float(k), "v": k})
                    accepted.append(k)
                    started.set()
            except StoreClosed:
                pass

        thread = threading.Thread(target=append, daemon=True)
        thread.start()
        started.wait(10)
        store.close()
        thread.join(30)
        assert not thread.is_alive()
        with kvstore.open(path) as found:
            assert len(found["s"]) - before == len(accepted) + 1


def test_rows_stay_staged_while_memory_is_short(path, monkeypatch):
    with kvstore.open(path, "w", flush_interval_s=None) as store:
        stream = store.stream("s")
        stream.append({"time": 0.0, "v": 7})

        def short(*_, **__):
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr("kvstore.writer.codec.encode", short)
            with pytest.raises(MemoryError):
                store.flush()
        stream.append({"time": 1.0, "v": 8})
        store.flush()
    assert values(path) == [7, 8]


def test_without_memory_to_compress_rows_are_stored_as_they_are(monkeypatch):
    def short(*_):
        raise MemoryError

    monkeypatch.setattr(codec, "_shuffle", lambda *_, **__: 1)
    monkeypatch.setattr(codec, "_compress", short)
    assert codec.encode(np.zeros(1000), Field("v", "f8")).codec == codec.RAW


@pytest.mark.parametrize("dtype", ["<i8", "<M8[s]"])
def test_windows_that_end_between_two_ticks_lose_nothing(path, dtype):
    times = np.array([9, 10, 11]) * (10**9 if dtype == "<i8" else 1)
    with kvstore.open(path, "w") as store:
        store.stream("s").append({"time": times.astype(dtype), "v": np.arange(3)})
        store.flush()
        ends = [8.5, 9.5, 10.5, 11.5]
        counts = [store["s"].count(a, b, inclusive="left") for a, b in pairwise(ends)]
    assert counts == [1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("f8", 2**53 + 1),
        ("f4", np.int64(16777217)),
        ("f4", np.float64(0.1)),
        ("i4", 2**31),
        ("i4", 1.5),
    ],
)
def test_a_row_is_refused_or_kept_exactly_as_a_list_of_one_is(path, dtype, value):
    schema = kvstore.Schema((Field("time", "f8"), Field("v", dtype)))
    with kvstore.open(path, "w") as store:
        stream = store.stream("s", schema)
        for batch in ({"time": 1.0, "v": value}, {"time": np.ones(1), "v": np.array([value])}):
            with pytest.raises(SchemaError):
                stream.append(batch)


def test_append_in_a_forked_child_raises_although_the_lock_was_held(path):
    with kvstore.open(path, "w") as store:
        stream = store.stream("s")
        stream.append({"time": 1.0, "v": 1})
        with store._writer._committer.lock:
            pid = os.fork()
            if not pid:
                signal.alarm(20)
                try:
                    stream.append({"time": 2.0, "v": 2})
                except StoreClosed:
                    os._exit(7)
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_many_streams_wait_for_room_together(path, monkeypatch):
    monkeypatch.setattr(commit, "QUEUE_BYTES_MAX", 1 << 20)
    held = threading.Event()
    monkeypatch.setattr(active.Active, "commit", lambda *_: held.wait(180))
    store = kvstore.open(path, "w", flush_interval_s=0.01)
    streams = [store.stream(f"s{k}") for k in range(40)]
    accepted = []

    def append():
        for stream in streams:
            stream.append({"time": np.arange(12_500.0), "v": np.arange(12_500.0)})  # 200 kB
            accepted.append(1)

    thread = threading.Thread(target=append, daemon=True)
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    assert len(accepted) < 20  # 1 MiB in commit, 1 MiB beside it
    monkeypatch.undo()
    held.set()
    thread.join(30)
    store.close()
    assert len(accepted) == 40


def test_marks_with_single_rows_are_gathered_and_stay_with_their_rows(path):
    with kvstore.open(path, "w", flush_interval_s=10) as store:
        stream = store.stream("s")
        for k in range(1000):
            stream.append({"time": float(k), "v": k}, marks={"input": k})
        store.flush()
        assert store.info().streams[0].batches == 1
        assert store.marks == {"input": 999}


def test_options_out_of_bounds_make_nothing(path):
    with pytest.raises(StoreError, match="segment_bytes"):
        kvstore.open(path, "w", segment_bytes=1)
    assert not path.exists()


def test_another_time_field_for_an_existing_stream_is_refused(path):
    with kvstore.open(path, "w") as store:
        store.stream("s").append({"time": 1.0, "seen": 2.0})
        with pytest.raises(SchemaError, match="'time', not 'seen'"):
            store.stream("s", time="seen")


def frames(arrays):
    payload = pickle.dumps(arrays, protocol=5)
    return struct.pack(">I", len(payload)) + payload


def decoded(data):
    decoder = PacketDecoder()
    found = []
    while data:
        buffer = decoder.buffer()
        size = min(len(buffer), len(data))
        buffer[:size], data = data[:size], data[size:]
        decoder.received(size)
        found += decoder.packets()
    return found


def test_one_payload_cannot_serve_hundreds_of_fields():
    shared = np.arange(1000.0)
    bomb = frames({"time": shared, **{f"f{k}": shared for k in range(500)}})
    with pytest.raises(PacketError, match="bytes of arrays out of a packet"):
        decoded(bomb)
    assert len(decoded(frames({"time": shared, "again": shared}))) == 1


def test_text_in_a_packet_is_bounded():
    with pytest.raises(PacketError, match="bytes of text"):
        decoded(frames({"time": np.arange(3.0), "note": np.array(["x" * 2_000_000] * 3)}))


def test_half_a_character_is_refused_where_packets_are_written():
    with pytest.raises(PacketError, match="half a character"):
        encode({"note": np.array(["\ud800"], object)})


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_input_that_a_signal_cut_short_exits_3(path, tmp_path, kind):
    packets = b"".join(bytes(p) for p in encode({"time": np.arange(2e6), "v": np.arange(2e6)}))
    source = tmp_path / "in.packets"
    source.write_bytes(packets)
    command = [sys.executable, "-m", "kvstore", "write", str(path), "--stream", "s"]
    if kind == "file":
        source.unlink()
        os.mkfifo(source)  # a named file whose end never comes
        child = subprocess.Popen([*command, str(source)], stderr=subprocess.PIPE)
        pipe = source.open("wb", buffering=0)
    else:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        pipe = child.stdin
    with pipe:
        pipe.write(packets + packets[: len(packets) // 2])
        pipe.flush()
        child.send_signal(signal.SIGTERM)
        _, talk = child.communicate(timeout=180) if kind == "file" else (None, child.stderr.read())
    assert child.wait(180) == 3, talk
    assert b"not read to its end" in talk or b"unfinished packet" in talk
    child.stderr.close()
    assert len(values(path)) == 2_000_000


def test_a_reader_that_meets_a_reopening_does_not_take_writing_away(path):
    """It saw the file closed for a moment, and opens it as it was: for reading."""
    kvstore.open(path, "w").close()
    with kvstore.open(path) as reader, kvstore.open(path, "w") as store:
        reader._active.environment._reopen("shared")
        store.stream("s").append({"time": 1.0, "v": 1})
        store.flush()
        assert len(reader["s"]) == 1


def test_ordered_rows_of_batches_that_begin_long_before_the_range(path):
    """What such a batch has inside the range may come after rows of the batches that follow."""
    with kvstore.open(path, "w") as store:
        stream = store.stream("s")
        for times in ([6], [0, 1_000_014], [-1, 1_000_000]):
            stream.append({"time": np.array(times), "v": np.array(times)})
            store.flush()
        batches = stream.read(5, unit="ns", ordered=True)
        assert np.concatenate([b["time"] for b in batches]).tolist() == [6, 1_000_000, 1_000_014]
