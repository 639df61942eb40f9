"""One house with the store: day files as streams, streams as hour files, a value explained."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dayexports import module, plant, save, save_wide, scatter, seconds, tags
from stores import check_store, scratch

import kvstore
from kvstore import cli, daystreams, hourly
from kvstore.dayfiles import etl, explain, hours, manifest
from kvstore.dayfiles.grid import Settings
from kvstore.errors import DayfilesError, SchemaError

EVE = seconds("2024-02-28T23:50:00")
ROWS = plant(EVE, EVE + 1200, seed=8, modules=2)


@pytest.fixture
def place():
    with scratch() as folder:
        yield folder


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*.parquet"))
    }


def run(monkeypatch, *arguments):
    """The command, in this process: its exit code."""
    monkeypatch.setattr("sys.argv", ["kvstore", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.mark.slow
def test_streams_of_day_files_become_the_same_day_files(place, monkeypatch):
    """Bins that are not filled go into a store; from there, filled, they are what convert makes."""
    save(place / "in" / "a.parquet", ROWS)
    bare = ("dayfiles", "convert", place / "in", place / "bare", "--fill", "none")
    assert run(monkeypatch, *bare, "--store", place / "m.kv") == 0
    check_store(place / "m.kv")
    with kvstore.open(place / "m.kv") as store:
        names = list(store)
        assert names == ["1", "1_1", "1_2", "system"]
        assert store["1_1"].count("2024-02-28T23:50:00") == 720 + 120
    etl.convert(place / "in", place / "filled")
    for name in names:
        export = ("export", place / "m.kv", "--stream", name, "--layout", "hourly", "--every", "5s")
        assert run(monkeypatch, *export, "-o", place / "again") == 0
    assert contents(place / "again") == contents(place / "filled")


def test_a_day_goes_into_a_store_once(place, monkeypatch, capsys):
    save(place / "in" / "a.parquet", ROWS)
    convert = ("dayfiles", "convert", place / "in", place / "out", "--store", place / "m.kv")
    assert run(monkeypatch, *convert) == 0
    with kvstore.open(place / "m.kv") as store:
        rows = {name: len(store[name]) for name in store}
    assert run(monkeypatch, *convert) == 0
    later = (EVE + 30 * 86400, "cell_voltage", "4.0", module(1, 1, battery=2, cell=1))
    save(place / "in" / "b.parquet", [later])
    assert run(monkeypatch, *convert) == 0  # all files get a column, no day another value
    with kvstore.open(place / "m.kv") as store:
        assert {name: len(store[name]) for name in store} == rows | {"1_1": rows["1_1"] + 720}
        assert store["1_1"].last()["cell_voltage_1_battery_2"].tolist()
    save(place / "in" / "late.parquet", [(EVE, "module_current", "-9", module(1, 1))])
    assert run(monkeypatch, *convert) == 3
    assert "other rows of a day that has changed since" in capsys.readouterr().err
    check_store(place / "m.kv")


@pytest.mark.parametrize("fill", ["none", "hold", "linear"])
def test_a_stream_on_the_grid_is_what_its_rows_say(place, fill):
    """Times of three kinds, integers and texts by their last, floats by their mean."""
    fields = (
        kvstore.Field("time", "float64"),
        kvstore.Field("celsius", "float32", unit="°C"),
        kvstore.Field("mode", "int16"),
        kvstore.Field("note", "text"),
        kvstore.Field("image", "uint8", (2, 2)),
    )
    midnight = EVE + 600.0
    with kvstore.open(place / "lab.kv", mode="w") as store:
        room = store.stream("room", kvstore.Schema(fields, "time"))
        for offset, celsius, mode, note in [
            (-3.5, 1.0, 7, "a"), (-4.25, 3.0, 8, None), (12.0, 5.0, 1, None), (3700, 1.0, 2, "b"),
        ]:  # fmt: skip
            row = {"time": midnight + offset, "celsius": celsius, "mode": mode, "note": note}
            room.append(row | {"image": [[0, 1], [2, 3]]})
        store.flush()
        written = hourly.export(room, place / "out", Settings(fill=fill))
        assert written.left_out == ("image",)
        assert written.rows == 4
        if fill == "none":
            with pytest.raises(SchemaError, match="for a grid"):
                hourly.export(room, place / "none", Settings(), fields=["image"])
    assert sorted(contents(place / "out")) == [
        "room/2024/02/28/23.parquet",
        "room/2024/02/29/00.parquet",
        "room/2024/02/29/01.parquet",
    ]
    found = {name: [] for name in ("celsius", "mode", "note")}
    for path in sorted((place / "out").rglob("*.parquet")):
        for name in found:
            found[name] += hours.read(path)[name].to_pylist()
    at = {name: values[719:724] for name, values in found.items()}  # from 23:59:55
    assert (
        at["celsius"]
        == {
            "none": [2.0, None, None, 5.0, None],
            "hold": [2.0, 2.0, 2.0, 5.0, 5.0],
            "linear": [2.0, 3.0, 4.0, 5.0, None],
        }[fill]
    )
    held = fill != "none"
    assert at["mode"] == [7.0, *([7.0, 7.0] if held else [None, None]), 1.0, 1.0 if held else None]
    assert at["note"] == ["a", *(["a"] * 4 if held else [None] * 4)]
    facts = hours.facts_of(place / "out" / "room" / "2024" / "02" / "29" / "01.parquet")
    assert facts.coverage["celsius"].observed == 1


def test_a_range_of_a_stream_is_exported_alone(place, monkeypatch, capsys):
    save(place / "in" / "a.parquet", ROWS)
    convert = ("dayfiles", "convert", place / "in", place / "out", "--store", place / "m.kv")
    assert run(monkeypatch, *convert) == 0
    export = ("export", place / "m.kv", "--stream", "1_1", "--layout", "hourly", "--json")
    span = ("--start", "2024-02-29T00:00:00", "--stop", "2024-02-29T00:09:59")
    capsys.readouterr()
    assert run(monkeypatch, *export, *span, "-o", place / "part") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 120
    assert list(contents(place / "part")) == ["1_1/2024/02/29/00.parquet"]


# ---- explaining ----


def test_each_row_behind_a_value_is_named_with_what_became_of_it(place):
    at = EVE + 300
    rows = [
        (at, "module_voltage", "54.0", module(1, 1)),
        (at + 1, "module_voltage", "56.5", module(1, 1)),
        (at + 1, "module_voltage", "56", module(1, 1)),
        (at + 2, "module_voltage", "n/a", module(1, 1)),
        (at + 1, "module_voltage", "1", module(1, 2)),
        (at + 20, "module_voltage", "58", module(1, 1)),
    ]
    save(place / "in" / "a.parquet", [rows[4], *rows[:4]])
    save(place / "in" / "b.csv", [rows[0], rows[5]])
    save_wide(place / "in" / "c.parquet", [rows[2]])
    etl.convert(place / "in", place / "out", Settings(fill="linear"))
    path = place / "out" / "1_1" / "2024" / "02" / "28" / "23.parquet"
    found = explain.explain(path, "module_voltage", (at + 4) * 10**9)
    assert (found.value, found.state, found.remade) == (55.0, "observed", 55.0)
    assert [(s.file, s.row, s.text, s.use) for s in found.sources] == [
        ("a.parquet", 1, "54.0", "used"),
        ("b.csv", 0, "54.0", "duplicate"),
        ("a.parquet", 2, "56.5", "lost a conflict"),
        ("a.parquet", 3, "56", "used"),
        ("c.parquet", 0, "56", "duplicate"),
        ("a.parquet", 4, "n/a", "unreadable"),
    ]
    between = explain.explain(path, "module_voltage", (at + 10) * 10**9)
    assert (between.state, between.value, len(between.sources)) == ("interpolated", 56.5, 7)
    nothing = explain.explain(path, "module_current", at * 10**9)
    assert (nothing.state, nothing.value, nothing.sources) == ("missing", None, [])
    (place / "in" / "c.parquet").unlink()
    assert explain.explain(path, "module_voltage", at * 10**9).absent == ["c.parquet"]


def test_inputs_are_found_again_by_their_content(place):
    """A run after they were renamed makes nothing again, and the record keeps their old names."""
    twice = [(EVE, "module_voltage", "54.0", module(1, 1))]
    for name in ("a", "copy"):
        save(place / "in" / "old" / f"{name}.parquet", twice)
    save(place / "in" / "b.csv", [(EVE, "module_voltage", "56.0", module(1, 1))])
    etl.convert(place / "in", place / "out")
    path = place / "out" / "1_1" / "2024" / "02" / "28" / "23.parquet"

    def explained():
        found = explain.explain(path, "module_voltage", EVE * 10**9)
        return [(source.file, source.use) for source in found.sources], found.absent

    old = [
        ("b.csv", "lost a conflict"),
        ("old/a.parquet", "used"),
        ("old/copy.parquet", "duplicate"),
    ]
    assert explained() == (old, [])
    (place / "in" / "old").rename(place / "in" / "new")
    (place / "in" / "new" / "copy.parquet").unlink()
    save(place / "in" / "new" / "other.csv", [(EVE, "module_voltage", "50.0", module(1, 1))])
    (place / "in" / "b.csv").rename(place / "in" / "z.csv")
    assert explained() == ([("new/a.parquet", "used"), ("z.csv", "lost a conflict")], [])
    (place / "in" / "z.csv").unlink()
    assert explained()[1] == ["b.csv"]
    shutil.rmtree(place / "in")
    assert explained() == ([], ["b.csv", "old/a.parquet", "old/copy.parquet"])


@pytest.mark.parametrize("keep", [save, save_wide])
def test_rows_of_the_other_column_of_an_open_measure_are_none_of_a_value(place, keep):
    """A number goes to NAME, a text to NAME_text: neither loses to the other."""
    rows = [
        (EVE, "pump", "7", module(1, 1)),
        (EVE + 1, "pump", "stuck", module(1, 1)),
        (EVE + 2, "pump", "9", module(1, 1)),
    ]
    keep(place / "in" / "a.parquet", rows)
    etl.convert(place / "in", place / "out")
    path = place / "out" / "1_1" / "2024" / "02" / "28" / "23.parquet"
    for name, texts, value in (("pump", ["7", "9"], 8.0), ("pump_text", ["stuck"], "stuck")):
        found = explain.explain(path, name, EVE * 10**9)
        assert [(s.text, s.use) for s in found.sources] == [(text, "used") for text in texts]
        assert (found.value, found.remade) == (value, value)


@pytest.mark.parametrize("layout", ["long", "wide"])
def test_bools_are_explained_as_the_numbers_that_they_are_read_as(place, layout):
    long = {
        "timestamp": [EVE, EVE + 1],
        "payload_type": ["module_current"] * 2,
        "value": [True, False],
        "tags": [module(1, 1)] * 2,
    }
    wide = {"timestamp": [EVE, EVE + 1], "phase": [1, 1], "module": [1, 1]}
    wide["module_current"] = [True, False]
    (place / "in").mkdir()
    pq.write_table(pa.table(long if layout == "long" else wide), place / "in" / "a.parquet")
    etl.convert(place / "in", place / "out")
    path = place / "out" / "1_1" / "2024" / "02" / "28" / "23.parquet"
    found = explain.explain(path, "module_current", EVE * 10**9)
    assert (found.value, found.remade) == (0.5, 0.5)
    assert [(s.text, s.use) for s in found.sources] == [("True", "used"), ("False", "used")]


def test_every_value_of_a_plant_is_explained_by_its_inputs(place):
    """A held text and a held number over midnight among them."""
    scatter(place / "in", ROWS)
    etl.convert(place / "in", place / "out")
    for tree, column in (("system", "system_state"), ("1_1", "module_voltage")):
        path = place / "out" / tree / "2024" / "02" / "29" / "00.parquet"
        states = set()
        for step in range(0, 130, 13):
            found = explain.explain(path, column, (EVE + 600 + 5 * step) * 10**9)
            assert found.remade == found.value
            assert bool(found.sources) == (found.value is not None)
            states.add(found.state)
        assert len(states) > 1


def test_explain_on_the_command_line(place, monkeypatch, capsys):
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out")
    path = place / "out" / "system" / "2024" / "02" / "28" / "23.parquet"
    time, _, text, _ = next(row for row in ROWS if row[1] == "system_state")
    stamp = f"23:{time % 3600 // 60}:{time % 60:02}"
    explained = ("dayfiles", "explain", path, "--column", "system_state", "--at", stamp)
    assert run(monkeypatch, *explained) == 0
    assert "a.parquet row 0: 2024-02-28T23:5" in capsys.readouterr().out
    assert run(monkeypatch, *explained, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["sources"][0]["text"], told["rule"]) == (text, "last")
    (place / "in" / "a.parquet").unlink()
    assert run(monkeypatch, *explained) == 3


def test_what_cannot_be_explained_says_why(place):
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out")
    path = place / "out" / "system" / "2024" / "02" / "28" / "23.parquet"
    with pytest.raises(DayfilesError, match="no column 'nothing' among phase_count"):
        explain.explain(path, "nothing", EVE * 10**9)
    with pytest.raises(DayfilesError, match="no bin at 2024-02-28T22"):
        explain.explain(path, "system_state", (EVE - 3600) * 10**9)
    with pytest.raises(DayfilesError, match="no hour file"):
        explain.explain(place / "in" / "a.parquet", "system_state", EVE * 10**9)
    manifest.Manifest(place / "out").forget(EVE // 86400)
    with pytest.raises(DayfilesError, match="no record of 2024-02-28"):
        explain.explain(path, "system_state", EVE * 10**9)


def test_a_file_that_was_moved_and_a_flag_are_not_explained(place):
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out", Settings(with_flags=True))
    path = place / "out" / "system" / "2024" / "02" / "28" / "23.parquet"
    with pytest.raises(DayfilesError, match="no column 'system_state_flag' among phase_count"):
        explain.explain(path, "system_state_flag", EVE * 10**9)
    with pytest.raises(DayfilesError, match="no record of 2024-02-28"):
        explain.explain(path.rename(place / "moved.parquet"), "system_state", EVE * 10**9)


def test_a_wide_row_without_a_phase_is_explained(place):
    table = {"timestamp": [EVE], "phase": [""], "module": [""], "system_state": ["RUN"]}
    (place / "in").mkdir()
    pq.write_table(pa.table(table), place / "in" / "a.parquet")
    etl.convert(place / "in", place / "out")
    path = place / "out" / "system" / "2024" / "02" / "28" / "23.parquet"
    found = explain.explain(path, "system_state", EVE * 10**9)
    assert [(source.row, source.use) for source in found.sources] == [(0, "used")]


def test_nan_in_a_wide_table_is_no_row_of_an_explanation(place):
    table = {"timestamp": [EVE, EVE + 1], "phase": ["1", "1"], "module": ["2", "2"]}
    table["module_current"] = [3.0, float("nan")]
    (place / "in").mkdir()
    pq.write_table(pa.table(table), place / "in" / "a.parquet")
    etl.convert(place / "in", place / "out")
    path = place / "out" / "1_2" / "2024" / "02" / "28" / "23.parquet"
    found = explain.explain(path, "module_current", EVE * 10**9)
    assert [(source.row, source.use) for source in found.sources] == [(0, "used")]


def test_a_stream_is_not_exported_among_day_files(place, monkeypatch, capsys):
    """The next run would remove its hours: it did not make them."""
    save(place / "in" / "a.parquet", ROWS)
    convert = ("dayfiles", "convert", place / "in", place / "out", "--store", place / "m.kv")
    assert run(monkeypatch, *convert) == 0
    export = ("export", place / "m.kv", "--stream", "1_1", "--layout", "hourly")
    assert run(monkeypatch, *export, "-o", place / "out") == 1
    assert "a folder of its own" in capsys.readouterr().err


def test_days_of_another_store_are_its_own(place):
    """The digest is of values: the same day of an equal output is the same day."""
    save(place / "in" / "a.parquet", ROWS)
    outcome = etl.convert(place / "in", place / "out")
    with kvstore.open(place / "m.kv", mode="w", flush_interval_s=None) as store:
        first = daystreams.store_days(place / "out", outcome.records, store)
        again = daystreams.store_days(place / "out", outcome.records, store)
    assert (first.days, again.days, again.changed) == (2, 0, [])
    assert first.rows > 0
    assert tags() == [["message_source", "master"]]


def test_a_day_that_is_not_complete_is_not_put_into_a_store(place):
    """Its files may be those of a run that was killed, and what a store has it keeps."""
    save(place / "in" / "a.parquet", ROWS)
    records = etl.convert(place / "in", place / "out").records
    day = EVE // 86400
    doubted = records | {day: records[day]._replace(complete=False)}
    with kvstore.open(place / "m.kv", mode="w", flush_interval_s=None) as store:
        assert daystreams.store_days(place / "out", doubted, store).days == 1
        assert store["1_1"].first()["timestamp"] >= np.datetime64("2024-02-29")
        assert daystreams.store_days(place / "out", records, store).days == 1


def test_a_mean_does_not_depend_on_how_rows_were_batched(place):
    """Sums go one by one in the order of time: to the last bit, as those of convert."""
    values = np.random.default_rng(1).uniform(-1, 1, 4000)
    times = EVE + np.arange(4000) / 1000
    schema = kvstore.Schema((kvstore.Field("t", "float64"), kvstore.Field("x", "float64")), "t")
    made = []
    for size in (4000, 700, 7):
        with kvstore.open(place / f"{size}.kv", mode="w") as store:
            lab = store.stream("lab", schema)
            for first in range(0, 4000, size):
                part = slice(first, first + size)
                lab.append({"t": times[part], "x": values[part]})
                store.flush()
            hourly.export(lab, place / str(size), Settings())
        made.append(contents(place / str(size)))
    assert made[0] == made[1] == made[2]
    (name,) = made[0]
    assert hours.read(place / "7" / name)["x"].drop_null()[0].as_py() == sum(values) / 4000


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--every", "5s"], "--every "),  # the default, but asked for
        (["--fill", "none", "--trim"], "--fill, --trim "),
        (["--hold", "1m"], "--hold "),
        (["--with-flags"], "--with-flags "),
    ],
)
def test_options_of_the_grid_need_the_grid(place, monkeypatch, capsys, options, named):
    with kvstore.open(place / "m.kv", mode="w") as store:
        store.stream("lab").append({"timestamps": [EVE], "x": [1.0]})
    export = ("export", place / "m.kv", "--stream", "lab", "-o", place / "lab.csv")
    assert run(monkeypatch, *export, *options) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"{named}" in said
    assert "add --layout hourly" in said
    assert not (place / "lab.csv").exists()


def test_a_stream_of_arrays_says_what_it_has_and_what_can_be_exported(place, monkeypatch, capsys):
    with kvstore.open(place / "run.kv", mode="w") as store:
        store.stream("particles").append({"timestamps": [EVE], "spectral": [[1.0, 2.0]]})
    export = ("export", place / "run.kv", "--layout", "hourly", "-o", place / "out")
    assert run(monkeypatch, *export) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "spectral (float64, 2 a row)" in said
    assert "-o particles.parquet" in said
    assert not (place / "out").exists()
