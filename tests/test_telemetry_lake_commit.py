"""The lake's one commit: races, lost replies, crashes, rollbacks, durable files, other readers."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import duckdb
import lakes
import numpy as np
import polars as pl
import pytest
import sqlalchemy
import telemetry_data as data
from telemetry_model import read_all, state_of

from kvstore.errors import CommitUnknown, Fenced, RolledBack, SinkError
from kvstore.telemetry.records import Claim, LetterChange, Outcome, State
from kvstore.telemetry.sinks import iceberg as iceberg_module
from kvstore.telemetry.sinks import iceberg_commit, iceberg_keys, iceberg_side
from kvstore.telemetry.sinks.iceberg import IcebergSink
from kvstore.telemetry.sinks.iceberg_keys import Keys, Runs
from kvstore.telemetry.sinks.iceberg_lake import COUNTS, DEAD_LETTERS, open_lake
from kvstore.telemetry.sinks.iceberg_maintain import accept_rollback

pytestmark = pytest.mark.slow  # many lakes: CI runs it

EMPTY = {"positions": [], "rows": [], "letters": [], "counts": []}


@pytest.fixture
def path():
    with lakes.scratch() as folder:
        yield folder / "lake"


def once_before(monkeypatch, act, *, module=iceberg_commit):
    """Do something just before the next swap of the readings, once."""
    real, acts = module.swap, [act]

    def swap(transaction, location):
        if acts:
            acts.pop()()
        real(transaction, location)

    monkeypatch.setattr(module, "swap", swap)


# ---- races ----


def test_a_lost_race_is_decided_again(path, monkeypatch):
    """What the winner stored meanwhile is a duplicate, and a conflict, of the loser's."""
    rows = [data.row("a", 1, offset=1), data.row("a", 2, offset=2), data.row("a", 3, offset=3)]
    theirs = [
        data.row("a", 1, place=data.OTHER, offset=1),
        data.row("a", 2, place=data.OTHER, offset=2, temperature=-1.0),
    ]
    with lakes.opened(path) as sink, lakes.opened(path) as other:
        made = lakes.first_work(sink, rows)
        winner = lakes.first_work(other, theirs, place=data.OTHER)
        once_before(monkeypatch, lambda: other.commit(winner))
        assert sink.commit(made) == Outcome(stored=1, duplicates=1, rejected=1, conflicts=1)
        assert [(lineage[0], lineage[2]) for _, _, lineage in read_all(sink)] == [
            (data.OTHER.source, 1),
            (data.OTHER.source, 2),
            (data.PLACE.source, 3),
        ]
        assert [each.rejection.offset for each in sink.dead_letters()] == [2]
        totals = {(c.name): c.value for c in sink.counts()}
        assert totals["received"] == 5
        assert totals["stored"] == 3
    assert len(lakes.data_files(path)) == 2, "the loser's first files are gone"


def test_files_are_used_again_where_a_lost_race_changes_nothing(path, monkeypatch):
    with lakes.opened(path) as sink, lakes.opened(path) as other:
        made = lakes.first_work(sink, [data.row("a", 1)])
        winner = lakes.first_work(other, [data.row("b", 1, place=data.OTHER)], place=data.OTHER)
        written = []
        real = iceberg_module.write
        monkeypatch.setattr(iceberg_module, "write", lambda *args: written.append(1) or real(*args))
        once_before(monkeypatch, lambda: other.commit(winner))
        assert sink.commit(made).stored == 1
        assert len(written) == 2, "one each"
        assert len(read_all(sink)) == 2


def test_a_claim_between_load_and_swap_fences(path, monkeypatch):
    """A claim changes properties alone, which no catalog compares: so it makes a snapshot."""
    with lakes.opened(path) as sink, lakes.opened(path) as other:
        made = lakes.first_work(sink, [data.row()], [data.rejection(2)])
        once_before(monkeypatch, lambda: other.claim([data.PLACE]))
        with pytest.raises(Fenced):
            sink.commit(made)
        assert state_of(sink) == EMPTY
    assert lakes.data_files(path) == set()


def test_a_column_that_came_meanwhile_does_no_harm(path, monkeypatch):
    with lakes.opened(path, data.BRIEF_1) as sink, lakes.opened(path, data.BRIEF_1) as other:
        made = data.work(sink.claim([data.PLACE]), [data.row()], contract=data.BRIEF_1)
        once_before(monkeypatch, lambda: other.evolve(data.BRIEF))
        assert sink.commit(made).stored == 1
        assert len(read_all(sink)) == 1


def test_races_have_an_end(path, monkeypatch):
    monkeypatch.setattr("kvstore.telemetry.sinks.iceberg_lake.RACE_WAIT_S", 0)
    with lakes.opened(path) as sink, lakes.opened(path) as other:
        made = lakes.first_work(sink, [data.row()])
        real = iceberg_commit.swap

        def always_late(transaction, location):
            monkeypatch.setattr(iceberg_commit, "swap", real)
            other.claim([data.OTHER])
            monkeypatch.setattr(iceberg_commit, "swap", always_late)
            real(transaction, location)

        monkeypatch.setattr(iceberg_commit, "swap", always_late)
        monkeypatch.setattr("kvstore.telemetry.sinks.iceberg_lake.SWAPS_MAX", 3)
        with pytest.raises(SinkError, match="lost 3 races"):
            sink.commit(made)
        monkeypatch.setattr(iceberg_commit, "swap", real)
        assert state_of(sink)["rows"] == []


def test_staging_meets_another_writer(path, monkeypatch):
    with lakes.opened(path) as sink, lakes.opened(path) as other:
        made = lakes.first_work(sink, [data.row("a")])
        winner = lakes.first_work(other, [data.row("b", place=data.OTHER)], place=data.OTHER)
        once_before(monkeypatch, lambda: other.commit(winner), module=iceberg_side)
        assert sink.commit(made).stored == 1
        assert {(c.device_id, c.name): c.value for c in sink.counts()} == {
            (device, name): 1 for device in "ab" for name in ("received", "stored")
        }


# ---- lost replies and crashes ----


class Killed(BaseException):
    """The process is gone: nothing more of it runs."""


def crash(*_args, **_kwargs):
    raise Killed


def after(real):
    def act(*args, **kwargs):
        real(*args, **kwargs)
        raise Killed

    return act


POINTS = {
    "before files": (iceberg_module, "write", crash),
    "after files": (iceberg_module, "write", after(iceberg_module.write)),
    "before staging": (iceberg_side, "swap", crash),
    "after staging": (iceberg_side, "swap", after(iceberg_side.swap)),
    "before the swap": (iceberg_commit, "swap", crash),
    "after the swap": (iceberg_commit, "swap", after(iceberg_commit.swap)),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_commit_is_there_or_not_at_all(path, monkeypatch, point):
    sink = lakes.opened(path)
    first = lakes.first_work(sink, [data.row(second=1)], [data.rejection(2)])
    sink.commit(first)
    before = state_of(sink)
    made = data.next_work(first, [data.row(second=2, offset=3)], [data.rejection(4)])
    module, name, act = POINTS[point]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, act)
        with pytest.raises(Killed):
            sink.commit(made)
    with lakes.opened(path) as again:
        if point == "after the swap":
            assert again.settle(made) == Outcome(1, 0, 1, 0)
        else:
            assert again.settle(made) is None
            assert state_of(again) == before
            claim = again.claim([data.PLACE])[0]
            made = data.work(claim, [data.row(second=2, offset=3)], [data.rejection(4)])
            assert again.commit(made) == Outcome(1, 0, 1, 0)
        assert len(read_all(again)) == 2
        assert [each.rejection.offset for each in again.dead_letters()] == [2, 4]
        assert sum(c.value for c in again.counts() if c.name == "received") == 4


@pytest.mark.parametrize("arrived", [True, False])
def test_a_lost_reply_is_settled(path, monkeypatch, arrived):
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, [data.row()], [data.rejection(2)])
        real = sink._lake.catalog.commit_table

        def commit_table(table, requirements, updates):
            if table.name()[-1] != "readings":
                return real(table, requirements, updates)
            if arrived:
                real(table, requirements, updates)
            raise ConnectionResetError("the network")

        monkeypatch.setattr(sink._lake.catalog, "commit_table", commit_table)
        files = len(lakes.data_files(path))
        with pytest.raises(CommitUnknown, match="may or may not"):
            sink.commit(made)
        assert len(lakes.data_files(path)) == files + 1, "nothing is cleaned up"
        assert sink.settle(made) == (Outcome(1, 0, 1, 0) if arrived else None)
        assert len(read_all(sink)) == int(arrived)
        monkeypatch.undo()
        if arrived:
            with pytest.raises(Fenced):
                sink.commit(made)
        else:
            assert sink.commit(made) == Outcome(1, 0, 1, 0)
        assert len(read_all(sink)) == 1


def test_staged_letters_are_nobodys_until_the_readings_name_them(path, monkeypatch):
    with lakes.opened(path) as sink:
        first = lakes.first_work(sink, [], [data.rejection(1)])
        sink.commit(first)
        with monkeypatch.context() as patch:
            patch.setattr(iceberg_commit, "swap", crash)
            for _ in range(2):
                with pytest.raises(Killed):
                    sink.commit(data.next_work(first, [], [data.rejection(2)]))
        assert [each.rejection.offset for each in sink.dead_letters()] == [1]
        sink.commit(data.next_work(first, [], [data.rejection(3)]))
        assert [each.rejection.offset for each in sink.dead_letters()] == [1, 3]
    for name, column, expected in ((DEAD_LETTERS, "offset", [1, 3]), (COUNTS, "value", None)):
        table = lakes.lake_at(path).table(name)
        found = sorted(table.scan().to_arrow()[column].to_pylist())
        assert expected in (None, found), "after a close, other tools see what was committed"


def test_main_is_behind_but_never_ahead(path, monkeypatch):
    sink = lakes.opened(path)
    made = lakes.first_work(sink, [], [data.rejection(1)])
    sink.commit(made)
    table = lakes.lake_at(path).table(DEAD_LETTERS)
    assert table.scan().to_arrow()["offset"].to_pylist() == []
    made = data.next_work(made, [], [data.rejection(2)])
    sink.commit(made)
    table = lakes.lake_at(path).table(DEAD_LETTERS)
    assert table.scan().to_arrow()["offset"].to_pylist() == [1]


# ---- rolled back by somebody else ----


def rolled_back(path, commits):
    """A lake with so many commits, set back to its first one by another tool."""
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, [data.row(second=0, offset=0)], [data.rejection(1)])
        sink.commit(made)
        target = sink._lake.table().current_snapshot().snapshot_id
        for n in range(1, commits):
            made = data.next_work(made, [data.row(second=n, offset=10 * n)])
            sink.commit(made)
    table = lakes.lake_at(path).table()
    table.manage_snapshots().set_current_snapshot(target).commit()
    return made


def test_who_reads_changes_no_byte_of_a_lake(path):
    sink = lakes.opened(path)
    sink.commit(lakes.first_work(sink, [data.row()], [data.rejection(1)]))
    sink._lake.close()  # as a writer that was killed: its letters are staged, and not on main

    def files():
        return {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}

    before = files()
    with IcebergSink.open(str(path), data.BRIEF, mode="r") as reader:
        assert len(list(reader.dead_letters())) == 1
        assert len(read_all(reader)) == 1
    assert files() == before


def test_a_catalog_that_is_held_does_not_fail_a_writer_that_is_done(path, monkeypatch):
    def held(*_):
        raise CommitUnknown("no answer")

    with lakes.opened(path) as sink:
        sink.commit(lakes.first_work(sink, [data.row()], [data.rejection(1)]))
        monkeypatch.setattr(iceberg_side, "publish", held)
    monkeypatch.undo()
    with IcebergSink.open(str(path), data.BRIEF, mode="r") as reader:
        assert len(list(reader.dead_letters())) == 1


def test_a_rollback_is_an_error_that_offers_the_positions(path):
    made = rolled_back(path, 3)
    sink = IcebergSink.open(str(path))
    for act in (
        sink.positions,
        lambda: sink.claim([data.PLACE]),
        lambda: sink.commit(made),
        lambda: sink.settle(made),
    ):
        with pytest.raises(RolledBack, match=r"rolled back.* 2 instead of 21.*--accept-rollback"):
            act()


def test_an_accepted_rollback_reads_again_from_there(path):
    made = rolled_back(path, 3)
    assert [position.next for position in accept_rollback(lakes.lake_at(path))] == [2]
    with lakes.opened(path) as sink:
        assert [position.next for position in sink.positions()] == [2]
        with pytest.raises(Fenced):
            sink.commit(made)
        assert sum(c.value for c in sink.counts() if c.name == "received") == 2
        claim = sink.claim([data.PLACE])[0]
        rows = [data.row(second=n, offset=10 * n) for n in (1, 2)]
        assert sink.commit(data.work(claim, rows)).stored == 2
        assert len(read_all(sink)) == 3


def test_snapshots_do_not_add_up(path, monkeypatch):
    """Each costs every commit; what is tagged stays, and so does what is committed."""
    monkeypatch.setattr(iceberg_commit, "SNAPSHOTS_MAX", 4)
    monkeypatch.setattr(iceberg_side, "SIDE_SNAPSHOTS_MAX", 4)
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, [data.row(second=0)])
        sink.commit(made)
        table = sink._lake.table()
        tagged = table.current_snapshot().snapshot_id
        table.manage_snapshots().create_tag(tagged, "training").commit()
        for n in range(1, 9):
            made = data.next_work(made, [data.row(second=n, offset=10 * n)])
            sink.commit(made)
        assert sink.settle(made) is not None
        assert len(read_all(sink)) == 9
        assert sum(each.value for each in sink.counts()) == 18
        found = [each.snapshot_id for each in sink._lake.table().metadata.snapshots]
        assert tagged in found
        assert len(found) <= 6
        assert len(sink._lake.table(COUNTS).metadata.snapshots) <= 6


def test_other_tools_may_write_on_top(path):
    with lakes.opened(path) as sink:
        sink.commit(lakes.first_work(sink, [data.row()]))
    table = lakes.lake_at(path).table()
    rows = table.scan().to_arrow()
    shifted = rows.set_column(0, rows.schema.field(0), [["other"]])
    table.append(shifted)
    table = lakes.lake_at(path).table()
    ids = [each.snapshot_id for each in table.metadata.snapshots[:-1]]
    table.maintenance.expire_snapshots().by_ids(ids).commit()
    with lakes.opened(path) as sink:
        claim = sink.claim([data.PLACE])[0]
        rows = [data.row("other", offset=5), data.row("new", offset=6)]
        assert sink.commit(data.work(claim, rows)) == Outcome(1, 1, 0, 0)


# ---- durable files ----


def test_every_file_is_synced_before_the_catalog_points_at_it(path, monkeypatch):
    """At each commit of the catalog: each file of the lake, at its length, and its folder."""
    synced: dict[tuple[int, int], int] = {}
    folders: dict[int, set[str]] = {}
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        found = os.fstat(descriptor)
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced[found.st_dev, found.st_ino] = found.st_size
        if name.is_dir():
            folders[found.st_ino] = {each.name for each in name.iterdir()}

    monkeypatch.setattr(os, "fsync", fsync)
    looked = []

    def look(_connection):
        for each in path.rglob("*"):
            if each.name.startswith("catalog.db"):
                continue
            found = each.stat()
            if each.is_file():
                assert synced[found.st_dev, found.st_ino] == found.st_size, each
                looked.append(each.suffix)
            assert each.name in folders[each.parent.stat().st_ino], each

    iceberg_files_known = "kvstore.telemetry.sinks.iceberg_files._durable"
    monkeypatch.setattr(iceberg_files_known, set())
    sink = lakes.opened(path)
    sqlalchemy.event.listen(sink._lake.catalog.engine, "commit", look)
    made = lakes.first_work(sink, [data.row(), data.row("b", 90_000)], [data.rejection(2)])
    sink.commit(made)
    assert {".parquet", ".avro", ".json"} <= set(looked)


def test_the_catalog_syncs_its_own_commits(path):
    with lakes.opened(path) as sink, sink._lake.catalog.engine.connect() as connection:
        found = connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar()
        assert found == 3, "EXTRA: FULL, and the journal's folder"


def test_a_folder_that_is_gone_is_made_again(path):
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, [data.row()])
        sink.commit(made)
        (file,) = lakes.data_files(path)
        moved = file.parent.with_name("moved")
        file.parent.rename(moved)
        rows = [data.row(second=5, offset=9)]
        with pytest.raises(FileNotFoundError):
            file.stat()
        sink.commit(data.next_work(made, rows))
        assert len(lakes.data_files(path)) == 2


# ---- the anti-join ----


def test_answers_do_not_depend_on_what_is_remembered(path, monkeypatch):
    """With no room for keys at all, each batch reads them again."""
    monkeypatch.setattr(iceberg_keys, "KEYS_BYTES_MAX", 0)
    rows = [data.row(f"d{n % 5}", n // 5, offset=n) for n in range(200)]
    again = [each._replace(offset=1000 + each.offset) for each in rows[:150]]
    again[7] = again[7]._replace(values={**again[7].values, "temperature": 1.5})
    found = []
    for bytes_max in (0, 8 * 60, 1 << 20):
        lake = path.with_name(f"lake-{bytes_max}")
        with lakes.opened(lake) as sink:
            sink._keys = Keys(4, bytes_max=bytes_max)
            made = lakes.first_work(sink, rows[:100])
            sink.commit(made)
            made = data.next_work(made, rows[100:])
            sink.commit(made)
            assert sum(map(len, sink._keys._runs.values())) * 8 <= bytes_max
        with lakes.opened(lake) as sink:
            sink._keys = Keys(4, bytes_max=bytes_max)
            found.append(sink.commit(data.work(sink.claim([data.PLACE]), again)))
    assert found == [Outcome(0, 149, 1, 1)] * 3


def test_files_that_cannot_overlap_are_not_read(path, monkeypatch):
    read = []
    real = iceberg_keys.keys_of
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, [data.row("a", n, offset=n) for n in range(5)])
        sink.commit(made)
    monkeypatch.setattr(
        iceberg_keys, "keys_of", lambda table, file: read.append(file) or real(table, file)
    )
    with lakes.opened(path) as sink:
        made = data.work(sink.claim([data.PLACE]), [data.row("a", 100, offset=100)])
        sink.commit(made)
        assert read == [], "another hour"
        sink.commit(data.next_work(made, [data.row("a", 4, offset=200)]))
        assert len(read) == 1


def test_runs_find_what_was_added_and_where():
    rng = np.random.default_rng(3)
    runs, known = Runs(), {}
    for number in range(60):
        more = rng.integers(0, 5000, int(rng.integers(0, 40)), dtype=np.uint64) << np.uint64(16)
        assert runs.number_of(f"file-{number}") == number
        runs.add(more | np.uint64(number))
        for each in more.tolist():
            known.setdefault(each, set()).add(number)
        wanted = np.sort(rng.integers(0, 5000, 50, dtype=np.uint64) << np.uint64(16))
        found, files = runs.find(wanted)
        assert found.tolist() == [each in known for each in wanted.tolist()]
        assert files == set().union(*(known.get(each, ()) for each in wanted.tolist()))
    assert len(runs._runs) < 12


def test_only_files_that_hold_a_suspect_are_compared(path, monkeypatch):
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink)
        sink.commit(made)
        for n in range(5):  # all of one time, so that statistics do not help
            rows = [data.row("a", 10 * i + n, offset=100 * n + i) for i in range(6)]
            made = data.next_work(made, rows)
            sink.commit(made)
        compared, real = [], iceberg_keys.scan
        monkeypatch.setattr(
            iceberg_keys, "scan", lambda *args: compared.append(args[1]) or real(*args)
        )
        again = data.next_work(made, [data.row("a", 23, offset=900), data.row("a", 77, offset=901)])
        assert sink.commit(again) == Outcome(1, 1, 0, 0)
        assert len(compared) == 1


def test_two_identities_of_one_hash_are_told_apart(path, monkeypatch):
    monkeypatch.setattr(
        iceberg_keys, "mixed", lambda devices, ts_us: np.zeros(len(ts_us), np.uint64)
    )
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, [data.row("a", n, offset=n) for n in range(5)])
        assert sink.commit(made).stored == 5
        rows = [
            data.row("b", 2, offset=10),
            data.row("a", 3, offset=11),
            data.row("a", 9, offset=12),
        ]
        assert sink.commit(data.next_work(made, rows)) == Outcome(2, 1, 0, 0)


# ---- other readers, other catalogs ----


def test_duckdb_and_polars_read_the_same(path, monkeypatch):
    monkeypatch.setenv("POLARS_ICEBERG_PLANNER", "pyiceberg")
    rows = [data.row(f"d{n % 3}", n, offset=n, temperature=n / 8) for n in range(50)]
    rows.append(data.row("d0", 90_000, offset=99, pressure=1013.0, extras='{"x":1}'))
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, rows[:30])
        sink.commit(made)
        sink.commit(data.next_work(made, rows[30:]))
    table = lakes.lake_at(path).table()
    by_polars = pl.scan_iceberg(table).sort("ts", "device_id").collect()
    assert by_polars.height == 51
    assert by_polars.schema["ts"] == pl.Datetime("us", "UTC")
    files = [task.file.file_path.removeprefix("file://") for task in table.scan().plan_files()]
    query = "select device_id, ts, temperature, pressure, extras from read_parquet($files)"
    with duckdb.connect() as connection:
        connection.execute("set timezone = 'UTC'")
        found = connection.execute(f"{query} order by ts, device_id", {"files": files}).fetchall()
    columns = ["device_id", "ts", "temperature", "pressure", "extras"]
    assert [tuple(row) for row in by_polars.select(columns).rows()] == [
        (device, ts.astimezone(by_polars["ts"][0].tzinfo), *rest) for device, ts, *rest in found
    ]
    expected = sorted((each.ts_us, each.device_id) for each in rows)
    assert [(int(ts.timestamp() * 1e6 + 0.5), device) for device, ts, *_ in found] == expected


def test_the_layout_is_by_day_and_bucket(path):
    with lakes.opened(path) as sink:
        rows = [data.row(f"d{n}", 40_000 * n, offset=n) for n in range(8)]
        sink.commit(lakes.first_work(sink, rows))
    table = lakes.lake_at(path).table()
    assert [str(field.transform) for field in table.spec().fields] == ["day", "bucket[4]"]
    for file in lakes.data_files(path):
        assert file.parent.name.startswith("device_bucket=")
        assert file.parent.parent.name.startswith("ts_day=20")
    kinds = {field.name: str(field.field_type) for field in table.schema().fields}
    assert kinds["ts"] == "timestamptz"
    assert kinds["temperature"] == kinds["humidity"] == "double"


def test_another_catalog_serves_several_hosts(path, postgres):
    catalog = {"uri": postgres}
    with IcebergSink.open(str(path), data.BRIEF, catalog=catalog) as sink:
        made = lakes.first_work(sink, [data.row()], [data.rejection(2)])
        assert sink.commit(made).stored == 1
    assert not (path / "catalog.db").exists()
    with IcebergSink.open(str(path), mode="r", catalog=catalog) as sink:
        assert len(read_all(sink)) == 1
        assert sink.settle(made) is not None


# ---- errors ----


def test_what_is_no_lake_is_said(path):
    with pytest.raises(SinkError, match="no lake at"):
        IcebergSink.open(str(path), mode="r")
    assert not path.exists()


def test_a_column_of_another_type_is_said(path):
    with lakes.opened(path) as sink:
        field = replace(data.BRIEF.values[0], type="string")
        with pytest.raises(SinkError, match=r"'temperature' is a number, and text in the contract"):
            sink.evolve(replace(data.BRIEF, values=(field,)))
        field = replace(field, name="_run")
        with pytest.raises(SinkError, match="'_run', which the lake's table has for itself"):
            sink.evolve(replace(data.BRIEF, values=(field,)))


def test_a_letter_that_is_not_there_is_said(path):
    with lakes.opened(path) as sink:
        change = LetterChange(data.PLACE, 7, State.DISCARDED, 0)
        with pytest.raises(SinkError, match="no dead letter at"):
            sink.change_letters([change])


def test_a_catalog_that_is_broken_is_an_error_of_ours(path):
    lakes.opened(path).__exit__(None, None, None)
    with sqlite3.connect(path / "catalog.db") as connection:
        connection.execute("drop table iceberg_tables")
    with pytest.raises(SinkError):
        IcebergSink.open(str(path), mode="r").positions()


def test_a_claim_survives_and_counts_up(path):
    with lakes.opened(path) as sink:
        assert [each.epoch for each in sink.claim([data.PLACE])] == [1]
    with lakes.opened(path) as sink:
        found = sink.claim([data.PLACE])
    assert found == [Claim(found[0].position, 2)]


def test_reading_stays_bounded(path, monkeypatch):
    monkeypatch.setattr("kvstore.telemetry.sinks.iceberg_view.READ_ROWS_MAX", 7)
    with lakes.opened(path) as sink:
        rows = [data.row(f"d{n % 4}", n // 4, offset=n) for n in range(61)]
        sink.commit(lakes.first_work(sink, rows))
        view = sink.view()
        sizes = [len(batch) for batch in view.read(rows_max=7)]
        assert sum(sizes) == 61
        assert max(sizes) <= 8
        assert view.rows_between(rows[8].ts_us, rows[40].ts_us) == 32
        assert view.rows_between(None, None) == 61


def test_paths_with_spaces_work():
    with lakes.scratch() as folder, lakes.opened(folder / "my lake ü") as sink:
        sink.commit(lakes.first_work(sink, [data.row()]))
        assert len(read_all(sink)) == 1


def test_a_relative_path_is_the_same_lake(path, monkeypatch):
    with lakes.opened(path) as sink:
        sink.commit(lakes.first_work(sink, [data.row()]))
    monkeypatch.chdir(path.parent)
    with IcebergSink.open("lake", mode="r") as sink:
        assert len(read_all(sink)) == 1
    assert open_lake("lake/").table().location() == (Path(path) / "telemetry/readings").as_uri()
