"""What rows of exports say: layouts, types, tags, series, values, and what other tools see."""

from __future__ import annotations

import datetime as dt
import glob
import json
import math
import random

import dayreference
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dayexports import module, plant, save, save_wide, seconds, tags
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import scratch

from kvstore.dayfiles import chunk, etl, grid, hours
from kvstore.dayfiles.cells import NO_TIME, cells, numbers, texts, times_ns
from kvstore.dayfiles.grid import Settings
from kvstore.dayfiles.measures import MEASURES, column, columns_of, level_of, table_columns
from kvstore.dayfiles.readings import distinct
from kvstore.dayfiles.series import column_of_header, parsed_tags, series_of, tree_of
from kvstore.dayfiles.tags import TagCoder
from kvstore.errors import DayfilesError

NOON = seconds("2024-07-29T11:59:30")
ROWS = [row for row in plant(NOON, NOON + 120, modules=2) if "debug" not in row[1]]


@pytest.fixture
def place():
    with scratch() as folder:
        yield folder


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*.parquet"))
    }


@pytest.fixture(scope="module")
def whole():
    with scratch() as folder:
        save(folder / "in" / "all.parquet", ROWS)
        etl.convert(folder / "in", folder / "out")
        yield contents(folder / "out")


# ---- layouts and types ----


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_wide_layout_says_the_same(place, whole, suffix):
    save_wide(place / "in" / f"wide.{suffix}", ROWS)
    assert etl.convert(place / "in", place / "out").is_whole
    assert contents(place / "out") == whole


def test_csv_says_the_same(place, whole):
    save(place / "in" / "long.csv", ROWS)
    assert etl.convert(place / "in", place / "out").is_whole
    assert contents(place / "out") == whole


def as_iso(table, form):
    times = [dt.datetime.fromtimestamp(t, dt.UTC) for t in table["timestamp"].to_pylist()]
    return pa.array([form(time) for time in times])


def with_time(table, array):
    return table.set_column(0, "timestamp", array)


RETYPED = {
    "iso": lambda t: with_time(t, as_iso(t, lambda time: f"{time:%Y-%m-%dT%H:%M:%SZ}")),
    "naive": lambda t: with_time(t, as_iso(t, lambda time: f"{time:%Y-%m-%d %H:%M:%S}")),
    "offset": lambda t: with_time(
        t, as_iso(t, lambda time: time.astimezone(dt.timezone(dt.timedelta(hours=2))).isoformat())
    ),
    "milliseconds": lambda t: with_time(
        t, t["timestamp"].cast("timestamp[s]").cast("timestamp[ms]")
    ),
    "zoned": lambda t: with_time(
        t, t["timestamp"].cast("timestamp[s]").cast(pa.timestamp("ns", "Europe/Berlin"))
    ),
    "float": lambda t: with_time(t, t["timestamp"].cast("float64")),
    "int32": lambda t: with_time(t, t["timestamp"].cast("int32")),
    "large": lambda t: t.cast(
        pa.schema([
            ("timestamp", pa.int64()),
            ("payload_type", pa.large_string()),
            ("value", pa.large_string()),
            ("tags", pa.large_list(pa.large_list(pa.large_string()))),
            ("__index_level_0__", pa.int64()),
        ])
    ),
    "bytes": lambda t: t.cast(
        pa.schema([
            ("timestamp", pa.int64()),
            ("payload_type", pa.binary()),
            ("value", pa.binary()),
            ("tags", pa.list_(pa.list_(pa.binary()))),
            ("__index_level_0__", pa.int64()),
        ])
    ),
    "written tags": lambda t: t.set_column(
        3, "tags", pa.array([str(tags_).replace("'", "") for tags_ in t["tags"].to_pylist()])
    ),
    "maps": lambda t: t.set_column(
        3,
        "tags",
        pa.array(
            [[tuple(pair) for pair in tags_] for tags_ in t["tags"].to_pylist()],
            pa.map_(pa.string(), pa.string()),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", RETYPED)
def test_other_types_with_the_same_meaning_say_the_same(place, whole, how):
    table = pq.read_table(save(place / "all.parquet", ROWS))
    (place / "in").mkdir()
    pq.write_table(RETYPED[how](table), place / "in" / "all.parquet")
    outcome = etl.convert(place / "in", place / "out")
    assert (outcome.is_whole, outcome.skipped) == (True, [])
    assert contents(place / "out") == whole


@pytest.mark.parametrize(
    "options",
    [
        {"row_group_size": 97},
        {"write_statistics": False},
        {"use_dictionary": False},
        {"compression": "zstd", "version": "1.0", "data_page_version": "2.0"},
        {"write_page_checksum": True, "dictionary_pagesize_limit": 64},
    ],
)
def test_other_ways_to_write_parquet_say_the_same(place, whole, options):
    table = pq.read_table(save(place / "all.parquet", ROWS))
    (place / "in").mkdir()
    pq.write_table(table, place / "in" / "all.parquet", **options)
    assert etl.convert(place / "in", place / "out").is_whole
    assert contents(place / "out") == whole


def test_readings_of_less_than_a_second_are_in_the_order_of_their_times(place):
    rows = [
        (NOON + 0.75, "RUN"),
        (NOON + 0.25, "IDLE"),
        (NOON + 4.5, "ERROR"),
        (NOON + 4.25, "INIT"),
    ]
    table = {
        "timestamp": [time for time, _ in rows],
        "payload_type": ["system_state"] * 4,
        "value": [state for _, state in rows],
        "tags": [tags()] * 4,
    }
    (place / "in").mkdir()
    pq.write_table(pa.table(table), place / "in" / "a.parquet")
    etl.convert(place / "in", place / "out")
    found = pq.read_table(place / "out" / "system" / "2024" / "07" / "29" / "11.parquet")
    assert found["system_state"].to_pylist()[714] == "ERROR"


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("payload_type", pa.array([1, 2])),
        ("tags", pa.array([[[1, 2]], [[3, 4]]])),
        ("tags", pa.array(["[" * 100_000] * 2)),
        ("tags", pa.array([[["phase", "." * 100]]] * 2)),
        ("timestamp", pa.array([2**64 - 1, NOON], pa.uint64())),
        ("timestamp", pa.array([2**63 // 10**9 - 3 * 86400] * 2)),
    ],
)
def test_columns_of_odd_types_and_sizes_end_no_run(place, column, values):
    columns = {"timestamp": [NOON, NOON], "payload_type": ["a", "b"], "value": ["1", "2"]}
    columns |= {"tags": [tags(), tags()], column: values}
    (place / "in").mkdir()
    pq.write_table(pa.table(columns), place / "in" / "a.parquet")
    outcome = etl.convert(place / "in", place / "out", Settings(hold_ns=7 * 86400 * 10**9))
    assert outcome.files + len(outcome.skipped) == 1
    assert len(outcome.made) <= 9


@pytest.mark.parametrize("phase", ["x" * 300, "9" * 5000])
def test_a_phase_that_is_no_name_for_a_folder_is_unplaced(place, phase):
    table = {"timestamp": [NOON], "phase": [phase], "module": ["1"], "module_voltage": ["54"]}
    (place / "in").mkdir()
    pq.write_table(pa.table(table), place / "in" / "a.parquet")
    [report] = etl.convert(place / "in", place / "out").made
    assert (report.unplaced, report.files) == (1, {})


def test_a_file_with_a_column_twice_is_foreign(place):
    names = ["timestamp", "payload_type", "value", "tags", "timestamp"]
    arrays = [pa.array([cell]) for cell in (NOON, "a", "1", "[]", NOON)]
    (place / "in").mkdir()
    pq.write_table(pa.Table.from_arrays(arrays, names=names), place / "in" / "a.parquet")
    (place / "in" / "b.csv").write_text(",".join(names) + "\n1,a,1,[],1\n")
    outcome = etl.convert(place / "in", place / "out")
    assert [skipped.reason[:7] for skipped in outcome.skipped] == ["foreign", "foreign"]


def test_a_module_that_appears_late_has_files_from_then_on(place):
    rows = [*ROWS, (NOON + 5400, "module_voltage", "55", module(3, 8))]
    save(place / "in" / "a.parquet", rows)
    etl.convert(place / "in", place / "out")
    assert [name for name in contents(place / "out") if name.startswith("3_8")] == [
        "3_8/2024/07/29/13.parquet"
    ]


# ---- cells ----


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("54.880001068115234", 54.880001068115234), ("-0.0", 0.0), ("1e3", 1000.0), ("+5", 5.0),
        (" 7 ", 7.0), (".5", 0.5), ("5.", 5.0), ("1E-3", 0.001), ("00012", 12.0),
        ("9007199254740993", 9007199254740992.0), ("1_000", None), ("٣", None), ("nan", None),
        ("inf", None), ("1e999", None), ("0x10", None), ("", None), ("1,5", None), (None, None),
    ],
)  # fmt: skip
def test_a_text_is_a_number_or_it_is_not(text, number):
    [found] = numbers(pa.array([text], pa.string())).tolist()
    assert found == number if number is not None else np.isnan(found)
    assert str(found) != "-0.0"


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
def test_every_float_comes_back_from_its_digits(values):
    found = numbers(pa.array([repr(value) for value in values], pa.string()))
    assert found.tolist() == values


def test_values_that_are_numbers_already_are_taken_as_they_are():
    assert numbers(pa.array([1, None, 3])).tolist()[::2] == [1.0, 3.0]
    assert np.isnan(numbers(pa.array([1, None, 3]))[1])
    assert numbers(pa.array([True, False])).tolist() == [1.0, 0.0]
    assert texts(pa.array([1.5, None, float("nan")])) == ["1.5", None, None]


def test_times_that_do_not_fit_are_none():
    far = [1717545757000, None, 10**18]
    assert times_ns(pa.array(far)).tolist() == [NO_TIME] * 3
    assert times_ns(pa.array(["yesterday", "1717545757", None])).tolist()[1] == 1717545757 * 10**9
    assert times_ns(pa.array([float("nan"), 1.5])).tolist() == [NO_TIME, 1_500_000_000]
    assert times_ns(pa.array([b"x"])).tolist() == [NO_TIME]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", None]), max_size=30), st.integers(0, 5))
def test_cells_are_codes_into_distinct_ones(values, first):
    array = pa.array(values, pa.string()).slice(first)
    for column_ in (array, array.dictionary_encode()):
        found = cells(column_)
        assert [found.distinct.to_pylist()[code] for code in found.codes] == values[first:]


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=40), st.sampled_from([1, 2**31]))
def test_distinct_readings_are_those_of_a_set(triples, scale):
    """Also where codes do not fit into one key."""
    columns = [np.array([t[axis] * scale for t in triples], np.int64) for axis in range(3)]
    found = distinct(*columns, (3 * scale + 1, 3 * scale + 1))
    assert [*zip(*(axis.tolist() for axis in found), strict=True)] == sorted(
        {tuple(part * scale for part in triple) for triple in triples}
    )


# ---- tags ----

WORDS = st.sampled_from(["phase", "module", "1", "2", "3"])
PAIRS = st.lists(st.tuples(WORDS, WORDS).map(list), max_size=4)
ODD_PAIRS = st.lists(
    st.one_of(st.none(), st.lists(st.one_of(st.none(), WORDS), max_size=3)), max_size=3
)


def plain(row):
    if row is None:
        return frozenset()
    if any(len(pair or ()) != 2 for pair in row):
        return None
    return frozenset(map(tuple, row))


@settings(deadline=None)
@given(
    st.lists(st.one_of(PAIRS, PAIRS, st.none(), ODD_PAIRS), max_size=12),
    st.booleans(),
    st.integers(0, 3),
)
def test_coded_tags_are_those_of_each_row(rows, encoded, first):
    kind = pa.list_(pa.list_(pa.string()))
    array = pa.array(rows, kind)
    if encoded:
        inner = pa.list_(pa.list_(pa.dictionary(pa.int32(), pa.string())))
        array = pa.array(rows, inner)
    coder = TagCoder()
    for part in (array, array.slice(first)):
        found = coder.code(part)
        told = [found.tags[code] for code in found.codes]
        assert told == [plain(row) for row in part.to_pylist()]


def test_more_pairs_than_bits_and_words_than_a_table_holds_are_told_apart():
    rows = [[["cell", str(n)], ["module", str(n % 7)]] for n in range(2000)]
    coder = TagCoder()
    for some in (rows[:20], rows[:70], rows[30:90], rows, rows[:3]):
        found = coder.code(pa.array(some))
        assert [found.tags[code] for code in found.codes] == [plain(row) for row in some]


def test_a_pair_that_stands_twice_in_a_row_is_no_other_pair():
    """As a sum of bits, a pair twice is the next pair once."""
    rows = [[["a", "1"]], [["b", "1"]], [["a", "1"], ["a", "1"]], [["a", "1"], ["b", "1"]]]
    found = TagCoder().code(pa.array(rows))
    assert [found.tags[code] for code in found.codes] == [plain(row) for row in rows]


@pytest.mark.parametrize(
    "text",
    [
        '[["phase", "1"], ["module", "3"]]',
        '[["phase", 1], ["module", 3]]',
        '{"phase": "1", "module": "3"}',
        "[[phase,1],[module,3]]",
        "[['phase', '1'], ['module', '3']]",
        "[array(['phase', '1'], dtype=object), array(['module', '3'], dtype=object)]",
    ],
)
def test_written_tags_are_read_however_they_were_written(text):
    assert parsed_tags(text) == [("phase", "1"), ("module", "3")]


@pytest.mark.parametrize("text", ["7", "[[1]]", "[[a,b]", "phase=1", '[["a", "b", "c"]]', '["a"]'])
def test_what_is_no_list_of_pairs_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  # of json, or its own: the rows are named
        parsed_tags(text)


@pytest.mark.parametrize(
    ("name", "pairs", "key"),
    [
        ("module_voltage", module(1, 3), "1_3/module_voltage"),
        ("module_voltage", module("01", " 3 "), "1_3/module_voltage"),
        ("cell_voltage", module(1, 3, battery=1, cell=5), "1_3/cell_voltage_5"),
        ("cell_voltage", module(1, 3, battery=2, cell=5), "1_3/cell_voltage_5_battery_2"),
        ("battery_sensor_temperature", module(1, 3, battery=1, sensor=2),
         "1_3/battery_sensor_temperature_sensor_2"),
        ("phase_current", tags(phase=2), "2/phase_current"),
        ("system_state", tags(), "system/system_state"),
        ("system_state", [], "system/system_state"),
        ("system_state", [["message_source", "slave"]], "system/system_state_from_slave"),
        ("debug_value", tags(debug_value_key="cb_temp_core"), "system/debug_value_cb_temp_core"),
        ("module_voltage", module(1, 3, rack="a b"), "1_3/module_voltage.rack=a%20b"),
        ("x" * 101, tags(), None),
        ("a", [["phase", "1"], ["phase", "2"]], None),
        ("a", [["", "1"]], None),
        ("timestamp", tags(), "system/%74imestamp"),
        ("door_flag", tags(), "system/door_%66lag"),
    ],
)  # fmt: skip
def test_a_series_is_named_by_its_tags(name, pairs, key):
    found = series_of(name, [tuple(pair) for pair in pairs])
    assert (found.key if found else None) == key


def test_the_reference_names_series_alike():
    for name, pairs in [(row[1], row[3]) for row in ROWS]:
        assert series_of(name, map(tuple, pairs)).key == "/".join(dayreference.place(name, pairs))


def test_headers_of_wide_tables_are_the_columns_of_the_output():
    names = [name for level in ("module", "phase", "system") for name in table_columns(level)]
    assert [column_of_header(name).name for name in names] == names
    assert tree_of("1", None) == "1"
    assert level_of(tree_of(None, "3")) == "module"


# ---- the table ----


def test_the_table_has_each_measure_once_and_whole():
    names = [measure.name for measure in MEASURES]
    assert len(set(names)) == len(names) == 16
    for measure in MEASURES:
        assert measure.rule == ("mean" if measure.kind == "continuous" else "last")
        assert measure.low < measure.high
        assert measure.hold_s == 30
    assert table_columns("module")[:2] == ("module_voltage", "module_current")
    assert len(table_columns("module")) == 20


def test_a_measure_that_nobody_knows_is_open_and_one_that_begins_like_another_is_not_that():
    assert column("module_voltage_battery_2").measure.unit == "V"
    assert column("module_voltage_status").measure.is_open
    assert column("module_voltage_status_text").measure.is_text
    assert column("module_voltage.rack=a").measure.name == "module_voltage"


def test_columns_are_those_of_the_table_and_then_the_others_as_people_count():
    extra = frozenset({"cell_voltage_100", "cell_voltage_15", "module_voltage"})
    names = [c.name for c in columns_of("module", extra)]
    assert names == [*table_columns("module"), "cell_voltage_15", "cell_voltage_100"]


# ---- what other tools see ----


def test_files_say_what_is_in_them(place):
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out", Settings(with_flags=True))
    path = place / "out" / "1_1" / "2024" / "07" / "29" / "11.parquet"
    file = pq.ParquetFile(path)
    assert file.metadata.num_rows == 720
    assert file.metadata.row_group(0).sorting_columns == (pq.SortingColumn(0),)
    field = file.schema_arrow.field("module_voltage")
    told = {key.decode(): value.decode() for key, value in field.metadata.items()}
    assert told == {"unit": "V", "kind": "continuous", "rule": "mean", "hold_s": "30"}
    facts = hours.facts_of(path)
    flags = file.read()["module_voltage_flag"].to_pylist()
    assert (facts.tree, facts.start_ns, facts.every_ns) == (
        "1_1",
        NOON // 3600 * 3600 * 10**9,
        5 * 10**9,
    )
    assert facts.coverage["module_voltage"] == (flags.count(0), flags.count(1), flags.count(2))
    assert facts.coverage["module_voltage"].observed >= 1
    text = json.loads(file.schema_arrow.metadata[hours.KEY])
    assert set(text) == {"version", "tree", "start", "every_s", "fill", "hold_s", "coverage"}


def test_files_of_a_kind_have_the_same_columns_in_the_same_order(place):
    rows = [*ROWS, (NOON + 7200, "cell_voltage", "4", module(2, 2, cell=1, battery=2))]
    save(place / "in" / "a.parquet", rows)
    etl.convert(place / "in", place / "out")
    kinds = {}
    for name in contents(place / "out"):
        kinds.setdefault(level_of(name.split("/")[0]), set()).add(
            str(pq.read_schema(place / "out" / name).remove_metadata())
        )
    assert {kind: len(schemas) for kind, schemas in kinds.items()} == {
        "module": 1, "phase": 1, "system": 1,
    }  # fmt: skip


def test_duckdb_polars_and_pandas_read_all_files_in_one_call(place):
    duckdb = pytest.importorskip("duckdb")
    pd = pytest.importorskip("pandas")
    pl = pytest.importorskip("polars")
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out")
    root = place / "out"
    expected = dayreference.convert(ROWS)
    modules = {name: lines for name, lines in expected.items() if "_" in name.split("/")[0]}
    values = sum(
        line["module_voltage"][0] is not None for lines in modules.values() for _, line in lines
    )
    assert values > 10

    found = duckdb.sql(f"select count(*), count(module_voltage) from '{root}/*_*/**/*.parquet'")
    assert found.fetchall() == [(720 * len(modules), values)]
    every = f"select count(*) from read_parquet('{root}/**/*.parquet', union_by_name=true)"
    assert duckdb.sql(every).fetchall() == [(720 * len(expected),)]

    frame = pl.read_parquet(f"{root}/*_*/**/*.parquet")
    assert (frame.height, frame["module_voltage"].count()) == (720 * len(modules), values)
    one = pl.read_parquet(f"{root}/1_1/**/*.parquet")
    assert one["timestamp"].is_sorted()
    assert str(one["timestamp"].dtype) == "Datetime(time_unit='us', time_zone='UTC')"

    frame = pd.read_parquet(root / "1_1")
    assert frame["timestamp"].is_monotonic_increasing
    assert str(frame["timestamp"].dtype.tz) == "UTC"
    frame = pd.read_parquet(glob.glob(f"{root}/*_*/**/*.parquet", recursive=True))  # noqa: PTH207  # as in docs
    assert (len(frame), int(frame["module_voltage"].count())) == (720 * len(modules), values)
    assert list(frame.columns) == ["timestamp", *table_columns("module")]
    assert len(pd.read_parquet(root)) == 720 * len(expected)


def test_a_file_with_another_tag_in_each_row_is_skipped(place, monkeypatch):
    monkeypatch.setattr(chunk, "SERIES_MAX", 100)
    rows = [(NOON, "module_current", "1", [*module(1, 1), ("serial", str(n))]) for n in range(101)]
    save(place / "in" / "odd.parquet", rows)
    save(place / "in" / "a.parquet", rows[:100])
    outcome = etl.convert(place / "in", place / "out")
    assert [name for name, _ in outcome.skipped] == ["odd.parquet"]
    assert "101 combinations of measure and tags, expected at most 100" in outcome.skipped[0].reason
    assert list((place / "out" / "1_1").rglob("11.parquet"))


def test_names_and_tags_by_the_thousand_are_told_apart(place, monkeypatch):
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out")
    monkeypatch.setattr(chunk, "_TABLE_MAX", 0)
    etl.convert(place / "in", place / "again")
    assert contents(place / "again") == contents(place / "out")


def test_more_bins_than_fit_are_refused_not_tried(place, monkeypatch):
    monkeypatch.setattr(grid, "_CELLS_MAX", 17_280 * 10)
    save(place / "in" / "a.parquet", ROWS)
    with pytest.raises(DayfilesError, match="do not fit into memory: use longer bins"):
        etl.convert(place / "in", place / "out")


def test_nan_in_a_wide_table_is_an_empty_cell(place):
    table = {"timestamp": [NOON, NOON + 5], "phase": [1, 1], "module": [1, 1]}
    table["module_current"] = [3.0, math.nan]
    (place / "in").mkdir()
    pq.write_table(pa.table(table), place / "in" / "wide.parquet")
    outcome = etl.convert(place / "in", place / "out")
    [path] = (place / "out").rglob("11.parquet")
    held = pq.read_table(path)["module_current"].to_pylist()[-2:]
    assert (held, sum(r.report.unreadable for r in outcome.records.values())) == ([3.0, 3.0], 0)


def test_bytes_do_not_depend_on_when_or_where_they_were_made(place, whole):
    shuffled = list(ROWS)
    random.Random(1).shuffle(shuffled)
    save(place / "elsewhere" / "another name.parquet", shuffled, index=False)
    etl.convert(place / "elsewhere" / "another name.parquet", place / "o u t")
    assert contents(place / "o u t") == whole
