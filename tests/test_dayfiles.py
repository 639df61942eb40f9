"""Day files are what the slow reference says, cell by cell, however the rows came."""

from __future__ import annotations

import dayreference
import pyarrow.parquet as pq
import pytest
from dayexports import module, plant, save, scatter, seconds, tags
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from stores import scratch

from kvstore.dayfiles import etl
from kvstore.dayfiles.grid import Settings

NS = 10**9
LEAP_EVE = seconds("2024-02-28T23:59:30")


def tree(root):
    """All files of an output by their names; the manifest is no part of it."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".dayfiles" not in path.parts
    }


def cells(path):
    """A file as the reference has it: [(time, {column: (value, flag)})]."""
    table = pq.read_table(path, partitioning=None)
    names = [n for n in table.column_names if n != "timestamp" and not n.endswith("_flag")]
    times = [int(time.timestamp()) for time in table["timestamp"].to_pylist()]
    found = {
        n: zip(table[n].to_pylist(), table[n + "_flag"].to_pylist(), strict=True) for n in names
    }
    rows = zip(*found.values(), strict=True)
    return [
        (time, dict(zip(names, row, strict=True))) for time, row in zip(times, rows, strict=True)
    ]


def check(root, expected):
    """The files are those of the reference, and so is every cell of them."""
    assert sorted(tree(root)) == sorted(expected)
    for name, lines in expected.items():
        found = cells(root / name)
        assert [time for time, _ in found] == [time for time, _ in lines], name
        for (time, row), (_, line) in zip(found, lines, strict=True):
            assert list(row) == list(line), name
            assert row == line, (name, time)


# ---- against the reference ----

KINDS = [
    ("module_voltage", module(1, 1)),
    ("module_voltage", module(2, 1)),
    ("module_voltage", list(reversed(module(1, 1)))),
    ("battery_voltage", module(1, 1, battery=1)),
    ("battery_voltage", module(1, 1, battery=2)),
    ("battery_sensor_temperature", module(1, 1, battery=1, sensor=2)),
    ("cell_voltage", module(1, 1, battery=1, cell=14)),
    ("cell_voltage", module(1, 1, battery=1, cell=15)),
    ("phase_current", tags(phase=1)),
    ("phase_module_count", tags(phase=2)),
    ("phase_count", tags()),
    ("system_state", tags()),
    ("debug_value", tags(debug_value_key="cb_temp_core")),
    ("unheard_of", module(1, 1)),
]
NUMBERS = ["54.880001068115234", "54.88", "-0.0", "0", "1e3", " 7 ", "3.3", "0.1", "0.2"]
ODD = ["n/a", "nan", "", "inf", "1_0", None]
TIMES = st.one_of(
    st.integers(LEAP_EVE, LEAP_EVE + 70),
    st.integers(LEAP_EVE + 86400, LEAP_EVE + 86400 + 60),
    st.sampled_from([seconds("2024-02-29T10:59:58"), seconds("2024-03-01T00:00:00")]),
)


@st.composite
def some_rows(draw):
    rows = []
    for _ in range(draw(st.integers(1, 40))):
        name, pairs = draw(st.sampled_from(KINDS))
        odd = ["RUN", "IDLE"] if name == "system_state" else ODD if name != "debug_value" else []
        text = draw(st.sampled_from(NUMBERS * 2 + odd))
        rows.append((draw(TIMES), name, text, pairs))
    return rows


def spread(draw, rows, folder):
    """The rows over a few files, some of them twice, in an order of their own."""
    count = draw(st.integers(1, 3))
    files = [[] for _ in range(count)]
    for row in rows:
        for _ in range(draw(st.integers(1, 2))):
            files[draw(st.integers(0, count - 1))].append(row)
    for number, own in enumerate(files):
        suffix = draw(st.sampled_from(["parquet", "parquet", "csv"]))
        if suffix == "csv" and any(row[2] in {"", None} for row in own):
            suffix = "parquet"  # CSV cannot tell these two
        save(folder / f"{number}.{suffix}", draw(st.permutations(own)))


# Not shrunk: that takes an hour, and the rows of an example are few.
@settings(max_examples=35, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_every_cell_is_that_of_the_reference(data):
    rows = data.draw(some_rows())
    every = data.draw(st.sampled_from([5, 60, 60, 300]))
    fill = data.draw(st.sampled_from(["hold", "hold", "linear", "none"]))
    hold = data.draw(st.sampled_from([30, 30, 0, 7, 600]))
    trim = data.draw(st.booleans())
    with scratch() as folder:
        source, root = folder / "in", folder / "out"
        spread(data.draw, rows, source)
        chosen = Settings(every * NS, fill, hold * NS, with_flags=True, trim=trim)
        etl.convert(source, root, chosen)
        expected = dayreference.convert(rows, every=every, fill=fill, hold=hold, trim=trim)
        if trim:
            expected = {name: lines for name, lines in expected.items() if lines}
        check(root, expected)


@pytest.mark.slow
def test_a_plant_of_three_days_is_that_of_the_reference(tmp_path):
    rows = plant(seconds("2024-02-28T22:00:00"), seconds("2024-03-01T01:00:00"))
    rows = [row for row in rows if row[0] % 86400 < 4000 or row[0] % 86400 > 82000]
    scatter(tmp_path / "in", rows, files=9)
    outcome = etl.convert(tmp_path / "in", tmp_path / "out", Settings(with_flags=True))
    check(tmp_path / "out", dayreference.convert(rows))
    assert [skipped.name for skipped in outcome.skipped] == [".DS_Store"]
