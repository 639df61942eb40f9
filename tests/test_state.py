"""The state of a store as a handle reads it again and again: the same as if read anew."""

from __future__ import annotations

import os

import lmdb
import numpy as np
import pytest

import kvstore
from kvstore import DamageError, Field, Schema, codec
from kvstore.environment import TABLES
from kvstore.layout import Layout
from kvstore.segment import Segment
from kvstore.state import Totals

TINY = {"segment_bytes": 64 << 10, "flush_interval_s": None}


def append(store, number, stream="s", time=None):
    """One batch of ten rows, as large as a tiny segment."""
    times = np.arange(10.0) + (10.0 * number if time is None else time)
    noise = np.random.default_rng(number).integers(0, 2**62, (10, 900))
    store.stream(stream).append({"time": times, "v": np.full(10, number), "noise": noise})


# ---- sums ----


def test_a_sum_is_what_adding_one_by_one_gives():
    random = np.random.default_rng(0)
    for count in (0, 1, 2, 7):
        parts = [
            Totals(3, 1, 5, 4, *sorted(random.integers(-9, 9, 2).tolist()), number)
            if random.integers(2)
            else Totals(next_sequence=number)
            for number in random.permutation(count).tolist()
        ]
        one_by_one = Totals()
        for part in parts:
            one_by_one = one_by_one.plus(part)
        assert Totals.summed(parts) == one_by_one


# ---- read again ----


def test_a_reader_that_goes_on_sees_what_a_new_one_does(path):
    """Over commits, new streams and fields, rolls, drops and marks."""
    with kvstore.open(path, "w", **TINY) as writer, kvstore.open(path) as reader:
        for number in range(40):
            append(writer, number, f"s{number % 3}")
            if number % 7 == 3:
                schema = writer[f"s{number % 3}"].schema
                added = Field(f"extra-{number}", "f8", fill=float(number))
                writer.stream(f"new-{number}", schema)
                writer.stream(f"s{number % 3}").add_fields(added)
                one_row = {"time": [float(number)], "v": [number]}
                writer.stream(f"small-{number}").append(one_row)
            writer.flush(marks={"number": number})
            if number % 10 == 9:
                writer.drop(10.0 * (number - 5))
                writer.pin(10.0 * (number - 1), 10.0 * number)
            with kvstore.open(path) as fresh:
                assert reader.state() == fresh.state()
                assert reader.info() == fresh.info()
        assert reader.info().segments > 3
        assert reader.state().dropped


def test_only_what_a_commit_changed_is_decoded_again(path, monkeypatch):
    real, decoded = Segment._part, []

    def part(self, key, value):
        decoded.append(key)
        return real(self, key, value)

    with kvstore.open(path, "w", **TINY) as writer, kvstore.open(path) as reader:
        for number in range(10):
            append(writer, number, f"s{number % 3}")
            writer.flush()
        reader.info()
        monkeypatch.setattr(Segment, "_part", part)
        writer.stream("s1").append(row(7.0))
        writer.flush()
        stream_id = reader.state().streams["s1"].stream_id.to_bytes(4, "big")
    lasting = {key for key in decoded if key.split(b":")[0] in (b"stream", b"total", b"sealed")}
    assert lasting == {b"total:" + stream_id}


def test_a_mark_that_was_changed_in_hand_is_read_as_stored(path):
    with kvstore.open(path, "w", **TINY) as writer, kvstore.open(path) as reader:
        writer.flush(marks={"offsets": [1, 2]})
        reader.marks["offsets"].append(3)
        append(writer, 0)
        writer.flush()
        assert reader.marks == {"offsets": [1, 2]}


# ---- damage ----


def meta(file):
    with lmdb.open(str(file), subdir=False, readonly=True, lock=False, max_dbs=len(TABLES)) as env:
        db = env.open_db(b"meta", create=False)
        with env.begin(db=db) as txn:
            return dict(txn.cursor())


def flip(file, value):
    """Flip a bit of each copy of these bytes in the file, in place: others have it mapped."""
    data, at = file.read_bytes(), -1
    with file.open("r+b") as stream:
        while (at := data.find(value, at + 1)) >= 0:
            os.pwrite(stream.fileno(), bytes([data[at + 9] ^ 0x20]), at + 9)


@pytest.mark.parametrize("kind", [b"sealed", b"stream", b"total"])
def test_a_record_that_is_damaged_once_it_was_read_is_found(broken_path, kind):
    with kvstore.open(broken_path, "w", **TINY) as writer:
        for number in range(5):
            append(writer, number)
            append(writer, number, "t")
            writer.flush()
    number = Layout(broken_path).active()
    file = Layout(broken_path).segment_path(number)
    copy = broken_path.parent / "copy.mdb"
    copy.write_bytes(file.read_bytes())
    with kvstore.open(broken_path, "w", **TINY) as writer, kvstore.open(broken_path) as reader:
        reader.info()
        key, value = next(item for item in meta(copy).items() if item[0].startswith(kind))
        flip(file, value)
        writer.flush(marks={"next": 1})
        with pytest.raises(DamageError, match=kind.decode()):
            reader.info()
    assert key


@pytest.mark.parametrize("mode", ["r", "w"])
def test_missing_totals_of_the_newest_segment_are_noticed(broken_path, mode):
    """Those of the sealed ones add up without them: its rows would be left out quietly."""
    with kvstore.open(broken_path, "w", **TINY) as writer:
        for number in range(3):
            append(writer, number)
            writer.flush()
        writer.stream("s").append(row(7.0))
        writer.flush()
        assert writer.state().totals[1].rows
    file = Layout(broken_path).segment_path(Layout(broken_path).active())
    with (
        lmdb.open(str(file), subdir=False, lock=False, max_dbs=len(TABLES)) as env,
        env.begin(write=True, db=env.open_db(b"meta", create=False)) as txn,
    ):
        assert txn.delete(b"total:\0\0\0\1")
    with pytest.raises(DamageError, match="batches of stream 's', expected 0"):
        list(kvstore.open(broken_path, mode)["s"].read())


# ---- schemas that are shared ----


def test_equal_schemas_of_a_store_are_one_object_and_others_are_not(path):
    time = Field("time", "f8")
    fields = {
        "a": Field("v", "i4"),
        "b": Field("v", "i4"),
        "unit": Field("v", "i4", unit="m"),
        "shape": Field("v", "i4", (1,)),
        "zero": Field("v", "f8", fill=0.0),
        "minus-zero": Field("v", "f8", fill=-0.0),
    }
    with kvstore.open(path, "w") as writer:
        for name, field in fields.items():
            writer.stream(name, Schema((time, field)))
    with kvstore.open(path) as reader:
        found = {name: reader[name].schema for name in fields}
    assert {name: schema.fields for name, schema in found.items()} == {
        name: (time, field) for name, field in fields.items()
    }
    assert found["a"] is found["b"]
    assert np.signbit(found["minus-zero"].fields[1].fill)
    assert not np.signbit(found["zero"].fields[1].fill)


# ---- which segments, in which order ----


def test_segments_that_overlap_are_read_in_the_order_of_their_keys(path):
    """Each joins once its turn has come: also where it begins at the very time of another."""
    random = np.random.default_rng(1)
    begins = [*random.integers(0, 60, 40).tolist(), 5, 5, 5]
    with kvstore.open(path, "w", **TINY) as writer:
        for number, begin in enumerate(begins):
            append(writer, number, time=float(begin))
            if number % 4:
                writer.stream("s").append(row(begin))
            writer.flush()
    with kvstore.open(path) as reader:
        assert reader.info().segments > 20
        keys = [
            (batch["time"][0], batch["v"][0]) for batch in reader["s"].read(fields=["time", "v"])
        ]
        every = len(begins) * 10 + sum(1 for number in range(len(begins)) if number % 4)
        assert [time for time, _ in keys] == sorted(time for time, _ in keys)
        assert reader["s"].count() == every
        for start, stop in ((0.0, 3.0), (5.0, 5.0), (14.5, 40.0), (65.0, None)):
            inside = list(reader["s"].read(start, stop, ordered=True))
            times = np.concatenate([[], *(batch["time"] for batch in inside)])
            whole = np.concatenate([b["time"] for b in reader["s"].read(ordered=True)])
            end = np.inf if stop is None else stop
            assert np.array_equal(times, whole[(whole >= start) & (whole <= end)])


def row(begin):
    return {"time": [begin + 0.5], "v": [-1], "noise": np.zeros((1, 900), "i8")}


def test_a_batch_that_straddles_an_end_has_its_times_decoded_once(path, monkeypatch):
    real, decoded = codec.decode, []

    def decode(data, kind, raw_bytes, expected, field, **options):
        decoded.append(field.name)
        return real(data, kind, raw_bytes, expected, field, **options)

    with kvstore.open(path, "w", **TINY) as writer:
        append(writer, 0)
        writer.flush()
        monkeypatch.setattr(codec, "decode", decode)
        batch = next(writer["s"].read(3.0, 6.5, fields=["v", "time", "noise"]))
        assert decoded == ["time", "v", "noise"]
        assert list(batch) == ["v", "time", "noise"]
        assert batch["time"].tolist() == [3.0, 4.0, 5.0, 6.0]
        assert batch["time"].base is None
        assert len(batch["v"]) == len(batch["noise"]) == 4
        del decoded[:]
        assert not list(writer["s"].read(3.2, 3.4))
        assert decoded == ["time"]


def test_numbers_of_more_than_eight_digits_are_the_highest(broken_path):
    with kvstore.open(broken_path, "w"):
        layout = Layout(broken_path)
    for name in ("99999999.mdb", "100000000.mdb", "100000001.tmp", "100000002.mdb-lock"):
        (broken_path / "segments" / name).touch()
    assert layout.active() == 100_000_000 == layout.numbers()[-1]
