"""What a row may be: inference, refusals, lossless conversion, fills, added fields."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import Field, NoFillError, Schema, SchemaError, TimeError

TIME = Field("time", "f8")


def one(dtype, **options):
    """A schema with one field besides the time."""
    return Schema((TIME, Field("v", dtype, **options)))


def column(schema, values):
    """What becomes of these values of the second field."""
    rows = len(values)
    return schema.columns({"time": np.arange(rows, dtype="f8"), "v": values})[1]


# ---- fields and schemas ----


@pytest.mark.parametrize(
    "dtype",
    [*"?bBhHiIlLefdFD", "M8[s]", "M8[ns]", "M8[D]", "m8[us]", "text", str, object, "<U7", ">f4"],
)
def test_storable_dtypes(dtype):
    field = Field("v", dtype)
    assert field.np_dtype.byteorder in "|=<"
    assert Field.from_record(field.to_record()) == field


def test_big_endian_is_stored_as_little_endian():
    assert Field("v", ">i4").np_dtype == np.dtype("<i4")
    assert column(one("<i4"), np.array([1, 2], ">i4")).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", ["S3", "V4", "M8", "m8", np.longdouble, "i4,f8", "nonsense", 3.5])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(SchemaError, match="field 'v'"):
        Field("v", dtype)


@pytest.mark.parametrize(
    "name", ["", " v", "v ", "a\nb", "\x00", "\ud800", "x" * 256, "\u00e9" * 128, 7, None]
)
def test_names_are_short_and_printable(name):
    with pytest.raises(SchemaError, match="field name"):
        Field(name, "f8")


@pytest.mark.parametrize("text", ["\ud800", "x" * 5000, 7, None])
@pytest.mark.parametrize("which", ["unit", "description"])
def test_unit_and_description_are_text_that_can_be_stored(which, text):
    with pytest.raises(SchemaError, match=which):
        Field("v", "f8", **{which: text})


def test_shapes_and_sizes_have_bounds():
    with pytest.raises(SchemaError, match="negative"):
        Field("v", "f8", (2, -1))
    with pytest.raises(SchemaError, match="over the limit"):
        Field("v", "f8", (1 << 26,))
    with pytest.raises(SchemaError, match="different names"):
        Schema((TIME, TIME))
    with pytest.raises(SchemaError, match="1 to 1000"):
        Schema((TIME, *(Field(f"v{n}", "f8") for n in range(1000))))
    with pytest.raises(SchemaError, match="1 to 1000"):
        Schema(())


@pytest.mark.parametrize("dtype", ["f4", "i4", "u8", "M8[D]", "M8[10ns]", "m8[ns]", "text", "?"])
def test_other_time_fields_are_refused(dtype):
    with pytest.raises(SchemaError, match="time field 'time'"):
        Schema((Field("time", dtype),))


def test_a_time_is_one_value_a_row():
    with pytest.raises(SchemaError, match="shape"):
        Schema((Field("time", "f8", (1,)),))


def test_the_time_field_is_found_or_named():
    assert Schema((Field("timestamp", "i8"), TIME)).time == "timestamp"
    assert Schema((Field("at", "M8[ns]"), TIME), "at").time == "at"
    with pytest.raises(SchemaError, match="which field is the time"):
        Schema((Field("at", "M8[ns]"),))
    with pytest.raises(SchemaError, match="'when' is not among"):
        Schema((TIME,), "when")


def test_inference():
    batch = {
        "timestamps": [1.0, 2.0],
        "i": [1, 2],
        "image": np.zeros((2, 3, 4), ">u2"),
        "text": ["a", None],
        "fixed": np.array(["a", "bcd"]),
        "flag": [True, False],
    }
    schema = Schema.infer(batch)
    found = {field.name: (field.np_dtype.str, field.shape) for field in schema.fields}
    assert found == {
        "timestamps": ("<f8", ()),
        "i": ("<i8", ()),
        "image": ("<u2", (3, 4)),
        "text": ("|O", ()),
        "fixed": ("|O", ()),
        "flag": ("|b1", ()),
    }


def test_inference_from_one_row():
    schema = Schema.infer({"time": 1.5, "image": np.zeros((3, 4), "f4"), "text": "a"})
    assert [field.shape for field in schema.fields] == [(), (3, 4), ()]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"time": [1.0], "v": [object()]}, "Python objects"),
        ({"time": [1.0], "v": [b"bytes"]}, "cannot be stored"),
        ({"time": [1.0], "v": 5.0}, "first axis"),
        ({"time": [1.0, 2.0], "v": [[1], [1, 2]]}, "inhomogeneous"),
        ({"v": [1.0]}, "which field"),
    ],
)
def test_what_cannot_be_inferred(batch, message):
    with pytest.raises(SchemaError, match=message):
        Schema.infer(batch)


# ---- batches ----


def test_a_batch_has_exactly_the_fields():
    with pytest.raises(SchemaError, match="missing v"):
        one("f8").columns({"time": [1.0]})
    with pytest.raises(SchemaError, match="unknown w"):
        one("f8").columns({"time": [1.0], "v": [1.0], "w": [1.0]})


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((2, 1)), 1.0, np.zeros((2, 2, 2))])
def test_every_field_has_a_value_of_its_shape_for_each_time(values):
    with pytest.raises(SchemaError, match="field 'v': shape"):
        one("f8").columns({"time": [1.0, 2.0], "v": values})


@pytest.mark.parametrize("time", [np.nan, np.inf, -np.inf, 1e10, -1e10, 1771342357000.0])
def test_times_that_no_key_can_hold_are_refused(time):
    with pytest.raises(TimeError, match="row 1"):
        one("f8").columns({"time": np.array([1.0, time]), "v": np.zeros(2)})


def test_nat_is_refused():
    schema = Schema((Field("time", "M8[ns]"),))
    with pytest.raises(TimeError, match="row 0"):
        schema.columns({"time": np.array(["NaT"], "M8[ns]")})


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("i4", np.array([1, 2], "i8")),  # arrays: the dtype decides
        ("f4", np.array([1.0, 2.0], "f8")),
        ("i8", np.array([1.0, 2.0])),
        ("u8", np.array([1, 2], "i8")),
        ("?", np.array([0, 1])),
        ("f8", np.array(["1.5", "2"])),
        ("f8", np.array([1 + 0j, 2])),
        ("M8[us]", np.array([1, 2], "M8[ns]")),
        ("i8", np.array([1, 2], "M8[ns]")),
        ("M8[ns]", np.array([1, 2], "i8")),
        ("text", np.array([1, 2])),
        ("text", np.array([b"a", b"b"])),
        ("i1", [300, 1]),  # lists: the values decide
        ("i1", [np.int64(300), 1]),
        ("u8", [np.int64(-1), 1]),
        ("u1", [-1, 1]),
        ("i8", [1.5, 2]),
        ("i8", ["1", "2"]),
        ("f8", ["1.5", "2"]),
        ("?", ["False", "True"]),
        ("?", [0, 1]),
        ("i8", [None, 1]),
        ("f8", [None, 1.0]),
        ("text", ["a", 1]),
        ("text", [float("nan"), "a"]),
        ("text", ["a", ["b"]]),
        ("f8", [2**53 + 1, 0]),  # exact in neither: numpy would round them in silence
        ("f8", np.array([2**53 + 1, 0])),
        ("f8", np.array([-(2**63), 0])),
        ("f4", [2**24 + 1, 0]),
        ("f8", [2**53 + 1, 0.5]),
        ("i8", [2**40, 0.5]),
        ("c8", [2**24 + 1, 0]),
        ("f4", [1e300, 0.0]),
        ("f2", [1e5, 0.0]),
        ("M8[ns]", np.array(["1500-01-01", "1970-01-01"], "M8[us]")),
        ("m8[ns]", np.array([2**62, 0], "m8[s]")),
    ],
)
def test_lossy_values_are_refused(dtype, values):
    with pytest.raises(SchemaError, match="field 'v'"):
        column(one(dtype), values)


@pytest.mark.parametrize(
    ("dtype", "values", "stored"),
    [
        ("i8", np.array([1, 2], "i4"), [1, 2]),
        ("i1", [-128, 127], [-128, 127]),
        ("u8", [2**64 - 1, 0], [2**64 - 1, 0]),
        ("i8", [True, False], [1, 0]),
        ("f8", np.array([2**53, -(2**53)]), [2.0**53, -(2.0**53)]),
        ("f8", [1, 2.5], [1.0, 2.5]),
        ("f8", [2**40, 2.5], [2.0**40, 2.5]),
        ("f4", [0.1, 1], np.array([0.1, 1], "f4").tolist()),  # Python's floats have no dtype
        ("f8", np.array([0.1, 1], "f4"), np.array([0.1, 1], "f4").tolist()),
        ("c16", [1, 2j], [1, 2j]),
        ("M8[ns]", np.array([7, 8], "M8[s]"), [7 * 10**9, 8 * 10**9]),
        ("M8[s]", ["1970-01-01T00:00:07", "1970-01-02"], [7, 86400]),
        ("text", ["a", None], ["a", None]),
        ("text", np.array(["a", "b"], "T"), ["a", "b"]),
        ("text", ["\ud800", "\U0001f600\x00"], ["\ud800", "\U0001f600\x00"]),
    ],
)
def test_values_that_fit_are_converted(dtype, values, stored):
    found = column(one(dtype), values)
    assert found.dtype == one(dtype).fields[1].np_dtype
    assert (found.view("i8") if found.dtype.kind == "M" else found).tolist() == stored


def test_nat_and_nan_survive_conversion():
    assert np.isnat(column(one("M8[ns]"), np.array(["NaT", "1970-01-01"], "M8[s]")))[0]
    assert np.isnan(column(one("f8"), np.array([np.nan, 1], "f4")))[0]


def test_masked_arrays_are_refused():
    with pytest.raises(SchemaError, match="mask"):
        column(one("f8"), np.ma.masked_array([1.0, 2.0], [True, False]))


def test_arrays_of_the_right_dtype_are_not_copied():
    values = np.zeros(2)
    assert np.shares_memory(column(one("f8"), values), values)


@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=5))
def test_integers_are_stored_exactly_or_refused(values):
    for dtype in ("i1", "u4", "i8", "u8", "f4", "f8"):
        for given_values in (values, [np.array(value)[()] for value in values]):
            try:
                found = column(one(dtype), given_values).tolist()
            except SchemaError:
                continue
            assert [int(value) for value in found] == values


# ---- fills and added fields ----


@pytest.mark.parametrize(
    ("dtype", "fill", "expected"),
    [
        ("f4", 1.5, 1.5),
        ("f8", 3, 3.0),
        ("i2", -7, -7),
        ("u8", 2**64 - 1, 2**64 - 1),
        ("?", True, True),
        ("c16", 1 - 2j, 1 - 2j),
        ("text", "no fill", "no fill"),
        ("text", "", ""),
        ("M8[ns]", np.datetime64("2020-01-01"), np.datetime64("2020-01-01", "ns")),
        ("M8[s]", "2020-01-01", np.datetime64("2020-01-01", "s")),
        ("m8[us]", np.timedelta64(3, "s"), np.timedelta64(3, "s")),
    ],
)
def test_a_fill_comes_back_as_declared(dtype, fill, expected):
    field = Field("v", dtype, (2,), fill=fill)
    for same in (field, Field.from_record(field.to_record()), pickle.loads(pickle.dumps(field))):
        assert same == field
        filled = same.filled(3)
        assert filled.shape == (3, 2)
        assert filled.dtype == field.np_dtype
        assert (filled == expected).all()


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("i4", 1.5),
        ("i1", 300),
        ("f8", "x"),
        ("i4", None),
        ("?", 2),
        ("f8", [1.0, 2.0]),
        ("text", 7),
        ("text", "\ud800"),
        ("M8[s]", 7.5),
        ("i8", object()),
    ],
)
def test_a_fill_must_fit_its_field(dtype, fill):
    with pytest.raises(SchemaError, match="field 'v'"):
        Field("v", dtype, fill=fill)


def test_the_default_fill_declared_is_no_other_schema():
    """NaN is not equal to itself: a schema with such a fill would differ from its stored self."""
    assert Field("v", "f8", fill=float("nan")) == Field("v", "f8")
    assert Field("v", "M8[s]", fill="NaT") == Field("v", "M8[s]")
    assert Field("v", "text", fill=None) == Field("v", "text")


@pytest.mark.parametrize("dtype", ["f2", "c8", "M8[s]", "m8[s]", "text"])
def test_missing_values_have_a_default_where_one_is_honest(dtype):
    filled = Field("v", dtype, (2,)).filled(2)
    if dtype == "text":
        assert filled.tolist() == [[None, None]] * 2
    else:
        assert np.isnan(filled).all()


@pytest.mark.parametrize("dtype", ["?", "i1", "u8"])
def test_no_fill_is_invented(dtype):
    with pytest.raises(NoFillError, match="'v'"):
        Field("v", dtype).filled(1)


def test_earlier_versions_of_a_schema():
    schema = Schema((TIME,)).extended([Field("v", "f8"), Field("w", "i4", fill=0)])
    assert schema.names == ("time", "v", "w")
    assert schema.first(2).names == ("time", "v")
    assert schema.first(3) is schema
    with pytest.raises(SchemaError, match="different names"):
        schema.extended([Field("v", "f8")])
    with pytest.raises(SchemaError, match="no field 'x'; there are time, v, w"):
        schema.number("x")
