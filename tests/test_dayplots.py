"""Figures of day files: what they are drawn from is right, all are drawn, gaps stay open."""

from __future__ import annotations

import sys
from datetime import date
from subprocess import run

import numpy as np
import pytest
from dayexports import module, plant, save, scatter, seconds

from kvstore.dayfiles import etl
from kvstore.dayfiles.grid import Settings
from kvstore.dayplots import FIGURES, Grid, coverage, days_of, figures, load, trees
from kvstore.dayplots.figures import energy_of, pooled, spread_of
from kvstore.errors import KvstoreError

DAY = date(2024, 7, 29)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Day files of two modules over midnight, with flags."""
    folder = tmp_path_factory.mktemp("dayplots")
    rows = plant(seconds("2024-07-28T23:30:00"), seconds("2024-07-29T01:20:00"), modules=2)
    scatter(folder / "data", rows)
    etl.convert(folder / "data", folder / "output", Settings(with_flags=True))
    return folder / "output"


def kvstore(*args):
    return run(
        [sys.executable, "-m", "kvstore", *map(str, args)],
        text=True,
        capture_output=True,
        check=False,
    )


def test_a_grid_is_what_the_files_hold(output, tmp_path):
    save(
        tmp_path / "data" / "a.parquet",
        [
            (seconds("2024-07-29T05:00:01"), "module_voltage", "50.0", module(1, 1)),
            (seconds("2024-07-29T05:00:12"), "module_voltage", "51.0", module(1, 1)),
        ],
    )
    etl.convert(tmp_path / "data", tmp_path / "out", Settings(with_flags=True))
    grid = load(tmp_path / "out", "1_1", DAY)
    assert len(grid) == 24 * 720
    first = 5 * 720
    assert grid.values["module_voltage"][first : first + 3].tolist() == [50.0, 50.0, 51.0]
    observed = grid.observed("module_voltage")
    assert observed[first] == 50.0
    assert np.isnan(observed[first + 1]), "a held bin has no reading"
    assert np.isnan(grid.values["module_voltage"][:first]).all()
    assert np.isnan(grid.column("module_current")).all()


def test_trees_and_days_are_those_that_have_files(output):
    assert trees(output) == ["1", "1_1", "1_2", "system"]
    assert days_of(output, "1_2") == [date(2024, 7, 28), DAY]
    shares = coverage(output, ["1_1"], "module_voltage")["1_1"]
    assert set(shares) == {(date(2024, 7, 28), 23), (DAY, 0), (DAY, 1)}
    assert all(0 < share <= 1 for share in shares.values())


def test_no_files_of_a_day_names_what_there_is(output):
    with pytest.raises(KvstoreError, match="2024-07-28 to 2024-07-29"):
        load(output, "1_1", date(2024, 1, 1))
    with pytest.raises(KvstoreError, match="there are 1, 1_1, 1_2, system"):
        load(output, "7_7", DAY)


@pytest.mark.parametrize("content", [b"junk", None])
def test_a_file_that_is_no_hour_file_is_named(tmp_path, content):
    rows = plant(seconds("2024-07-29T00:00:00"), seconds("2024-07-29T00:10:00"))
    scatter(tmp_path / "data", rows)
    etl.convert(tmp_path / "data", tmp_path / "out", Settings())
    path = tmp_path / "out" / "1_1" / "2024" / "07" / "29" / "13.parquet"
    path.write_bytes(content) if content else save(path, rows)
    with pytest.raises(KvstoreError, match=r"13\.parquet: no hour file"):
        load(tmp_path / "out", "1_1", DAY)


@pytest.mark.slow
def test_every_figure_is_drawn_with_titles_and_units(output, tmp_path):
    for name, figure in figures(output, "1_1", "2024-07-29"):
        figure.savefig(tmp_path / f"{name}.png", dpi=40)
        titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
        assert any(titles), name
        labels = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
        assert any("/" in each or "UTC" in each for each in labels), (name, labels)
    assert len([*tmp_path.iterdir()]) == len(FIGURES)


def test_held_bins_are_told_apart_only_with_flags(output, tmp_path):
    def said(folder):
        ((_, figure),) = figures(folder, "1_1", DAY, ["measures"])
        return figure.get_suptitle()

    assert "pale: held" in said(output)
    scatter(
        tmp_path / "data", plant(seconds("2024-07-29T00:00:00"), seconds("2024-07-29T00:10:00"))
    )
    etl.convert(tmp_path / "data", tmp_path / "out", Settings())
    assert "--with-flags" in said(tmp_path / "out")


def test_lines_break_at_gaps(output):
    ((_, figure),) = figures(output, "1_1", DAY, ["measures"])
    values = figure.axes[0].get_lines()[0].get_ydata()
    assert np.isnan(values).any()
    assert not np.isnan(values).all()


def grid_of(**values):
    columns = {name: np.array(column, float) for name, column in values.items()}
    flags = {name: np.zeros(len(column), np.int8) for name, column in columns.items()}
    return Grid("1_1", 0, 1800.0, columns, flags, told_apart=True)


def test_energy_leaves_gaps_out_and_keeps_signs_apart():
    grid = grid_of(
        module_voltage=[50.0, 50.0, np.nan, 40.0, 40.0],
        module_current=[2.0, 4.0, 9.0, -1.0, np.nan],
    )
    assert energy_of(grid) == (150.0, -20.0, 3.0, -0.5, 1.5)


def test_the_spread_needs_two_cells():
    low, middle, high = spread_of(
        {
            1: np.array([3.0, 3.5, np.nan]),
            2: np.array([3.2, np.nan, np.nan]),
            7: np.array([3.4, np.nan, 1.0]),
        }
    )
    assert (low[0], middle[0], high[0]) == (3.0, 3.2, 3.4)
    assert np.isnan([low[1:], middle[1:], high[1:]]).all()


def test_pooling_keeps_what_is_rare():
    rows = np.full((1, 1000), np.nan)
    rows[0, 700] = 5.0
    found = pooled(rows, 100)
    assert found.shape == (1, 100)
    assert np.flatnonzero(~np.isnan(found[0])).tolist() == [70]
    assert found[0, 70] == 5.0


def test_the_command_draws_all_or_some(output, tmp_path):
    done = kvstore("dayfiles", "plot", output, "--phase", 1, "--module", 2, "-o", tmp_path / "p",
                   "--only", "cells,energy", "--dpi", 40)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in (tmp_path / "p").iterdir()) == [
        "1_2-2024-07-29-cells.png",
        "1_2-2024-07-29-energy.png",
    ]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--only", "nothing"], 2, "there are measures, phase, cells"),
        (["--date", "29.7.2024"], 2, "such as 2024-07-29"),
        (["--date", "2020-01-01"], 1, "it has 2024-07-28 to 2024-07-29"),
        (["--module", "9"], 1, "no day files of 1_9; there are: 1, 1_1, 1_2, system"),
    ],
)
def test_what_cannot_be_drawn_is_said(output, tmp_path, args, code, said):
    done = kvstore(
        "dayfiles", "plot", output, "--phase", 1, "--module", 1, "-o", tmp_path / "plots", *args
    )
    assert done.returncode == code
    assert said in " ".join(done.stderr.split())
