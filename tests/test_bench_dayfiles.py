"""The day-file bench runs tiny. Never: that anything is fast."""

from __future__ import annotations

import json

import pytest

from bench.__main__ import main


@pytest.mark.slow
def test_the_day_file_bench_runs_tiny_and_saves_its_figures(tmp_path):
    report = tmp_path / "report.json"
    options = ["--tiny", "--sample", "nowhere", "--dir", str(tmp_path), "--json", str(report)]
    assert main(["dayfiles", *options]) == 0
    names = [figure["name"] for figure in json.loads(report.read_text())["figures"]]
    assert names == [f"dayfiles-{name}" for name in ("month", "again", "memory", "pandas")]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
