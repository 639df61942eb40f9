"""What the tests of export, conversions and import share: a stream of every kind of field."""

from __future__ import annotations

import numpy as np
import pytest

import kvstore
from kvstore.schema import Field, Schema

FIELDS = (
    Field("timestamps", "float64", unit="s", description="arrival"),
    Field("stamp", "datetime64[us]"),
    Field("second", "datetime64[s]"),
    Field("day", "datetime64[D]"),
    Field("took", "timedelta64[ms]"),
    Field("single", "float32", unit="°C"),
    Field("half", "float16"),
    Field("grid", "int32", (2, 3), description="counts"),
    Field("flags", "bool", (2,)),
    Field("ok", "bool"),
    Field("big", "uint64", fill=7),
    Field("wave", "complex64", (2,)),
    Field("z", "complex128"),
    Field("stamps", "datetime64[ns]", (2,)),
    Field("note", "text"),
    Field("words", "text", (2,)),
)
SCHEMA = Schema(FIELDS)
TIMES = {
    "float64": np.array([np.nextafter(1771342357.0, 0), 1771342357.080619, 1771342357.080619]),
    "int64": np.array([1, 1771342357080619001, 1771342357080619002]),
    "datetime64[ns]": np.array([1, 1771342357080619001, 1771342357080619002]).view("M8[ns]"),
    "datetime64[s]": np.array([1, 2, 1771342357], "M8[s]"),
}
ROWS = {
    "timestamps": TIMES["float64"],
    "stamp": np.array(["2026-02-17T15:32:37.080619", "NaT", "1969-12-31"], "M8[us]"),
    "second": np.array(["2026-02-17T15:32:37", "NaT", "1900-01-01"], "M8[s]"),
    "day": np.array(["2026-02-17", "NaT", "0001-01-01"], "M8[D]"),
    "took": np.array([5, "NaT", -1], "m8[ms]"),
    "single": np.array([0.1, np.nan, -np.inf], "f4"),
    "half": np.array([0.1, np.nan, 65504], "f2"),
    "grid": np.arange(18, dtype="i4").reshape(3, 2, 3) - 9,
    "flags": np.array([[True, False], [False, False], [True, True]]),
    "ok": np.array([True, False, True]),
    "big": np.array([0, 2**64 - 1, 2**53 + 1], "u8"),
    "wave": np.array([[1 + 2j, 0], [complex(np.nan, -0.0), 1], [0, 3j]], "c8"),
    "z": np.array([1 + 2j, complex(np.nan, 0), 0]),
    "stamps": np.array([[1, 2], [3, np.iinfo("i8").min], [-1, 2**62]]).view("M8[ns]"),
    "note": np.array(["a", "", 'é€😀 ",\n;'], object),
    "words": np.array([["a", "bb"], ["", "c"], ["d", "\n"]], object),
}


def small_store(path, rows=ROWS, schema=SCHEMA, name="all"):
    with kvstore.open(path, mode="w", flush_interval_s=None) as store:
        stream = store.stream(name, schema)
        for start in (0, 2):  # two commits, and so two batches
            stream.append({key: column[start : start + 2] for key, column in rows.items()})
            store.flush()
    return path


def timed_rows(dtype):
    """Times of that dtype with a value beside each, and their schema."""
    rows = {"time": TIMES[dtype], "value": np.arange(3, dtype="i2")}
    return rows, Schema((Field("time", dtype), Field("value", "int16")))


def everything(stream, fields=None):
    batches = list(stream.read(fields=fields))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def same(a, b):
    """Equal to the bit, NaN and NaT included; text by value."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype == object:
        return a.tolist() == b.tolist()
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same_rows(found, expected):
    assert list(found) == list(expected)
    for name, column in expected.items():
        assert same(found[name], column), name


LIBRARY = {"parquet": "pyarrow", "arrow": "pyarrow", "h5": "h5py", "zarr": "zarr"}


def need(suffix):
    """Skip where the library of a format is missing; CI installs them all."""
    if suffix in LIBRARY:
        pytest.importorskip(LIBRARY[suffix])


def need_torch():
    """No part of what CI installs: 754 MB, of the CPU's build."""
    return pytest.importorskip("torch", reason="torch is an extra of its own: 'kvstore[torch]'")
