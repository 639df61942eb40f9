"""`kvstore import`: what was exported comes back to the bit; foreign files are inferred."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from exports import (
    FIELDS,
    ROWS,
    SCHEMA,
    TIMES,
    assert_same_rows,
    everything,
    need,
    same,
    small_store,
    timed_rows,
)
from hypothesis import given
from hypothesis import strategies as st
from stores import scratch
from typer.testing import CliRunner

import kvstore
from kvstore import libc
from kvstore.cli import app
from kvstore.errors import KvstoreError, SchemaError
from kvstore.export.files import load_file, write_file
from kvstore.schema import Field, Schema

TYPED = ["parquet", "arrow", "npz"]


@pytest.fixture(autouse=True)
def _keep_malloc(monkeypatch):
    monkeypatch.setattr(libc, "keep_freed_memory", lambda: None)


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def imported(path, *files, options=()):
    done = run("import", path, *files, "--stream", "all", *options)
    assert done.exit_code == 0, done.output + repr(done.exception)
    with kvstore.open(path) as store:
        return store["all"].schema, everything(store["all"])


# ---- round trips ----


@pytest.mark.parametrize("suffix", TYPED)
def test_what_was_exported_comes_back_with_its_schema(path, tmp_path, suffix):
    need(suffix)
    out = tmp_path / f"out.{suffix}"
    assert run("export", small_store(tmp_path / "from.kv"), "-o", out).exit_code == 0
    schema, rows = imported(path, out)
    assert schema == SCHEMA
    assert [field.to_record() for field in schema.fields] == [f.to_record() for f in FIELDS]
    assert_same_rows(rows, ROWS)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_none_comes_back(path, tmp_path, suffix):
    need(suffix)
    rows = {"time": np.arange(3.0), "note": np.array(["a", None, ""], object)}
    fields = [Field("time", "f8"), Field("note", "text")]
    write_file([rows], fields, tmp_path / f"out.{suffix}", time="time")
    assert_same_rows(imported(path, tmp_path / f"out.{suffix}")[1], rows)


@pytest.mark.parametrize("suffix", [*TYPED, "csv"])
@pytest.mark.parametrize("dtype", TIMES)
def test_every_kind_of_time_comes_back_exactly(path, tmp_path, suffix, dtype):
    need(suffix)
    rows, schema = timed_rows(dtype)
    out = tmp_path / f"out.{suffix}"
    run("export", small_store(tmp_path / "from.kv", rows, schema), "-o", out)
    options = ["--time-unit", "ns"] if (suffix, dtype) == ("csv", "int64") else []
    found, values = imported(path, out, options=options)
    assert found.time == "time"
    if suffix != "csv":
        assert found == schema
    elif rows["time"].dtype.kind == "M":
        values["time"] = values["time"].astype(rows["time"].dtype)
    assert same(values["time"], rows["time"])
    assert values["value"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", TYPED)
def test_the_time_field_of_any_name_is_remembered(path, tmp_path, suffix):
    need(suffix)
    fields, rows = (Field("when", "f8"), Field("x", "i4")), {"when": [1.0, 2.0], "x": [1, 2]}
    source = small_store(tmp_path / "from.kv", rows, Schema(fields, "when"))
    run("export", source, "-o", tmp_path / f"out.{suffix}")
    assert imported(path, tmp_path / f"out.{suffix}")[0].time == "when"


VALUES = {
    "f8": st.floats(width=64),
    "f4": st.floats(width=32),
    "i8": st.integers(-(2**63), 2**63 - 1),
    "u8": st.integers(0, 2**64 - 1),
    "M8[ns]": st.integers(-(2**63), 2**63 - 1),
    "text": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
}
CASES = st.sampled_from(sorted(VALUES)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(VALUES[kind], min_size=4, max_size=4))
)


@given(CASES, st.sampled_from(TYPED), st.booleans())
def test_any_values_come_back(case, suffix, shaped):
    need(suffix)
    kind, listed = case
    if kind == "M8[ns]":
        column = np.array(listed, "i8").view(kind)
    else:
        column = np.array(listed, object if kind == "text" else kind)
    column = column.reshape(2, 2) if shaped else column
    fields = [Field("time", "f8"), Field("x", kind, column.shape[1:])]
    rows = {"time": np.arange(float(len(column))), "x": column}
    with scratch() as folder:
        out = folder / f"out.{suffix}"
        write_file([rows], fields, out, time="time")
        loaded = load_file(out)
        (batch,) = loaded.batches
    assert loaded.schema.fields == tuple(fields)
    assert same(loaded.schema.columns(batch)[1], column)


# ---- CSV ----


def test_csv_comes_back_into_a_stream_that_says_the_types(path, tmp_path):
    run("export", small_store(tmp_path / "from.kv"), "-o", tmp_path / "out.csv")
    with kvstore.open(path, mode="w") as store:
        store.stream("all", SCHEMA)
    assert_same_rows(imported(path, tmp_path / "out.csv")[1], ROWS)


def test_csv_types_are_inferred_over_the_whole_file(path, tmp_path):
    lines = ["time,n,f,big,neg,ok,when,note,gap,grid_0_0,grid_0_1,a_0,b_1"]
    lines += [
        f"{i}.5,{i},{i},{i},{i},True,2026-01-01T00:00:00,x,{i},{i},{-i},1,2" for i in range(9000)
    ]
    lines += ["9000,1,1.5,18446744073709551615,-1,False,2026-01-01T00:00:00+02:00,7,,0,0,1,2"]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    schema, rows = imported(path, tmp_path / "log.csv")
    kinds = {field.name: (field.np_dtype.str, field.shape) for field in schema.fields}
    assert kinds == {
        "time": ("<f8", ()), "n": ("<i8", ()), "f": ("<f8", ()), "big": ("<u8", ()),
        "neg": ("<i8", ()), "ok": ("|b1", ()), "when": ("<M8[ns]", ()), "note": ("|O", ()),
        "gap": ("<f8", ()), "grid": ("<i8", (1, 2)), "a_0": ("<i8", ()), "b_1": ("<i8", ()),
    }  # fmt: skip
    assert rows["big"][-1] == 2**64 - 1
    assert np.isnan(rows["gap"][-1])
    assert rows["note"][-1] == "7"
    assert rows["when"][-1] == np.datetime64("2025-12-31T22:00:00", "ns")
    assert rows["grid"][5].tolist() == [[5, -5]]


@pytest.mark.parametrize(
    ("texts", "dtype"),
    [
        (["2026-01-01", "NaT", ""], "<M8[ns]"),
        (["2026-01-01 12:00:00.123456789Z", "1700-01-01"], "<M8[ns]"),
        (["3000-01-01", "2026-01-01"], "|O"),  # beyond what ns can say
        (["2026-01-01T00:00:00.0000000001"], "|O"),
        (["3000-01-01T00:00:00.000000001"], "|O"),
        (["2026-02-30"], "|O"),
        (["1.5", "2026-01-01"], "|O"),
        (["today", "now"], "|O"),
        (["1", "99999999999999999999"], "|O"),
        (["-1", "18446744073709551615"], "|O"),
        (["1", "nan"], "<f8"),
        (["True", "1"], "|O"),
        (["", ""], "|O"),
    ],
)
def test_csv_takes_no_value_for_what_it_is_not(path, tmp_path, texts, dtype):
    lines = [f"{number}.0,{text}\n" for number, text in enumerate(texts)]
    (tmp_path / "log.csv").write_text("time,x\n" + "".join(lines))
    schema, rows = imported(path, tmp_path / "log.csv")
    assert schema.fields[1].np_dtype.str == dtype
    assert dtype != "|O" or rows["x"].tolist() == texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header line"),
        ("a,a\n1,2\n", "header line of different names"),
        ("time,x\n1,2\n3\n", "row 3: 1 values, expected the header's 2"),
        ("when,x\n1,2\n", "--time-field"),
        ("time,x\n1,\ufffd\n", None),
    ],
)
def test_csv_that_makes_no_sense_is_refused_in_words(tmp_path, text, message):
    file = tmp_path / "log.csv"
    file.write_bytes(text.encode() if message else b"time,x\n1,\xff\n")
    done = run("import", tmp_path / "new.kv", file)
    assert isinstance(done.exception, KvstoreError)
    assert (message or "line 1: 'utf-8' codec") in str(done.exception) or message is None


def test_csv_values_that_do_not_fit_the_stream_are_refused(path, tmp_path):
    with kvstore.open(path, mode="w") as store:
        store.stream("all", Schema((Field("time", "f8"), Field("x", "int8"))))
    for name, text in {
        "big": "time,x\n1,300\n",
        "word": "time,x\n1,abc\n",
        "other": "time,y\n1,2\n",
    }.items():
        (tmp_path / f"{name}.csv").write_text(text)
        done = run("import", path, tmp_path / f"{name}.csv", "--stream", "all")
        assert isinstance(done.exception, SchemaError), name


# ---- foreign files ----


def test_a_parquet_of_pandas_is_inferred(path, tmp_path):
    pd, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    when = pd.date_range("2026-01-01", periods=3, freq="s", tz="Europe/Vienna")
    frame = pd.DataFrame(
        {"when": when, "x": [1.5, None, 3], "kind": pd.Categorical(["a", "b", "a"])}
    )
    frame.to_parquet(tmp_path / "in.parquet")
    schema, rows = imported(path, tmp_path / "in.parquet", options=["--time-field", "when"])
    assert schema.time == "when"
    assert rows["when"].view("i8").tolist() == when.asi8.tolist()
    assert same(rows["x"], np.array([1.5, np.nan, 3]))
    assert rows["kind"].tolist() == ["a", "b", "a"]


def test_an_arrow_file_of_others_is_inferred(path, tmp_path):
    pa = pytest.importorskip("pyarrow")
    columns = {
        "time": pa.array([1, 2], pa.timestamp("ms")),
        "day": pa.array([0, None], pa.date32()),
        "pair": pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8(), 2)),
        "note": pa.array(["a", None], pa.large_string()),
    }
    table = pa.table(columns)
    with (
        pa.OSFile(str(tmp_path / "in.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table)
    schema, rows = imported(path, tmp_path / "in.arrow")
    assert schema.time_dtype == "M8[ms]"
    assert rows["pair"].tolist() == [[1, 2], [3, 4]]
    assert same(rows["day"], np.array(["1970-01-01", "NaT"], "M8[s]"))
    assert rows["note"].tolist() == ["a", None]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([1, None], "int64", "holds 1 nulls"),
        ([[1], [2, 3]], "list", "cannot be stored"),
        ([[1, 2], None], "pair", "holds 1 nulls"),
    ],
)
def test_what_arrow_holds_and_we_do_not_is_named(tmp_path, values, kind, message):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    types = {"int64": pa.int64(), "list": pa.list_(pa.int64()), "pair": pa.list_(pa.int64(), 2)}
    table = pa.table({"time": [1.0, 2.0], "odd": pa.array(values, types[kind])})
    pq.write_table(table, tmp_path / "in.parquet")
    done = run("import", tmp_path / "new.kv", tmp_path / "in.parquet")
    assert isinstance(done.exception, SchemaError)
    assert "'odd'" in str(done.exception)
    assert message in str(done.exception)


def test_a_column_that_another_tool_changed_is_taken_for_what_it_is(path, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    fields = [Field("time", "f8"), Field("x", "i4", unit="V")]
    write_file(
        [{"time": np.arange(2.0), "x": np.arange(2, dtype="i4")}],
        fields,
        tmp_path / "a.parquet",
        time="time",
    )
    table = pq.read_table(tmp_path / "a.parquet")
    changed = table.set_column(1, "x", pa.array([0.5, 1.5]))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), tmp_path / "b.parquet")
    assert imported(path, tmp_path / "b.parquet")[1]["x"].tolist() == [0.5, 1.5]


def test_npz_of_numpy_is_inferred_compressed_or_not(path, tmp_path):
    rows = {"time": np.arange(3.0), "x": np.arange(6, dtype="i2").reshape(3, 2)}
    np.savez(tmp_path / "a.npz", **rows)
    np.savez_compressed(tmp_path / "b.npz", time=rows["time"] + 10, x=rows["x"])
    _, found = imported(path, tmp_path / "a.npz", tmp_path / "b.npz")
    assert found["time"].tolist() == [0, 1, 2, 10, 11, 12]
    assert found["x"].tolist() == rows["x"].tolist() * 2


def test_npz_runs_no_pickles_and_refuses_what_does_not_fit(tmp_path):
    bad = {
        "objects": {"time": np.arange(1.0), "x": np.array([{}], object)},
        "lengths": {"time": np.arange(1.0), "x": np.arange(2)},
        "scalar": {"time": np.arange(1.0), "x": np.array(3)},
        "columns": {"time": np.arange(2.0), "x": np.asfortranarray(np.ones((2, 3)))},
    }
    for name, arrays in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        done = run("import", tmp_path / "new.kv", tmp_path / f"{name}.npz")
        assert isinstance(done.exception, SchemaError), name


@pytest.mark.parametrize("suffix", TYPED)
def test_a_broken_file_is_named(tmp_path, suffix):
    need(suffix)
    file = tmp_path / f"in.{suffix}"
    file.write_bytes(b"not what it says" * 10)
    done = run("import", tmp_path / "new.kv", file)
    assert isinstance(done.exception, KvstoreError)
    assert file.name in str(done.exception)


@pytest.mark.parametrize("suffix", TYPED)
def test_a_file_cut_short_is_named(tmp_path, suffix):
    need(suffix)
    rows = {"time": np.arange(10_000.0)}
    write_file([rows], [Field("time", "f8")], tmp_path / f"a.{suffix}", time="time")
    data = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"b.{suffix}").write_bytes(data[: len(data) // 2])
    done = run("import", tmp_path / "new.kv", tmp_path / f"b.{suffix}")
    assert isinstance(done.exception, KvstoreError)


def test_an_unknown_suffix_names_the_known_ones(tmp_path):
    (tmp_path / "in.xlsx").write_bytes(b"x")
    done = run("import", tmp_path / "new.kv", tmp_path / "in.xlsx")
    assert done.exit_code == 2
    assert ".parquet, .arrow, .npz, .csv" in " ".join(done.stderr.split())
    assert not (tmp_path / "new.kv").exists()
    with pytest.raises(KvstoreError, match=r"expected \.parquet, \.arrow, \.npz, \.csv"):
        load_file(tmp_path / "in.xlsx")


def test_a_file_that_fits_another_schema_is_refused_before_a_row_is_stored(path, tmp_path):
    with kvstore.open(path, mode="w") as store:
        store.stream("all", Schema((Field("time", "f8"), Field("x", "i4"))))
    np.savez(tmp_path / "in.npz", time=np.arange(2.0), y=np.arange(2))
    done = run("import", path, tmp_path / "in.npz", "--stream", "all")
    assert "missing x; unknown y" in str(done.exception)


# ---- memory ----

GROWTH = """
import resource, sys
from pathlib import Path
from kvstore.export.files import load_file
rows = sum(len(batch["t"]) for batch in load_file(Path(sys.argv[1]), time="t").batches)
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "npz", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    """.arrow is left out: its pages are mapped, and counted though the kernel may take them."""
    need(suffix)
    fields = [Field("t", "f8"), Field("grid", "i4", (64, 16))]
    if suffix == "csv":
        fields = [Field("t", "f8"), Field("grid", "i4", (4,))]
    grid = np.random.default_rng(1).poisson(9, (512, *fields[1].shape)).astype("i4")

    def peak_kb(count):
        out = tmp_path / f"{count}.{suffix}"
        batches = ({"t": np.arange(512.0) + i, "grid": grid} for i in range(count))
        write_file(batches, fields, out, time="t")
        command = [sys.executable, "-c", GROWTH, str(out)]
        done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=120)
        rows, peak = map(int, done.stdout.split())
        assert rows == 512 * count
        return peak

    assert peak_kb(120) - peak_kb(40) < 40_000
