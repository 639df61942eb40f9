"""A stream of packets into a store: all of it, in order, at the store's pace, faults named."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvstore
from kvstore import ingest as ingesting
from kvstore.errors import PacketError, SchemaError
from kvstore.ingest import Progress, Source, ingest
from kvstore.packets import PacketDecoder, encode

T0 = 1771342357.0


def particles(rows=2, at=T0, **changed):
    batch = {
        "timestamps": np.full(rows, at),
        "scattering": np.arange(rows * 1024, dtype="i4").reshape(rows, 64, 16),
        "spectral": np.arange(rows * 512, dtype="i4").reshape(rows, 32, 16),
    }
    return {name: x for name, x in {**batch, **changed}.items() if x is not None}


def framed(*batches):
    return b"".join(part for batch in batches for part in encode(batch))


def reader(data, piece=1 << 20):
    """Like a file's readinto: at most ``piece`` bytes a call, 0 at the end."""
    rest = memoryview(data)

    def readinto(buffer):
        nonlocal rest
        count = min(len(buffer), len(rest), piece)
        buffer[:count], rest = rest[:count], rest[count:]
        return count

    return readinto


def take(path, data, *, piece=1 << 20, frame_bytes_max=1 << 28, **options):
    """Ingest bytes into the store at ``path``; returns (what ingest returned, progress)."""
    progress = options.pop("progress", None) or Progress()
    decoder = PacketDecoder(frame_bytes_max=frame_bytes_max)
    with kvstore.open(path, mode="w") as store:
        done = ingest(store, reader(data, piece), decoder, progress=progress, **options)
    return done, progress


def rows_of(path, stream="particles"):
    """All rows of a stream, field by field."""
    with kvstore.open(path) as store:
        batches = list(store[stream].read())
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


# ---- all of it ----


@pytest.mark.parametrize("piece", [1, 4097, 1 << 20])
def test_what_came_in_is_what_is_read_however_the_bytes_arrive(path, piece):
    sent = [particles(rows, T0 + rows) for rows in (1, 3, 0, 30)]
    done, progress = take(path, framed(*sent), piece=piece)
    assert done
    assert progress.ended
    assert (progress.packets, progress.rows, progress.skipped) == (4, 34, 0)
    assert progress.bytes == len(framed(*sent))
    assert (progress.first, progress.last) == (T0 + 1, T0 + 30)
    found = rows_of(path)
    for name, column in found.items():
        assert np.array_equal(column, np.concatenate([batch[name] for batch in sent]))


def test_first_and_last_are_of_arrival_not_of_time(path):
    _, progress = take(path, framed(particles(1, T0), particles(1, T0 - 5)))
    assert (progress.first, progress.last) == (T0, T0 - 5)
    assert rows_of(path)["timestamps"].tolist() == [T0 - 5, T0]


def test_several_inputs_go_on_in_one_stream_and_one_count(path):
    progress = Progress()
    take(path, framed(particles(2)), progress=progress)
    take(path, framed(particles(3)), progress=progress)
    assert (progress.packets, progress.rows) == (2, 5)
    assert len(rows_of(path)["timestamps"]) == 5


def test_an_empty_input_leaves_an_empty_stream_of_particles(path):
    done, progress = take(path, b"")
    assert done
    assert (progress.packets, progress.first) == (0, None)
    with kvstore.open(path) as store:
        assert list(store) == ["particles"]
        assert store["particles"].schema == ingesting.PARTICLE_SCHEMA
        assert len(store["particles"]) == 0


def test_particles_keep_their_dtypes_to_the_letter(path):
    for name, array in {
        "scattering": np.ones((2, 64, 16), ">i2"),
        "timestamps": np.full(2, 1771342357.0, "f4"),
    }.items():
        with pytest.raises(PacketError, match=f"packet 0 at byte 0: field '{name}' has dtype"):
            take(path, framed(particles(2, **{name: array})))


def test_a_stream_called_particles_may_have_another_schema(path):
    with kvstore.open(path, "w") as store:
        store.stream("particles").append({"time": np.arange(2.0), "v": np.arange(2, dtype="f4")})
    take(path, framed({"time": np.arange(2.0), "v": np.arange(2, dtype="i2")}))
    with kvstore.open(path) as store:
        assert len(store["particles"]) == 4


# ---- other streams ----


def test_any_dict_of_arrays_makes_a_stream_of_its_own_shape(path):
    batch = {
        "seen": np.array([3, 1, 2], "M8[ms]"),
        "name": np.array(["a", "é€😀", ""]),
        "ok": np.array([True, False, True]),
        "level": np.arange(12, dtype=">f4").reshape(3, 2, 2),
    }
    _, progress = take(path, framed(batch), stream="door", time_field="seen")
    assert (progress.first, progress.last) == (batch["seen"][0], batch["seen"][2])
    found = rows_of(path, "door")
    order = [1, 2, 0]
    assert found["seen"].dtype == np.dtype("M8[ms]")
    assert found["name"].tolist() == ["é€😀", "", "a"]
    assert found["ok"].tolist() == [False, True, True]
    assert np.array_equal(found["level"], batch["level"][order])


def test_the_usual_names_of_a_time_field_need_not_be_given(path):
    for name in ("timestamps", "timestamp", "time"):
        take(path, framed({"x": np.arange(2), name: np.arange(2.0)}), stream=name)
        with kvstore.open(path) as store:
            assert store[name].time == name


def test_a_time_field_other_than_the_streams_own_is_refused(path):
    take(path, framed({"a": np.arange(2.0), "time": np.arange(2.0)}), stream="s")
    with pytest.raises(SchemaError, match=r"stream 's' is 'time', not 'a'.*--time-field"):
        take(path, b"", stream="s", time_field="a")
    take(path, framed({"a": np.arange(2.0), "time": np.arange(2.0)}), stream="s", time_field="time")
    assert len(rows_of(path, "s")["a"]) == 4


def test_a_time_field_that_nobody_names_is_asked_for(path):
    with pytest.raises(PacketError, match=r"packet 0 at byte 0: which field is the time.*--time-f"):
        take(path, framed({"when": np.arange(2.0)}), stream="s")
    with kvstore.open(path) as store:
        assert "s" not in store


# ---- malformed packets ----

BAD = {
    "no field at all": ({}, "expected the fields .*missing scattering, spectral, timestamps"),
    "a field missing": (particles(spectral=None), "missing spectral"),
    "a field too many": (particles(extra=np.zeros(2)), "unknown extra"),
    "another name": (particles(spectral=None, spectra=np.zeros(2)), "missing.*; unknown spectra"),
    "a scalar time": (particles(timestamps=np.array(3.0)), "'timestamps' is a scalar"),
    "times of two axes": (particles(timestamps=np.zeros((2, 1))), "timestamps"),
    "times as text": (particles(timestamps=np.array(["a", "b"])), "timestamps"),
    "times as integers": (particles(timestamps=np.array([2**62, 1])), "timestamps"),
    "NaN": (particles(timestamps=np.array([T0, np.nan])), "row 1: time nan"),
    "infinity": (particles(timestamps=np.array([-np.inf, T0])), "row 0: time -inf"),
    "milliseconds": (particles(timestamps=np.array([T0, 1.8e12])), "Milliseconds"),
    "one NaN": (particles(1, timestamps=np.array([np.nan])), "row 0: time nan"),
    "other rows": (particles(scattering=np.zeros((3, 64, 16), "i4")), r"'scattering'.*\(3, 64"),
    "other shape": (particles(spectral=np.zeros((2, 16, 32), "i4")), r"'spectral'.*\(2, 16, 32"),
    "flat values": (particles(spectral=np.zeros(2, "i4")), r"'spectral'.*\(2,\)"),
    "floats": (particles(scattering=np.zeros((2, 64, 16))), "'scattering'.*float64.*int32"),
    "wide integers": (particles(spectral=np.zeros((2, 32, 16), "i8")), "'spectral'.*int64.*int32"),
    "unsigned": (particles(spectral=np.zeros((2, 32, 16), "u4")), "'spectral'.*uint32.*int32"),
    "booleans out of range": (
        particles(ok=np.array([0, 2], "u1").view(bool)),
        r"ok\[1\] is no valid boolean",
    ),
}


@pytest.mark.parametrize(("batch", "reason"), BAD.values(), ids=BAD)
def test_a_bad_packet_is_named_by_number_and_offset_and_what_came_before_it_is_stored(
    path, batch, reason
):
    good = framed(particles(2))
    with pytest.raises(PacketError, match=f"^packet 2 at byte {2 * len(good)}: .*{reason}") as e:
        take(path, good + good + framed(batch) + good)
    assert e.value.whole
    assert len(rows_of(path)["timestamps"]) == 4


@pytest.mark.parametrize(("batch", "reason"), BAD.values(), ids=BAD)
def test_a_bad_packet_is_passed_over_where_the_caller_says_so(path, batch, reason):
    good = framed(particles(2))
    seen = []
    done, progress = take(path, good + framed(batch, batch) + good, on_error=seen.append)
    assert done
    assert (progress.packets, progress.rows, progress.skipped) == (2, 4, 2)
    assert [error.packet for error in seen] == [1, 2]
    assert len(rows_of(path)["timestamps"]) == 4


def test_a_first_packet_that_is_refused_leaves_no_stream_behind(path):
    batch = {"time": np.array([np.nan]), "x": np.arange(1)}
    with pytest.raises(PacketError, match="packet 0 at byte 0"):
        take(path, framed(batch), stream="s")
    with kvstore.open(path) as store:
        assert list(store) == []


def test_every_cut_keeps_the_packets_before_it_and_is_an_error_inside_one(path):
    one = framed({"time": np.arange(2.0)})
    data = one * 3
    for length in range(0, len(data) + 1, 7):
        progress = Progress()
        if length % len(one):
            with pytest.raises(PacketError, match="the input ends") as caught:
                take(path, data[:length], stream=f"s{length}", progress=progress)
            assert not caught.value.whole
        else:
            take(path, data[:length], stream=f"s{length}", progress=progress)
        assert progress.ended
        assert progress.rows == 2 * (length // len(one))
        with kvstore.open(path) as store:
            assert progress.rows == (len(store[f"s{length}"]) if progress.rows else 0)


def test_a_packet_over_the_limit_stops_even_who_skips_and_is_no_end_of_the_input(path):
    progress = Progress()
    good = framed(particles(1))
    with pytest.raises(PacketError, match="over the limit of 10000"):
        take(
            path,
            good + framed(particles(2)) + good,
            frame_bytes_max=10_000,
            on_error=lambda error: None,
            progress=progress,
        )
    assert not progress.ended
    assert (progress.rows, progress.skipped) == (1, 0)
    assert len(rows_of(path)["timestamps"]) == 1


def test_what_the_input_says_about_code_is_not_done(path):
    hostile = b"cos\nsystem\n(S'touch hacked'\ntR."
    with pytest.raises(PacketError, match="packet 0 at byte 0"):
        take(path, len(hostile).to_bytes(4) + hostile)


# ---- gaps ----


def rejected(path):
    with kvstore.open(path) as store:
        return [gap for gap in store.gaps() if gap.kind == "rejected"]


def test_a_rejected_packet_is_recorded_as_a_gap_on_the_wall_clock(path):
    before_ns = time.time_ns()
    with pytest.raises(PacketError):
        take(path, framed(particles(1), particles(timestamps=np.array([T0, np.nan]))))
    (gap,) = rejected(path)
    assert before_ns <= gap.start_ns <= gap.stop_ns <= time.time_ns()
    assert (gap.stream, gap.occurrences, gap.rows) == ("particles", 1, 0)
    assert "packet 1 at byte" in gap.detail
    with pytest.raises(PacketError):
        take(path, framed(particles(1))[:-1])
    assert sum(gap.occurrences for gap in rejected(path)) == 2


def test_a_flood_of_rejected_packets_is_recorded_each_second_as_one(path, monkeypatch):
    noted = []
    inner = kvstore.Store.note_gap

    def note_gap(self, kind, *args, **options):
        noted.append(options["occurrences"])
        inner(self, kind, *args, **options)

    monkeypatch.setattr(kvstore.Store, "note_gap", note_gap)
    bad = framed({"time": np.array([np.nan])})
    take(path, bad * 3000, stream="s", on_error=lambda _: None, time_field="time")
    assert sum(noted) == 3000
    assert len(noted) < 60  # at the begin, each second, at the end
    assert sum(gap.occurrences for gap in rejected(path)) == 3000


def test_what_waits_to_be_recorded_is_with_the_next_bytes(path, monkeypatch):
    monkeypatch.setattr(ingesting, "_TELL_S", 3600.0)
    clock = iter([10, 20, 30]).__next__
    with kvstore.open(path, "w") as store:
        found = ingesting.Rejections(store, "s", clock)
        for n in range(3):
            found.add(f"why {n}")
        monkeypatch.setattr(ingesting, "_TELL_S", 0.0)
        found.tell_due()
        found.tell_due()
        store.flush()
        (gap,) = store.gaps()
        assert (gap.start_ns, gap.stop_ns, gap.occurrences) == (10, 30, 3)


# ---- stopping and waiting ----


def test_it_stops_where_the_reader_says_so_and_keeps_what_was_complete(path):
    data = framed(particles(1), particles(1))[:-10]
    pieces = iter([data])

    def readinto(buffer):
        piece = next(pieces, None)
        if piece is None:
            return None
        buffer[: len(piece)] = piece
        return len(piece)

    progress = Progress()
    with kvstore.open(path, mode="w") as store:
        assert not ingest(store, readinto, PacketDecoder(), progress=progress)
    assert not progress.ended
    assert len(rows_of(path)["timestamps"]) == progress.rows == 1


def test_a_source_drains_what_waits_in_the_pipe_once_it_is_told_to_stop():
    data_out, data_in = os.pipe()
    stop_out, stop_in = os.pipe()
    try:
        os.write(data_in, b"abcdef")
        source = Source(data_out, stop_out)
        buffer = bytearray(4)
        assert source.readinto(memoryview(buffer)) == 4
        os.write(stop_in, b"!")
        assert source.readinto(memoryview(buffer)) == 2
        assert bytes(buffer[:2]) == b"ef"
        assert source.readinto(memoryview(buffer)) is None
        os.close(data_in)
        assert source.readinto(memoryview(buffer)) is None  # the end no longer counts
    finally:
        for fd in (data_out, stop_out, stop_in):
            os.close(fd)


def test_a_sender_that_never_rests_cannot_keep_a_source_from_stopping(monkeypatch):
    monkeypatch.setattr(ingesting, "_DRAINED_BYTES_MAX", 10)
    stop_out, stop_in = os.pipe()
    with Path("/dev/zero").open("rb", buffering=0) as endless:
        os.write(stop_in, b"!")
        source = Source(endless.fileno(), stop_out)
        buffer = memoryview(bytearray(4))
        assert [source.readinto(buffer) for _ in range(5)] == [4, 4, 2, None, None]
    os.close(stop_out)
    os.close(stop_in)


def test_a_source_without_a_signal_reads_to_the_end(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with (tmp_path / "file").open("rb", buffering=0) as file:
        source = Source(file.fileno())
        buffer = memoryview(bytearray(9))
        assert [source.readinto(buffer) for _ in range(2)] == [3, 0]


def test_the_input_waits_while_the_disk_is_slow(path, monkeypatch):
    """Back-pressure: with commits held up, no more is read than the queue and two groups hold."""
    from kvstore import commit  # noqa: PLC0415
    from kvstore.active import Active  # noqa: PLC0415

    monkeypatch.setattr(commit, "QUEUE_BYTES_MAX", 1 << 20)
    monkeypatch.setattr(commit, "GROUP_BYTES", 1 << 19)
    gate = threading.Event()
    inner = Active.commit

    def held(self, group):
        gate.wait(180)
        return inner(self, group)

    monkeypatch.setattr(Active, "commit", held)
    data = framed(*[particles(100, T0 + n) for n in range(30)])
    progress = Progress()
    with kvstore.open(path, mode="w") as store:
        thread = threading.Thread(
            target=ingest,
            args=(store, reader(data, 1 << 16), PacketDecoder()),
            kwargs={"progress": progress},
            daemon=True,
        )
        thread.start()
        seen = -1
        while seen != progress.bytes or not seen:
            seen = progress.bytes
            time.sleep(0.3)
        assert seen < 8 << 20 < len(data)
        gate.set()
        thread.join(180)
    assert progress.rows == 3000
    assert len(rows_of(path)["timestamps"]) == 3000


def test_rows_are_durable_within_the_flush_interval_while_the_input_stands_still(path):
    data_out, data_in = os.pipe()
    with kvstore.open(path, mode="w", flush_interval_s=0.05) as store:
        thread = threading.Thread(
            target=ingest,
            args=(store, Source(data_out).readinto, PacketDecoder()),
            kwargs={"progress": Progress()},
            daemon=True,
        )
        thread.start()
        os.write(data_in, framed(particles(3)))
        deadline = time.monotonic() + 120
        with kvstore.open(path) as reading:
            while "particles" not in reading or len(reading["particles"]) < 3:
                assert time.monotonic() < deadline, "not durable although its time is over"
                time.sleep(0.02)
        os.close(data_in)
        thread.join(180)
    os.close(data_out)
