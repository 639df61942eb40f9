"""backup: whole or not there, incremental, taken while writing, never replaced by damage."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from stores import ROOT, check_store, start
from test_damage import BATCHES, ROWS, block_of, content, flip, flip_value, segments
from test_disk_full import mounted
from test_verify import command, files_of

import kvstore
from kvstore import (
    DamageError,
    DiskFull,
    StoreError,
    StoreFormatError,
    StoreLocked,
    backup,
    codec,
    copies,
    verify,
)

backups = sys.modules["kvstore.backup"]  # the name itself is the function


def grow(path, first, end):
    with kvstore.open(path, "w", segment_bytes=64 << 10) as store:
        for number in range(first, end):
            store.stream("s").append(content(number), marks={"number": number})
            store.flush()


@pytest.fixture
def path(broken_path):
    """A closed store of BATCHES batches in several segments."""
    grow(broken_path, 0, BATCHES)
    return broken_path


@pytest.fixture
def dest(path):
    return path.with_name("backup.kv")


def numbers(path):
    """Numbers of the batches in a store, each compared; they are a prefix of what was written."""
    with kvstore.open(path) as store:
        rows = [int(n) for b in store["s"].read() for n in b["v"][::ROWS]]
        marks = store.marks
    found = [row // ROWS for row in rows]
    assert found == list(range(len(found)))
    assert marks == {"number": found[-1]}
    return found


# ---- what a backup is ----


def test_a_backup_is_a_store_equal_to_the_first(path, dest):
    before = files_of(path)
    report = backup(path, dest)
    assert files_of(path) == before
    assert report.damages == ()
    assert (report.copied, report.kept) == (len(segments(path)), 0)
    assert numbers(dest) == list(range(BATCHES))
    check_store(dest)
    assert verify(dest).damages == ()
    for file in segments(path)[:-1]:
        assert (dest / "segments" / file.name).read_bytes() == file.read_bytes()


def test_sealed_segments_are_copied_once(path, dest):
    backup(path, dest)
    stamps = {file.name: file.stat().st_ino for file in segments(dest)[:-1]}
    report = backup(path, dest)
    assert (report.copied, report.kept) == (1, len(segments(path)) - 1)
    grow(path, BATCHES, 2 * BATCHES)
    report = backup(path, dest)
    assert report.kept == len(stamps)
    assert numbers(dest) == list(range(2 * BATCHES))
    assert stamps.items() <= {file.name: file.stat().st_ino for file in segments(dest)}.items()
    assert verify(dest).damages == ()


def test_while_being_written_it_holds_what_was_committed_before(path, dest):
    done = threading.Event()
    committed = [BATCHES - 1]

    def write():
        with kvstore.open(path, "w", segment_bytes=256 << 10) as store:
            while not done.is_set():
                number = committed[0] + 1
                store.stream("s").append(content(number), marks={"number": number})
                store.flush()
                committed[0] = number
                time.sleep(0.005)  # else the store outgrows its checks

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(5):
            at_least = committed[0]
            backup(path, dest)
            assert numbers(dest)[-1] >= at_least
            assert verify(dest).damages == ()
    finally:
        done.set()
        thread.join()
    backup(path, dest)
    assert numbers(dest) == list(range(committed[0] + 1))


def test_segments_dropped_meanwhile_are_not_waited_for(path, dest, monkeypatch):
    """A file that goes before its copy, as retention drops it, and no later commit that says so."""
    lost = segments(path)[0]
    copy = backups._Backup._copy

    def vanishing(self, number):
        if number == 1 and lost.exists():
            lost.unlink()
        return copy(self, number)

    monkeypatch.setattr(backups._Backup, "_copy", vanishing)
    report = backup(path, dest)
    assert [(each.segment, each.what) for each in report.damages] == [
        (1, "the segment is missing in the store")
    ]


def test_what_the_store_has_dropped_is_dropped_from_its_backup(path, dest):
    grow(path, BATCHES, 4 * BATCHES)
    backup(path, dest)
    with kvstore.open(path, "w", segment_bytes=64 << 10) as store:
        store.pin(0, 1, "door", unit="s")
        assert store.drop(2 * BATCHES, unit="s")["segments"] > 2
    report = backup(path, dest)
    assert report.damages == ()
    assert [file.name for file in segments(dest)] == [file.name for file in segments(path)]
    with kvstore.open(path) as store, kvstore.open(dest) as copy:
        assert (copy.pins(), copy.gaps()) == (store.pins(), store.gaps())
        assert copy["s"].count() == store["s"].count()
    assert verify(dest).damages == ()


def test_retention_at_work_meanwhile_disturbs_nothing(path, dest):
    """Segments go while they are copied; what the backup holds is what one commit knew."""
    code = """
        import sys, numpy as np, kvstore
        limits = kvstore.Settings(max_bytes=4 << 20)
        with kvstore.open(sys.argv[1], "w", segment_bytes=256 << 10, settings=limits) as store:
            print("writing", flush=True)
            k = 0
            while True:
                x = np.random.default_rng(k).integers(0, 1 << 60, (50, 99))
                store.stream("t").append({"time": np.arange(50.0) + k, "x": x})
                k += 1
    """
    seen = set()
    with start(code, path) as child:
        child.stdout.readline()
        deadline = time.monotonic() + 120
        while len(seen) < 4 and time.monotonic() < deadline:
            report = backup(path, dest)
            assert report.damages == ()
            assert verify(dest).damages == ()
            assert verify(path).damages == ()
            seen.add(segments(dest)[0].name)
        child.kill()
    assert len(seen) > 1, "nothing was dropped meanwhile"


def test_a_second_backup_copies_only_what_is_new(path, dest):
    first = backup(path, dest)
    assert first.copied_bytes == sum(file.stat().st_size for file in segments(path))
    known = {file.name for file in segments(path)[:-1]}
    grow(path, BATCHES, BATCHES + 4)
    second = backup(path, dest)
    new = [file for file in segments(path) if file.name not in known]
    assert second.copied_bytes == sum(file.stat().st_size for file in new)
    assert second.copied_bytes < first.copied_bytes


# ---- what it refuses ----


def test_other_folders_are_left_alone(path, dest, tmp_path):
    (tmp_path / "letter").write_text("mine")
    with pytest.raises(StoreError, match="not a backup"):
        backup(path, tmp_path)
    other = path.with_name("other.kv")
    grow(other, 0, 1)
    with pytest.raises(StoreError, match="not a backup"):
        backup(path, other)
    backup(other, dest)
    with pytest.raises(StoreError, match="a backup of the store"):
        backup(path, dest)
    for inside in (path, path / "b", path.parent):
        with pytest.raises(StoreError, match="outside"):
            backup(path, inside)
    with pytest.raises(kvstore.StoreNotFound):
        backup(tmp_path, tmp_path / "x" / "y")


def test_a_backup_that_was_written_to_is_left_alone(path, dest):
    backup(path, dest)
    kvstore.open(dest, "w").close()
    with pytest.raises(StoreError, match="opened for writing"):
        backup(path, dest)


def test_one_at_a_time(path, dest):
    with copies.locked_folder(dest), pytest.raises(StoreLocked):
        backup(path, dest)


def test_a_damaged_source_does_not_replace_a_good_backup(path, dest):
    backup(path, dest)
    for file in (segments(path)[0], segments(path)[-1]):
        data = file.read_bytes()
        os.truncate(file, len(data) // 2)
        if file == segments(path)[0]:
            report = backup(path, dest)
            assert "that one is kept" in report.damages[0].what
        else:
            with pytest.raises(DamageError, match="truncated"):
                backup(path, dest)
        assert numbers(dest) == list(range(BATCHES))
        file.write_bytes(data)
    file = segments(path)[-1]
    for page in range(2, file.stat().st_size // 4096):
        flip(file, page * 4096 + 10)
    with pytest.raises((DamageError, StoreFormatError)):
        backup(path, dest)
    assert numbers(dest) == list(range(BATCHES))


def test_of_a_segment_damaged_since_it_was_active_the_earlier_copy_is_kept(path, dest):
    """One flipped bit must neither cost a sound copy nor end all backing up."""
    backup(path, dest)
    file = segments(path)[-1]
    sound = (dest / "segments" / file.name).read_bytes()
    grow(path, BATCHES, 2 * BATCHES)
    _, block = block_of(file, "large")
    flip_value(file, block)
    damage, kept = backup(path, dest).damages
    assert (damage.stream, damage.field, damage.rows) == ("s", "noise", ROWS)
    assert kept.what == f"its earlier copy is kept as {file.name}.kept"
    assert (dest / "segments" / f"{file.name}.kept").read_bytes() == sound
    grow(path, 2 * BATCHES, 3 * BATCHES)
    assert backup(path, dest).damages == ()  # it is there, as good as it gets
    (found,) = verify(dest).damages
    assert (found.segment, found.field) == (int(file.stem), "noise")
    assert (dest / "segments" / f"{file.name}.kept").read_bytes() == sound


def test_a_damaged_block_in_the_active_segment_does_not_end_backing_up(path, dest):
    backup(path, dest)
    grow(path, BATCHES, BATCHES + 1)
    file = segments(path)[-1]
    backup(path, dest)
    sound = (dest / "segments" / file.name).read_bytes()
    _, block = block_of(file, "large")
    flip_value(file, block)
    for copy in (dest, dest, dest.with_name("fresh.kv")):
        report = backup(path, copy)
        assert report.damages[0].field == "noise"
        assert [each.segment for each in verify(copy).damages] == [int(file.stem)]
    assert (dest / "segments" / f"{file.name}.kept").read_bytes() == sound


def test_a_store_without_segments_is_named(path, dest):
    for file in segments(path):
        file.unlink()
    with pytest.raises(StoreFormatError, match="no segment there"):
        backup(path, dest)


def test_a_damaged_manifest_is_named(path, dest):
    backup(path, dest)
    flip(dest / "backup.msgpack", 20)
    with pytest.raises(StoreFormatError, match=r"backup\.msgpack: damaged"):
        backup(path, dest)


def test_a_disk_that_does_not_keep_what_it_is_given_is_found(path, dest, monkeypatch):
    _, block = block_of(segments(path)[0], "large")

    def sync(file):
        if block in file.read_bytes():
            flip_value(file, block)

    monkeypatch.setattr(backups, "sync_file", sync)
    with pytest.raises(StoreError, match="read back"):
        backup(path, dest)
    with pytest.raises(kvstore.StoreNotFound):
        kvstore.open(dest)


def documented(name):
    """The bytes of an example in docs/format.md."""
    text = (ROOT / "docs/format.md").read_text()
    (digits,) = re.findall(rf"^{name} record\n((?:[0-9a-f ]+\n)+)", text, re.MULTILINE)
    return bytes.fromhex(digits)


def test_the_documents_records_are_read_as_documented(path, dest, tmp_path):
    (tmp_path / "backup.msgpack").write_bytes(documented("backup"))
    manifest = backups._read_manifest(tmp_path / "backup.msgpack")
    assert manifest.sealed == {1: (73728, 0x1234567890ABCDEF)}
    assert codec.packed(manifest) == documented("backup")
    backup(path, dest)
    made = backups._read_manifest(dest / "backup.msgpack")
    assert made.sealed[2] == (
        segments(dest)[1].stat().st_size,
        copies.checksum_of(segments(dest)[1]),
    )
    verify(path, since_last=True)
    found = segments(path)[0].stat()
    store_id, sound = codec.unpacked(documented("verified"), "")
    assert (store_id, sound) == (manifest.store_id, {1: [73728, manifest.complete_ns, 1234567]})
    note = codec.unpacked(path.with_name("run.kv.verified").read_bytes(), "")
    assert note[1][1] == [found.st_size, found.st_mtime_ns, found.st_ino]


# ---- cut short ----


class Cut(Exception):
    pass


def cut_at_each_step(path, dest, monkeypatch, check):
    """Run the backup again and again, stopped at its 1st, 2nd, … change of a name or sync."""
    steps = [0]
    real = {"rename": Path.rename, "unlink": Path.unlink, "sync": backups.sync_folder,
            "write": backups.write_durably}  # fmt: skip

    def counted(name):
        def act(*args, **options):
            if not steps[0]:
                raise Cut
            steps[0] -= 1
            return real[name](*args, **options)

        return act

    monkeypatch.setattr(Path, "rename", counted("rename"))
    monkeypatch.setattr(Path, "unlink", counted("unlink"))
    monkeypatch.setattr(backups, "sync_folder", counted("sync"))
    monkeypatch.setattr(backups, "write_durably", counted("write"))
    count = 0
    while True:
        steps[0] = count
        try:
            backup(path, dest)
        except Cut:
            steps[0] = 10**6
            check()
            count += 1
        else:
            return count


def test_cut_anywhere_a_first_backup_is_no_store_until_it_is_whole(path, dest, monkeypatch):
    def check():
        if (dest / "store.msgpack").exists():
            assert numbers(dest) == list(range(BATCHES))
        else:
            with pytest.raises(kvstore.StoreNotFound):
                kvstore.open(dest)
            if (dest / "backup.msgpack").exists():
                with pytest.raises(StoreFormatError, match="a folder with other files"):
                    kvstore.open(dest, "w")
            shutil.rmtree(dest, ignore_errors=True)

    assert cut_at_each_step(path, dest, monkeypatch, check) > 20


def test_cut_anywhere_an_earlier_backup_stays_a_store(path, dest, monkeypatch):
    backup(path, dest)
    grow(path, BATCHES, 2 * BATCHES)
    saved = path.with_name("saved.kv")
    shutil.copytree(dest, saved)

    def check():
        assert BATCHES <= len(numbers(dest)) <= 2 * BATCHES
        assert verify(dest).damages == ()
        shutil.rmtree(dest)
        shutil.copytree(saved, dest)

    assert cut_at_each_step(path, dest, monkeypatch, check) > 20
    assert numbers(dest) == list(range(2 * BATCHES))


def test_cut_short_it_goes_on_where_it_ended(path, dest, monkeypatch):
    copy = backups._Backup._copy
    copied = []

    def stopping(self, number):
        if len(copied) == 2:
            raise Cut
        copied.append(number)
        return copy(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(backups._Backup, "_copy", stopping)
        with pytest.raises(Cut):
            backup(path, dest)
    report = backup(path, dest)
    assert (report.kept, report.copied) == (2, len(segments(path)) - 2)
    assert numbers(dest) == list(range(BATCHES))


BACKUP = """
    import sys
    from kvstore.backup import backup
    print("begun", flush=True)
    backup(sys.argv[1], sys.argv[2])
"""


def kill_backups(path, dest, kills):
    """Kill backups of a growing store; after each, the backup is absent, or whole."""
    end, least = BATCHES, 0
    for _ in range(kills):
        with start(BACKUP, path, dest) as child:
            child.stdout.readline()
            time.sleep(random.uniform(0, 0.08))
            child.kill()
        if (dest / "store.msgpack").exists():
            found = numbers(dest)
            assert least <= len(found) <= end
            assert verify(dest).damages == ()
            least = len(found)
        grow(path, end, end + 6)
        end += 6
    backup(path, dest)
    assert numbers(dest) == list(range(end))
    assert verify(dest).damages == ()


def test_killed_backups_are_whole_or_absent(path, dest):
    kill_backups(path, dest, 4)


@pytest.mark.slow
def test_many_killed_backups(path, dest):
    kill_backups(path, dest, 24)


def test_a_full_disk_leaves_the_earlier_backup(broken_path, tmp_path):
    if os.geteuid() != 0 or mounted("tmpfs", tmp_path):
        pytest.skip("needs root: mounts a volume")
    dest = tmp_path / "backup.kv"

    def write(first, end):
        with kvstore.open(broken_path, "w", segment_bytes=2 << 20) as store:
            for k in range(first, end):
                noise = np.frombuffer(np.random.default_rng(k).bytes(1 << 20), "u1")
                time_ = np.arange(1024.0) + 1024 * k
                store.stream("s").append({"time": time_, "x": noise.reshape(1024, 1024)})
                store.flush()

    try:
        write(0, 4)
        backup(broken_path, dest)
        write(4, 30)
        for _ in range(2):
            with pytest.raises(DiskFull):
                backup(broken_path, dest)
            check_store(dest)
            with kvstore.open(dest) as store:
                assert len(store["s"]) == 4 * 1024
        shutil.rmtree(dest)
        with pytest.raises(DiskFull):
            backup(broken_path, dest)
        with pytest.raises(kvstore.StoreNotFound):
            kvstore.open(dest)
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path], check=True)
        assert backup(broken_path, dest).kept > 0
        check_store(dest)
        with kvstore.open(dest) as store:
            assert len(store["s"]) == 30 * 1024
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ---- the command ----


def test_the_command(path, dest):
    done = command("backup", path, dest)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete" in done.stdout
    listed = command("backup", path, dest, "--json")
    assert json.loads(listed.stdout)["kept"] == len(segments(path)) - 1
    segments(path)[0].unlink()
    kept = command("backup", path, dest)
    assert kept.returncode == 3
    assert "segment 1: the segment is missing in the store; its backup is kept" in kept.stderr
    assert numbers(dest) == list(range(BATCHES))
    fresh = command("backup", path, dest.with_name("fresh.kv"))
    assert fresh.returncode == 3
    assert "segment 1: the segment is missing" in fresh.stderr
