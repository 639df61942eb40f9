"""Runs of the day-file ETL: again, in parts, killed, with files that come late, vanish or lie."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dayexports import SCHEMA, module, plant, save, scatter, seconds, tags
from stores import scratch

from kvstore import cli, libc
from kvstore.dayfiles import day as days
from kvstore.dayfiles import etl, hours, manifest, summary
from kvstore.dayfiles.grid import Settings
from kvstore.dayfiles.plan import Shard
from kvstore.errors import DayfilesError

NIGHT = seconds("2024-02-29T23:40:00")  # of a leap day into March
ROWS = plant(NIGHT, NIGHT + 2400, seed=3, modules=2)
ROWS += [(NIGHT + 1500, "battery_voltage", "51.5", module(1, 1, battery=2))]  # after midnight only
ROWS += [(NIGHT + 1199, "module_current", "7.5", module(1, 3))]  # a second before midnight


@pytest.fixture
def place():
    with scratch() as folder:
        yield folder


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and manifest.FOLDER not in path.parts
    }


def times(root):
    """When each file was written, the manifest's included; but for the lock."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "lock")
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def whole():
    """What the rows become in one run of one file."""
    with scratch() as folder:
        save(folder / "in" / "all.parquet", ROWS)
        etl.convert(folder / "in", folder / "out")
        yield contents(folder / "out")


def test_the_plant_has_what_the_claims_are_about(whole):
    assert "1_3/2024/03/01/00.parquet" in whole  # nothing but a value held across midnight
    assert len({name.split("/")[0] for name in whole}) == 5


# ---- any split, order and number of runs ----


@pytest.mark.parametrize("seed", range(4))
def test_any_split_into_files_gives_the_same_bytes(place, whole, seed):
    scatter(place / "in", ROWS, seed=seed, files=1 + 3 * seed)
    etl.convert(place / "in", place / "out")
    assert contents(place / "out") == whole


def test_files_that_come_one_by_one_in_any_order_give_the_same_bytes(place, whole):
    paths = scatter(place / "later", ROWS, files=5)
    random.Random(5).shuffle(paths)
    (place / "in").mkdir()
    for path in paths:
        path.rename(place / "in" / path.name)
        etl.convert(place / "in", place / "out")
    assert contents(place / "out") == whole


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_in_any_order_give_the_same_bytes(place, whole, order):
    scatter(place / "in", ROWS)
    for part in order:
        etl.convert(place / "in", place / "out", shard=Shard(part, 3))
    assert contents(place / "out") == whole


def test_workers_give_the_same_bytes(place, whole):
    scatter(place / "in", ROWS)
    etl.convert(place / "in", place / "out", run=etl.in_processes(2))
    assert contents(place / "out") == whole


def test_running_again_writes_nothing(place):
    scatter(place / "in", ROWS)
    etl.convert(place / "in", place / "out")
    before = times(place / "out")
    outcome = etl.convert(place / "in", place / "out")
    assert (outcome.made, outcome.hours_changed) == ([], 0)
    assert times(place / "out") == before


def test_files_that_move_or_are_copied_change_nothing(place):
    paths = scatter(place / "in", ROWS)
    etl.convert(place / "in", place / "out")
    before = times(place / "out")
    paths[0].rename(place / "in" / "elsewhere.parquet")
    (place / "in" / "copy.parquet").write_bytes(paths[1].read_bytes())
    outcome = etl.convert(place / "in", place / "out")
    assert (outcome.made, outcome.vanished) == ([], [])
    assert times(place / "out") == before


def test_a_full_run_makes_all_days_and_changes_no_byte(place):
    scatter(place / "in", ROWS)
    etl.convert(place / "in", place / "out")
    outcome = etl.convert(place / "in", place / "out", full=True)
    assert (len(outcome.made), outcome.hours_changed) == (2, 0)


def test_other_settings_make_all_days_anew(place):
    scatter(place / "in", ROWS)
    etl.convert(place / "in", place / "out")
    other = Settings(10 * 10**9, "linear", with_flags=True)
    etl.convert(place / "in", place / "out", other)
    etl.convert(place / "in", place / "fresh", other)
    assert contents(place / "out") == contents(place / "fresh")


@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_a_file_that_is_gone_or_cut_is_made_again(place, whole, harm):
    scatter(place / "in", ROWS)
    etl.convert(place / "in", place / "out")
    path = place / "out" / "1_1" / "2024" / "03" / "01" / "00.parquet"
    path.unlink() if harm == "removed" else path.write_bytes(path.read_bytes()[:99])
    outcome = etl.convert(place / "in", place / "out")
    assert outcome.hours_changed == 1
    assert contents(place / "out") == whole


# ---- what comes late ----


def test_a_late_row_rewrites_its_hour_and_those_that_its_value_reaches_and_no_other(place):
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out", Settings(hold_ns=4000 * 10**9))
    before = times(place / "out")
    late = (NIGHT + 1190, "module_temperature", "20.25", module(1, 3))
    save(place / "in" / "late.parquet", [late])
    outcome = etl.convert(place / "in", place / "out", Settings(hold_ns=4000 * 10**9))
    after = times(place / "out")
    changed = {
        path.relative_to(place / "out").as_posix()
        for path in after
        if after[path] != before.get(path) and path.suffix == ".parquet"
    }
    expected = ["1_3/2024/02/29/23", "1_3/2024/03/01/00", "1_3/2024/03/01/01"]
    assert sorted(changed) == [f"{name}.parquet" for name in expected]
    assert outcome.hours_changed == 3
    etl.convert(place / "in", place / "fresh", Settings(hold_ns=4000 * 10**9))
    assert contents(place / "out") == contents(place / "fresh")


def test_a_column_that_appears_late_is_in_all_files_of_its_kind(place):
    save(place / "in" / "a.parquet", [row for row in ROWS if row[0] < NIGHT + 1200])
    etl.convert(place / "in", place / "out", Settings(with_flags=True))
    save(place / "in" / "b.parquet", [row for row in ROWS if row[0] >= NIGHT + 1200])
    etl.convert(place / "in", place / "out", Settings(with_flags=True))
    etl.convert(place / "in", place / "fresh", Settings(with_flags=True))
    assert contents(place / "out") == contents(place / "fresh")
    first = hours.pq.read_schema(place / "out" / "1_2" / "2024" / "02" / "29" / "23.parquet")
    assert "battery_voltage_battery_2" in first.names


# ---- what vanishes ----


@pytest.fixture
def halves(place):
    """An output of two inputs, the second of which has vanished; it alone has battery 2."""
    save(place / "in" / "a.parquet", [row for row in ROWS if row[0] < NIGHT + 1300])
    save(place / "in" / "b.parquet", [row for row in ROWS if row[0] >= NIGHT + 1300])
    etl.convert(place / "in", place / "out")
    (place / "in" / "b.parquet").unlink()
    return place


def test_what_a_vanished_input_gave_stays_and_is_reported(halves, whole):
    outcome = etl.convert(halves / "in", halves / "out")
    assert (outcome.made, outcome.vanished, outcome.blocked) == ([], ["b.parquet"], [])
    assert outcome.is_whole
    assert contents(halves / "out") == whole


def test_a_day_that_would_lose_what_a_vanished_input_gave_is_not_made(halves, whole):
    save(halves / "in" / "c.parquet", [(NIGHT + 1300, "module_current", "1", module(1, 1))])
    outcome = etl.convert(halves / "in", halves / "out")
    assert (outcome.made, outcome.blocked) == ([], [NIGHT // 86400 + 1])
    assert not outcome.is_whole
    assert contents(halves / "out") == whole


def test_a_row_that_is_only_held_into_a_day_blocks_it_too_once_it_has_vanished(place):
    midnight = NIGHT - NIGHT % 86400 + 86400
    save(place / "in" / "a.parquet", [(midnight - 10, "module_current", "3", module(1, 1))])
    etl.convert(place / "in", place / "out")
    before = contents(place / "out")
    assert "1_1/2024/03/01/00.parquet" in before
    (place / "in" / "a.parquet").unlink()
    save(place / "in" / "b.parquet", [(midnight + 7000, "module_current", "1", module(1, 1))])
    outcome = etl.convert(place / "in", place / "out")
    assert (outcome.vanished, outcome.blocked) == (["a.parquet"], [midnight // 86400])
    assert contents(place / "out") == before


def test_an_input_that_grows_where_it_is_is_read_again(place):
    save(place / "in" / "a.csv", [row for row in ROWS if row[0] < NIGHT + 1300])
    etl.convert(place / "in", place / "out")
    save(place / "in" / "a.csv", ROWS)
    outcome = etl.convert(place / "in", place / "out")
    assert outcome.is_whole
    assert (outcome.vanished, outcome.blocked) == ([], [])
    etl.convert(place / "in", place / "fresh")
    assert contents(place / "out") == contents(place / "fresh")


def test_an_input_that_shrinks_has_vanished(place, whole):
    save(place / "in" / "a.csv", ROWS)
    etl.convert(place / "in", place / "out")
    save(place / "in" / "a.csv", ROWS[:-50])
    outcome = etl.convert(place / "in", place / "out")
    assert outcome.vanished == ["a.csv"]
    assert contents(place / "out") == whole


def test_pruning_lets_go_of_what_vanished_inputs_gave(halves):
    etl.convert(halves / "in", halves / "out", prune=True)
    etl.convert(halves / "in", halves / "fresh")
    assert contents(halves / "out") == contents(halves / "fresh")


def test_pruning_removes_days_that_have_no_input_left(place):
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out")
    (place / "in" / "a.parquet").unlink()
    save(place / "in" / "b.parquet", plant(NIGHT - 10 * 86400, NIGHT - 10 * 86400 + 60))
    outcome = etl.convert(place / "in", place / "out", prune=True)
    etl.convert(place / "in", place / "fresh")
    assert len(outcome.removed) == 2
    assert contents(place / "out") == contents(place / "fresh")
    assert not (place / "out" / "1_3").exists()  # no empty folders either


# ---- what is killed ----

KILLED = """
import os, signal, sys
from pathlib import Path
from kvstore.dayfiles import etl, exports, hours, manifest
left = int(sys.argv[3])
def counted(act):
    def wrapped(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*args, **options)
    return wrapped
Path.replace = counted(Path.replace)
manifest.write_durably = counted(manifest.write_durably)
os.mkdir = counted(os.mkdir)
etl.convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def killed_run(place, after):
    command = [sys.executable, "-c", KILLED, place / "in", place / "out", str(after)]
    return subprocess.run(command, check=False, capture_output=True, text=True).returncode


@pytest.mark.parametrize("after", [2, 17, 27, pytest.param(None, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_leaves_whole_files_and_the_next_completes(place, whole, after):
    scatter(place / "in", ROWS)
    for moment in [after] if after is not None else range(0, 60, 3):
        code = killed_run(place, moment)
        assert code in {0, -signal.SIGKILL}
        half_done = contents(place / "out") if (place / "out").exists() else {}
        done = {name: data for name, data in half_done.items() if name.endswith(".parquet")}
        for name, data in done.items():
            hours.pq.read_table(hours.pa.BufferReader(data))
            assert name in whole
        etl.convert(place / "in", place / "out")
        assert contents(place / "out") == whole
        if after is None:
            for path in (place / "out").rglob("*.parquet"):
                path.unlink()
            (place / "out" / manifest.FOLDER / "days" / "2024-02-29.json").unlink()


def test_a_rebuild_that_was_killed_is_not_taken_for_done(place, whole, monkeypatch):
    """The old record describes files of which some are new: undoing the input must not save it."""
    save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out")
    save(place / "in" / "b.parquet", [(NIGHT, "module_current", "-9", module(1, 1))])
    write = manifest.Manifest.write

    def dies(self, record):
        if record.complete:
            raise KeyboardInterrupt
        write(self, record)

    monkeypatch.setattr(manifest.Manifest, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        etl.convert(place / "in", place / "out")
    monkeypatch.undo()
    assert contents(place / "out") != whole
    (place / "in" / "b.parquet").unlink()
    etl.convert(place / "in", place / "out", prune=True)
    assert contents(place / "out") == whole


def test_a_day_is_synced_before_the_manifest_says_so(place, monkeypatch):
    """And marked as doubtful before a file of it changes."""
    said = []
    sync, write, put = libc.sync_filesystem, manifest.write_durably, hours.put
    monkeypatch.setattr(libc, "sync_filesystem", lambda folder: (said.append("sync"), sync(folder)))
    monkeypatch.setattr(hours, "put", lambda *given: (said.append("put"), put(*given))[1])

    def writes(path, data):
        said.append(f"record {json.loads(data)['complete']}")
        write(path, data)

    monkeypatch.setattr(manifest, "write_durably", writes)
    one_day = [row for row in ROWS if row[0] < NIGHT + 1000]
    save(place / "in" / "a.parquet", one_day)
    etl.convert(place / "in", place / "out")
    made = [what for what, _ in itertools.groupby(said)]
    assert made == ["put", "sync", "record True"]
    said.clear()
    save(place / "in" / "b.parquet", [(NIGHT, "module_current", "-9", module(1, 1))])
    etl.convert(place / "in", place / "out")
    assert [what for what, _ in itertools.groupby(said)] == ["record False", *made]


def test_what_killed_runs_left_is_removed(place, whole):
    scatter(place / "in", ROWS)
    folder = place / "out" / "1_1" / "2024" / "02" / "29"
    folder.mkdir(parents=True)
    (folder / ".23.parquet.99999.tmp").write_bytes(b"half of a file")
    etl.convert(place / "in", place / "out")
    assert contents(place / "out") == whole


def test_runs_of_equal_process_ids_write_a_file_under_names_of_their_own(place, monkeypatch):
    """Two containers, in which Dask makes a day twice. And all such names are known as ours."""
    names = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda s, o: (names.append(s.name), replace(s, o))[1])
    for content in (b"one", b"two"):
        hours.put(place / "12.parquet", memoryview(content))
    assert len(set(names)) == 2
    assert all(map(days._is_ours, names))


def test_a_file_whose_half_another_run_of_the_day_removed_is_written_again(place, monkeypatch):
    """It takes it for what a killed run left."""
    replace = Path.replace
    others = ["removes"]

    def meets_another_run(fresh, path):
        if others:
            others.pop()
            hours.remove(fresh, place)
        return replace(fresh, path)

    monkeypatch.setattr(Path, "replace", meets_another_run)
    assert hours.put(place / "1_1" / "12.parquet", memoryview(b"one"))
    assert contents(place) == {"1_1/12.parquet": b"one"}


def test_workers_end_with_a_killed_run(place):
    """Else they would wait for work for ever."""
    code = (
        "import sys, os, signal, time\nfrom pathlib import Path\n"
        "from kvstore.dayfiles import etl, day\n"
        "if __name__ == '__main__':\n"
        "    from concurrent.futures import ProcessPoolExecutor\n"
        "    import multiprocessing\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, mp_context=context, initializer=etl._start_worker)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = place / "run.py"
    script.write_text(code)
    said = place / "said"  # a pipe would be held open by a worker that lives on
    with said.open("w") as out:
        subprocess.run([sys.executable, script], check=False, stdout=out, stderr=subprocess.DEVNULL)
    worker = int(said.read_text())
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(worker)


def dies(task):
    os._exit(1)


def test_a_worker_that_is_killed_ends_the_run_with_advice_and_the_next_completes(
    place, whole, monkeypatch
):
    scatter(place / "in", ROWS)
    monkeypatch.setattr(etl, "convert_day", dies)
    with pytest.raises(DayfilesError, match="fewer --workers"):
        etl.convert(place / "in", place / "out", run=etl.in_processes(2))
    monkeypatch.undo()
    etl.convert(place / "in", place / "out")
    assert contents(place / "out") == whole


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_runs_into_one_output_are_refused_and_shards_are_not(place):
    scatter(place / "in", ROWS)
    with manifest.held(place / "out", alone=False):
        with pytest.raises(DayfilesError, match="being written by another run"):
            etl.convert(place / "in", place / "out")
        etl.convert(place / "in", place / "out", shard=Shard(0, 2))
    assert contents(place / "out")


def test_a_shard_waits_for_a_run_that_brings_columns_in_line(place):
    scatter(place / "in", ROWS)
    with manifest.held(place / "out", alone=False):
        pass
    aligning = threading.Event()

    def align():
        with manifest.last_one(place / "out") as is_last:
            assert is_last
            aligning.set()
            time.sleep(0.3)

    with ThreadPoolExecutor(1) as other:
        done = other.submit(align)
        aligning.wait(5)
        etl.convert(place / "in", place / "out", shard=Shard(0, 2))
        done.result()
    assert contents(place / "out")


def test_a_shard_waits_for_no_whole_run_to_its_end(place, monkeypatch):
    monkeypatch.setattr(manifest, "SHARD_WAIT_S", 0.2)
    scatter(place / "in", ROWS)
    with (
        manifest.held(place / "out", alone=True),
        pytest.raises(DayfilesError, match=r"by a run without --shard, .* 0.2 s") as refused,
    ):
        etl.convert(place / "in", place / "out", shard=Shard(0, 2))
    assert "each need" not in str(refused.value)


# ---- what is wrong with the input ----


def test_corrupt_empty_and_foreign_files_are_skipped_with_a_reason(place, whole):
    scatter(place / "in", ROWS)
    good = save(place / "good.parquet", ROWS[:500]).read_bytes()
    bad = {
        "cut.parquet": good[: len(good) // 2],
        "empty.parquet": b"",
        "empty.csv": b"",
        "notes.txt": b"buy milk",
        "other.csv": b"a,b\n1,2\n",
        "text.parquet": b"PAR1 is how it starts",
    }
    for name, data in bad.items():
        (place / "in" / name).write_bytes(data)
    save(place / "in" / "norows.parquet", [])
    outcome = etl.convert(place / "in", place / "out")
    reasons = {skipped.name: skipped.reason.split(":")[0] for skipped in outcome.skipped}
    assert reasons == {
        ".DS_Store": "foreign",
        "cut.parquet": "corrupt",
        "empty.csv": "empty",
        "empty.parquet": "empty",
        "norows.parquet": "empty",
        "notes.txt": "foreign",
        "other.csv": "foreign",
        "text.parquet": "corrupt",
    }
    assert not outcome.is_whole
    assert contents(place / "out") == whole


def test_a_file_whose_pages_are_corrupt_is_left_out_as_a_whole(place, whole):
    scatter(place / "in", ROWS)
    path = save(place / "in" / "zz.parquet", [(t, p, "1", g) for t, p, _, g in ROWS])
    data = bytearray(path.read_bytes())
    data[40:4000] = os.urandom(3960)  # the footer stays
    path.write_bytes(data)
    outcome = etl.convert(place / "in", place / "out")
    assert {skipped.name for skipped in outcome.skipped} == {".DS_Store", "zz.parquet"}
    assert contents(place / "out") == whole
    again = etl.convert(place / "in", place / "out")
    assert again.made == []
    assert {skipped.name for skipped in again.skipped} == {".DS_Store", "zz.parquet"}


def test_values_that_cannot_be_read_are_counted_named_and_null(place):
    rows = [
        (NIGHT, "module_voltage", "54.5", module(1, 1)),
        (NIGHT + 5, "module_voltage", "broken", module(1, 1)),
        (NIGHT + 10, "module_voltage", None, module(1, 1)),
    ]
    save(place / "in" / "a.parquet", [*rows, rows[1]])
    [report] = [r for r in etl.convert(place / "in", place / "out").made if r.rows]
    assert report.unreadable == 3
    assert report.named[0] == "a.parquet row 1: unreadable: 1_1/module_voltage 'broken'"
    table = hours.pq.read_table(place / "out" / "1_1" / "2024" / "02" / "29" / "23.parquet")
    first = (NIGHT % 3600) // 5
    assert table["module_voltage"].to_pylist()[first : first + 5] == [54.5, None, None, None, None]


def test_rows_without_a_place_are_counted_and_named(place):
    rows = [
        (NIGHT, "module_voltage", "54.5", module(1, 1)),
        (NIGHT, "module_voltage", "54.5", [["phase", "1"], ["phase", "2"]]),
        (NIGHT, None, "54.5", module(1, 1)),
        (None, "module_voltage", "54.5", module(1, 1)),
        (NIGHT, "module_voltage", "54.5", [["phase"]]),
        (10**15, "module_voltage", "54.5", module(1, 1)),
    ]
    save(place / "in" / "a.parquet", rows)
    outcome = etl.convert(place / "in", place / "out")
    [report] = [r for r in outcome.made if r.rows]
    assert (report.rows, report.unplaced, report.distinct) == (6, 5, 1)
    assert report.named[:2] == [
        "a.parquet row 1: unplaced: tags",
        "a.parquet row 2: unplaced: tags",
    ]
    assert not outcome.is_whole


@pytest.mark.parametrize("seed", range(3))
def test_conflicts_are_resolved_by_values_alone(place, seed):
    """The lowest stays; of numbers that are written differently there is no conflict."""
    voltages = ["55.0", "54.0", "54", "5.4e1", "broken"]
    rows = [(NIGHT, "module_voltage", value, module(1, 1)) for value in voltages]
    rows += [(NIGHT, "system_state", value, tags()) for value in ("RUN", "IDLE", "READY")]
    random.Random(seed).shuffle(rows)
    save(place / "in" / "a.parquet", rows[:3])
    save(place / "in" / "b.parquet", rows[3:])
    [report] = [r for r in etl.convert(place / "in", place / "out").made if r.rows]
    assert (report.rows, report.distinct, report.conflicts) == (8, 6, 3)
    first = (NIGHT % 3600) // 5
    values = {}
    for tree, column in (("1_1", "module_voltage"), ("system", "system_state")):
        table = hours.pq.read_table(place / "out" / tree / "2024" / "02" / "29" / "23.parquet")
        values[column] = table[column].to_pylist()[first]
    assert values == {"module_voltage": 54.0, "system_state": "IDLE"}


def test_a_file_that_changes_while_it_is_read_ends_the_run(place, monkeypatch):
    path = save(place / "in" / "a.parquet", ROWS)
    read = days.exports.read

    def touched(*args):
        chunks = read(*args)
        os.utime(path, ns=(1, 1))
        return chunks

    monkeypatch.setattr(days.exports, "read", touched)
    with pytest.raises(DayfilesError, match="changed while it was read"):
        etl.convert(place / "in", place / "out")


def test_an_output_within_the_input_is_no_input(place, whole):
    scatter(place / "in", ROWS)
    for _ in range(2):
        outcome = etl.convert(place / "in", place / "in" / "out")
    assert [skipped.name for skipped in outcome.skipped] == [".DS_Store"]
    assert contents(place / "in" / "out") == whole


def test_tags_lead_nowhere_outside_of_the_output(place):
    rows = [
        (NIGHT, "module_voltage", "1", module("../..", "/etc")),
        (NIGHT, "../../escape", "1", module(1, 1)),
        (NIGHT, "phase_current", "1", tags(phase="system")),
        (NIGHT, "phase_current", "2", tags(phase="1_1")),
        (NIGHT, "timestamp", "3", tags()),
    ]
    save(place / "in" / "a.parquet", rows)
    outcome = etl.convert(place / "in", place / "out")
    assert outcome.is_whole
    trees = sorted(path.name for path in (place / "out").iterdir())
    assert trees == [
        "%2E%2E%2F%2E%2E_%2Fetc",
        "%73ystem",
        "1%5F1",
        "1_1",
        ".dayfiles",
        "system",
    ] or (
        sorted(trees)
        == sorted([".dayfiles", "%2E%2E%2F%2E%2E_%2Fetc", "%73ystem", "1%5F1", "1_1", "system"])
    )


def test_a_row_with_a_stray_time_makes_no_days_between(place):
    """A device without a clock says 1970: no task, read and record for each day since."""
    rows = [(time, "module_voltage", "54", module(1, 1)) for time in (0, NIGHT)]
    for suffix in ("parquet", "csv"):
        save(place / suffix / f"a.{suffix}", rows)
        outcome = etl.convert(place / suffix, place / f"{suffix}-out")
        assert [report.day for report in outcome.made] == [0, NIGHT // 86400]


@pytest.mark.parametrize("folder", ["out/data", "out"])
def test_an_input_within_the_output_is_refused(place, folder):
    """An hour file that no run made is removed there, and this one is an input."""
    path = save(place / folder / "2024" / "02" / "29" / "23.parquet", ROWS)
    with pytest.raises(DayfilesError, match="a folder of its own"):
        etl.convert(place / folder, place / "out")
    assert path.exists()


def test_a_folder_is_read_once_however_many_links_lead_to_it(place, whole):
    save(place / "in" / "a.parquet", ROWS)
    (place / "in" / "loop").symlink_to(place / "in")
    outcome = etl.convert(place / "in", place / "out")
    assert (outcome.files, outcome.skipped) == (1, [])
    assert contents(place / "out") == whole


def test_a_folder_that_cannot_be_read_is_reported(place, monkeypatch):
    save(place / "in" / "a.parquet", ROWS)
    (place / "in" / "closed").mkdir()
    scan = os.scandir

    def refusing(path="."):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    outcome = etl.convert(place / "in", place / "out")
    assert outcome.skipped == [("closed", "a folder that cannot be read")]
    assert not outcome.is_whole


def test_a_name_that_is_not_utf8_is_reported(place):
    path = save(place / "in" / "a.parquet", ROWS)
    path.rename(os.fsdecode(os.fsencode(place / "in") + b"/M\xfc.parquet"))
    outcome = etl.convert(place / "in", place / "out")
    assert outcome.skipped == [("M\\udcfc.parquet", "its name is not UTF-8: rename it")]
    json.dumps(summary.summary(outcome), ensure_ascii=False).encode()


def test_an_output_that_was_removed_with_its_input_is_in_nobodys_way(place):
    """Old days may be archived; columns of later ones are not given to files that are gone."""
    path = save(place / "in" / "a.parquet", ROWS)
    etl.convert(place / "in", place / "out")
    path.unlink()
    shutil.rmtree(place / "out" / "1_1")
    later = (NIGHT + 10 * 86400, "cell_voltage", "4", module(1, 1, battery=2, cell=1))
    save(place / "in" / "b.parquet", [later])
    outcome = etl.convert(place / "in", place / "out")
    assert [report.day for report in outcome.made] == [later[0] // 86400]


def test_a_full_disk_is_said_with_the_file(place, monkeypatch):
    """Else the command speaks of standard output."""

    class Full(io.RawIOBase):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    with pytest.raises(OSError, match="No space") as raised:
        hours.put(place / "15.parquet", memoryview(b"x"))
    assert "15.parquet" in raised.value.filename


# ---- the command ----


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, check=False, capture_output=True, text=True
    )


SOLUTION = Path(__file__).resolve().parent.parent / "solution.py"


def test_the_literal_command_converts_a_folder(place, whole):
    scatter(place / "data", ROWS)
    done = command(SOLUTION, "--input", "data/", "--output", "output/", cwd=place)
    assert done.returncode == 3, done.stderr  # .DS_Store was skipped
    assert contents(place / "output") == whole
    assert "skipped: .DS_Store" in done.stderr
    (place / "data" / ".DS_Store").unlink()
    done = command(SOLUTION, "--report", "report.json", cwd=place)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    report = json.loads((place / "report.json").read_text())
    assert report["run"]["hours_written"] == 0
    assert report["readings"] == len({json.dumps(row) for row in ROWS})
    assert report["rows"] == report["readings"] + report["duplicates"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["nowhere", "out"], 1, "nowhere: no such folder"),
        (["in", "out", "--every", "7s"], 1, "expected a whole part of an hour"),
        (["in", "out", "--shard", "3/2"], 2, "expected a part"),
        (["in", "out", "--hold", "8d"], 1, "at most 7 days"),
    ],
)
def test_wrong_usage_says_what_to_do(  # noqa: PLR0917  # fixtures and a case
    place, monkeypatch, capsys, options, code, said
):
    save(place / "in" / "a.parquet", ROWS[:10])
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["kvstore", "dayfiles", "convert", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_the_schema_of_exports_is_that_of_the_real_ones():
    """The README of the data: five columns, of these types."""
    kinds = [str(field.type) for field in SCHEMA]
    assert kinds[:3] == ["int64", "string", "string"]
    assert str(SCHEMA.field("tags").type).count("list<") == 2
