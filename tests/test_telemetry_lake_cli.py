"""``maintain`` and ``migrate`` as their users meet them."""

from __future__ import annotations

import json
import sys

import lakes
import pytest
import telemetry_data as data
from telemetry_model import read_all

from kvstore import libc
from kvstore.cli import main
from kvstore.telemetry.settings import Settings, load
from kvstore.telemetry.sinks.iceberg import IcebergSink, preflight
from kvstore.telemetry.sinks.postgres import PostgresSink
from kvstore.telemetry.sinks.stream import StreamSink

pytestmark = pytest.mark.slow  # servers, processes or many files: CI runs it


@pytest.fixture
def run(capfd, monkeypatch):
    """A command in this process, in a folder with a lake of 30 rows and two dead letters."""
    monkeypatch.setattr(libc, "keep_freed_memory", lambda: None)
    with lakes.scratch() as folder:
        monkeypatch.chdir(folder)
        with lakes.opened(folder / "lake") as sink:
            made = lakes.first_work(sink, [data.row(f"d{n % 3}", n, offset=n) for n in range(25)])
            sink.commit(made)
            late = [data.row("d0", 90_000 + n, offset=100 + n) for n in range(5)]
            sink.commit(data.next_work(made, late, [data.rejection(200), data.rejection(201)]))

        def run(*args):
            monkeypatch.setattr(sys, "argv", ["kvstore", "telemetry", *map(str, args)])
            with pytest.raises(SystemExit) as caught:
                main()
            out, err = capfd.readouterr()
            assert "Traceback" not in err
            return caught.value.code or 0, out, err

        yield run


def test_migrate_moves_compares_and_goes_on(run):
    code, out, err = run("migrate", "lake", "--to", "ops.kv")
    assert (code, out) == (0, "")
    assert "30 readings read, 30 stored in ops.kv" in err
    assert "the same on both sides: 30 readings of 2 days" in err
    code, out, _ = run("migrate", "lake", "--to", "ops.kv", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["moved"]["resumed"]
    assert found["moved"]["rows"] == 0
    assert found["verified"] == {"days": 2, "rows": 30, "differing": 0, "differences": []}


def test_migrate_of_a_window(run):
    window = ("--from", "2025-01-21", "--until", "2025-01-22")
    code, out, err = run("migrate", "lake", "--to", "ops.kv", *window, "--dry-run")
    assert (code, out) == (0, "")
    assert "5 readings would be moved" in err
    code, out, _ = run("migrate", "lake", "--to", "ops.kv", *window, "--json")
    assert json.loads(out)["moved"]["stored"] == 5


def test_sides_that_differ_are_exit_code_3(run):
    run("migrate", "lake", "--to", "ops.kv", "--until", "2025-01-21", "--no-verify")
    code, out, err = run("migrate", "lake", "--to", "ops.kv", "--verify-only")
    assert (code, out) == (3, "")
    assert "d0 2025-01-21 count: 5 in lake, 0 in ops.kv" in err
    assert "1 devices and days differ" in err
    code, out, _ = run("migrate", "lake", "--to", "ops.kv", "--verify-only", "--json")
    assert code == 3
    assert json.loads(out)["verified"]["differing"] == 1


def test_maintain_says_what_it_did(run):
    code, out, _ = run("maintain", "lake", "--keep", "0s", "--dry-run", "--json")
    assert code == 0
    would = json.loads(out)
    assert would["expired"] > 0
    assert would["files_removed"] == 0
    code, out, err = run("maintain", "lake", "--keep", "0s")
    assert (code, out) == (0, "")
    assert "snapshots expired" in err
    assert run("maintain", "lake", "--orphans-after", "1m")[0] == 2
    with IcebergSink.open("lake", mode="r") as sink:
        assert len(read_all(sink)) == 30


def test_a_rollback_is_told_and_accepted(run):
    lake = lakes.lake_at("lake")
    metadata = lake.table().metadata
    first = next(s for s in metadata.snapshots if ", 25, " in s.summary["kvstore.positions"])
    lake.table().manage_snapshots().set_current_snapshot(first.snapshot_id).commit()
    code, _, err = run("maintain", "lake")
    assert code == 1
    assert "--accept-rollback" in err
    code, out, _ = run("maintain", "lake", "--accept-rollback")
    assert (code, out) == (0, f"{data.PLACE.source} 0: goes on at 25\n")
    assert run("maintain", "lake")[0] == 0


def test_what_is_no_lake_is_said(run):
    for command in (("maintain", "nothing"), ("migrate", "nothing", "--to", "ops.kv")):
        code, _, err = run(*command)
        assert code == 1
        assert "no lake at" in err


def test_a_catalog_stands_in_the_settings(run, tmp_path):
    file = tmp_path / "pipeline.toml"
    file.write_text('[catalog]\nuri = "sqlite:///${WHERE}"\n')
    settings = load(file, {"WHERE": "elsewhere.db"})
    assert settings.catalog == {"uri": "sqlite:///elsewhere.db"}
    assert Settings().catalog == {}


def test_the_preflight_changes_nothing(run, tmp_path):
    assert preflight("lake", data.BRIEF) == []
    assert preflight(str(tmp_path / "new"), data.BRIEF) == []
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    (fault,) = preflight(str(tmp_path / "file"), data.BRIEF)
    assert "is a file" in fault


def test_history_moves_into_postgresql(run, postgres):
    code, _, err = run("migrate", "lake", "--to", postgres)
    assert code == 0, err
    assert "the same on both sides: 30 readings of 2 days" in err
    with PostgresSink.open(postgres, data.BRIEF) as sink, IcebergSink.open("lake") as lake:
        assert read_all(sink) == read_all(lake)
        assert len(list(sink.read(device_id="d0"))) > 0
    with StreamSink.open("ops.kv", data.BRIEF) as other:
        assert list(other.read()) == []
