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
from kvstore import codec, layout
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
            for start, stop in [(a, b) for a in times[::9] for b in times[::13] if a <= b]:
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


# ---- writing ----


def without_codec_choices(path, leave_out=()):
    """All keys and values of a store, with blocks decompressed.

    What the compressors make of the same bytes may differ between their releases.
    """
    found = [record((path / "store.msgpack").read_bytes())]
    for file in sorted((path / "segments").iterdir()):
        tables = read_tables(file)
        index = {key: record(value) for key, value in tables["index"].items()}
        for key, value in index.items():
            value[4] = [opened(tables, key, number, b) for number, b in enumerate(value[4])]
        meta = {key: record(value) for key, value in tables["meta"].items()}
        meta = {key: value for key, value in meta.items() if not key.startswith(tuple(leave_out))}
        for key, value in meta.items():
            if key.startswith(b"total:"):
                value[3] = "stored bytes"
            if key.startswith(b"sealed:"):
                value[1] = "file bytes"
                value[3] = {k: [*t[:3], "stored bytes", *t[4:]] for k, t in value[3].items()}
                del value[5 if not leave_out else 4 :]
        found.append((file.name, index, sorted(tables["blocks"]), tables["order"], meta))
    return found


def opened(tables, key, number, block):
    kind, raw_bytes, *_, data = [*block, tables["blocks"].get(key + number.to_bytes(2, "big"))][:5]
    if kind == codec.RAW:
        return block
    unpacked = independent_reader.blosc if kind == codec.BLOSC else codec.lz4.block.decompress
    extra = {} if kind == codec.BLOSC else {"uncompressed_size": raw_bytes}
    return kind, raw_bytes, len(block), unpacked(data, **extra)


def test_todays_writer_makes_the_same_records(name, tmp_path):
    fresh = make_store(name, tmp_path)
    assert (tmp_path / f"{name}.json").read_text() == (GOLDEN / f"{name}.json").read_text()
    # The first golden stores were made before a store kept sessions, limits and a clock.
    new = () if name == "operated" else (b"clock", b"session", b"settings", b"gap:")
    stored = without_codec_choices(GOLDEN / name, new)
    assert repr(without_codec_choices(fresh, new)) == repr(stored)


def test_golden_stores_hold_every_case_of_the_format():
    codecs, classes, versions = Counter(), set(), set()
    for file in GOLDEN.glob("*/segments/*.mdb"):
        tables = read_tables(file)
        for key, value in tables["index"].items():
            classes.add(key[4])
            codecs.update((block[0], len(block) == 5) for block in record(value)[4])
        for key, value in tables["meta"].items():
            versions |= {len(record(value)[2])} if key.startswith(b"stream:") else set()
    assert set(codecs) == {(kind, inline) for kind in range(3) for inline in (False, True)}
    assert {0, 1, 64} < classes
    assert versions == {1, 2}


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
    assert comparable(independent_reader.read_store(golden)) == as_json(expected(name))


def test_another_version_is_refused_by_name(golden):
    identity = golden / "store.msgpack"
    one = identity.read_bytes()
    identity.write_bytes(codec.packed([2, *record(one)[1:]]))
    with pytest.raises(StoreFormatError, match="format version 2"):
        kvstore.open(golden)
    identity.write_bytes(one)
    newest = max((golden / "segments").iterdir())
    with lmdb.open(str(newest), subdir=False, lock=False, max_dbs=4, **ENGINE) as env:
        meta = env.open_db(b"meta", create=False)
        with env.begin(write=True, db=meta) as txn:
            txn.put(b"identity", codec.packed([2, *record(txn.get(b"identity"))[1:], "more"]))
    with pytest.raises(StoreFormatError, match="format version 2"):
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
    assert len(rows) == 11
    for number, module, constant in rows:
        value = getattr(importlib.import_module(f"kvstore.{module}"), constant)
        assert int(number.replace(",", "")) == value, constant
