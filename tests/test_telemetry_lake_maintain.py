"""Upkeep of a lake: the rows stay, files become few, garbage goes, and nothing that is needed."""

from __future__ import annotations

import os
import time

import lakes
import pytest
import telemetry_data as data
from telemetry_model import read_all, state_of

from kvstore.errors import CommitUnknown, SinkError
from kvstore.telemetry.records import LetterChange, Outcome, State
from kvstore.telemetry.sinks import iceberg_commit, iceberg_maintain
from kvstore.telemetry.sinks.iceberg import IcebergSink
from kvstore.telemetry.sinks.iceberg_lake import COUNTS, DEAD_LETTERS, READINGS
from kvstore.telemetry.sinks.iceberg_maintain import maintain, referred

pytestmark = pytest.mark.slow  # servers, processes or many files: CI runs it

TABLES = (READINGS, DEAD_LETTERS, COUNTS)
DAY_S = 86_400


@pytest.fixture
def path():
    with lakes.scratch() as folder:
        yield folder / "lake"


def filled(path, commits=4):
    """A lake of many small commits, closed; the last of its works."""
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink)
        sink.commit(made)
        for n in range(commits):
            rows = [data.row(f"d{i}", n, offset=100 * n + i) for i in range(3)]
            made = data.next_work(made, rows, [data.rejection(100 * n + 50)])
            sink.commit(made)
        return made


def state(path):
    with lakes.opened(path) as sink:
        return state_of(sink)


def files(path):
    """All files of the tables."""
    found = (path / "telemetry").rglob("*")
    return {each for each in found if each.is_file() and each.suffix != ".json"}


def unreferred(path):
    """Data files and manifests that no snapshot needs."""
    lake = lakes.lake_at(path)
    known = set()
    for name in TABLES:
        table = lake.table(name)
        known |= {
            each.removeprefix("file://") for each in referred(table, table.metadata.snapshots)
        }
    return {each for each in files(path) if str(each) not in known}


def later(seconds):
    return lambda: time.time() + seconds


def test_rows_letters_and_counts_stay(path):
    made = filled(path)
    before = state(path)
    done = maintain(lakes.lake_at(path), keep_s=0, orphans_s=0, now_s=later(1))
    assert done.compacted > done.into > 0
    assert state(path) == before
    with lakes.opened(path) as sink:
        assert sink.settle(made) is not None, "its position still names it"
        claim = sink.claim([data.PLACE])[0]
        rows = [data.row("d1", 3, offset=9001), data.row("d1", 3, offset=9002, temperature=0.5)]
        assert sink.commit(data.work(claim, rows)) == Outcome(0, 1, 1, 1)


def test_files_become_few_and_expired_ones_go(path):
    filled(path, commits=8)
    lake = lakes.lake_at(path)
    before = len(files(path))
    maintain(lake, keep_s=0, orphans_s=1e9, now_s=later(1))
    done = maintain(lake, keep_s=0, orphans_s=1e9, now_s=later(1))
    assert done.compacted == 0, "nothing is left to do"
    assert len(files(path)) < before / 2
    for name in TABLES:
        table = lake.table(name)
        live = len(list(table.scan().plan_files()))
        assert live <= 3, "one for each bucket that has rows"
        assert len(lakes.data_files(path, name)) == live
    assert unreferred(path) == set()


def test_young_snapshots_stay(path):
    filled(path)
    lake = lakes.lake_at(path)
    snapshots = len(lake.table().metadata.snapshots)
    done = maintain(lake, keep_s=DAY_S)
    assert done.expired == 0
    assert done.files_removed == 0
    assert len(lake.table().metadata.snapshots) > snapshots
    old = lake.table().metadata.snapshots[3].snapshot_id
    assert len(lake.table().scan(snapshot_id=old).to_arrow()) > 0


def test_a_dry_run_changes_nothing(path):
    filled(path)
    before = {each: each.stat().st_mtime_ns for each in files(path)}
    done = maintain(lakes.lake_at(path), keep_s=0, orphans_s=0, dry_run=True, now_s=later(10))
    assert done.compacted > 0
    assert done.expired > 0
    assert {each: each.stat().st_mtime_ns for each in files(path)} == before


def test_compaction_and_ingestion_at_once(path, monkeypatch):
    """Each loses a race to the other, and both get through."""
    made = filled(path)
    with lakes.opened(path) as sink:
        real, late = iceberg_commit.swap, [[data.row("d0", 77, offset=7700)]]

        def swap(transaction, location):
            if late:
                sink.commit(data.next_work(made, late.pop()))
            real(transaction, location)

        claim = sink.claim([data.PLACE])[0]
        made = data.work(claim)
        sink.commit(made)
        monkeypatch.setattr(iceberg_commit, "swap", swap)
        done = maintain(lakes.lake_at(path), keep_s=0, orphans_s=0, now_s=later(1))
        assert done.compacted > 0
        assert len(read_all(sink)) == 13
    assert len(state(path)["rows"]) == 13


def test_two_maintain_at_once(path, monkeypatch):
    filled(path)
    before = state(path)
    real, others = iceberg_commit.swap, [lakes.lake_at(path)]

    def swap(transaction, location):
        if others:
            maintain(others.pop(), keep_s=DAY_S)
        real(transaction, location)

    monkeypatch.setattr(iceberg_commit, "swap", swap)
    maintain(lakes.lake_at(path), keep_s=DAY_S)
    assert state(path) == before


def test_orphans_go_by_age_and_nothing_else(path):
    filled(path)
    lake = lakes.lake_at(path)
    maintain(lake, keep_s=DAY_S)
    wanted = {*files(path)}
    old = lakes.data_files(path).pop().with_name("orphan-old.parquet")
    young = old.with_name("orphan-young.parquet")
    for each in (old, young):
        each.write_bytes(b"garbage")
    os.utime(old, (time.time() - 10 * DAY_S,) * 2)
    for each in wanted:  # age alone condemns no file that is needed
        os.utime(each, (time.time() - 20 * DAY_S,) * 2)
    before = state(path)
    done = maintain(lake, keep_s=1e9, orphans_s=3 * DAY_S)
    assert not old.exists()
    assert young.exists()
    assert wanted <= files(path)
    assert done.orphans == done.files_removed
    assert state(path) == before


def test_a_commit_without_an_answer_keeps_its_files_or_can_no_longer_arrive(path, monkeypatch):
    """Its request is still under way while maintain runs; then it reaches the catalog."""
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, [data.row()])
        real, held = sink._lake.catalog.commit_table, []

        def commit_table(table, requirements, updates):
            if table.name()[-1] != READINGS:
                return real(table, requirements, updates)
            held.append((table, requirements, updates))
            raise ConnectionResetError

        monkeypatch.setattr(sink._lake.catalog, "commit_table", commit_table)
        with pytest.raises(CommitUnknown):
            sink.commit(made)
        monkeypatch.undo()
        (file,) = lakes.data_files(path)
        maintain(lakes.lake_at(path), keep_s=DAY_S)
        assert file.exists(), "it is young"
        maintain(lakes.lake_at(path), keep_s=DAY_S, orphans_s=0, now_s=later(5))
        with pytest.raises(Exception, match=r"branch main has changed|Requirement failed"):
            real(*held[0])
        assert sink.settle(made) is None
        assert sink.commit(made).stored == 1
        assert len(read_all(sink)) == 1


def test_staged_garbage_goes(path, monkeypatch):
    made = filled(path, commits=2)
    with lakes.opened(path) as sink:
        claim = sink.claim([data.PLACE])[0]
        with monkeypatch.context() as patch:
            patch.setattr(iceberg_commit, "swap", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sink.commit(data.work(claim, [], [data.rejection(made.after[0].next + 1)]))
    before = state(path)
    for _ in range(2):  # the next staging lets go of the branch
        maintain(lakes.lake_at(path), keep_s=0, orphans_s=0, now_s=later(5))
        with lakes.opened(path) as sink:
            sink.commit(data.work(sink.claim([data.PLACE]), [], [data.rejection(80_000)]))
    maintain(lakes.lake_at(path), keep_s=0, orphans_s=0, now_s=later(5))
    assert unreferred(path) == set()
    assert len(state(path)["letters"]) == len(before["letters"]) + 1


def test_letters_can_be_changed_behind_it(path):
    filled(path)
    maintain(lakes.lake_at(path), keep_s=0, orphans_s=0, now_s=later(1))
    with lakes.opened(path) as sink:
        sink.change_letters([LetterChange(data.PLACE, 150, State.DISCARDED, 0)])
        found = [each.rejection.offset for each in sink.dead_letters(state=State.DISCARDED)]
        assert found == [150]
        assert len(list(sink.dead_letters())) == 4


def test_a_lake_that_was_rolled_back_is_left_alone(path):
    with lakes.opened(path) as sink:
        made = lakes.first_work(sink, [data.row()])
        sink.commit(made)
        target = sink._lake.table().current_snapshot().snapshot_id
        sink.commit(data.next_work(made, [data.row(second=1, offset=5)]))
    lakes.lake_at(path).table().manage_snapshots().set_current_snapshot(target).commit()
    before = files(path)
    with pytest.raises(SinkError, match="rolled back"):
        maintain(lakes.lake_at(path), keep_s=0, orphans_s=0, now_s=later(5))
    assert files(path) == before


def test_large_files_are_left(path, monkeypatch):
    filled(path)
    monkeypatch.setattr(iceberg_maintain, "SMALL_ROWS", 1)
    lake = lakes.lake_at(path)
    before = {task.file.file_path for task in lake.table().scan().plan_files()}
    maintain(lake, keep_s=DAY_S)
    assert {task.file.file_path for task in lake.table().scan().plan_files()} == before


def test_compacted_files_have_a_bound(path, monkeypatch):
    filled(path, commits=12)
    monkeypatch.setattr(iceberg_maintain, "FILE_ROWS", 5)
    monkeypatch.setattr(iceberg_maintain, "SMALL_ROWS", 5)
    lake = lakes.lake_at(path)
    maintain(lake, keep_s=DAY_S)
    assert all(task.file.record_count <= 5 for task in lake.table().scan().plan_files())
    assert len(state(path)["rows"]) == 36


@pytest.mark.parametrize("spelling", ["lake", "file:{path}", "file://{path}"])
def test_no_spelling_of_the_folder_makes_orphans_of_all(path, monkeypatch, spelling):
    """A relative warehouse once had every file of the lake deleted."""
    monkeypatch.chdir(path.parent)
    catalog = {"warehouse": spelling.format(path=path), "uri": f"sqlite:///{path}/catalog.db"}
    with IcebergSink.open("lake", data.BRIEF, catalog=catalog) as sink:
        made = lakes.first_work(sink, [data.row()], [data.rejection(2)])
        sink.commit(made)
        before = state_of(sink)
        maintain(sink._lake, keep_s=1e9, orphans_s=0, now_s=later(5))
        assert state_of(sink) == before


def test_names_that_cannot_be_matched_remove_nothing(path, monkeypatch):
    filled(path, commits=1)
    before = files(path)
    monkeypatch.setattr(iceberg_maintain, "_listed", lambda _table: {"elsewhere": ("x", 0.0)})
    with pytest.raises(SinkError, match="nothing was removed"):
        maintain(lakes.lake_at(path), keep_s=1e9, orphans_s=0, now_s=later(5))
    assert before <= files(path)
