"""The power-cut harness itself, on handmade logs and on bare LMDB files.

A harness that cannot fail proves nothing: besides its model, these tests show that it passes a
program that syncs as it should, and that it catches the same program when it does not.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from powercut import checker, disk, recorder
from powercut.recorder import Event, Op, mark

FILES, COMMITS = 6, 12
ROW_KEYS = (1, 4)  # rows a commit, at least and below


# ---- the recorded program: rows with increasing numbers, in LMDB files that roll ---------------


def row_value(number: int) -> bytes:
    """1 to 100 KB that only this row has."""
    rng = np.random.default_rng(number)
    return rng.bytes(int(1024 * 10 ** rng.uniform(0, 2)))


def write_rows(root: Path, *, sync: bool) -> None:
    """As DESIGN.md section 4.2 rolls: under a temporary name, synced, renamed, folder synced."""
    number, rng = 0, np.random.default_rng(0)
    for file in range(FILES):
        temporary, final = root / f"{file}.tmp", root / f"{file}.mdb"
        with open_rows(temporary, sync=sync, lock=False) as env, env.begin(write=True) as txn:
            # Without a commit nothing syncs the first two pages: the file may arrive empty.
            txn.put(struct.pack(">Q", 0), b"carried")
        temporary.rename(final)
        sync_folder(root)
        env = open_rows(final, sync=sync)
        for _ in range(COMMITS):
            with env.begin(write=True) as txn:
                for _ in range(int(rng.integers(*ROW_KEYS))):
                    number += 1
                    txn.put(struct.pack(">Q", number), row_value(number), append=True)
            mark(str(number))
        env.close()


def open_rows(path: Path, *, sync: bool = True, lock: bool = True) -> lmdb.Environment:
    return lmdb.open(
        str(path), subdir=False, map_size=1 << 26, sync=sync, writemap=False, max_dbs=4, lock=lock
    )


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def check_rows(folder: Path, state: disk.State) -> str:
    """Each promised row is there with its value, and nothing after a gap."""
    found = 0
    for path in sorted(folder.glob("*.mdb")):
        with open_rows(path) as env, env.begin() as txn:
            for key, value in txn.cursor():
                (number,) = struct.unpack(">Q", key)
                if number == 0:
                    continue
                found += 1
                if number != found or value != row_value(number):
                    raise AssertionError(f"row {number} in {path.name} where {found} should be")
    promised = int(state.promised[-1]) if state.promised else 0
    if found < promised:
        raise AssertionError(f"{found} rows, and {promised} were promised")
    return "promised rows" if found == promised else "more rows"


# ---- recording ---------------------------------------------------------------------------------


@pytest.fixture
def place():
    folder = checker.fast_folder()
    yield folder
    shutil.rmtree(folder)


def recorded(shim, place, program, *arguments, lying=False):
    """A recording of a program that is told the folder, and what else."""
    root = place / "root"
    root.mkdir()
    command = [program, root, *arguments]
    return recorder.record(command, root, shim=shim, log_path=place / "log", lying=lying)


def script(place, text):
    path = place / "script.py"
    path.write_text(
        "import os, sys\nfrom powercut.recorder import mark\nos.chdir(sys.argv[1])\n" + text
    )
    return path


EVERY_CALL = """
root = sys.argv[1]
os.mkdir("a"); os.mkdir(root + "/a/b/")
folder = os.open("a", os.O_RDONLY)
os.mkdir("c", dir_fd=folder)
with open("a/plain", "wb") as f: f.write(b"x" * 1000); f.flush(); os.fsync(f.fileno())
with open("a/plain", "ab") as f: f.write(b"y" * 100)
with open("a/plain", "r+b") as f: f.seek(50); f.write(b"z"); f.truncate(700)
with open("a/again", "wb") as f: f.write(b"old")
with open("a/again", "wb") as f: f.write(b"new")
fd = os.open("many", os.O_RDWR | os.O_CREAT | os.O_DSYNC, dir_fd=folder)
copy = os.dup(fd)
os.writev(copy, [b"one", b"two"])
os.pwrite(fd, b"three", 5000); os.pwritev(fd, [b"f", b"our"], 9000)
os.posix_fallocate(fd, 0, 20000); os.fdatasync(copy); os.truncate("a/many", 15000)
os.close(fd)
os.rename("a/many", "moved"); os.link("moved", "a/linked"); os.unlink("moved")
os.rename("a/again", "a/plain"); os.rmdir("a/c")
os.rename("linked", "there", src_dir_fd=folder, dst_dir_fd=folder)
os.fsync(folder)
mark("done: 1")
with open(root + "/../elsewhere", "wb") as f: f.write(b"no")
if os.fork() == 0:
    os._exit(0)
"""


def test_every_call_is_recorded(shim, place):
    log = recorded(shim, place, script(place, EVERY_CALL))
    events = recorder.load(log)
    final = disk.final_state(events)
    assert {event.op for event in events} == set(Op)
    assert final.promised == ("done: 1",)
    assert sorted(final.folders) == ["a", "a/b"]
    assert sorted(final.files) == ["a/plain", "a/there"]
    assert final.files["a/plain"] == b"new"
    assert len(final.files["a/there"]) == 15000


@pytest.mark.parametrize(
    "unseen",
    [
        "import shutil; shutil.copyfile('/etc/passwd', 'copied')",
        "import numpy; numpy.arange(9).tofile(open('tofile', 'wb'))",
        "import mmap\nf = open('m', 'w+b'); f.truncate(9); mmap.mmap(f.fileno(), 0)[0] = 1",
    ],
)
def test_a_recording_that_misses_something_is_refused(shim, place, unseen):
    with pytest.raises(recorder.RecordingError):
        recorded(shim, place, script(place, unseen))


def test_a_program_that_fails_is_reported(shim, place):
    with pytest.raises(recorder.RecordingError, match="went wrong"):
        recorded(shim, place, script(place, "sys.exit('went wrong')"))


def test_a_mark_outside_a_recording_does_nothing():
    mark("anything")


# ---- the model, on handmade logs ---------------------------------------------------------------

OLD, NEW = b"o" * 2048, b"n" * 2048
FILE, OTHER, FOLDER, ROOT = 7, 8, 9, 1
CREATED = [Event(Op.CREATE, FILE, path="f")]


def sync(inode, number):
    event = Event(Op.SYNC_BEGIN, inode, offset=number)
    return [event, event._replace(op=Op.SYNC_END)]


def wrote(data, offset=0, inode=FILE):
    return Event(Op.WRITE, inode, offset, len(data), data=data)


STORED = [*CREATED, wrote(OLD), *sync(FILE, 1), *sync(ROOT, 2)]


def drawn(events, count=300):
    return list(disk.crash_states(events, [len(events)] * count, np.random.default_rng(0)))


def contents(events, name="f"):
    return {state.files.get(name) for state in drawn(events)}


def test_what_was_synced_is_always_there():
    assert contents(STORED) == {OLD}


def test_an_unsynced_write_arrives_in_any_subset_of_its_sectors():
    found = contents([*STORED, wrote(NEW)])
    assert found == {
        b"".join((NEW if bits >> i & 1 else OLD)[:512] for i in range(4)) for bits in range(16)
    }


def test_a_sector_is_never_torn():
    found = contents([*STORED, wrote(NEW[:100], 500)])  # across the first sector's end
    first, second = OLD[:500] + NEW[:12], NEW[:88] + OLD[:424]
    assert found == {a + b + OLD[1024:] for a in (OLD[:512], first) for b in (OLD[:512], second)}


def test_a_sector_may_keep_any_content_it_had():
    found = contents([*STORED, wrote(b"1" * 512), wrote(b"2" * 512)])
    assert {data[:1] for data in found} == {b"o", b"1", b"2"}


def test_a_size_may_run_ahead_of_the_data_and_behind_it():
    found = contents([*STORED, wrote(NEW, 2048)])
    assert OLD + bytes(2048) in found
    assert OLD in found
    assert OLD + NEW in found
    assert all(data.startswith(OLD) for data in found)


def test_an_unsynced_truncation_may_not_arrive():
    found = contents([*STORED, Event(Op.TRUNCATE, FILE, length=100)])
    assert OLD in found
    assert OLD[:100] in found


def test_what_is_written_while_a_sync_runs_is_not_covered():
    begin, end = sync(FILE, 3)
    assert OLD in contents([*STORED, begin, wrote(NEW), end])
    assert OLD in contents([*STORED, wrote(NEW), begin])
    assert contents([*STORED, wrote(NEW), begin, end]) == {NEW}


def test_a_dsync_write_makes_its_own_range_durable_only():
    durable = Event(Op.DURABLE, FILE, 4096, 512)
    found = contents([*STORED, wrote(NEW, 2048), wrote(b"m" * 512, 4096), durable])
    assert OLD + bytes(2048) + b"m" * 512 in found
    assert {data[4096:] for data in found} == {b"m" * 512}
    assert len(found) == 16


def test_names_arrive_only_with_their_folder():
    created = [*CREATED, wrote(OLD), *sync(FILE, 1)]
    assert contents(created) == {OLD, None}
    renamed = [*STORED, Event(Op.RENAME, FILE, path="f", other="g")]
    assert {tuple(state.files) for state in drawn(renamed)} == {("f",), ("g",)}
    assert {tuple(state.files) for state in drawn([*renamed, *sync(ROOT, 3)])} == {("g",)}
    dropped = [*STORED, Event(Op.UNLINK, FILE, path="f")]
    assert contents(dropped) == {OLD, None}
    assert contents([*dropped, *sync(ROOT, 3)]) == {None}


def test_a_file_is_gone_with_its_folder():
    events = [
        Event(Op.MKDIR, FOLDER, path="d"),
        Event(Op.CREATE, FILE, path="d/f"),
        wrote(OLD),
        *sync(FILE, 1),
        *sync(FOLDER, 2),
    ]
    assert contents(events, "d/f") == {OLD, None}
    assert contents([*events, *sync(ROOT, 3)], "d/f") == {OLD}


def test_a_rename_may_arrive_before_what_it_names():
    events = [
        *STORED,
        Event(Op.CREATE, OTHER, path="t"),
        wrote(NEW, inode=OTHER),
        Event(Op.RENAME, OTHER, path="t", other="f"),
    ]
    found = contents(events)
    assert {OLD, NEW, b"", bytes(2048)} <= found


def test_an_inode_number_that_is_used_again_is_another_file():
    events = [*STORED, Event(Op.UNLINK, FILE, path="f"), Event(Op.CREATE, FILE, path="g")]
    assert {state.files.get("f") for state in drawn([*events, wrote(NEW)])} == {OLD, None}


def test_lock_files_are_arbitrary():
    events = [Event(Op.CREATE, FILE, path="x-lock"), wrote(OLD), *sync(FILE, 1), *sync(ROOT, 2)]
    states = [
        next(disk.crash_states(events, [len(events)], np.random.default_rng(seed)))
        for seed in range(30)
    ]
    sizes = {len(state.files.get("x-lock", b"absent")) for state in states}
    assert sizes == {len(b"absent"), 0, disk.LOCK_BYTES}


def test_power_is_cut_at_every_position_near_a_change_of_names():
    events = [*STORED, *(wrote(NEW) for _ in range(50)), Event(Op.UNLINK, FILE, path="f")]
    points = disk.crash_points(events, np.random.default_rng(0), 60)
    assert len(points) == 60
    assert {0, 1, 2, len(events) - 2, len(events) - 1, len(events)} <= set(points)


# ---- bare LMDB ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_synced_lmdb_keeps_its_promises(shim, place):
    log = recorded(shim, place, __file__, "sync")
    report = checker.check_log(log, check_rows, count=300, seed=1)
    assert not report.failures, report
    assert report.count >= 270
    assert report.met["more rows"] > 0


@pytest.mark.slow
def test_sync_false_is_caught(shim, place):
    log = recorded(shim, place, __file__, "nosync")
    report = checker.check_log(log, check_rows, count=60, seed=1)
    assert len(report.failures) > 20, report


@pytest.mark.slow
def test_a_disk_that_lies_about_syncs_is_caught(shim, place):
    log = recorded(shim, place, __file__, "sync", lying=True)
    report = checker.check_log(log, check_rows, count=60, seed=1)
    assert len(report.failures) > 20, report


def die_of_sigbus(folder: Path, state: disk.State) -> str:
    os.kill(os.getpid(), signal.SIGBUS)
    return "survived"


def test_a_check_that_kills_its_process_is_a_failure(shim, place):
    log = recorded(shim, place, script(place, "open('f', 'w').write('x')"))
    report = checker.check_log(log, die_of_sigbus, count=4, seed=1)
    assert {failure.message for failure in report.failures} == {"killed by SIGBUS"}


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]), sync=sys.argv[2] == "sync")
