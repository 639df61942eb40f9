"""Stores whose content is hostile: verify, recover and backup refuse or report, and do no more.

Records are given any values under right checksums; pages are flipped, zeroed, swapped, torn and
filled with noise; disks withhold sectors. None of the three may raise anything but our errors,
hang, write to the source, or call something sound that reads differently.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import time

import pytest
from stores import SEED
from test_damage import BATCHES, ROWS, block_of, content, segments, table
from test_verify import damages, edited, files_of

import kvstore
from kvstore import backup, codec, recover, verify
from kvstore.errors import KvstoreError
from kvstore.pages import PageFile

PAGE = 4096
SLOW_S = 30.0  # of CPU time; a round takes 0.2 s
ODD = (
    None, True, -1, 0, 1, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63), 10**9, 1.5, float("nan"),
    float("inf"), "", "x", "s", "time", "<f8", "V1000000000", "M8[ns]", "text", b"", b"x" * 30,
    [], {}, [[]], {1: 2}, {"a": []}, [1] * 10,
)  # fmt: skip


@pytest.fixture
def path(broken_path):
    """A closed store of BATCHES batches in several segments, with pins and gaps."""
    with kvstore.open(broken_path, "w", segment_bytes=64 << 10) as store:
        for number in range(BATCHES):
            store.stream("s").append(content(number), marks={"number": number})
            store.stream("other").append({"time": [float(number)], "v": [number]})
            store.flush()
        store.pin(3, 5, "door", unit="s")
        store.note_gap("rejected", start_ns=1, stop_ns=2, detail="for the tests")
    return broken_path


def dump(path):
    """All that a store says, but for what differs between a store and its copy."""
    with kvstore.open(path) as store:
        info = store.info()._replace(path="", store_id="", file_bytes=0, created_ns=0)
        rows = [[{k: v.tolist() for k, v in b.items()} for b in store[n].read()] for n in store]
        return repr((info, rows, store.marks, store.pins(), store.gaps(), store.settings))


def mutated(value, choose):
    if isinstance(value, list | dict) and value and choose.random() < 0.85:
        value = value.copy()
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = choose.choice(places)
        if isinstance(value, list) and choose.random() < 0.2:
            value.insert(place, choose.choice(ODD))
        else:
            value[place] = mutated(value[place], choose)
        return value
    if isinstance(value, int) and choose.random() < 0.4:
        return value + choose.choice([-1, 1, 1000, -1000, 10**6])
    return choose.choice(ODD)


def with_hostile_records(path, choose):
    """Any value under a right checksum. Marks and comments may hold any: they are left alone."""
    name = choose.choice([b"index", b"index", b"meta", b"order", b"blocks"])

    def change(txn):
        items = [(k, v) for k, v in txn.cursor() if not k.startswith(b"mark:")]
        if not items:
            return
        key, value = choose.choice(items)
        if name in (b"index", b"meta"):
            record = mutated(codec.unpacked(value, ""), choose)
            txn.put(key, codec.packed(record))
        else:
            txn.put(key, choose.randbytes(choose.randrange(40)))
        if choose.random() < 0.2:
            txn.put(choose.randbytes(choose.choice([1, 12, 21, 23])), codec.packed([1]))

    edited(choose.choice(segments(path)), name, change)


def with_mutated_pages(path, choose):
    file = choose.choice([*segments(path), path / "store.msgpack"])
    data = bytearray(file.read_bytes())
    count = max(len(data) // PAGE, 1)
    a, b = (choose.randrange(count) * PAGE for _ in range(2))
    what = choose.choice(["flip", "flips", "zero", "swap", "torn", "header", "cut", "noise"])
    if what in ("flip", "flips") or len(data) < PAGE:
        for _ in range(1 if what == "flip" else 60):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif what == "zero":
        data[a : a + PAGE] = bytes(PAGE)
    elif what == "swap":
        data[a : a + PAGE], data[b : b + PAGE] = data[b : b + PAGE], data[a : a + PAGE]
    elif what == "torn":
        half = 512 * choose.randrange(8)
        data[a + half : a + PAGE] = data[b + half : b + PAGE]
    elif what == "header":
        place = a + choose.randrange(0, 64, 2)
        data[place : place + 2] = choose.randbytes(2)
    elif what == "cut":
        del data[choose.randrange(len(data)) :]
    else:
        data[a + 16 : a + PAGE] = choose.randbytes(PAGE - 16)
    file.write_bytes(data)


def attempted(act):
    """What it gives, or None where it refuses; in time."""
    begun = time.process_time()
    try:
        return act()
    except KvstoreError:
        return None
    finally:
        assert time.process_time() - begun < SLOW_S


def attack(path, mutate, count, *, seed):
    sound, saved = dump(path), path.with_name("saved.kv")
    shutil.copytree(path, saved)
    new, copy = path.with_name("new.kv"), path.with_name("copy.kv")
    for number in range(seed, seed + count):
        mutate(path, random.Random(number))
        before = files_of(path)
        report = attempted(lambda: verify(path))
        assert report is not None, number
        if not report.damages and mutate is with_mutated_pages:
            assert dump(path) == sound, number
        attempted(lambda: recover(path, new))
        attempted(lambda: backup(path, copy))
        assert files_of(path) == before, number
        for each in (new, copy, path):
            shutil.rmtree(each, ignore_errors=True)
        shutil.copytree(saved, path)


@pytest.mark.parametrize("mutate", [with_hostile_records, with_mutated_pages])
def test_whatever_a_store_holds_they_report_or_refuse(path, mutate):
    attack(path, mutate, 12, seed=SEED)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [with_hostile_records, with_mutated_pages])
def test_whatever_a_store_holds_in_many_rounds(path, mutate):
    attack(path, mutate, 250, seed=SEED)


# ---- what random mutation hardly meets ----


def put(file, name, key, record):
    edited(file, name, lambda txn: txn.put(key, codec.packed(record)))


def test_totals_beyond_all_reason_cost_neither_time_nor_memory(path):
    file = segments(path)[1]
    key = b"total:\0\0\0\1"
    _, _, *rest = codec.unpacked(dict(table(file, b"meta"))[key], "")
    put(file, b"meta", key, [2**62, 2**62, *rest[:-1], 2**62 + 5])
    assert any("lacks the batches" in each.what for each in damages(path))
    report = recover(path, path.with_name("new.kv"))
    assert report.rows == BATCHES * (ROWS + 1)


def test_a_batch_of_more_rows_than_there_is_memory_is_refused(path):
    file = segments(path)[1]
    key, value = next((k, v) for k, v in table(file, b"index") if k[:4] == b"\0\0\0\1")
    record = codec.unpacked(value, "")
    for rows in (2**40, 2**62):
        put(file, b"index", key, [key, rows, *record[2:]])
        assert any("bytes for" in each.what for each in damages(path))


def test_a_tree_that_bites_its_tail_ends(path):
    """A branch page whose children are its own parent, as often as they fit."""
    with kvstore.open(path, "w", segment_bytes=1 << 30) as store:
        for number in range(300):
            store.stream("t").append({"time": [float(number)], "v": [number]})
            store.flush()
    file = segments(path)[-1]
    data = bytearray(file.read_bytes())
    found = []
    with PageFile(file, found.append) as pages:
        root = pages.tables[b"order"].root
        assert pages.tables[b"order"].depth > 1
    begin = root * PAGE
    lower = int.from_bytes(data[begin + 12 : begin + 14], "little")
    for place in range(begin + 16, begin + lower, 2):
        node = begin + int.from_bytes(data[place : place + 2], "little")
        data[node : node + 6] = root.to_bytes(6, "little")
    file.write_bytes(data)
    assert any("in the tree twice" in each.what for each in damages(path))
    with kvstore.open(path, "w"):
        assert any("in the tree twice" in each.what for each in damages(path))


# ---- disks that withhold ----


@pytest.fixture
def bad_sector(monkeypatch):
    """Reading these bytes of this file fails, as on a failing disk."""
    pread = os.pread
    bad = {}

    def failing(fd, size, place):
        for file, (begin, end) in bad.items():
            same = os.path.sameopenfile(fd, file)
            if same and place < end and begin < place + size:
                if place >= begin:
                    raise OSError(errno.EIO, "Input/output error")
                return pread(fd, begin - place, place)
        return pread(fd, size, place)

    monkeypatch.setattr(os, "pread", failing)
    opened = []

    def spoil(path, begin, end):
        opened.append(path.open("rb"))
        bad[opened[-1].fileno()] = (begin, end)

    yield spoil
    for file in opened:
        file.close()


def test_a_bad_sector_costs_the_batches_on_it(path, bad_sector):
    file = segments(path)[1]
    number, block = block_of(file, "large")
    place = file.read_bytes().index(block) // PAGE * PAGE
    bad_sector(file, place + PAGE, place + 2 * PAGE)
    (found,) = damages(path)
    assert (found.segment, found.field, found.rows) == (2, "noise", ROWS)
    target = path.with_name("new.kv")
    (loss,) = recover(path, target).losses
    assert (loss.field, loss.start) == (found.field, found.start)
    with kvstore.open(target) as store:
        assert store["s"].count() == (BATCHES - 1) * ROWS
    (reported,) = backup(path, path.with_name("copy.kv")).damages
    assert (reported.segment, reported.field) == (2, "noise")
    assert number == int(float(found.start[17:19]))


def test_a_bad_sector_in_the_tree_is_survived(path, bad_sector):
    file = segments(path)[1]
    with PageFile(file, print) as pages:
        root = pages.tables[b"index"].root
    bad_sector(file, root * PAGE, (root + 1) * PAGE)
    assert any("Input/output error" in each.what for each in damages(path))
    report = recover(path, path.with_name("new.kv"))
    assert report.rows >= (BATCHES - 3) * (ROWS + 1)


def test_a_file_that_may_not_be_read_is_no_damage(path, monkeypatch):
    opening = os.open

    def refused(file, *args, **options):
        if str(file).endswith("2.mdb"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opening(file, *args, **options)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(kvstore.StoreError, match="Permission denied"):
        verify(path)
    with pytest.raises(kvstore.StoreError, match="Permission denied"):
        recover(path, path.with_name("new.kv"))
    assert not path.with_name("new.kv").exists()
