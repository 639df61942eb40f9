"""Damaged stores: what is wrong is named, the rest is read, nothing false passes for data."""

from __future__ import annotations

import os
import shutil
import textwrap

import lmdb
import numpy as np
import pytest
from stores import MEMORY, SEED, run, start

import kvstore
from kvstore import DamageError, StoreError, StoreFormatError, codec
from kvstore.environment import TABLES

BATCHES = 12
ROWS = 50

CONTENT = """
    import sys
    import numpy as np
    import kvstore

    def content(number):
        v = np.arange(number * 50, number * 50 + 50)
        noise = v[:, None].astype("u8") * np.uint64(0x9E3779B97F4A7C15)
        noise = (noise ^ np.arange(40, dtype="u8")) ** 2
        text = np.array([f"row {n}" for n in noise[:, 0]], object)
        return {"time": v / 50, "v": v, "noise": noise, "text": text}
"""
scope: dict = {}
exec(textwrap.dedent(CONTENT), scope)
content = scope["content"]


@pytest.fixture
def path(broken_path):
    """A closed store of BATCHES batches, one second each, in several segments."""
    with kvstore.open(broken_path, "w", segment_bytes=64 << 10) as store:
        for number in range(BATCHES):
            store.stream("s").append(content(number), marks={"number": number})
            store.stream("other").append({"time": [float(number)], "v": [number]})
            store.flush()
    assert len(segments(broken_path)) > 3
    return broken_path


def segments(path):
    return sorted((path / "segments").glob("*.mdb"))


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 0x20
    file.write_bytes(data)


def table(file, name):
    """(key, value) of everything in one table of a segment."""
    with lmdb.open(
        str(file), subdir=False, readonly=True, lock=False, max_dbs=len(TABLES), create=False
    ) as env:
        db = env.open_db(name, create=False)
        with env.begin(db=db) as txn:
            return list(txn.cursor())


def flip_value(file, value):
    """Flip a bit in the middle of these bytes, and of what commits left of earlier copies."""
    data = file.read_bytes()
    damaged = bytearray(value)
    damaged[len(value) // 2] ^= 0x20
    assert value in data
    file.write_bytes(data.replace(value, damaged))


def read_rest(path, **options):
    """Numbers of the batches that can still be read, and the reports of damage."""
    reports: list[DamageError] = []
    with kvstore.open(path) as store:
        batches = list(store["s"].read(on_damage=reports.append, **options))
    numbers = []
    for batch in batches:
        numbers.append(int(batch["v"][0]) // ROWS)
        expected = content(numbers[-1])
        assert all(np.array_equal(batch[name], expected[name]) for name in batch)
    return numbers, [str(report) for report in reports]


# ---- blocks and records ----


def first_batch(file, kind=""):
    """Key and index record of the stream's first batch in the file; of one with inline blocks."""
    for key, value in table(file, b"index"):
        record = codec.unpacked(value, "record")
        if key[:4] == b"\0\0\0\1" and (kind != "inline" or len(record[4][0]) > 4):
            return key, value
    raise AssertionError(f"{file}: no such batch")


def block_of(file, kind):
    """Number of the first batch in the file, and the bytes of one of its blocks."""
    key, value = first_batch(file, kind)
    record = codec.unpacked(value, "record")
    number = int(record[2])
    if kind == "inline":
        return number, record[4][0][4]
    blocks = dict(table(file, b"blocks"))
    return number, blocks[key + {"large": b"\0\2", "text": b"\0\3"}[kind]]


@pytest.mark.parametrize(("kind", "field"), [("large", "noise"), ("text", "text")])
@pytest.mark.parametrize("which", [0, 1, -2])
def test_a_flipped_bit_in_a_block_is_named_and_the_rest_is_read(path, kind, field, which):
    file = segments(path)[which]
    number, block = block_of(file, kind)
    flip_value(file, block)
    numbers, reports = read_rest(path)
    assert numbers == [n for n in range(BATCHES) if n != number]
    (report,) = reports
    assert report.startswith("stream 's', 50 rows from 1970-01-01T00:00:")
    assert f"00:00:{number:02}" in report
    assert f"{number:02}.980000+00:00" in report
    assert f"field '{field}': checksum is" in report
    with kvstore.open(path) as store:
        with pytest.raises(DamageError, match=f"stream 's'.*{field}"):
            list(store["s"].read())
        assert store["s"].count() == BATCHES * ROWS
        fields = ["v", "time"]
        assert sum(len(b["v"]) for b in store["s"].read(fields=fields)) == BATCHES * ROWS
        sound = store["s"].read(float(number + 1), None)
        assert sum(len(b["v"]) for b in sound) == (BATCHES - 1 - number) * ROWS
        assert store["other"].count() == BATCHES


def test_a_flipped_bit_in_an_inline_block_is_found(path):
    """Small blocks stand in the index record: its checksum covers them."""
    file = segments(path)[1]
    number, block = block_of(file, "inline")
    _, value = first_batch(file, "inline")
    assert bytes(block) in value
    flip_value(file, value)
    numbers, reports = read_rest(path)
    assert numbers == [n for n in range(BATCHES) if n != number]
    (report,) = reports
    assert f"stream 's', a batch that begins at 1970-01-01T00:00:{number:02}+00:00" in report
    assert "its index record: the record fails its checksum" in report


def test_damage_in_ordered_reads_and_counts(path):
    file = segments(path)[1]
    number, block = block_of(file, "large")
    flip_value(file, block)
    assert read_rest(path, ordered=True)[0] == [n for n in range(BATCHES) if n != number]
    _, value = first_batch(segments(path)[2])
    flip_value(segments(path)[2], value)
    with kvstore.open(path) as store:
        with pytest.raises(DamageError, match="begins at"):
            store["s"].count()
        assert store["s"].count(0.0, 0.5) == 26


def test_a_flipped_bit_in_the_meta_table_is_named(path):
    file = segments(path)[-1]
    records = dict(table(file, b"meta"))
    sound = file.read_bytes()
    for key in (b"identity", b"commit", b"mark:number", b"total:\0\0\0\1", b"stream:\0\0\0\1"):
        flip_value(file, records[key])
        with pytest.raises(DamageError, match=key.split(b":")[0].decode()):
            kvstore.open(path)["s"].count()
        with pytest.raises(DamageError, match=key.split(b":")[0].decode()):
            kvstore.open(path, "w")
        file.write_bytes(sound)
    assert read_rest(path) == (list(range(BATCHES)), [])


@pytest.mark.parametrize("what", ["lost", "renamed"])
def test_a_missing_meta_record_is_noticed(path, what):
    """Keys have no checksum: under another one, a sealed segment was quietly forgotten."""
    key = b"sealed:" + (3).to_bytes(8, "big")
    with (
        lmdb.open(str(segments(path)[-1]), subdir=False, lock=False, max_dbs=len(TABLES)) as env,
        env.begin(write=True, db=env.open_db(b"meta", create=False)) as txn,
    ):
        record = txn.pop(key)
        if what == "renamed":
            txn.put(b"seeled:" + key[7:], record)
    for mode in ("r", "w"):
        with pytest.raises(DamageError, match="batches of stream 's', expected 12"):
            list(kvstore.open(path, mode)["s"].read())


def test_a_damaged_identity_file_is_named(path):
    for place in range((path / "store.msgpack").stat().st_size):
        flip(path / "store.msgpack", place)
        for mode in ("r", "w"):
            with pytest.raises(StoreFormatError, match=r"store\.msgpack is damaged"):
                kvstore.open(path, mode)
        flip(path / "store.msgpack", place)
    assert read_rest(path) == (list(range(BATCHES)), [])


# ---- files that are not what they should be ----


def newer_format(file):
    with lmdb.open(str(file), subdir=False, lock=False, max_dbs=len(TABLES)) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True, db=meta) as txn:
            _, *rest = codec.unpacked(txn.get(b"identity"), "identity")
            txn.put(b"identity", codec.packed([3, *rest]))


def foreign_lmdb(file):
    file.unlink()
    with lmdb.open(str(file), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.put(b"a", b"b")


def other_stores(file):
    path = file.parent.parent.with_name("other.kv")
    with kvstore.open(path, "w", segment_bytes=1 << 16) as store:
        for number in range(BATCHES):
            store.stream("s").append(content(number))
            store.flush()
    shutil.copy(path / "segments" / file.name, file)


def renamed(file):
    shutil.copy(file.with_name("00000001.mdb"), file)


BREAKS = {
    "empty": (lambda file: file.write_bytes(b""), "no LMDB 0.9 file"),
    "one byte": (lambda file: file.write_bytes(b"x"), "no LMDB 0.9 file"),
    "zeros": (lambda file: file.write_bytes(bytes(1 << 16)), "no LMDB 0.9 file"),
    "text": (lambda file: file.write_text("a letter\n" * 5000), "no LMDB 0.9 file"),
    "half": (lambda file: os.truncate(file, file.stat().st_size // 2), "truncated: "),
    "a byte short": (lambda file: os.truncate(file, last_byte(file)), "truncated: "),
    "missing": (lambda file: file.unlink(), "missing"),
    "foreign": (foreign_lmdb, "no segment of a store"),
    "another store's": (other_stores, "a segment of the store"),
    "renamed": (renamed, "holds segment 1"),
    "newer": (newer_format, "format version 3, this kvstore reads up to 2"),
}


def last_byte(file):
    """Length of the file without the last byte that LMDB uses."""
    with lmdb.open(str(file), subdir=False, readonly=True, lock=False) as env:
        return (env.info()["last_pgno"] + 1) * env.stat()["psize"] - 1


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_segment_does_not_affect_the_others(path, name):
    break_, message = BREAKS[name]
    file = segments(path)[2]
    lost = {
        int(codec.unpacked(value, "")[2])
        for key, value in table(file, b"index")
        if key[:4] == b"\0\0\0\1"
    }
    break_(file)
    numbers, reports = read_rest(path)
    assert numbers == [n for n in range(BATCHES) if n not in lost]
    (report,) = reports
    assert message in report
    assert f"stream 's', {len(lost) * ROWS} rows from 1970-01-01T00:00:{min(lost):02}" in report
    assert file.name in report
    with kvstore.open(path) as store:
        with pytest.raises(DamageError, match=message):
            list(store["s"].read())
        assert sum(len(b["v"]) for b in store["s"].read(None, min(lost) - 0.01)) == min(lost) * ROWS
    with kvstore.open(path, "w") as store:  # the active segment is sound: capture goes on
        store.stream("s").append(content(BATCHES))


@pytest.mark.parametrize("name", [name for name in BREAKS if name != "missing"])
def test_a_broken_active_segment_is_refused(path, name):
    break_, message = BREAKS[name]
    file = segments(path)[-1]
    break_(file)
    before = file.read_bytes()
    for mode in ("r", "w"):
        with pytest.raises(StoreFormatError, match=message):
            kvstore.open(path, mode)
    assert file.read_bytes() == before


@pytest.mark.parametrize("page_bytes", [0, 1, 255, 4095, 1 << 17, 1 << 31])
def test_a_page_size_that_cannot_be_is_refused(path, page_bytes):
    """LMDB divides by it."""
    for file in (segments(path)[-1], segments(path)[2]):
        data = bytearray(file.read_bytes())
        for meta_page in (0, 4096):
            data[meta_page + 40 : meta_page + 44] = page_bytes.to_bytes(4, "little")
        file.write_bytes(data)
    for mode in ("r", "w"):
        with pytest.raises(StoreFormatError, match=r"no LMDB 0\.9 file"):
            kvstore.open(path, mode)


def test_an_unreadable_segments_folder_is_named(path):
    for file in segments(path):
        file.unlink()
    with pytest.raises(StoreFormatError, match="no segment there"):
        kvstore.open(path)
    with pytest.raises(StoreFormatError, match="no segment there"):
        kvstore.open(path, "w")
    for left in (path / "segments").iterdir():
        left.unlink()
    (path / "segments").rmdir()
    for mode in ("r", "w"):
        with pytest.raises(StoreError, match="No such file"):
            kvstore.open(path, mode)


def test_other_files_among_the_segments_are_left_alone(path):
    for name in ("backup.mdb", "1.mdb", "notes.txt", "00000001.mdb.bak"):
        (path / "segments" / name).write_text("mine")
    assert read_rest(path)[0] == list(range(BATCHES))
    kvstore.open(path, "w").close()
    assert (path / "segments" / "backup.mdb").read_text() == "mine"


def test_a_newer_store_is_refused_by_its_version(path):
    _, *rest = codec.unpacked((path / "store.msgpack").read_bytes(), "")
    (path / "store.msgpack").write_bytes(codec.packed([3, *rest]))
    for mode in ("r", "w"):
        with pytest.raises(StoreFormatError, match="format version 3, this kvstore reads up to 2"):
            kvstore.open(path, mode)


def test_no_truncation_kills_the_reader(path):
    """In a child, as LMDB reads through a memory map: a SIGBUS would end it."""
    code = (
        CONTENT
        + """
    import os
    from pathlib import Path
    path, file = sys.argv[1:3]
    size = os.path.getsize(file)
    data = Path(file).read_bytes()
    for length in [*range(size - 4096, 0, -4096), *range(0, 20000, 1000), 15, 152]:
        Path(file).write_bytes(data[:length])
        reports = []
        try:
            with kvstore.open(path) as store:
                rows = sum(len(b["v"]) for b in store["s"].read(on_damage=reports.append))
                assert reports and rows < 600
        except kvstore.StoreFormatError as error:
            assert "truncated" in str(error) or "no LMDB 0.9 file" in str(error), error
        print("survived", length)
    """
    )
    for which in (1, -2):
        file = segments(path)[which]
        copy = file.read_bytes()
        assert len(run(code, path, file).splitlines()) >= 30
        file.write_bytes(copy)


# ---- anywhere at random ----

FLIPPER = (
    CONTENT
    + """
    import os, random, shutil
    from pathlib import Path
    source, scratch, first, end = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    expected = [content(number) for number in range(12)]

    def check(path):
        reports = []
        with kvstore.open(path) as store:
            found = list(store["s"].read(on_damage=reports.append))
            batches = [int(batch["v"][0]) // 50 for batch in found]
            for number, batch in zip(batches, found, strict=True):
                for name, values in expected[number].items():
                    assert np.array_equal(batch[name], values), "FALSE DATA"
            assert len(set(batches)) == len(batches), "TWICE"
            if batches != list(range(12)):
                assert reports, f"SILENTLY LOST: {batches}"
            return "damage" if reports else "sound"

    for seed in range(first, end):
        choose = random.Random(seed)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch)
        files = sorted(each for each in scratch.rglob("*") if each.suffix in (".mdb", ".msgpack"))
        file = choose.choice(files)
        data = bytearray(file.read_bytes())
        # Half of them where LMDB's structure is: in page headers and node lists.
        places = [choose.randrange(len(data)) for _ in range(choose.choice([1, 1, 3]))]
        if choose.random() < 0.5:
            pages = range(0, len(data), 4096)
            places = [choose.choice(pages) + choose.randrange(64) for _ in places]
        for place in places:
            data[min(place, len(data) - 1)] ^= 1 << choose.randrange(8)
        file.write_bytes(data)
        os.write(1, b"seed %d %s\\n" % (seed, file.name.encode()))
        try:
            outcome = check(scratch)
        except kvstore.KvstoreError as error:
            outcome = type(error).__name__
        except AssertionError as error:
            outcome = f"WRONG {error} {places}"
        except Exception as error:
            outcome = f"WRONG {error!r} {places}"
        os.write(1, b"outcome %d %s\\n" % (seed, outcome.encode()))
"""
)


def flips_anywhere(path, count):
    """Outcomes by seed; a seed without one killed its child."""
    outcomes: dict[int, str] = {}
    first = SEED
    scratch = MEMORY / f"kvstore-flips-{os.getpid()}"
    seed = first
    try:
        while seed < first + count:
            with start(FLIPPER, path, scratch, seed, first + count) as child:
                lines = child.stdout.read().splitlines()
            for line in lines:
                word, number, rest = line.split(" ", 2)
                outcomes[int(number)] = rest if word == "outcome" else f"killed in {rest}"
            assert child.returncode <= 0, lines[-3:]
            seed = max(outcomes) + 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return outcomes


def assert_never_silently_wrong(outcomes):
    wrong = {seed: outcome for seed, outcome in outcomes.items() if outcome.startswith("WRONG")}
    assert not wrong
    assert {"sound", "damage"} <= set(outcomes.values())


def test_flips_anywhere_are_never_silently_wrong(path):
    assert_never_silently_wrong(flips_anywhere(path, 150))


@pytest.mark.slow
def test_many_flips_anywhere_are_never_silently_wrong(path):
    assert_never_silently_wrong(flips_anywhere(path, 2_000))
