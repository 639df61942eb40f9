"""Streams as Arrow tables, DataFrames, Datasets and datasets for training."""

from __future__ import annotations

import builtins
import pickle
import sys
import warnings

import numpy as np
import pytest
from exports import ROWS, SCHEMA, TIMES, everything, need_torch, same, small_store, timed_rows

import kvstore
from kvstore.errors import KvstoreError, SchemaError
from kvstore.schema import Field, Schema


def stream_of(path, rows=ROWS, schema=SCHEMA):
    return kvstore.open(small_store(path, rows, schema))["all"]


# ---- Arrow ----


def test_a_table_has_the_values_and_the_schema(path):
    pa = pytest.importorskip("pyarrow")
    table = stream_of(path).to_arrow()
    assert table.num_rows == 3
    assert same(table["timestamps"].to_numpy(), ROWS["timestamps"])
    assert same(table["grid"].combine_chunks().to_numpy_ndarray(), ROWS["grid"])
    assert table.schema.field("stamp").type == pa.timestamp("us", "UTC")


def test_a_table_of_a_range_has_its_rows_and_fields(path):
    pytest.importorskip("pyarrow")
    stream, times = stream_of(path), TIMES["float64"]
    assert stream.to_arrow(times[1], fields=["big", "note"]).to_pydict() == {
        "big": ROWS["big"][1:].tolist(), "note": ROWS["note"][1:].tolist(),
    }  # fmt: skip
    assert stream.to_arrow(None, times[1], inclusive="left", fields=["ok"]).num_rows == 1
    assert stream.to_arrow(times[2] + 1).num_rows == 0


# ---- pandas ----


def test_a_frame_is_indexed_by_the_time_as_it_is_stored(path):
    pytest.importorskip("pandas")
    frame = stream_of(path).to_pandas()
    assert frame.index.name == "timestamps"
    assert same(frame.index.to_numpy(), ROWS["timestamps"])
    assert same(frame["big"].to_numpy(), ROWS["big"])
    assert same(frame["single"].to_numpy(), ROWS["single"])
    assert str(frame["stamp"].dtype) == "datetime64[us, UTC]"
    assert frame["stamp"].isna().tolist() == [False, True, False]
    assert same(np.stack(frame["grid"]), ROWS["grid"])
    assert frame["note"].tolist() == ROWS["note"].tolist()
    assert frame.attrs["single"] == {"unit": "°C", "description": ""}


@pytest.mark.parametrize("dtype", ["int64", "datetime64[ns]", "datetime64[s]"])
def test_integral_times_are_utc_to_the_last_ns(path, dtype):
    pytest.importorskip("pandas")
    rows, schema = timed_rows(dtype)
    index = stream_of(path, rows, schema).to_pandas().index
    assert str(index.tz) == "UTC"
    assert index.asi8.tolist() == rows["time"].view("i8").tolist()


def test_a_frame_without_the_time_or_without_rows(path):
    pytest.importorskip("pandas")
    stream = stream_of(path)
    assert stream.to_pandas(fields=["ok"])["ok"].tolist() == [True, False, True]
    empty = stream.to_pandas("2050-01-01")
    assert len(empty) == 0
    assert empty["single"].dtype == np.float32


# ---- xarray ----


@pytest.mark.parametrize("dtype", TIMES)
def test_a_dataset_has_the_time_as_coordinate(path, dtype):
    pytest.importorskip("xarray")
    rows, schema = timed_rows(dtype)
    found = stream_of(path, rows, schema).to_xarray()
    expected = rows["time"].view("M8[ns]") if dtype == "int64" else rows["time"]
    assert same(found["time"].to_numpy(), expected)
    assert found["value"].dims == ("time",)
    assert found["value"].to_numpy().tolist() == [0, 1, 2]


def test_a_dataset_has_shapes_units_and_descriptions(path):
    pytest.importorskip("xarray")
    found = stream_of(path).to_xarray(fields=["timestamps", "grid", "single"])
    assert found["grid"].dims == ("timestamps", "grid_0", "grid_1")
    assert same(found["grid"].to_numpy(), ROWS["grid"])
    assert found["single"].attrs == {"units": "°C"}
    assert found["grid"].attrs == {"description": "counts"}
    assert stream_of(path.parent / "b.kv").to_xarray(fields=["ok"])["ok"].dims == ("row",)


# ---- torch ----


def many(path, dtype="float64", batches=40, rows=100):
    """Batches that overlap in time, with equal times in several of them."""
    schema = Schema((Field("time", dtype), Field("x", "int64"), Field("grid", "float32", (2, 3))))
    rng = np.random.default_rng(5)
    with kvstore.open(path, mode="w", flush_interval_s=None) as store:
        stream = store.stream("all", schema)
        for number in range(batches):
            times = np.sort(rng.integers(0, 150, rows)) + number * 60
            ids = np.arange(rows) + number * rows
            grid = np.repeat(ids, 6).reshape(rows, 2, 3)
            stream.append({"time": times.astype(dtype), "x": ids, "grid": grid.astype("f4")})
            store.flush()
    return kvstore.open(path)["all"]


def loader(dataset, workers, method="fork"):
    data = need_torch().utils.data
    context = method if workers else None
    return data.DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
    )


def ids(batches):
    return [x for batch in batches for x in batch["x"].tolist()]


@pytest.mark.parametrize("dtype", TIMES)
def test_a_dataset_for_training_has_every_row_once(path, dtype):
    torch = need_torch()
    stream = many(path, dtype)
    dataset = stream.to_torch()
    assert isinstance(dataset, torch.utils.data.IterableDataset)
    batches = list(loader(dataset, 0))
    assert sorted(ids(batches)) == list(range(4000))
    assert batches[0]["grid"].shape[1:] == (2, 3)
    assert batches[0]["grid"].dtype == torch.float32
    assert all((batch["grid"][:, 1, 2] == batch["x"]).all() for batch in batches)
    assert sorted(ids(loader(dataset, 0))) == list(range(4000)), "a second epoch"


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_the_range_and_open_the_store_themselves(path, method):
    need_torch()
    dataset = many(path).to_torch(fields=["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about CPUs and fork
        assert sorted(ids(loader(dataset, 3, method))) == list(range(4000))


def test_each_worker_has_about_its_share(path, monkeypatch):
    torch = need_torch()
    from kvstore.export import torch as ours  # noqa: PLC0415  # needs torch

    dataset = many(path).to_torch(fields=["x"])
    shares = []
    for number in range(4):
        info = type("Info", (), {"id": number, "num_workers": 4})
        monkeypatch.setattr(ours, "get_worker_info", lambda info=info: info)
        shares.append(ids(dataset))
    assert torch.utils.data.get_worker_info() is None
    assert sorted(x for share in shares for x in share) == list(range(4000))
    assert max(map(len, shares)) < 1.5 * min(map(len, shares))


def test_batches_of_so_many_rows(path):
    need_torch()
    dataset = many(path).to_torch(100.0, 900.0, fields=["x"], batch_rows=64)
    sizes = [len(batch["x"]) for batch in dataset]
    assert set(sizes[:-1]) == {64}
    stream = kvstore.open(path)["all"]
    assert sum(sizes) == stream.count(100.0, 900.0)
    half_open = stream.to_torch(100.0, 900.0, inclusive="left")
    assert len(ids(half_open)) == stream.count(100.0, 900.0, inclusive="left")


def test_batches_of_no_rows_are_refused(path):
    need_torch()
    with pytest.raises(SchemaError, match="batch_rows=0: use 1 or more"):
        stream_of(path).to_torch(batch_rows=0)


def test_an_epoch_leaves_out_what_a_writer_adds_at_the_end(path):
    need_torch()
    dataset = many(path).to_torch(fields=["x"])
    with kvstore.open(path, mode="w") as store:
        store["all"].append({"time": [1e6], "x": [-1], "grid": np.zeros((1, 2, 3), "f4")})
    assert sorted(ids(dataset)) == list(range(4000))


def test_a_dataset_of_nothing_and_one_of_text_and_times(path):
    torch = need_torch()
    stream = stream_of(path)
    assert list(stream.to_torch("2050-01-01")) == []
    batches = list(stream.to_torch(fields=["note", "stamp", "big"]))
    assert [text for batch in batches for text in batch["note"]] == ROWS["note"].tolist()
    assert torch.cat([batch["stamp"] for batch in batches]).tolist() == (
        ROWS["stamp"].view("i8").tolist()
    )


def test_a_dataset_pickles(path):
    need_torch()
    dataset = pickle.loads(pickle.dumps(many(path).to_torch(fields=["x"])))
    assert sorted(ids(dataset)) == list(range(4000))


# ---- what is not there ----


@pytest.mark.parametrize(
    ("module", "library", "install"),
    [
        ("arrow", "pyarrow", r"'kvstore\[export\]'"),
        ("pandas", "pandas", r"'kvstore\[export\]'"),
        ("xarray", "xarray", r"'kvstore\[export\]'"),
        ("torch", "torch", r"'kvstore\[torch\]'"),
    ],
)
def test_a_missing_library_is_named(path, monkeypatch, module, library, install):
    method = f"to_{module}"
    stream, real = stream_of(path), builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, f"kvstore.export.{module}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(KvstoreError, match=f"{method}.* needs {library}.*pip install {install}"):
        getattr(stream, method)()


@pytest.mark.parametrize("method", ["to_arrow", "to_pandas", "to_xarray", "to_torch"])
def test_an_unknown_field_is_named(path, method):
    if method == "to_torch":
        need_torch()
    else:
        pytest.importorskip({"to_arrow": "pyarrow"}.get(method, method.removeprefix("to_")))
    with pytest.raises(SchemaError, match="no field 'nope'; there are"):
        getattr(stream_of(path), method)(fields=["nope"])


def test_reading_after_a_conversion_finds_the_same(path):
    pytest.importorskip("pyarrow")
    stream = stream_of(path)
    stream.to_arrow()
    assert same(everything(stream)["grid"], ROWS["grid"])
