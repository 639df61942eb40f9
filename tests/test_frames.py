"""A batch of megabytes is checked and decompressed by its frames: what a range needs, no more."""

from __future__ import annotations

import lmdb
import numpy as np
import pytest
from golden.independent_reader import ENGINE, read_store, read_tables, record

import kvstore
from kvstore import DamageError, codec, recover, verify

ROWS = 600
FIRST = 128  # rows of the first frame: half a megabyte of the widest field
NOISE = np.random.default_rng(3).integers(-(2**31), 2**31, (ROWS, 64, 16), np.int32)
CONTENTS = {"counts": NOISE >> 24, "noise": NOISE}
HALF = slice(FIRST, ROWS)


@pytest.fixture(params=CONTENTS)
def content(request):
    """One batch whose rows are a second apart, as a wide field and one of half its width."""
    wide = CONTENTS[request.param]
    return {"time": np.arange(float(ROWS)), "wide": wide, "half": wide[:, :32].copy()}


@pytest.fixture
def store_path(broken_path, content):
    """Three such batches, a thousand seconds apart."""
    with kvstore.open(broken_path, "w") as store:
        for number in range(3):
            store.stream("s").append(content | {"time": content["time"] + 1000 * number})
    return broken_path


def read(path, *ends, **options):
    with kvstore.open(path) as store:
        return list(store["s"].read(*ends, **options))


def same(batch, content, part, *, after=0):
    assert np.array_equal(batch["time"], content["time"][part] + after)
    assert all(np.array_equal(batch[name], content[name][part]) for name in ("wide", "half"))


def flip(path, *, batch, name, row):
    """One bit in what is stored of a row, or beside it in the same frame."""
    (file,) = (path / "segments").glob("*.mdb")
    tables = read_tables(file)
    key = sorted(tables["index"])[batch]
    number = ["time", "wide", "half"].index(name)
    place = 0
    for rows, stored_bytes, _ in record(tables["index"][key])[5][number]:
        if row < rows:
            break
        row, place = row - rows, place + stored_bytes
    block = tables["blocks"][key + number.to_bytes(2, "big")]
    stored = block[place : place + stored_bytes]
    data = bytearray(file.read_bytes())
    at = -1
    for _ in range(batch + 1):  # all three batches hold the same
        at = data.index(stored, at + 1)
    data[at + stored_bytes // 2] ^= 8
    file.write_bytes(data)


def test_a_read_begins_with_a_short_piece_and_goes_on_with_whole_batches(store_path, content):
    found = read(store_path)
    assert [len(batch["time"]) for batch in found] == [FIRST, ROWS - FIRST, ROWS, ROWS]
    same(found[0], content, slice(FIRST))
    same(found[1], content, HALF)
    same(found[3], content, slice(None), after=2000)
    assert all(array.flags.owndata for batch in found for array in batch.values())
    assert len(read(store_path, fields=["time"])) == 3
    assert [len(batch["half"]) for batch in read(store_path, fields=["half"])][:2] == [128, 472]
    same(read(store_path, ordered=True)[0], content, slice(None))


@pytest.mark.parametrize("ends", [(0, 1), (5, 599), (127, 128), (128, 599), (130, 400), (7, 7)])
def test_a_range_that_cuts_a_batch_has_its_rows_in_at_most_two_pieces(store_path, content, ends):
    start, stop = ends
    found = read(store_path, float(start), float(stop))
    assert 1 <= len(found) <= 2
    joined = {name: np.concatenate([each[name] for each in found]) for name in content}
    same(joined, content, slice(start, stop + 1))


def test_damage_elsewhere_in_a_batch_costs_a_range_nothing(store_path, content):
    flip(store_path, batch=0, name="wide", row=300)
    for ends in ((0.0, 100.0), (5.0, 127.0), (512.0, 599.0)):
        same(read(store_path, *ends)[0], content, slice(int(ends[0]), int(ends[1]) + 1))
    for ends in ((0.0, 128.0), (300.0, 301.0), (511.0, 1000.0)):
        with pytest.raises(DamageError, match="field 'wide': checksum"):
            read(store_path, *ends)
    assert len(read(store_path, fields=["half"])) == 4


def test_damage_behind_the_first_piece_is_told_with_what_was_given(store_path, content):
    flip(store_path, batch=0, name="half", row=599)
    reports = []
    found = read(store_path, on_damage=reports.append)
    assert [len(batch["time"]) for batch in found] == [FIRST, ROWS, ROWS]
    same(found[0], content, slice(FIRST))
    assert len(reports) == 1
    assert "all but the first 128 of 600 rows" in str(reports[0])
    assert "field 'half'" in str(reports[0])


def test_damage_in_the_first_piece_costs_the_batch_as_ever(store_path, content):
    flip(store_path, batch=0, name="half", row=1)
    reports = []
    found = read(store_path, on_damage=reports.append)
    assert [len(batch["time"]) for batch in found] == [FIRST, ROWS - FIRST, ROWS]
    same(found[0], content, slice(FIRST), after=1000)
    assert str(reports[0]).startswith("stream 's', 600 rows from ")


def with_frames(path, change):
    """The record of the second batch with other frames, under its right checksum."""
    (file,) = (path / "segments").glob("*.mdb")
    with lmdb.open(str(file), subdir=False, lock=False, max_dbs=4, **ENGINE) as env:
        table = env.open_db(b"index", create=False)
        with env.begin(write=True, db=table) as txn:
            key, value = list(txn.cursor())[1]
            entry = codec.unpacked(value, "")
            entry[5] = change(entry[5])
            txn.put(key, codec.packed(entry))


def off_by(place, number):
    def change(frames):
        frames[1][1][place] += number
        return frames

    return change


ODD = {
    "rows": off_by(0, 1),
    "bytes": off_by(1, -1),
    "negative": off_by(1, -(10**9)),
    "no rows": lambda frames: [[], [[0, 0, 0], *frames[1]], frames[2]],
    "two numbers": lambda frames: [[], [each[:2] for each in frames[1]], frames[2]],
    "floats": lambda frames: [[], [[float(n) for n in each] for each in frames[1]], frames[2]],
    "no checksum": lambda frames: [[], [[*each[:2], -1] for each in frames[1]], frames[2]],
    "too few fields": lambda frames: frames[:1],
    "too many": lambda frames: [*frames, []],
    "a number": lambda frames: [7, *frames[1:]],
    "nothing": lambda _: None,
    "text": lambda _: "abc",
}


@pytest.mark.parametrize("name", ODD)
def test_frames_that_cannot_be_are_reported_and_cost_that_batch(name, store_path, tmp_path):
    with_frames(store_path, ODD[name])
    (damage,) = verify(store_path).damages
    assert damage.stream == "s"
    assert recover(store_path, tmp_path / "new.kv").rows in (2 * ROWS, 3 * ROWS)
    with kvstore.open(tmp_path / "new.kv") as store:
        assert sum(len(batch["time"]) for batch in store["s"].read()) >= 2 * ROWS


def test_a_wrong_checksum_of_a_frame_is_found_by_verify_and_costs_recover_nothing(
    store_path, tmp_path, content
):
    with_frames(store_path, off_by(2, -1))
    (damage,) = verify(store_path).damages
    assert (damage.stream, damage.field) == ("s", "wide")
    recover(store_path, tmp_path / "new.kv")
    same(read(tmp_path / "new.kv")[2], content, slice(None), after=1000)
    assert verify(tmp_path / "new.kv").damages == ()


def test_an_independent_reader_finds_the_frames(store_path, content):
    rows = read_store(store_path)["streams"]["s"]["rows"]
    assert rows["half"][ROWS + 5] == content["half"][5].tolist()
