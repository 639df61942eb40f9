"""recover: all that a damaged store holds comes out, nothing false does, the source stays."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import time

import lmdb
import numpy as np
import pytest
from stores import SEED, check_store, start
from test_damage import BATCHES, ROWS, block_of, content, first_batch, flip, flip_value, segments
from test_disk_full import mounted
from test_verify import command, files_of

import kvstore
from kvstore import DiskFull, StoreError, StoreLocked, verify
from kvstore.copies import locked_folder
from kvstore.environment import TABLES
from kvstore.pages import PageFile
from kvstore.recover import recover


@pytest.fixture
def path(broken_path):
    """A closed store of BATCHES batches, one second each, in several segments."""
    with kvstore.open(broken_path, "w", segment_bytes=64 << 10) as store:
        for number in range(BATCHES):
            store.stream("s").append(content(number), marks={"number": number})
            store.stream("other").append({"time": [float(number)], "v": [number]})
            store.flush()
    return broken_path


def recovered(path):
    """The report, and the numbers of the batches of ``s`` that came out, each checked."""
    target = path.with_name("new.kv")
    shutil.rmtree(target, ignore_errors=True)
    before = files_of(path)
    report = recover(path, target)
    assert files_of(path) == before
    check_store(target)
    with kvstore.open(target) as store:
        rows = []
        for batch in store["s"].read() if "s" in store else ():
            for begin in range(0, len(batch["v"]), ROWS):
                number = int(batch["v"][begin]) // ROWS
                for name, values in content(number).items():
                    if name == "text" and batch[name][begin] is None:
                        assert any(loss.field == name for loss in report.losses)
                        continue
                    assert np.array_equal(batch[name][begin : begin + ROWS], values), "FALSE DATA"
                rows.append(number)
        others = [int(v) for b in store["other"].read() for v in b["v"]] if "other" in store else []
    assert len(set(rows)) == len(rows)
    assert len(set(others)) == len(others)
    if sorted(rows) != list(range(BATCHES)) or sorted(others) != list(range(BATCHES)):
        assert report.losses, f"SILENTLY LOST {rows} {others}"
    return report, rows


def test_a_sound_store_comes_out_whole_with_an_id_of_its_own(path):
    report, numbers = recovered(path)
    assert numbers == list(range(BATCHES))
    assert (report.losses, report.notes) == ((), ())
    assert report.rows == BATCHES * (ROWS + 1)
    with kvstore.open(path) as old, kvstore.open(path.with_name("new.kv")) as new:
        assert new.marks == old.marks
        assert new.info().store_id != old.info().store_id
        assert new["s"].schema == old["s"].schema


def test_added_fields_and_all_times_come_out(broken_path):
    with kvstore.open(broken_path, "w", segment_bytes=64 << 10) as store:
        stream = store.stream("s")
        stream.append({"time": np.array([3, 1, 2], "M8[us]"), "n": np.arange(3)})
        store.flush()
        stream.add_fields(kvstore.Field("late", "int32"))
        stream.append({"time": np.array([5], "M8[us]"), "n": [9], "late": [7]})
        store.flush()
        expected = list(store["s"].read(fields=["time", "n"]))
    target = broken_path.with_name("new.kv")
    recover(broken_path, target)
    with kvstore.open(target) as store:
        found = list(store["s"].read(fields=["time", "n"]))
        assert [b["late"].tolist() for b in store["s"].read(np.datetime64(4, "us"))] == [[7]]
    for name in ("time", "n"):
        joined = [np.concatenate([b[name] for b in each]) for each in (expected, found)]
        assert np.array_equal(*joined)


def test_only_the_batch_of_a_damaged_block_is_lost(path):
    number, block = block_of(segments(path)[1], "large")
    flip_value(segments(path)[1], block)
    report, numbers = recovered(path)
    assert numbers == [n for n in range(BATCHES) if n != number]
    (loss,) = report.losses
    assert (loss.stream, loss.field, loss.rows) == ("s", "noise", ROWS)
    assert loss.start == f"1970-01-01T00:00:{number:02}+00:00"


def test_a_damaged_field_with_a_fill_leaves_the_rest_of_its_batch(path):
    number, block = block_of(segments(path)[1], "text")
    flip_value(segments(path)[1], block)
    target = path.with_name("new.kv")
    report = recover(path, target)
    (loss,) = report.losses
    assert (loss.stream, loss.field) == ("s", "text")
    assert "reads as never stored" in loss.what
    with kvstore.open(target) as store:
        (batch,) = store["s"].read(float(number), number + 0.99)
        assert batch["text"].tolist() == [None] * ROWS
        assert np.array_equal(batch["noise"], content(number)["noise"])


def test_a_batch_without_record_is_a_hole_between_its_neighbours(path):
    _, value = first_batch(segments(path)[1])
    flip_value(segments(path)[1], value)
    report, numbers = recovered(path)
    assert len(numbers) == BATCHES - 1
    (loss,) = report.losses
    assert (loss.segment, loss.rows) == (2, ROWS)
    assert loss.what.startswith("batches ")


def test_blocks_of_several_frames_that_no_page_points_to_are_found(broken_path):
    """By the sizes that their frames tell; among others that take as many pages."""
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 4, (140_000, 2)) << 8 * k for k in range(6)]
    with kvstore.open(broken_path, "w", segment_bytes=1 << 30) as store:
        for number, v in enumerate(batches):
            store.stream("s").append({"time": np.full(len(v), float(number)), "v": v})
            store.flush()
    file = segments(broken_path)[0]
    data = bytearray(file.read_bytes())
    with PageFile(file, print) as pages:
        nodes = list(pages.nodes(b"blocks"))
        frames = [pages.large(node.overflow, node.size) for node in nodes if node.overflow]
    assert len(frames) >= len(batches)
    assert all(struct.unpack_from("<12xI", each)[0] < len(each) for each in frames)
    for page in {node.place >> 16 for node in nodes}:
        data[page * 4096 : (page + 1) * 4096] = bytes(4096)
    file.write_bytes(data)
    target = broken_path.with_name("new.kv")
    assert not recover(broken_path, target).losses
    with kvstore.open(target) as store:
        found = np.concatenate([batch["v"] for batch in store["s"].read(fields=["v"])])
    assert np.array_equal(found, np.concatenate(batches))


def test_a_walk_through_hostile_frames_ends(broken_path, monkeypatch):
    """Large values full of the least frames, one inside the other: looked at, not for ever."""
    with kvstore.open(broken_path, "w", segment_bytes=1 << 30) as store:
        store.stream("s").append({"time": np.zeros(70_000), "v": np.arange(140_000).reshape(-1, 2)})
    file = segments(broken_path)[0]
    with PageFile(file, print) as pages:
        node = max(pages.nodes(b"blocks"), key=lambda each: each.size)
        count = pages.overflow_pages(node.size)
    least = struct.pack("<4B3I", 2, 1, 0x21, 8, 16, 16, 16)
    data = bytearray(file.read_bytes())
    data[4096 * node.overflow + 16 : 4096 * (node.overflow + 1)] = bytes(4080)
    data += bytes(-len(data) % 4096)
    for number in range(len(data) // 4096, len(data) // 4096 + 4 * count):
        data += struct.pack("<QHHI", number, 0, 4, count) + least * 255
    file.write_bytes(data)
    steps = []
    large = PageFile.large
    monkeypatch.setattr(PageFile, "large", lambda *a: steps.append(1) or large(*a))
    report = recover(broken_path, broken_path.with_name("new.kv"))
    assert report.losses
    assert 1000 < len(steps) <= 65 * (len(data) // 4096)


@pytest.mark.parametrize("which", [1, -1])
def test_a_file_cut_at_any_page_gives_what_is_left(path, which):
    with kvstore.open(path, "w") as store:  # rows in the last segment
        store.stream("s")
    file = segments(path)[which]
    data = file.read_bytes()
    counts = []
    for length in [*range(0, len(data) + 1, 4096), 100, 5000]:
        os.truncate(file, min(length, len(data)))
        _, numbers = recovered(path)
        counts.append(len(numbers))
        file.write_bytes(data)
    assert counts[-3] == BATCHES


def test_half_of_a_large_segment_gives_about_half_of_its_batches(broken_path):
    with kvstore.open(broken_path, "w") as store:
        for number in range(1500):
            store.stream("s").append(content(number))
            if number % 10 == 9:
                store.flush()
    (file,) = segments(broken_path)
    sound = broken_path.with_name("sound.kv")
    shutil.copytree(broken_path, sound)
    data = bytearray(file.read_bytes()[: file.stat().st_size // 2])
    for page in range(0, len(data), 4096):
        if b"stream:" in data[page : page + 4096]:
            data[page : page + 4096] = bytes(4096)
    file.write_bytes(data)
    target = broken_path.with_name("new.kv")
    report = recover(broken_path, target)
    assert any("definition is lost" in loss.what for loss in report.losses)
    shutil.rmtree(target)
    report = recover(broken_path, target, like=sound)
    assert report.losses
    with kvstore.open(target) as store:
        numbers = [n // ROWS for b in store["s"].read() for n in b["v"][::ROWS]]
        assert 400 < len(numbers) < 800
        check_store(target)


@pytest.mark.parametrize("kept", ["meta pages lost", "root pages lost", "tables lost"])
def test_without_lmdbs_tree_the_pages_themselves_are_searched(path, kept):
    file = segments(path)[1]
    data = bytearray(file.read_bytes())
    if kept == "meta pages lost":
        data[:8192] = bytes(8192)
    else:
        with lmdb.open(str(file), subdir=False, lock=False, readonly=True, max_dbs=4) as env:
            dbs = [env.open_db(name, create=False) for name in TABLES]
            assert len(dbs) == 4
        for page in range(2, len(data) // 4096):
            flags = int.from_bytes(data[page * 4096 + 10 : page * 4096 + 12], "little")
            holds_tables = data.find(b"blocks", page * 4096, page * 4096 + 4096) >= 0
            if flags == 1 or (kept == "tables lost" and flags == 2 and holds_tables):
                data[page * 4096 : page * 4096 + 16] = bytes(16)
    file.write_bytes(data)
    _, numbers = recovered(path)
    assert numbers == list(range(BATCHES))


def test_blocks_are_found_without_the_pages_that_point_to_them(path):
    """Large values are known by their checksums in the index."""
    file = segments(path)[1]
    data = bytearray(file.read_bytes())
    wiped = 0
    for start_ in range(8192, len(data), 4096):
        page = data[start_ : start_ + 4096]
        flags, lower = (int.from_bytes(page[a : a + 2], "little") for a in (10, 12))
        if flags == 2 and lower > 16:
            node = int.from_bytes(page[16:18], "little")
            if int.from_bytes(page[node + 6 : node + 8], "little") == 23:
                data[start_ : start_ + 4096] = bytes(4096)
                wiped += 1
    assert wiped
    file.write_bytes(data)
    report, numbers = recovered(path)
    assert len(numbers) >= BATCHES - len(report.losses)
    assert len(numbers) >= BATCHES // 2


def test_missing_foreign_and_renamed_segments(path):
    file = segments(path)[1]
    data = file.read_bytes()
    file.unlink()
    report, numbers = recovered(path)
    assert 0 < len(numbers) < BATCHES
    assert {loss.what for loss in report.losses} == {"the segment is missing"}
    shutil.copy(segments(path)[0], file)
    report, again = recovered(path)
    assert again == numbers
    assert any("holds segment 1" in loss.what for loss in report.losses)
    file.write_bytes(data)
    (path / "store.msgpack").unlink()
    report, numbers = recovered(path)
    assert numbers == list(range(BATCHES))
    assert report.losses == ()


def test_segments_that_were_swapped_are_told_apart_by_what_they_say(path):
    first, second = segments(path)[:2]
    first.rename(path / "aside")
    second.rename(first)
    (path / "aside").rename(second)
    assert {each.segment for each in verify(path).damages} == {1, 2}
    report, numbers = recovered(path)
    assert sorted(numbers) == list(range(BATCHES))
    assert report.losses == ()


def flips(path, count):
    files = [*segments(path), path / "store.msgpack"]
    for seed in range(SEED, SEED + count):
        choose = random.Random(seed)
        file = choose.choice(files)
        data = file.read_bytes()
        for _ in range(choose.choice([1, 1, 5])):
            place = choose.randrange(len(data))
            if choose.random() < 0.6:
                place = min(place // 4096 * 4096 + choose.randrange(80), len(data) - 1)
            flip(file, place)
        recovered(path)
        file.write_bytes(data)


def test_flips_anywhere_lose_little_and_nothing_silently(path):
    flips(path, 40)


@pytest.mark.slow
def test_many_flips_anywhere(path):
    flips(path, 400)


def test_nothing_is_overwritten_and_a_writer_is_waited_for(path, tmp_path):
    with pytest.raises(StoreError, match="there already"):
        recover(path, tmp_path)
    with pytest.raises(kvstore.StoreNotFound):
        recover(tmp_path, tmp_path / "new")
    with kvstore.open(path, "w"), pytest.raises(kvstore.StoreLocked):
        recover(path, path.with_name("new.kv"))
    assert not path.with_name("new.kv").exists()


def test_settings_pins_gaps_and_marks_come_along_and_losses_are_gaps(path):
    with kvstore.open(path, "w", segment_bytes=64 << 10) as store:
        store.drop(2, unit="s")
        store.pin(3, 5, "door", unit="s")
        store.note_gap("rejected", start_ns=1, stop_ns=2, rows=7, detail="bad packets")
        store.set(max_bytes=900_000_000, gap_after_s=5.0)
        before = store.gaps()
    number, block = block_of(segments(path)[1], "large")
    flip_value(segments(path)[1], block)
    target = path.with_name("new.kv")
    (loss,) = recover(path, target).losses
    with kvstore.open(path) as old, kvstore.open(target) as new:
        assert new.settings == old.settings
        assert [pin[1:4] for pin in new.pins()] == [pin[1:4] for pin in old.pins()]
        gaps = new.gaps()
        assert {gap[:5] for gap in before if gap.kind != "unclean_stop"} <= {g[:5] for g in gaps}
        (gap,) = [gap for gap in gaps if gap.kind == "damaged"]
        assert (gap.start_ns, gap.stream, gap.rows) == (number * 10**9, "s", loss.rows)
        assert not [gap for gap in gaps if gap.kind.startswith("clock")]


def test_limits_that_come_along_drop_nothing_of_what_was_recovered(path):
    with kvstore.open(path, "w", segment_bytes=64 << 10) as store:
        for number in range(BATCHES, 100):
            store.stream("s").append(content(number))
            store.flush()
        rows = len(store["s"])
        limit = sum(file.stat().st_size for file in segments(path)) * 2
        store.set(max_bytes=limit)
    target = path.with_name("new.kv")
    assert recover(path, target).losses == ()
    with kvstore.open(target) as store:
        assert len(store["s"]) == rows
        assert store.settings.max_bytes == limit
    with kvstore.open(target, "w") as store:
        assert len(store["s"]) == rows


def test_the_new_store_does_not_go_into_the_old_one(path):
    before = files_of(path)
    for inside in (path / "new.kv", path / "segments" / "new.kv"):
        with pytest.raises(StoreError, match="inside of the damaged store"):
            recover(path, inside)
    assert files_of(path) == before


def test_two_recoveries_to_one_place_do_not_mix(path):
    target = path.with_name("new.kv")
    with locked_folder(target.with_name(".new.kv.recovering")) as _, pytest.raises(StoreLocked):
        recover(path, target)
    assert recovered(path)[1] == list(range(BATCHES))


def test_a_writer_that_begins_meanwhile_is_told(path):
    def write(done, total):
        kvstore.open(path, "w").close()

    report = recover(path, path.with_name("new.kv"), on_progress=write)
    assert [loss.what for loss in report.losses] == [
        "a process began to write to the store meanwhile"
    ]


def test_definitions_of_another_store_do_not_get_in_the_way(path):
    """A store given with like= may call its streams otherwise."""
    other = path.with_name("other.kv")
    with kvstore.open(other, "w") as store:
        for name in ("third", "other", "s"):
            store.stream(name, time="when").append({"when": [1.0], "x": [1]})
            store.flush()
    report = recover(path, path.with_name("new.kv"), like=other)
    assert (report.rows, report.losses) == (BATCHES * (ROWS + 1), ())


@pytest.mark.parametrize("kills", [6, pytest.param(15, marks=pytest.mark.slow)])
def test_a_killed_recovery_leaves_no_store_and_can_be_run_again(path, kills):
    target = path.with_name("new.kv")
    code = """
        import sys
        from kvstore.recover import recover
        print("begun", flush=True)
        recover(sys.argv[1], sys.argv[2])
    """
    before = files_of(path)
    for _ in range(kills):
        with start(code, path, target) as child:
            child.stdout.readline()
            time.sleep(random.uniform(0, 0.15))
            child.kill()
        if target.exists():
            check_store(target)
            with kvstore.open(target) as store:
                assert len(store["s"]) == BATCHES * ROWS
            shutil.rmtree(target)
    assert files_of(path) == before
    assert recovered(path)[1] == list(range(BATCHES))
    assert [each.name for each in path.parent.iterdir() if "recovering" in each.name] == []


def test_a_full_disk_leaves_no_store(broken_path, tmp_path):
    if os.geteuid() != 0 or mounted("tmpfs", tmp_path):
        pytest.skip("needs root: mounts a volume")
    try:
        with kvstore.open(broken_path, "w") as store:
            for k in range(30):
                noise = np.random.default_rng(k).bytes(1 << 20)
                x = np.frombuffer(noise, "u1").reshape(1024, 1024)
                store.stream("s").append({"time": np.arange(1024.0) + k, "x": x})
        with pytest.raises(DiskFull):
            recover(broken_path, tmp_path / "new.kv")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_command_reports_losses_and_exits_with_3(path):
    assert command("recover", path, "-o", path.with_name("a.kv")).returncode == 0
    _, block = block_of(segments(path)[1], "large")
    flip_value(segments(path)[1], block)
    done = command("recover", path, "-o", path.with_name("b.kv"))
    assert done.returncode == 3
    assert "field 'noise', 50 rows" in done.stderr
    assert "562 rows" in done.stdout
    assert command("recover", path, "-o", path.with_name("b.kv")).returncode == 1
