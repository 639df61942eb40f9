"""Any schema, any rows: out to a file and into a new store gives the same rows and schema."""

from __future__ import annotations

import csv
import importlib.util
import re
from itertools import pairwise

import numpy as np
import pytest
from exports import FIELDS, LIBRARY, ROWS, assert_same_rows, everything, need, same, small_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stores import ROOT, scratch

import kvstore
from kvstore.errors import KvstoreError, NoFillError, SchemaError
from kvstore.export import csv as ours
from kvstore.export import npz
from kvstore.export.files import load_file, write_file
from kvstore.schema import Field, Schema

LIBRARIES = ("pandas", "pyarrow", "numpy", "h5py", "xarray", "zarr")
TYPED = ["parquet", "arrow", "npz"]
INSTALLED = [x for x in [*TYPED, "csv"] if x not in LIBRARY or importlib.util.find_spec("pyarrow")]
NUMBERS = ["?", "i1", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
TIMES = ["M8[D]", "M8[s]", "M8[us]", "M8[ns]", "M8[10ms]", "m8[ms]", "m8[ns]"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
WORDS = st.text("µ°ab =+\"'\n", max_size=8)


def arrays(dtype, shape):
    if dtype == "text":
        count = int(np.prod(shape))
        texts = st.lists(TEXT, min_size=count, max_size=count)
        return texts.map(lambda found: np.array([*found, None], object)[:-1].reshape(shape))
    whole = np.dtype(dtype)
    if whole == np.dtype("M8[s]"):  # Parquet holds them as milliseconds
        numbers = hnp.arrays("<i8", shape, elements=st.integers(-(2**53), 2**53))
    elif whole == np.dtype("M8[10ms]"):  # beyond that numpy cannot print them
        numbers = hnp.arrays("<i8", shape, elements=st.integers(-(2**59), 2**59))
    elif whole.kind in "mM":
        numbers = hnp.arrays("<i8", shape)
    else:
        return hnp.arrays(whole, shape)
    return numbers.map(lambda found: found.view(whole))


@st.composite
def fields(draw, name):
    dtype = draw(st.sampled_from([*NUMBERS, *TIMES, "text"]))
    shape = draw(st.lists(st.integers(1, 3), max_size=3).map(tuple))
    about = {"unit": draw(WORDS), "description": draw(WORDS)}
    fill = draw(arrays(dtype, (1,)))[0] if draw(st.booleans()) or dtype in NUMBERS[:7] else None
    return Field(name, dtype, shape, **about, **({} if fill is None else {"fill": fill}))


@st.composite
def streams(draw):
    """A schema, rows of its first fields, then rows of all."""
    time = draw(st.sampled_from(["f8", "i8", "M8[s]", "M8[us]", "M8[ns]"]))
    count = draw(st.integers(1, 3))
    every = [Field("when", time), *(draw(fields(f"x{n}")) for n in range(count))]
    added = draw(st.integers(0, count))
    sizes = draw(st.lists(st.integers(0, 3), min_size=2, max_size=2))
    parts, rows = [], 0
    for size, there in zip(sizes, (every[: len(every) - added], every), strict=True):
        part = {
            f.name: draw(arrays("text" if f.is_text else f.np_dtype.str, (size, *f.shape)))
            for f in there
        }
        counts = np.arange(rows, rows + size)
        part["when"] = counts + 0.1 if time == "f8" else counts.astype(time)
        parts.append(part)
        rows += size
    return Schema(tuple(every), "when"), parts


def stored(path, schema, parts):
    """The stream, its later fields added after the first rows."""
    first = Schema(schema.fields[: len(parts[0])], schema.time)
    with kvstore.open(path, "w", flush_interval_s=None) as store:
        for each, rows in zip((first, schema), parts, strict=True):
            stream = store.stream("s", each)
            stream.append(rows)
            store.flush()


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(streams(), st.sampled_from(INSTALLED))
def test_any_stream_comes_back_with_its_schema(case, suffix):
    schema, parts = case
    with scratch() as folder:
        stored(folder / "from.kv", schema, parts)
        out = folder / f"out.{suffix}"
        with kvstore.open(folder / "from.kv") as store, kvstore.open(folder / "to.kv", "w") as to:
            rows = list(store["s"].read())
            if suffix == "npz" and any(
                None in column
                for batch in rows
                for column in batch.values()
                if column.dtype == object
            ):
                with pytest.raises(SchemaError, match="holds None"):
                    store["s"].export(out)
                return
            count = store["s"].export(out)
            assert count == sum(len(part["when"]) for part in parts)
            target = to.stream("s", schema) if suffix == "csv" else to.stream("s")
            assert target.import_file(out) == count
            to.flush()
            found = target.schema
            assert found == schema
            assert [f.to_record() for f in found.fields] == [f.to_record() for f in schema.fields]
            if count:
                assert_equal(everything(target), everything(store["s"]), suffix)


def assert_equal(found, expected, suffix):
    """To the bit; text formats know one NaN, and no None."""
    if suffix != "csv":
        assert_same_rows(found, expected)
        return
    for name, column in expected.items():
        if column.dtype == object:
            assert found[name].tolist() == [x or "" for x in column.flat] or column.ndim > 1
        else:
            a, b = found[name], column
            assert np.array_equal(a, b, equal_nan=a.dtype.kind in "fcmM"), name
            if a.dtype.kind == "f":
                assert np.array_equal(np.signbit(a)[~np.isnan(a)], np.signbit(b)[~np.isnan(b)])


# ---- rows that are missing ----


@pytest.mark.parametrize("suffix", [*TYPED, "csv"])
def test_a_stream_without_rows_comes_back_as_one(path, tmp_path, suffix):
    need(suffix)
    schema = Schema(
        (Field("time", "f8", unit="s"), Field("x", "text", fill="?"), Field("g", "i4", (2, 1, 2)))
    )
    with kvstore.open(tmp_path / "from.kv", "w") as store:
        stream = store.stream("s", schema)
        store.flush()
        assert stream.export(tmp_path / f"out.{suffix}") == 0
    with kvstore.open(path, "w") as store:
        stream = store.stream("s", schema if suffix == "csv" else None)
        assert stream.import_file(tmp_path / f"out.{suffix}") == 0
        store.flush()
        assert stream.schema == schema
    with kvstore.open(path) as store:
        assert "s" in store
        assert len(store["s"]) == 0


def test_a_field_that_was_added_and_has_no_fill_stops_an_export(tmp_path):
    need("parquet")
    first, second = Field("time", "f8"), Field("n", "i4")
    parts = [{"time": np.arange(2.0)}, {"time": np.arange(2.0), "n": np.arange(2, dtype="i4")}]
    stored(tmp_path / "s.kv", Schema((first, second)), parts)
    with kvstore.open(tmp_path / "s.kv") as store:
        with pytest.raises(NoFillError, match="field 'n'"):
            store["s"].export(tmp_path / "out.parquet")
        assert store["s"].export(tmp_path / "out.csv", fields=["time"]) == 4
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("bad", ["null", "word"])
def test_a_file_whose_first_rows_do_not_fit_leaves_no_stream_behind(path, tmp_path, bad):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    time = [1.0, 2.0] if bad == "null" else [1.0, float("nan")]
    table = pa.table({"time": time, "n": pa.array([1, None if bad == "null" else 2])})
    pq.write_table(table, tmp_path / "in.parquet")
    with kvstore.open(path, "w") as store:
        with pytest.raises(KvstoreError):
            store.stream("s").import_file(tmp_path / "in.parquet")
        assert "s" not in store


# ---- integer times ----


@pytest.mark.parametrize("suffix", ["parquet", "npz", "csv"])
@pytest.mark.parametrize(("unit", "dtype"), [("s", "<M8[s]"), ("ms", "<M8[ms]"), ("ns", "<i8")])
def test_integer_times_of_others_need_their_unit(path, tmp_path, suffix, unit, dtype):
    file, counts = tmp_path / f"in.{suffix}", np.array([1, 1771342357], "i4")
    if suffix == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"time": counts}), file)
    elif suffix == "npz":
        np.savez(file, time=counts)
    else:
        file.write_text("time\n1\n1771342357\n")
    with kvstore.open(path, "w") as store:
        with pytest.raises(SchemaError, match=r"integers: say with --time-unit whether"):
            store.stream("s").import_file(file)
        assert store.stream("s").import_file(file, time_unit=unit) == 2
        store.flush()
        assert store["s"].schema.time_dtype.str == dtype
        assert everything(store["s"])["time"].view("i8").tolist() == counts.tolist()
        if suffix == "csv":
            store.stream("s").import_file(file, time_unit=unit)
            store.flush()
            assert len(store["s"]) == 4


def test_a_unit_for_times_that_have_one_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", time=np.array([1, 2], "M8[ms]"))
    with pytest.raises(SchemaError, match=r"are datetime64.* and not integers: leave their unit"):
        load_file(tmp_path / "a.npz", unit="s")
    np.savez(tmp_path / "b.npz", time=np.array([2**63], "u8"))
    with pytest.raises(SchemaError, match="do not fit int64"):
        next(load_file(tmp_path / "b.npz", unit="ns").batches)


def test_the_time_of_our_own_file_that_another_tool_changed_is_not_taken_for_ns(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_file(
        [{"time": np.arange(2.0)}], [Field("time", "f8")], tmp_path / "a.parquet", time="time"
    )
    table = pq.read_table(tmp_path / "a.parquet")
    changed = pa.table({"time": pa.array([1, 2])}).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, tmp_path / "b.parquet")
    with pytest.raises(SchemaError, match="say with --time-unit"):
        load_file(tmp_path / "b.parquet")


def test_times_that_another_tool_made_finer_are_not_rounded(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"time": np.array([1, 2], "M8[s]")}
    write_file([rows], [Field("time", "M8[s]")], tmp_path / "a.parquet", time="time")
    table = pq.read_table(tmp_path / "a.parquet")
    finer = pa.table({"time": pa.array([1500, 2000], pa.timestamp("ms", "UTC"))})
    pq.write_table(finer.replace_schema_metadata(table.schema.metadata), tmp_path / "b.parquet")
    with pytest.raises(SchemaError, match="not all times are whole"):
        next(load_file(tmp_path / "b.parquet").batches)


# ---- what text formats must not lose ----


def test_npz_refuses_text_whose_end_numpy_would_cut_off(tmp_path):
    rows = {"note": np.array(["a", "b\0"], object)}
    with pytest.raises(SchemaError, match=r"'note' holds text that ends in NUL.*parquet or jsonl"):
        write_file([rows], [Field("note", "text")], tmp_path / "out.npz")


def test_hdf5_refuses_text_it_would_cut_off(tmp_path):
    pytest.importorskip("h5py")
    for text, what in {"a\0b": "a NUL", "\ud800": "a lone surrogate"}.items():
        rows = {"note": np.array([text], object)}
        with pytest.raises(SchemaError, match=f"'note' holds text with {what}"):
            write_file([rows], [Field("note", "text")], tmp_path / "out.h5")


@pytest.mark.parametrize("text", ["a\0b\0", "\ud800", "=1+1", "\r", "\r\n", '"', ",", "", " a "])
def test_csv_brings_any_text_back(tmp_path, text):
    rows = {"time": np.arange(2.0), "note": np.array([text, "z"], object)}
    write_file([rows], [Field("time", "f8"), Field("note", "text")], tmp_path / "out.csv")
    (batch,) = load_file(tmp_path / "out.csv").batches
    assert batch["note"].tolist() == [text, "z"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("dtype", ["M8[10ms]", "m8[10ms]"])
def test_times_that_numpy_prints_wrong_are_refused(tmp_path, suffix, dtype):
    rows = {"far": np.array([2**62, 1], "i8").view(dtype)}
    with pytest.raises(SchemaError, match="that ms cannot count, and so cannot be printed"):
        write_file([rows], [Field("far", dtype)], tmp_path / f"out.{suffix}")


def test_columns_that_would_stand_twice_in_csv_are_refused(tmp_path):
    fields = [Field("g", "i4", (2,)), Field("g_1", "f8")]
    with pytest.raises(SchemaError, match="the columns g_1 would stand twice"):
        write_file([], fields, tmp_path / "out.csv")


def test_csv_takes_a_duration_in_its_own_unit(tmp_path):
    (tmp_path / "in.csv").write_text('time,d\n1.0,"5 seconds"\n2.0,7\n3.0,NaT\n')
    known = Schema((Field("time", "f8"), Field("d", "m8[ms]")))
    (batch,) = load_file(tmp_path / "in.csv", known=known).batches
    assert same(batch["d"], np.array([5000, 7, "NaT"], "m8[ms]"))
    (tmp_path / "in.csv").write_text('time,d\n1.0,"5 microseconds"\n')
    with pytest.raises(SchemaError, match="5 microseconds has no exact"):
        next(load_file(tmp_path / "in.csv", known=known).batches)


@pytest.mark.parametrize("text", ["1_000", "٣", "1_0.5"])
def test_csv_takes_for_numbers_what_others_do(tmp_path, text):
    (tmp_path / "in.csv").write_text(f"time,x\n1.0,{text}\n")
    (batch,) = load_file(tmp_path / "in.csv").batches
    assert batch["x"].tolist() == [text]


def test_csv_passes_over_blank_lines(tmp_path):
    (tmp_path / "in.csv").write_text("\ntime,x\n1.0,2\n\n2.0,3\n\n")
    (batch,) = load_file(tmp_path / "in.csv").batches
    assert batch["x"].tolist() == [2, 3]


def test_wide_csv_is_read_some_cells_at_a_time(tmp_path, monkeypatch):
    field = Field("g", "i4", (100,))
    rows = {"time": np.arange(50.0), "g": np.arange(5000, dtype="i4").reshape(50, 100)}
    write_file([rows], [Field("time", "f8"), field], tmp_path / "out.csv")
    monkeypatch.setattr(ours, "_CELLS", 1010)
    parts = []
    batches = list(load_file(tmp_path / "out.csv", progress=parts.append).batches)
    assert [len(batch["time"]) for batch in batches] == [9, 10, 10, 10, 10, 1]
    assert same(np.concatenate([batch["g"] for batch in batches]), rows["g"].astype("i8"))
    assert parts == sorted(parts)
    assert parts[-1] == 1


def test_long_text_is_written_some_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "_TEXTS_BYTES", 1000)
    texts = np.array(["x" * 100, *map(str, range(50))], object)
    write_file([{"note": texts}], [Field("note", "text")], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        assert found["note"].tolist() == texts.tolist()


@pytest.mark.parametrize("where", ["first", "middle"])
def test_of_an_npz_with_flipped_bits_nothing_is_stored(path, tmp_path, where):
    """zlib finds no way on, or the sum of it is wrong: in the end, were it not asked for before."""
    file = tmp_path / "in.npz"
    np.savez_compressed(file, time=np.arange(100_000.0))
    data = bytearray(file.read_bytes())
    begin = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    data[begin if where == "first" else len(data) // 2] ^= 255
    file.write_bytes(data)
    with kvstore.open(path, "w") as store:
        with pytest.raises(KvstoreError, match=r"in\.npz(:.*fails its checksum| cannot be)"):
            store.stream("s").import_file(file)
        assert "s" not in store


def test_of_a_parquet_page_with_flipped_bits_nothing_is_stored(path, tmp_path):
    pytest.importorskip("pyarrow")
    file, noise = tmp_path / "in.parquet", np.random.default_rng(1).random(10_000)
    write_file([{"time": noise}], [Field("time", "f8")], file, time="time")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with kvstore.open(path, "w") as store:
        with pytest.raises(KvstoreError, match=r"in\.parquet cannot be read.*"):
            store.stream("s").import_file(file)
        assert "s" not in store


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [*TYPED, "csv"])
def test_progress_goes_from_nothing_to_all(path, tmp_path, suffix):
    need(suffix)
    rows = {"time": np.arange(200_000.0)}
    write_file([rows], [Field("time", "f8")], tmp_path / f"in.{suffix}", time="time")
    parts = []
    with kvstore.open(path, "w") as store:
        store.stream("s").import_file(tmp_path / f"in.{suffix}", progress=parts.append)
    assert len(parts) > 1
    assert all(0 <= a <= b <= 1 for a, b in pairwise([0, *parts, 1]))
    assert parts[-1] > 0.5


@pytest.mark.parametrize("count", [0, 2])
def test_a_field_that_is_named_twice_or_none_is_refused(tmp_path, count):
    with pytest.raises(SchemaError, match=r"fields to export: (none|x, x); name each once"):
        write_file([], [Field("x", "f8")] * count, tmp_path / "out.npz")


# ---- other people's readers ----


def exported(path, tmp_path, suffix):
    with kvstore.open(small_store(path)) as store:
        store["all"].export(tmp_path / f"out.{suffix}")
    return tmp_path / f"out.{suffix}"


def test_pandas_reads_our_parquet(path, tmp_path):
    pd, _ = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pd.read_parquet(exported(path, tmp_path, "parquet"))
    assert same(frame["timestamps"].to_numpy(), ROWS["timestamps"])
    assert same(np.stack(frame["grid"]).reshape(3, 2, 3), ROWS["grid"])
    assert frame["note"].tolist() == ROWS["note"].tolist()
    assert (
        frame["stamp"].dt.tz_localize(None).to_numpy().astype("M8[us]").tolist()
        == ROWS["stamp"].tolist()
    )
    assert frame["big"].tolist() == ROWS["big"].tolist()


def test_pandas_reads_our_csv(path, tmp_path):
    pd = pytest.importorskip("pandas")
    exactly = {} if int(pd.__version__.split(".")[0]) > 2 else {"float_precision": "round_trip"}
    frame = pd.read_csv(exported(path, tmp_path, "csv"), **exactly)
    assert same(frame["timestamps"].to_numpy(), ROWS["timestamps"])
    assert frame["big"].tolist() == ROWS["big"].tolist()
    assert frame["grid_1_2"].tolist() == ROWS["grid"][:, 1, 2].tolist()
    assert frame["note"].fillna("").tolist() == ROWS["note"].tolist()


def test_the_standard_library_reads_our_csv(path, tmp_path):
    with exported(path, tmp_path, "csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["timestamps"]) for line in lines] == ROWS["timestamps"].tolist()
    assert [line["note"] for line in lines] == ROWS["note"].tolist()


def test_polars_would_find_plain_lists_below_our_tensors(path, tmp_path):
    """Readers that know no extension types read the storage."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = pq.ParquetFile(exported(path, tmp_path, "parquet"), arrow_extensions_enabled=False)
    with file:
        column = file.read(["grid"]).column("grid").combine_chunks()
    storage = column.storage if isinstance(column, pa.ExtensionArray) else column
    assert storage.flatten().to_pylist() == ROWS["grid"].ravel().tolist()


def test_xarray_opens_our_zarr_at_once_and_zeros_are_zeros(path, tmp_path):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("zarr", minversion="3")
    with xarray.open_zarr(exported(path, tmp_path, "zarr")) as found:  # a warning would fail
        assert same(found["grid"].to_numpy(), ROWS["grid"])
        assert found["stamp"].isnull().to_numpy().tolist() == [False, True, False]
        assert list(found) == sorted(found, key=list(found).index)
        assert set(found.variables) == {field.name for field in FIELDS}


ONE_LINERS = re.findall(
    rf"`((?:{'|'.join(LIBRARIES)})\.[^`]*[)\]])`",
    (ROOT / "docs" / "export.md").read_text().partition("## Reading them elsewhere")[2],
)


def test_the_docs_lines_read_our_files(path, tmp_path, monkeypatch):
    for library in ("pandas", "pyarrow.feather", "pyarrow.parquet", "h5py", "xarray", "zarr"):
        pytest.importorskip(library)
    names = {name: importlib.import_module(name) for name in LIBRARIES}
    fields = (Field("time", "f8"), Field("spectral", "i4", (2, 3)))
    rows = {"time": np.arange(3.0), "spectral": np.arange(18, dtype="i4").reshape(3, 2, 3)}
    monkeypatch.chdir(tmp_path)
    with kvstore.open(small_store(path, rows, Schema(fields))) as store:
        for suffix in ("parquet", "arrow", "npz", "h5", "zarr", "csv", "jsonl"):
            store["all"].export(f"run.{suffix}")
        store["all"].export("run.npy", fields=["spectral"])
    assert len(ONE_LINERS) == 10
    for line in ONE_LINERS:
        found = eval(line, names)
        assert 3 in (len(found), getattr(found, "num_rows", 0)), line
        getattr(getattr(found, "file", None), "close", int)()  # h5py leaves it to the collector
