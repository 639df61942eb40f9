"""docs/format.md, the golden stores, an independent reader and today's kvstore, held together.

The golden stores are what earlier kvstores wrote: they are only ever added to. Their values
stand beside them as JSON, made from what went in. See tests/golden/make_stores.py.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import struct
import sys
from collections import Counter
from pathlib import Path

import lmdb
import numcodecs.blosc
import numpy as np
import pytest
from golden import independent_reader
from golden.independent_reader import ENGINE, read_tables, record
from golden.make_stores import STORES, as_json, digested, make_store, plain

import kvstore
from kvstore import backup, codec, layout, recover, state, verify
from kvstore.errors import StoreFormatError, StoreNotFound
from kvstore.timestamps import format_time

GOLDEN = Path(__file__).parent / "golden" / "stores"
FORMAT = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
READER_MAY_IMPORT = {"lmdb", "lz4", "msgpack", "xxhash"}


@pytest.fixture(params=sorted(STORES))
def name(request):
    return request.param


@pytest.fixture
def golden(name, tmp_path):
    return shutil.copytree(GOLDEN / name, tmp_path / name)


def expected(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def version_of(path):
    return record((path / "store.msgpack").read_bytes())[0]


def comparable(found):
    for stream in found["streams"].values():
        stream["rows"] = {name: digested(column) for name, column in stream["rows"].items()}
    return as_json(found)


def snapshot(folder):
    files = [folder, *sorted(folder.rglob("*"))]
    return [(f.name, f.stat().st_mtime_ns, f.is_file() and f.read_bytes()) for f in files]


# ---- reading ----


def found_by_kvstore(path):
    with kvstore.open(path) as store:
        streams = {}
        for name in store:
            stream = store[name]
            batches = list(stream.read(ordered=True))
            columns = {
                field.name: [row for batch in batches for row in plain(batch[field.name])]
                for field in stream.schema.fields
            }
            fields = [field.to_record() for field in stream.schema.fields]
            streams[name] = {"time": stream.schema.time, "fields": fields, "rows": columns}
        segments = store.info().segments
        return {"segments": segments, "marks": store.marks, "streams": streams}


def test_kvstore_reads_golden_stores_and_changes_nothing(name, golden):
    before = snapshot(golden)
    assert comparable(found_by_kvstore(golden)) == as_json(expected(name))
    assert snapshot(golden) == before


def test_every_range_of_golden_rows_is_exact(name):
    with kvstore.open(GOLDEN / name) as store:
        for about in (store[each] for each in store):
            dtype, time = about.schema.time_dtype, about.schema.time
            rows = [b[time] for b in about.read(fields=[time], ordered=True)]
            times = np.concatenate(rows)
            some = [times[:: max(least, len(times) // 20)] for least in (9, 13)]
            for start, stop in [(a, b) for a in some[0] for b in some[1] if a <= b]:
                ends = [format_time(end, dtype) for end in (start, stop)]
                inside = times[(times >= start) & (times <= stop)]
                assert about.count(*ends) == len(inside)


def test_an_independent_reader_reads_golden_stores(name):
    assert comparable(independent_reader.read_store(GOLDEN / name)) == as_json(expected(name))


def test_the_independent_reader_shares_nothing_with_kvstore():
    tree = ast.parse(Path(independent_reader.__file__).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all(isinstance(node, ast.Import) or not node.level for node in nodes)
    modules = [getattr(node, "module", None) or node.names[0].name for node in nodes]
    names = {module.split(".")[0] for module in modules}
    assert names - sys.stdlib_module_names == READER_MAY_IMPORT


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("values", [1, 17, 127, 128, 5_000, 70_001, 200_000])
def test_the_documented_blosc_container_is_what_blosc_writes(width, values):
    rng = np.random.default_rng(values)
    mixed = rng.integers(0, 2**62, values) * (np.arange(values) % 4000 < 1000)
    array = (mixed + np.arange(values) // 3).astype(f"u{width}")
    for level in (1, 5, 9):
        packed = numcodecs.blosc.compress(array, b"lz4", level, numcodecs.blosc.SHUFFLE, 0)
        if len(packed) < array.nbytes:  # else kvstore stores the block raw
            assert independent_reader.blosc(packed) == array.tobytes()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("values", [1, 120, 127, 128, 136, 5_000, 70_001, 140_008])
def test_the_documented_bit_shuffle_is_what_blosc_does(width, values):
    """With blocks that are no whole number of eights, split ones, and incompressible ones."""
    for high in (3, 100, 256**width // 2 - 1):
        rng = np.random.default_rng(values)
        array = rng.integers(0, high, values).astype(f"u{width}")
        packed = numcodecs.blosc.compress(array, b"lz4", 5, numcodecs.blosc.BITSHUFFLE, 0)
        assert independent_reader.blosc(packed) == array.tobytes()


# ---- writing ----


def without_codec_choices(path, leave_out=(), *, is_old=False):
    """All keys and values of a store, with blocks decompressed.

    What the compressors make of the same bytes may differ between their releases. is_old: leaves
    out what format version 2 does otherwise: its number, and what is compressed how far.
    """
    found = [versionless(record((path / "store.msgpack").read_bytes()), is_old=is_old)]
    for file in sorted((path / "segments").iterdir()):
        tables = read_tables(file)
        meta = {key: record(value) for key, value in tables["meta"].items()}
        meta[b"identity"] = versionless(meta[b"identity"], is_old=is_old)
        dtypes = {key[7:]: value[3] for key, value in meta.items() if key[:7] == b"stream:"}
        index = {key: record(value) for key, value in tables["index"].items()}
        for key, value in index.items():
            blocks = list(zip(dtypes[key[:4]], value[4], strict=False))
            opening = (opened(tables, key, n, *each) for n, each in enumerate(blocks))
            value[4] = [each[-1] if is_old else each for each in opening]
            frames = [[rows for rows, *_ in each] for each in value[5]] if value[5:] else []
            value[5:] = [] if is_old else [frames]
        meta = {key: value for key, value in meta.items() if not key.startswith(tuple(leave_out))}
        for key, value in meta.items():
            if key.startswith(b"total:"):
                value[3] = "stored bytes"
            if key.startswith(b"sealed:"):
                value[1] = "file bytes"
                value[3] = {k: [*t[:3], "stored bytes", *t[4:]] for k, t in value[3].items()}
                del value[5 if not leave_out else 4 :]
        large = [] if is_old else sorted(tables["blocks"])
        found.append((file.name, index, large, tables["order"], meta))
    return found


def versionless(identity, *, is_old):
    return ["version" if is_old else identity[0], *identity[1:]]


def opened(tables, key, number, field, block):
    """Codec, raw bytes, length of the record, and the raw bytes themselves."""
    kind, raw_bytes, *_, data = [*block, tables["blocks"].get(key + number.to_bytes(2, "big"))][:5]
    if kind == codec.TEXT:
        data = codec.lz4.block.decompress(data, uncompressed_size=raw_bytes)
    elif kind != codec.RAW:
        data = independent_reader.frames(data, kind, field[1], int(np.prod(field[2])))
    return kind, raw_bytes, len(block), data


def test_todays_writer_makes_the_same_records(name, tmp_path):
    """The same values under the same keys; for stores of this version, in the same blocks."""
    fresh = make_store(name, tmp_path)
    assert (tmp_path / f"{name}.json").read_text() == (GOLDEN / f"{name}.json").read_text()
    # The first golden stores were made before a store kept sessions, limits and a clock.
    is_old = version_of(GOLDEN / name) < state.FORMAT
    new = (b"clock", b"session", b"settings", b"gap:") if is_old and name != "operated" else ()
    stored = without_codec_choices(GOLDEN / name, new, is_old=is_old)
    assert repr(without_codec_choices(fresh, new, is_old=is_old)) == repr(stored)
    assert version_of(fresh) == state.FORMAT


def test_golden_stores_hold_every_case_of_the_format():
    codecs, classes, versions, shapes = Counter(), set(), set(), set()
    listed = set()
    for file in GOLDEN.glob("*/segments/*.mdb"):
        tables = read_tables(file)
        for key, value in tables["index"].items():
            classes.add(key[4])
            codecs.update((block[0], len(block) == 5) for block in record(value)[4])
            shapes |= set(frames_of(tables, key, record(value)[4]))
            listed |= set(listed_frames(*record(value)[4:]))
        for key, value in tables["meta"].items():
            versions |= {len(record(value)[2])} if key.startswith(b"stream:") else set()
    assert set(codecs) == {(kind, inline) for kind in range(4) for inline in (False, True)}
    assert {(codec.RAW, 0), (codec.RAW, 3), (codec.FRAMES, 0), (codec.FRAMES, 3)} < listed
    assert {0, 1, 64} < classes
    assert versions == {1, 2}
    assert {version_of(each) for each in GOLDEN.glob("*/")} == set(state.FORMATS)
    by_bytes = {(0, "bytes", width) for width in (1, 2, 4, 8)}
    assert by_bytes | {(0, "bits", 1), (0, "bits", 2)} < shapes
    assert {(1, "as it is", 1), (1, "as it is", 8), (2, "bytes", 1), (2, "bytes", 4)} < shapes


def listed_frames(blocks, frames=()):
    """Codec of each block, and how many frames the record lists of it."""
    return [(block[0], len(each)) for block, each in zip(blocks, frames, strict=False)]


def frames_of(tables, key, blocks):
    """(number, shuffle, width) of each frame of a batch."""
    for field, block in enumerate(blocks):
        data = [*block, tables["blocks"].get(key + field.to_bytes(2, "big"))][4]
        number = 0
        while block[0] == codec.FRAMES and data:
            flags, width, size = struct.unpack_from("<2xBB8xI", data)
            kind = "as it is" if flags & 2 else "bits" if flags & 4 else "bytes"
            yield number, kind, width
            number, data = number + 1, data[size:]


def test_todays_writer_goes_on_in_a_golden_store(name, golden):
    before = expected(name)["streams"]
    with kvstore.open(golden, "w") as store:
        store.stream("new").append({"time": 1.5})
        if name == "rolled":
            store.stream("setup").append({"time": np.array([7]), "gain": np.array([2], "f4")})
        store.flush(marks={"more": 1})
    with kvstore.open(golden) as store:
        assert len(store["new"]) == 1
        assert store.marks["more"] == 1
    found = independent_reader.read_store(golden)["streams"]
    assert found["new"]["rows"] == {"time": [1.5]}
    if name == "rolled":
        assert found["setup"]["rows"]["time"] == [7, *before["setup"]["rows"]["time"]]


# ---- a store of the version before that is continued ----


@pytest.fixture(params=sorted(each for each in STORES if version_of(GOLDEN / each) == 1))
def old(request, tmp_path):
    return shutil.copytree(GOLDEN / request.param, tmp_path / request.param)


def versions_of(path):
    return [
        record(read_tables(file)["meta"][b"identity"])[0]
        for file in sorted((path / "segments").glob("*.mdb"))
    ]


def rows_of(found):
    return {name: stream["rows"] for name, stream in found["streams"].items()}


def more(count=5_000):
    rng = np.random.default_rng(1)
    few = rng.integers(0, 5, (count, 4)).astype("i4")
    return {"time": np.arange(count) / 8, "few": few, "v": np.arange(count) - 9}


def continue_(path):
    with kvstore.open(path, "w") as store:
        store.stream("new").append(more())
        store.flush(marks={"more": 1})
        store.flush(marks={"more": 2})


def old_part(path):
    """All of the old segments but what a session leaves in them."""
    files = sorted((path / "segments").glob("*.mdb"))
    found = {file.name: read_tables(file) for file in files}
    for tables in found.values():
        for key in [key for key in tables["meta"] if key in (b"session", b"clock", b"settings")]:
            del tables["meta"][key]
        for key in [key for key in tables["meta"] if key.startswith(b"gap:")]:
            del tables["meta"][key]
    return {name: tables for name, tables in found.items() if name in old_names(path)}


def old_names(path):
    return {each.name for each in (GOLDEN / path.name / "segments").iterdir()}


def test_opening_an_old_store_leaves_it_at_its_version(old):
    with kvstore.open(old, "w") as store:
        store.pin(1, 2, "x", unit="s")
        store.note_gap("rejected", start_ns=1, stop_ns=2)
    assert versions_of(old) == [1] * len(old_names(old))
    assert rows_of(found_by_kvstore(old)).keys() == expected(old.name)["streams"].keys()


def test_the_first_rows_go_to_a_segment_of_the_new_version(old):
    files, before = old_names(old), old_part(GOLDEN / old.name)
    continue_(old)
    versions = versions_of(old)
    assert versions == [1] * len(files) + [2]  # once, not with each commit
    assert version_of(old) == 1
    assert old_part(old) == before
    assert not verify(old).damages
    rows = rows_of(json.loads(as_json(independent_reader.read_store(old))))
    new = rows.pop("new")
    assert new == json.loads(as_json({key: plain(column) for key, column in more().items()}))
    assert {k: {n: digested(c) for n, c in v.items()} for k, v in rows.items()} == rows_of(
        expected(old.name)
    )


def followed(stream):
    idle, fields = [], [stream.schema.time]
    options = {"stop": lambda: bool(idle), "sleep": idle.append, "on_gap": lambda _: None}
    found = stream.follow("start", fields=fields, **options)
    return [time for each in found for time in plain(each.batch[fields[0]])]


def test_rows_of_both_versions_are_followed_backed_up_recovered_and_retained(old):
    continue_(old)
    whole = rows_of(found_by_kvstore(old))
    for name in whole:
        with kvstore.open(old) as store:
            assert sorted(followed(store[name])) == whole[name][store[name].schema.time]
    copy, new = old.with_name("copy.kv"), old.with_name("new.kv")
    assert not backup(old, copy).damages
    continue_(old)
    assert not backup(old, copy).damages
    assert repr(rows_of(found_by_kvstore(copy))) == repr(rows_of(found_by_kvstore(old)))
    recover(old, new)
    recovered = rows_of(found_by_kvstore(new))
    for name, columns in rows_of(found_by_kvstore(old)).items():
        if columns and next(iter(columns.values())):
            assert as_json(recovered[name]) == as_json(columns)
    assert set(versions_of(new)) == {2}
    with kvstore.open(old, "w") as store:
        store.drop(2**62, unit="ns")
    assert not verify(old).damages


# ---- what a crash leaves, and what is refused ----


def cut_short(module, function, store, folder, monkeypatch):
    """Have a call copy the store's folder before and after it: what a kill there would leave."""
    real = getattr(module, function)

    def wrapped(*args):
        for when in ("before", "after"):
            if when == "after":
                real(*args)
            shutil.copytree(store, folder / f"{len(list(folder.iterdir()))}-{when}-{function}")

    monkeypatch.setattr(module, function, wrapped)


def test_a_roll_cut_short_at_any_step_is_finished_by_opening(tmp_path, monkeypatch):
    path, cuts = tmp_path / "s", tmp_path / "cuts"
    cuts.mkdir()
    values = np.random.default_rng(3).integers(0, 2**60, 9000)
    with kvstore.open(path, "w", flush_interval_s=None, segment_bytes=1 << 16) as store:
        cut_short(layout, "create_segment", path, cuts, monkeypatch)
        cut_short(layout, "sync_folder", path, cuts, monkeypatch)
        store.stream("p").append({"time": np.arange(9000.0), "v": values})
        store.flush()
    monkeypatch.undo()
    old = ["00000001.mdb", "00000001.mdb-lock"]
    rolled = ["00000002.mdb", "00000002.mdb-lock"]
    new = [[], ["00000002.tmp"], rolled, rolled]
    for cut, more in zip(sorted(cuts.iterdir()), new, strict=True):
        assert sorted(file.name for file in (cut / "segments").iterdir()) == [*old, *more]
        with kvstore.open(cut) as store:
            assert len(store["p"]) == sum(len(b["v"]) for b in store["p"].read()) == 9000
        (cut / "segments" / "00000003.tmp").write_bytes(b"torn")
        with kvstore.open(cut, "w") as store:
            store.stream("p").append({"time": np.array([-1.0]), "v": np.array([5])})
        assert not list(cut.glob("segments/*.tmp"))
        assert independent_reader.read_store(cut)["streams"]["p"]["rows"]["v"] == [5, *values]


def test_a_store_without_its_identity_file_is_none_until_a_writer_restores_it(name, golden):
    (golden / "store.msgpack").rename(golden / "store.msgpack.tmp")
    with pytest.raises(StoreNotFound):
        kvstore.open(golden)
    kvstore.open(golden, "w").close()
    found = independent_reader.read_store(golden)
    found["segments"] = expected(name)["segments"]  # a full one may have been sealed
    assert comparable(found) == as_json(expected(name))
    assert version_of(golden) == version_of(GOLDEN / name)


def test_another_version_is_refused_by_name(golden):
    identity = golden / "store.msgpack"
    one = identity.read_bytes()
    identity.write_bytes(codec.packed([3, *record(one)[1:]]))
    with pytest.raises(StoreFormatError, match="format version 3, this kvstore reads up to 2"):
        kvstore.open(golden)
    identity.write_bytes(one)
    newest = max((golden / "segments").iterdir())
    with lmdb.open(str(newest), subdir=False, lock=False, max_dbs=4, **ENGINE) as env:
        meta = env.open_db(b"meta", create=False)
        with env.begin(write=True, db=meta) as txn:
            txn.put(b"identity", codec.packed([3, *record(txn.get(b"identity"))[1:], "more"]))
    with pytest.raises(StoreFormatError, match="format version 3, this kvstore reads up to 2"):
        kvstore.open(golden)


def test_unknown_meta_records_are_ignored(golden):
    newest = max((golden / "segments").iterdir())
    with lmdb.open(str(newest), subdir=False, lock=False, max_dbs=4, **ENGINE) as env:
        meta = env.open_db(b"meta", create=False)
        with env.begin(write=True, db=meta) as txn:
            txn.put(b"gap:later", codec.packed({"some": "thing"}))
    assert comparable(found_by_kvstore(golden)) == as_json(expected(golden.name))


# ---- the document ----


def test_the_documents_examples_are_bytes_of_the_golden_stores():
    examples = re.findall(r"^example (\S+)\n((?:[0-9a-f ]+\n)+)", FORMAT, re.MULTILINE)
    assert len(examples) == 3
    for place, digits in examples:
        assert bytes.fromhex(digits) == golden_bytes(place), place


def golden_bytes(place):
    name, *rest = place.split("/")
    if rest == ["store.msgpack"]:
        return (GOLDEN / name / "store.msgpack").read_bytes()
    number, table, key = rest
    segment = GOLDEN / name / "segments" / f"{int(number):08d}.mdb"
    return read_tables(segment)[table][bytes.fromhex(key)]


def test_the_documents_limits_are_those_of_the_code():
    rows = re.findall(r"^\| [^|]+ \| ([0-9,]+)[^|]* \| `(\w+)\.(\w+)` \|$", FORMAT, re.MULTILINE)
    assert len(rows) == 12
    for number, module, constant in rows:
        value = getattr(importlib.import_module(f"kvstore.{module}"), constant)
        assert int(number.replace(",", "")) == value, constant
