"""Rows as csv, jsonl and npz: the values come back, whatever the batches, and memory is bounded."""

from __future__ import annotations

import csv as csv_reader
import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvstore.errors import SchemaError
from kvstore.export import csv, jsonl, npz
from kvstore.schema import Field

FIELDS = (
    Field("time", "float64"),
    Field("stamp", "datetime64[us]"),
    Field("took", "timedelta64[ms]"),
    Field("single", "float32"),
    Field("half", "float16"),
    Field("grid", "int32", (2, 3)),
    Field("pair", "float64", (2,)),
    Field("ok", "bool"),
    Field("big", "uint64"),
    Field("wave", "complex128"),
    Field("note", "text"),
)
ROWS = {
    "time": np.array([1771342357.080619, np.nextafter(1771342357.0, 0), -0.1]),
    "stamp": np.array(["2026-02-17T15:32:37.080619", "NaT", "1969-12-31"], "M8[us]"),
    "took": np.array([5, "NaT", -1], "m8[ms]"),
    "single": np.array([0.1, np.nan, np.inf], "f4"),
    "half": np.array([0.1, np.nan, 65504], "f2"),
    "grid": np.arange(18, dtype="i4").reshape(3, 2, 3) - 9,
    "pair": np.array([[0.1, np.nan], [-np.inf, 1e300], [0, -0.0]]),
    "ok": np.array([True, False, True]),
    "big": np.array([0, 2**64 - 1, 2**53 + 1], "u8"),
    "wave": np.array([1 + 2j, complex(np.nan, 0), 0]),
    "note": np.array(["a", 'é€😀 ",\n;', ""], object),
}
WITH_NONE = {"time": np.arange(3.0), "note": np.array(["a", None, ""], object)}


def batches(rows, *ends):
    """The rows in batches that end there."""
    for start, stop in zip((0, *ends), (*ends, None), strict=True):
        yield {name: column[start:stop] for name, column in rows.items()}


def written(module, rows, fields=FIELDS, ends=(1,)):
    file = io.BytesIO()
    count = module.write(batches(rows, *ends), fields, file)
    assert not file.closed
    assert count == len(next(iter(rows.values())))
    return file.getvalue()


def fields_of(rows):
    return [field for field in FIELDS if field.name in rows]


def same(a, b):
    """Equal to the bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- csv ----


def table(data):
    return list(csv_reader.reader(io.StringIO(data.decode(), newline="")))


def test_csv_has_a_header_and_a_line_per_row_whatever_the_batches():
    one = written(csv, ROWS, ends=())
    assert one == written(csv, ROWS, ends=(1, 1, 2))
    header, *lines = table(one)
    assert header[:5] == ["time", "stamp", "took", "single", "half"]
    assert header[5:11] == ["grid_0_0", "grid_0_1", "grid_0_2", "grid_1_0", "grid_1_1", "grid_1_2"]
    assert header[11:] == ["pair_0", "pair_1", "ok", "big", "wave", "note"]
    assert len(lines) == 3
    assert all(len(line) == len(header) for line in lines)


def test_csv_prints_the_digits_that_bring_each_value_back():
    header, *lines = table(written(csv, ROWS))
    columns = dict(zip(header, zip(*lines, strict=True), strict=True))
    assert same(np.array([float(x) for x in columns["time"]]), ROWS["time"])
    assert columns["single"] == ("0.1", "nan", "inf")
    assert same(np.array(columns["half"], "f2"), ROWS["half"])
    assert np.array_equal(np.array(columns["stamp"], "M8[us]"), ROWS["stamp"], equal_nan=True)
    assert columns["stamp"][0] == "2026-02-17T15:32:37.080619"
    assert columns["stamp"][1] == columns["took"][1] == "NaT"
    assert [int(x) for x in columns["big"]] == ROWS["big"].tolist()
    assert [int(x) for x in columns["grid_1_2"]] == ROWS["grid"][:, 1, 2].tolist()
    assert same(np.array([float(x) for x in columns["pair_1"]]), ROWS["pair"][:, 1].copy())
    assert columns["note"] == tuple(ROWS["note"])
    assert columns["ok"] == ("True", "False", "True")


def test_csv_leaves_none_empty():
    assert table(written(csv, WITH_NONE, fields_of(WITH_NONE))) == [
        ["time", "note"], ["0.0", "a"], ["1.0", ""], ["2.0", ""],
    ]  # fmt: skip


def test_csv_of_nothing_is_its_header():
    file = io.BytesIO()
    assert csv.write([], [Field("time", "f8"), Field("grid", "i4", (1, 1))], file) == 0
    assert table(file.getvalue()) == [["time", "grid_0_0"]]


def test_a_field_without_values_takes_no_column_in_csv():
    rows = {"time": np.arange(2.0), "none": np.zeros((2, 0))}
    fields = [Field("time", "f8"), Field("none", "f8", (0,))]
    assert table(written(csv, rows, fields)) == [["time"], ["0.0"], ["1.0"]]


def test_times_of_many_digits_are_written_out():
    """numpy's astype(str) cut their units off."""
    field = Field("took", "m8[ms]")
    rows = {"took": np.array([-(2**63) + 1, -10_000_000], "m8[ms]")}
    assert table(written(csv, rows, [field]))[1:] == [
        ["-9223372036854775807 milliseconds"], ["-10000000 milliseconds"],
    ]  # fmt: skip
    assert objects(written(jsonl, rows, [field]))[1] == {"took": "-10000000 milliseconds"}


def test_jsonl_with_a_lone_surrogate_is_still_utf8():
    rows = {"note": np.array(["\ud800", "é"], object)}
    data = written(jsonl, rows, [Field("note", "text")])
    assert data.decode().splitlines() == ['{"note": "\\ud800"}', '{"note": "é"}']


# ---- jsonl ----


def objects(data):
    assert data.endswith(b"\n") or not data
    return [json.loads(line, parse_constant=pytest.fail) for line in data.splitlines()]


def test_jsonl_has_an_object_per_row_whatever_the_batches():
    one = written(jsonl, ROWS, ends=())
    assert one == written(jsonl, ROWS, ends=(1, 1, 2))
    found = objects(one)
    assert [list(row) for row in found] == [list(ROWS)] * 3


def test_jsonl_brings_each_value_back_and_has_null_where_json_has_no_word():
    found = objects(written(jsonl, ROWS))
    column = {name: [row[name] for row in found] for name in ROWS}
    assert same(np.array(column["time"]), ROWS["time"])
    assert column["single"] == [0.1, None, None]  # not 0.10000000149011612
    assert column["half"] == [0.1, None, 65500.0]  # the shortest that is 65504 again
    assert column["stamp"][:2] == ["2026-02-17T15:32:37.080619", None]
    assert column["took"] == ["5 milliseconds", None, "-1 milliseconds"]
    assert column["grid"] == ROWS["grid"].tolist()
    assert column["pair"] == [[0.1, None], [None, 1e300], [0.0, -0.0]]
    assert column["ok"] == [True, False, True]
    assert column["big"] == ROWS["big"].tolist()
    assert column["wave"] == [[1.0, 2.0], [None, 0.0], [0.0, 0.0]]
    assert column["note"] == ROWS["note"].tolist()


def test_jsonl_has_null_for_none():
    rows = objects(written(jsonl, WITH_NONE, fields_of(WITH_NONE)))
    assert [row["note"] for row in rows] == ["a", None, ""]


def test_jsonl_of_nothing_is_empty():
    file = io.BytesIO()
    assert jsonl.write([], FIELDS, file) == 0
    assert file.getvalue() == b""


# ---- npz ----


def arrays(data):
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("ends", [(), (1,), (0, 1, 1, 2, 3)])
def test_npz_brings_every_array_back_to_the_bit(ends):
    found = arrays(written(npz, ROWS, ends=ends))
    assert list(found) == list(ROWS)
    for name, column in ROWS.items():
        if name == "note":
            assert found[name].dtype.kind == "U"
            assert found[name].tolist() == column.tolist()
        else:
            assert same(found[name], column)


def test_npz_of_nothing_has_empty_arrays_of_the_right_kind():
    file = io.BytesIO()
    assert npz.write([], FIELDS, file) == 0
    found = arrays(file.getvalue())
    for field in FIELDS:
        assert found[field.name].shape == (0, *field.shape)
        assert field.is_text or found[field.name].dtype == field.np_dtype


def test_npz_refuses_none_and_says_what_to_do():
    with pytest.raises(SchemaError, match=r"'note' holds None.*--fields.*jsonl"):
        written(npz, WITH_NONE, fields_of(WITH_NONE))


def test_npz_keeps_text_of_any_width_with_per_row_shapes():
    field = Field("words", "text", (2,))
    words = np.array([["a", "b" * 300], ["", "\u00e9"]], object)
    found = arrays(written(npz, {"words": words}, [field]))["words"]
    assert found.shape == (2, 2)
    assert found.tolist() == words.tolist()


def test_npz_names_with_slashes_stay_names():
    rows = {"time": np.arange(2.0), "a/b": np.arange(2)}
    fields = [Field("time", "f8"), Field("a/b", "i8")]
    assert arrays(written(npz, rows, fields))["a/b"].tolist() == [0, 1]


def test_npz_is_a_plain_archive_that_any_tool_opens():
    with zipfile.ZipFile(io.BytesIO(written(npz, ROWS))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{name}.npy" for name in ROWS]


# ---- any values ----

COLUMNS = {
    "f8": hnp.arrays("<f8", 6),
    "f4": hnp.arrays("<f4", (6, 2)),
    "i8": hnp.arrays("<i8", 6),
    "u1": hnp.arrays("u1", (6, 1, 3)),
    "M8[ns]": hnp.arrays("<M8[ns]", 6),
    "text": st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        min_size=6,
        max_size=6,
    ).map(lambda texts: np.array([*texts, None], object)[:-1]),
}
CASES = st.sampled_from(sorted(COLUMNS)).flatmap(
    lambda kind: COLUMNS[kind].map(lambda values: (kind, values))
)


@given(CASES, st.lists(st.integers(0, 6), max_size=3).map(sorted))
def test_any_values_come_back_from_npz_and_jsonl(case, ends):
    kind, values = case
    field = Field("x", kind, values.shape[1:])
    from_npz = arrays(written(npz, {"x": values}, [field], ends))["x"]
    from_jsonl = [row["x"] for row in objects(written(jsonl, {"x": values}, [field], ends))]
    if kind == "text":
        assert from_npz.tolist() == from_jsonl == values.tolist()
        return
    assert same(from_npz, values)
    if kind[0] == "f":
        back = np.array(from_jsonl, object).astype(values.dtype).reshape(values.shape)
        assert np.array_equal(back, np.where(np.isfinite(values), values, np.nan), equal_nan=True)
    elif kind[0] == "M":
        assert np.array_equal(
            np.array([x or "NaT" for x in from_jsonl], values.dtype), values, equal_nan=True
        )
    else:
        assert from_jsonl == values.tolist()


@given(CASES, st.lists(st.integers(0, 6), max_size=3).map(sorted))
def test_any_values_come_back_from_csv(case, ends):
    kind, values = case
    field = Field("x", kind, values.shape[1:])
    _, *lines = table(written(csv, {"x": values}, [field], ends))
    if kind == "text":
        assert [value for (value,) in lines] == values.tolist()
        return
    back = np.array(lines).astype(values.dtype).reshape(values.shape)
    assert np.array_equal(back, values, equal_nan=kind[0] in "fM")
