"""`kvstore export`: every format, read back by its own library; complete or not at all."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from exports import LIBRARY, ROWS, TIMES, need, same, small_store, timed_rows
from typer.testing import CliRunner

import kvstore
from kvstore import libc
from kvstore.cli import app
from kvstore.errors import KvstoreError, SchemaError
from kvstore.export import chunks
from kvstore.export.files import FORMATS, write_file
from kvstore.schema import Field

ARROW = ["parquet", "arrow"]


@pytest.fixture(autouse=True)
def _keep_malloc(monkeypatch):
    monkeypatch.setattr(libc, "keep_freed_memory", lambda: None)


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def export(source, target, *options):
    done = run("export", source, "-o", target, *options)
    assert done.exit_code == 0, done.output + str(done.exception)
    return target


def plain(array):
    return array.view("i8") if array.dtype.kind in "mM" else array


# ---- HDF5 and Zarr ----


def test_hdf5_brings_every_array_back_to_the_bit(path, tmp_path):
    h5py = pytest.importorskip("h5py")
    export(small_store(path), tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert file.attrs["time"] == "timestamps"
        assert sorted(file) == sorted(ROWS)
        for name, column in ROWS.items():
            dataset = file[name]
            found = dataset.asstr()[...] if column.dtype == object else dataset[...]
            assert same(found, plain(column)), name
        assert dict(file["timestamps"].attrs) == {
            "dtype": "<f8", "units": "s", "epoch": "1970-01-01T00:00:00Z", "description": "arrival",
        }  # fmt: skip
        assert file["stamp"].attrs["units"] == "microseconds since 1970-01-01"
        assert file["took"].attrs["units"] == "milliseconds"
        assert file["single"].attrs["units"] == "°C"
        assert file["grid"].attrs["description"] == "counts"


def test_zarr_brings_every_array_back_to_the_bit(path, tmp_path):
    zarr = pytest.importorskip("zarr", minversion="3")
    export(small_store(path), tmp_path / "out.zarr")
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert group.attrs["time"] == "timestamps"
    for name, column in ROWS.items():
        found = group[name][...]
        assert same(found.astype(object) if column.dtype == object else found, plain(column)), name
    assert group["grid"].attrs["description"] == "counts"
    assert group["grid"].metadata.dimension_names == ("timestamps", "grid_0", "grid_1")


@pytest.mark.parametrize("dtype", TIMES)
def test_xarray_opens_the_zarr_with_exact_times(path, tmp_path, dtype):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("zarr", minversion="3")
    rows, schema = timed_rows(dtype)
    export(small_store(path, rows, schema), tmp_path / "out.zarr")
    with xarray.open_zarr(tmp_path / "out.zarr", consolidated=False) as found:
        times = found["time"].to_numpy()
        assert found["value"].dims == ("time",)
    expected = (
        rows["time"]
        if dtype == "float64"
        else plain(rows["time"]).view("M8[s]" if dtype == "datetime64[s]" else "M8[ns]")
    )
    assert times.dtype.kind == expected.dtype.kind
    assert np.array_equal(times, expected)


@pytest.mark.parametrize("suffix", ["h5", "zarr"])
def test_names_that_are_paths_are_refused(tmp_path, suffix):
    need(suffix)
    field = Field("../up", "f8")
    with pytest.raises(SchemaError, match="takes its name for a path"):
        write_file([], [field], tmp_path / f"out.{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", ["h5", "zarr"])
def test_none_is_refused_where_text_has_no_null(tmp_path, suffix):
    need(suffix)
    rows = {"note": np.array(["a", None], object)}
    with pytest.raises(SchemaError, match=r"'note' holds None.*parquet"):
        write_file([rows], [Field("note", "text")], tmp_path / f"out.{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", ["h5", "zarr"])
def test_each_chunk_is_about_a_megabyte_and_written_once(tmp_path, suffix, monkeypatch):
    need(suffix)
    fields = [Field("t", "f8"), Field("grid", "i4", (64, 16))]
    rows = {"t": np.arange(1000.0), "grid": np.arange(1024000, dtype="i4").reshape(1000, 64, 16)}
    batches = [{k: v[i : i + 7] for k, v in rows.items()} for i in range(0, 1000, 7)]
    written = []
    fill = chunks.fill
    target = __import__(f"kvstore.export.{'hdf5' if suffix == 'h5' else 'zarr'}", fromlist=["fill"])

    def watched(batches, fields, puts):
        def watch(name, put):
            def watching(offset, array):
                written.append((name, offset, len(array)))
                put(offset, array)

            return watching

        named = zip(fields, puts, strict=True)
        return fill(batches, fields, [watch(field.name, put) for field, put in named])

    monkeypatch.setattr(target, "fill", watched)
    write_file(batches, fields, tmp_path / f"out.{suffix}")
    of_grid = [(offset, count) for name, offset, count in written if name == "grid"]
    assert of_grid == [(0, 256), (256, 256), (512, 256), (768, 232)]
    assert [count for name, _, count in written if name == "t"] == [1000]


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_text_chunk_has_few_rows_as_texts_may_be_long(shape):
    """By the size of its references, a chunk of 10 KB texts took more than a gigabyte."""
    values = np.prod(shape, dtype=int)
    assert chunks.chunk_rows(Field("note", "text", shape), 2) * values == 4096


# ---- Arrow and Parquet ----


def read_table(path):
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path)
    pa = pytest.importorskip("pyarrow")
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


@pytest.mark.parametrize("suffix", ARROW)
def test_arrow_types_are_exact_and_shapes_are_tensors(path, tmp_path, suffix):
    pa = pytest.importorskip("pyarrow")
    schema = read_table(export(small_store(path), tmp_path / f"out.{suffix}")).schema
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types["timestamps"] == "double"
    assert types["stamp"] == "timestamp[us, tz=UTC]"
    assert types["second"] == f"timestamp[{'ms' if suffix == 'parquet' else 's'}, tz=UTC]"
    assert types["day"] == "int64"
    assert types["took"] == "duration[ms]"
    assert types["half"] == "halffloat"
    assert schema.field("grid").type == pa.fixed_shape_tensor(pa.int32(), (2, 3))
    assert schema.field("wave").type == pa.fixed_shape_tensor(pa.float32(), (2, 2))
    assert types["note"] == "string"
    about = {name: schema.field(name).metadata for name in schema.names}
    assert about["timestamps"][b"unit"] == b"s"
    assert about["timestamps"][b"epoch"] == b"1970-01-01T00:00:00Z"
    assert about["timestamps"][b"description"] == b"arrival"
    assert about["single"][b"unit"] == "°C".encode()
    assert json.loads(about["grid"][b"shape"]) == [2, 3]
    assert json.loads(about["words"][b"shape"]) == [2]
    assert about["day"][b"dtype"] == b"<M8[D]"


@pytest.mark.parametrize("suffix", ARROW)
def test_arrow_values_are_exact(path, tmp_path, suffix):
    pytest.importorskip("pyarrow")
    table = read_table(export(small_store(path), tmp_path / f"out.{suffix}"))
    assert same(table["timestamps"].to_numpy(), ROWS["timestamps"])
    assert same(table["big"].to_numpy(), ROWS["big"])
    assert same(table["single"].to_numpy(), ROWS["single"])
    assert table["stamp"].null_count == table["took"].null_count == 1
    grid = table["grid"].combine_chunks()
    assert same(grid.to_numpy_ndarray(), ROWS["grid"])
    assert table["note"].to_pylist() == ROWS["note"].tolist()
    assert table["words"].to_pylist() == ROWS["words"].tolist()


@pytest.mark.parametrize("suffix", ARROW)
@pytest.mark.parametrize("dtype", ["int64", "datetime64[ns]"])
def test_ns_are_timestamps_to_the_last_one(path, tmp_path, suffix, dtype):
    pa = pytest.importorskip("pyarrow")
    rows, schema = timed_rows(dtype)
    table = read_table(export(small_store(path, rows, schema), tmp_path / f"out.{suffix}"))
    assert table.schema.field("time").type == pa.timestamp("ns", "UTC")
    assert table["time"].cast(pa.int64()).to_pylist() == plain(rows["time"]).tolist()


def test_small_batches_become_few_row_groups(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    batches = [{"x": np.arange(10.0) + i} for i in range(100)]
    monkeypatch.setattr(chunks, "GROUP_ROWS", 400)
    write_file(batches, [Field("x", "f8")], tmp_path / "out.parquet")
    found = pq.ParquetFile(tmp_path / "out.parquet")
    assert [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)] == [
        400, 400, 200,
    ]  # fmt: skip
    found.close()


def test_a_row_without_values_is_refused_by_arrow(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(SchemaError, match=r"shape \(0,\) hold no values"):
        write_file([], [Field("none", "f8", (0,))], tmp_path / "out.arrow")


@pytest.mark.parametrize("suffix", ARROW)
def test_text_that_is_no_utf8_is_refused_by_name(tmp_path, suffix):
    pytest.importorskip("pyarrow")
    rows = {"note": np.array(["\ud800"], object)}
    with pytest.raises(SchemaError, match=r"'note'.*surrogate.*jsonl"):
        write_file([rows], [Field("note", "text")], tmp_path / f"out.{suffix}")


def test_seconds_beyond_parquets_milliseconds_are_refused(tmp_path):
    pytest.importorskip("pyarrow")
    rows = {"far": np.array([2**62], "M8[s]")}
    with pytest.raises(KvstoreError, match=r"Parquet cannot hold these rows.*use \.arrow"):
        write_file([rows], [Field("far", "M8[s]")], tmp_path / "out.parquet")
    assert os.listdir(tmp_path) == []


# ---- the others ----


def test_npy_is_one_field(path, tmp_path):
    found = np.load(export(small_store(path), tmp_path / "out.npy", "--fields", "grid"))
    assert same(found, ROWS["grid"])
    done = run("export", path, "-o", tmp_path / "all.npy")
    assert isinstance(done.exception, SchemaError)
    assert "name one with --fields" in str(done.exception)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_range_some_fields_a_limit(path, tmp_path, suffix):
    need(suffix)
    small_store(path)
    out = tmp_path / f"out.{suffix}"
    at = repr(float(TIMES["float64"][1]))
    done = run("export", path, "-o", out, "--fields", "big", "--start", at, "--limit", 1)
    assert done.exit_code == 0, done.output
    assert f"1 rows to {out}" in done.stderr


@pytest.mark.parametrize("suffix", FORMATS)
def test_of_nothing_there_is_an_empty_file_of_the_right_kind(path, tmp_path, suffix):
    need(suffix)
    small_store(path)
    out = tmp_path / f"out.{suffix}"
    done = run("export", path, "-o", out, "--fields", "big", "--start", "2050-01-01")
    assert done.exit_code == 0, done.output
    assert out.exists()


def test_the_last_stretch(path, tmp_path):
    small_store(path)
    found = np.load(export(path, tmp_path / "out.npy", "--fields", "big", "--last", "1ms"))
    assert same(found, ROWS["big"][1:])


# ---- complete or not at all ----


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_read_that_fails_leaves_the_file_as_it_was(tmp_path, suffix):
    need(suffix)

    def failing():
        yield {"x": np.arange(3.0)}
        raise kvstore.DamageError("found, expected, do")

    out = tmp_path / f"out.{suffix}"
    if suffix != "zarr":
        out.write_bytes(b"before")
    with pytest.raises(kvstore.DamageError):
        write_file(failing(), [Field("x", "f8")], out)
    assert suffix == "zarr" or out.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ([] if suffix == "zarr" else [out.name])


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from kvstore.errors import KvstoreError
from kvstore.export.files import check_format, write_file
from kvstore.schema import Field
check_format(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
rng = np.random.default_rng(1)
batches = ({"x": rng.random((1000, 50))} for _ in range(50))
try:
    write_file(batches, [Field("x", "f8", (50,))], Path(sys.argv[1]))
except KvstoreError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", FORMATS)
def test_where_the_disk_takes_no_more_nothing_is_left(tmp_path, suffix):
    """A limit on the size of files stands in for the full disk."""
    need(suffix)
    out = tmp_path / f"out.{suffix}"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(out)],
        capture_output=True, check=False, text=True, timeout=180, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "large" in done.stdout
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from kvstore.export.files import write_file
from kvstore.schema import Field
def batches():
    for _ in range(300):
        yield {"x": np.zeros(100_000)}
    os.kill(os.getpid(), signal.SIGKILL)
write_file(batches(), [Field("x", "f8")], Path(sys.argv[1]))
"""


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_kill_leaves_the_file_as_it_was(tmp_path, suffix):
    need(suffix)
    out = tmp_path / f"out.{suffix}"
    if suffix != "zarr":
        out.write_bytes(b"before")
    code = KILLED.replace("300", "3") if suffix in ("csv", "jsonl") else KILLED  # they are slow
    done = subprocess.run([sys.executable, "-c", code, str(out)], check=False, timeout=180)
    assert done.returncode == -9
    assert not out.exists() if suffix == "zarr" else out.read_bytes() == b"before"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == (
        [] if suffix == "zarr" else [out.name]
    )


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KvstoreError, match="No such file or directory"):
        write_file([], [Field("x", "f8")], tmp_path / "no" / "out.csv")


def test_damaged_batches_are_left_out_and_the_exit_code_says_so(broken_path, tmp_path):
    small_store(broken_path)
    segment = next((broken_path / "segments").glob("*.mdb"))
    data = bytearray(segment.read_bytes())
    place = -1
    while (place := data.find(ROWS["grid"][:2].tobytes(), place + 1)) >= 0:
        data[place] ^= 1  # old pages have it, too
    segment.write_bytes(data)
    done = run("export", broken_path, "-o", tmp_path / "out.npy", "--fields", "grid")
    assert done.exit_code == 3, done.output
    assert same(np.load(tmp_path / "out.npy"), ROWS["grid"][2:])


# ---- what is not there ----


def test_an_unknown_suffix_names_the_known_ones(path, tmp_path):
    done = run("export", small_store(path), "-o", tmp_path / "out.xlsx")
    assert done.exit_code == 2
    assert ".parquet, .arrow, .h5, .zarr" in " ".join(done.stderr.split())
    with pytest.raises(KvstoreError, match=r"\.parquet, \.arrow, \.h5, \.zarr"):
        write_file([], [Field("x", "f8")], tmp_path / "out.xlsx")


@pytest.mark.parametrize("suffix", sorted(LIBRARY))
def test_a_missing_library_names_the_extra(tmp_path, suffix, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in LIBRARY.values():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    for module in ("arrow", "parquet", "hdf5", "zarr"):
        monkeypatch.delitem(sys.modules, f"kvstore.export.{module}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(KvstoreError, match=r"pip install 'kvstore\[export\]'"):
        write_file([], [Field("x", "f8")], tmp_path / f"out.{suffix}")


# ---- memory ----

GROWTH = """
import resource, sys
from pathlib import Path
import numpy as np
from kvstore.export.files import check_format, write_file
from kvstore.schema import Field
target, count = Path(sys.argv[1]), int(sys.argv[2])
fields = [Field("t", "f8"), Field("grid", "i4", (64, 16))]
grid = np.random.default_rng(1).poisson(9, (512, 64, 16)).astype("i4")
batches = ({"t": np.arange(512.0), "grid": grid.copy()} for _ in range(count))
write_file(batches, fields, target)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "h5", "zarr", "npz"])
def test_memory_does_not_grow_with_the_range(tmp_path, suffix):
    """Three times the rows, 84 MB and 252 MB, take the same memory, give or take 40 MB."""
    need(suffix)

    def peak_kb(count):
        out = tmp_path / f"{count}.{suffix}"
        done = subprocess.run(
            [sys.executable, "-c", GROWTH, str(out), str(count)],
            capture_output=True, check=True, text=True, timeout=120,
        )  # fmt: skip
        return int(done.stdout)

    assert peak_kb(120) - peak_kb(40) < 40_000
