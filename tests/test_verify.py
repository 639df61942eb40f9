"""verify: sound stores pass, every flipped bit that matters is found, nothing kills it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import lmdb
import numpy as np
import pytest
from stores import ROOT, SEED, start
from test_damage import BATCHES, ROWS, block_of, content, first_batch, flip, flip_value, segments
from test_disk_full import ballast, mounted

import kvstore
from kvstore import codec, verify
from kvstore.environment import TABLES
from kvstore.pages import PageFile


@pytest.fixture
def path(broken_path):
    """A closed store of BATCHES batches, one second each, in several segments."""
    with kvstore.open(broken_path, "w", segment_bytes=64 << 10) as store:
        for number in range(BATCHES):
            store.stream("s").append(content(number), marks={"number": number})
            store.stream("other").append({"time": [float(number)], "v": [number]})
            store.flush()
    assert len(segments(broken_path)) > 3
    return broken_path


def files_of(path):
    return {each: each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


def damages(path, **options):
    return verify(path, **options).damages


def edited(file, table, change):
    """Change a table of a segment through LMDB itself: its pages stay sound."""
    with lmdb.open(str(file), subdir=False, lock=False, max_dbs=len(TABLES)) as env:
        db = env.open_db(table)
        with env.begin(write=True, db=db) as txn:
            change(txn)


# ---- sound stores ----


def test_a_sound_store_passes_and_not_a_byte_of_it_changes(path):
    before = files_of(path.parent)
    report = verify(path)
    assert report.damages == ()
    assert (report.segments, report.skipped) == (len(segments(path)), 0)
    assert report.rows == BATCHES * (ROWS + 1)
    assert report.bytes == sum(file.stat().st_size for file in segments(path))
    assert files_of(path.parent) == before


def test_the_golden_stores_pass():
    for store in (ROOT / "tests/golden/stores").glob("*/"):
        if store.is_dir():
            assert damages(store) == ()


def test_a_store_that_is_being_written_passes(path):
    with kvstore.open(path, "w", segment_bytes=256 << 10, flush_interval_s=0.001) as store:
        for round_ in range(5):
            for number in range(20):
                store.stream("s").append(content(number + 20 * round_))
            assert damages(path) == ()
    assert damages(path) == ()


def test_a_store_passes_while_another_process_writes_and_rolls(path):
    code = """
        import sys, numpy as np, kvstore
        limits = kvstore.Settings(max_bytes=32 << 20)  # else it outgrows its checks
        with kvstore.open(
            sys.argv[1], "w", segment_bytes=1 << 18, flush_interval_s=0.001, settings=limits
        ) as store:
            print("writing", flush=True)
            k = 0
            while True:
                store.stream("s2").append({"time": np.arange(50.0) + k, "x": np.ones((50, 99))})
                k += 1
    """
    with start(code, path) as child:
        child.stdout.readline()
        for _ in range(5):
            assert damages(path) == ()
        child.kill()
    assert damages(path) == ()


def test_all_kinds_of_fields_and_added_ones_pass(broken_path):
    with kvstore.open(broken_path, "w") as store:
        for unit in ("s", "ms", "us", "ns"):
            times = np.array([3, 1, 2], f"M8[{unit}]")
            store.stream(unit).append({"time": times, "b": [True, False, True]})
        wide = store.stream("wide")
        wide.append({"time": np.array([-(2.0**33), 2.0**33]), "x": np.ones((2, 3, 0))})
        wide.add_fields(kvstore.Field("late", "float32"))
        wide.append({"time": [1.0], "x": np.ones((1, 3, 0)), "late": [2.0]})
        store.stream("ints").append({"time": np.arange(9), "t": np.array(["é"] * 9, object)})
        store.flush()
        assert damages(broken_path) == ()
    assert damages(broken_path) == ()


# ---- damage ----


@pytest.mark.parametrize(("kind", "field"), [("large", "noise"), ("text", "text")])
def test_a_damaged_block_is_named(path, kind, field):
    number, block = block_of(segments(path)[1], kind)
    flip_value(segments(path)[1], block)
    (found,) = damages(path)
    assert (found.segment, found.stream, found.field, found.rows) == (2, "s", field, ROWS)
    assert found.start == f"1970-01-01T00:00:{number:02}+00:00"
    assert found.stop == f"1970-01-01T00:00:{number:02}.980000+00:00"
    assert "checksum" in found.what


def test_a_damaged_index_record_is_named_once(path):
    _, value = first_batch(segments(path)[1])
    flip_value(segments(path)[1], value)
    (found,) = damages(path)
    assert (found.segment, found.stream) == (2, "s")
    assert "its index record" in found.what


def drop_block(txn):
    key = next(key for key, _ in txn.cursor())
    txn.delete(key)


def drop_record(txn):
    key = next(key for key, _ in txn.cursor() if key[:4] == b"\0\0\0\1")
    txn.delete(key)


def drop_order(txn):
    drop_record(txn)


def swap_order(txn):
    (a, x), (b, y), *_ = txn.cursor()
    txn.put(a, y)
    txn.put(b, x)


def wrong_totals(txn):
    key = b"total:\0\0\0\1"
    rows, *rest = codec.unpacked(txn.get(key), "")
    txn.put(key, codec.packed([rows + 1, *rest]))


EDITS = {
    "a missing block": (b"blocks", drop_block, "its block is missing"),
    "a block without record": (b"index", drop_record, "blocks without an index entry"),
    "a missing record": (b"index", drop_record, "totals say"),
    "a record out of order": (b"index", drop_record, "the index lacks the batches"),
    "a missing place in the order": (b"order", drop_order, "order and index differ"),
    "a wrong place in the order": (b"order", swap_order, "order and index differ"),
    "wrong totals": (b"meta", wrong_totals, "totals say"),
    "wrong totals of a sealed one": (b"meta", wrong_totals, "later segments know"),
}


@pytest.mark.parametrize("name", EDITS)
def test_tables_that_disagree_are_found(path, name):
    table, change, what = EDITS[name]
    edited(segments(path)[1], table, change)
    found = damages(path)
    assert any(what in each.what for each in found), found
    assert {each.segment for each in found} == {2}


def test_missing_longer_and_foreign_segments_are_found(path):
    lost = segments(path)[1]
    data = lost.read_bytes()
    lost.unlink()
    (found,) = damages(path)
    assert (found.segment, found.what) == (2, "the segment is missing")
    lost.write_bytes(data + bytes(4096))
    assert any("bytes, expected" in each.what for each in damages(path))
    shutil.copy(segments(path)[0], lost)
    assert any("holds segment 1" in each.what for each in damages(path))
    lost.write_bytes(data)
    assert damages(path) == ()


def test_every_truncation_is_found_and_kills_nothing(path):
    for file in (segments(path)[1], segments(path)[-1]):
        data = file.read_bytes()
        for length in [*range(0, len(data), 4096), 15, 100, 5000]:
            os.truncate(file, min(length, len(data)))
            found = damages(path)
            assert [each for each in found if each.segment == int(file.stem)], length
            file.write_bytes(data)


@pytest.mark.parametrize(
    ("place", "bit", "what"),
    [(89, 4, "table list of tables: has pages of"), (136, 1, "is in use, behind the last one")],
)
def test_what_lmdb_refuses_in_a_meta_page_is_found(path, place, bit, what):
    """Found by flipping every bit of the newest meta page: LMDB refuses, where we saw nothing."""
    file = segments(path)[1]
    data = bytearray(file.read_bytes())
    newest = max((0, 4096), key=lambda start: int.from_bytes(data[start + 144 :][:8], "little"))
    data[newest + place] ^= 1 << bit
    file.write_bytes(data)
    assert any(what in each.what for each in damages(path))


def is_harmless(path):
    """Whether a store reads to the last value through LMDB, as if nothing were damaged."""
    with kvstore.open(path) as store:
        batches = list(store["s"].read())
        assert store["other"].count() == BATCHES
    for number, batch in enumerate(batches):
        assert all(np.array_equal(batch[name], value) for name, value in content(number).items())
    return len(batches) == BATCHES


def flips(path, count):
    files = [*segments(path), path / "store.msgpack"]
    passed = 0
    for seed in range(SEED, SEED + count):
        choose = random.Random(seed)
        file = choose.choice(files)
        data = file.read_bytes()
        place = choose.randrange(len(data))
        if choose.random() < 0.6:  # where LMDB's structure is
            place = min(place // 4096 * 4096 + choose.randrange(80), len(data) - 1)
        flip(file, place)
        found = damages(path)
        if not found:
            assert is_harmless(path), f"{seed=} {file} {place}"
            passed += 1
        file.write_bytes(data)
    return passed


def test_flips_anywhere_are_found_or_harmless(path):
    assert flips(path, 150) < 130


@pytest.mark.slow
def test_many_flips_anywhere_are_found_or_harmless(path):
    flips(path, 1000)


def test_damage_in_a_segment_that_is_being_written_is_found(path):
    with kvstore.open(path, "w", segment_bytes=1 << 30) as store:
        store.stream("s").append(content(BATCHES))
    _, block = block_of(segments(path)[-1], "large")
    flip_value(segments(path)[-1], block)
    with kvstore.open(path, "w", segment_bytes=1 << 30):
        (found,) = damages(path)
    assert (found.stream, found.field) == ("s", "noise")


def test_no_store_and_a_newer_one_are_errors(path, tmp_path):
    with pytest.raises(kvstore.StoreNotFound):
        verify(tmp_path)
    _, *rest = codec.unpacked((path / "store.msgpack").read_bytes(), "")
    (path / "store.msgpack").write_bytes(codec.packed([3, *rest]))
    with pytest.raises(kvstore.StoreFormatError, match="version 3"):
        verify(path)


def test_a_damaged_key_of_a_meta_record_is_found(path):
    """Keys carry no checksum of their own."""

    def rename(txn):
        txn.put(b"cnmmit", txn.pop(b"commit"))

    edited(segments(path)[-1], b"meta", rename)
    whats = [each.what for each in damages(path)]
    assert any("cnmmit" in what for what in whats)
    assert any("no time of a last commit" in what for what in whats)


def test_a_summary_that_has_gone_is_found(path):
    """Without it, a segment and its rows would quietly count as dropped."""
    edited(segments(path)[-1], b"meta", lambda txn: txn.delete(b"sealed:" + bytes(7) + b"\2"))
    assert any("batches, expected" in each.what for each in damages(path))


def test_definitions_that_contradict_each_other_are_found(path):
    def rename(txn):
        key = b"stream:\0\0\0\1"
        name, *rest = codec.unpacked(txn.get(key), "")
        rest[-1][1][3] = "kelvin"
        txn.put(key, codec.packed([name, *rest]))

    edited(segments(path)[1], b"meta", rename)
    (found,) = [each for each in damages(path) if "bytes, expected" not in each.what]
    assert (found.segment, found.stream) == (2, "s")
    assert "its definition of the stream" in found.what


def test_segments_that_retention_drops_meanwhile_are_not_missed(path):
    with kvstore.open(path, "w", segment_bytes=64 << 10) as store:
        dropped = []

        def drop(done, total):
            if not dropped:
                count = len(segments(path))
                dropped.append(store.drop(6, unit="s")["segments"])
                while len(segments(path)) > count - dropped[0] + 1:
                    time.sleep(0.01)  # they are removed in the background

        assert damages(path, on_progress=drop) == ()
        assert dropped[0] > 1
        assert damages(path) == ()
    assert damages(path) == ()


def test_what_is_verified_while_writing_ends_with_one_commit(broken_path):
    """A reader's transaction holds it, however many come meanwhile."""
    with kvstore.open(broken_path, "w") as store:
        count = [0]

        def write_on(*_):
            store.stream("s").append(content(count[0]))
            store.flush()
            count[0] += 1

        for _ in range(30):
            write_on()
        report = verify(broken_path, on_progress=write_on)
        assert report.damages == ()
        assert count[0] > 60
        assert report.rows == 30 * ROWS
        assert damages(broken_path) == ()


def test_commits_that_come_before_it_has_looked_are_waited_out(broken_path, monkeypatch):
    """The third commit after the one that is held writes over its meta page."""
    opened = PageFile._meta_of
    late = []

    def meta_of(file, txn_id):
        if len(late) < 2:
            late.append(txn_id)
            for number in range(3):
                store.stream("s").append(content(number))
                store.flush()
        return opened(file, txn_id)

    with kvstore.open(broken_path, "w") as store:
        store.stream("s").append(content(0))
        store.flush()
        monkeypatch.setattr(PageFile, "_meta_of", meta_of)
        assert damages(broken_path) == ()
        assert len(late) == 2


# ---- recorded ----


def test_damages_are_recorded_as_gaps_each_once(path):
    number, block = block_of(segments(path)[1], "large")
    flip_value(segments(path)[1], block)
    lost = segments(path)[2]
    lost.unlink()
    found = damages(path)
    assert kvstore.record_damages(path, found) == 3  # a batch, and of a segment both streams
    assert kvstore.record_damages(path, found) == 0
    with kvstore.open(path) as store:
        gaps = [gap for gap in store.gaps() if gap.kind == "damaged"]
    assert {gap.stream for gap in gaps} == {"s", "other"}
    (gap,) = [gap for gap in gaps if "noise" in gap.detail]
    assert (gap.start_ns, gap.rows) == (number * 10**9, ROWS)
    assert any("the segment is missing" in gap.detail for gap in gaps)


def test_damage_is_recorded_beside_a_writer_and_without(path):
    _, block = block_of(segments(path)[1], "large")
    flip_value(segments(path)[1], block)
    with kvstore.open(path, "w") as store:
        done = command("verify", path, "--record")
        assert (done.returncode, "1 new gaps recorded" in done.stderr) == (3, True)
        assert [gap.kind for gap in store.gaps()] == ["damaged"]
    done = command("verify", path, "--record")
    assert (done.returncode, "0 new gaps recorded" in done.stderr) == (3, True)
    assert "field 'noise'" in done.stderr
    assert "damaged" in command("gaps", path).stdout


# ---- since the last run, at a rate ----


def test_since_last_looks_only_at_what_changed(path):
    count = len(segments(path))
    note = path.with_name(path.name + ".verified")
    assert verify(path, since_last=True).skipped == 0
    assert note.exists()
    again = verify(path, since_last=True)
    assert (again.segments, again.skipped) == (1, count - 1)
    flip(segments(path)[1], 9000)
    again = verify(path, since_last=True)
    assert (again.segments, again.skipped) == (2, count - 2)
    flip(note, 10)
    assert verify(path, since_last=True).skipped == 0


def test_a_damaged_segment_is_looked_at_again(path):
    _, block = block_of(segments(path)[1], "large")
    flip_value(segments(path)[1], block)
    for _ in range(2):
        assert len(damages(path, since_last=True)) == 1


def test_an_interrupted_run_is_resumed(path):
    state = path.with_name("elsewhere")

    def stop(done, total):
        if state.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(path, since_last=True, state_path=state, on_progress=stop)
    assert verify(path, since_last=True, state_path=state).skipped == 1


@pytest.mark.slow
def test_a_killed_run_is_resumed(path):
    code = """
        import sys
        from kvstore.verify import verify
        print("begun", flush=True)
        while True:
            verify(sys.argv[1], since_last=True, rate_bytes_s=1e6)
    """
    before = files_of(path)
    for _ in range(5):
        with start(code, path) as child:
            child.stdout.readline()
            time.sleep(random.uniform(0, 0.2))
            child.kill()
        assert damages(path, since_last=True) == ()
        assert files_of(path) == before


def test_a_segment_put_back_is_looked_at_again(path):
    """A copy keeps size and times, and may be damaged all the same."""
    verify(path, since_last=True)
    file = segments(path)[1]
    shutil.copy2(file, file.with_suffix(".copy"))
    file.with_suffix(".copy").replace(file)
    assert verify(path, since_last=True).segments == 2


def test_a_full_disk_costs_the_memory_of_it_and_not_the_report(path, tmp_path):
    if os.geteuid() != 0 or mounted("tmpfs", tmp_path):
        pytest.skip("needs root: mounts a volume")
    try:
        _, block = block_of(segments(path)[1], "large")
        flip_value(segments(path)[1], block)
        with ballast(tmp_path, leaving=0):
            done = command("verify", path, "--since-last", "--state", tmp_path / "state")
            assert done.returncode == 3
            assert "field 'noise'" in done.stderr
            assert "cannot be remembered" in done.stderr
            assert [each.name for each in tmp_path.iterdir()] == ["ballast"]
        assert verify(path, since_last=True, state_path=tmp_path / "state").notes == ()
        assert verify(path, since_last=True, state_path=tmp_path / "state").skipped > 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
def test_the_rate_is_kept(path):
    size = sum(file.stat().st_size for file in segments(path))
    begun = time.monotonic()
    verify(path, rate_bytes_s=size / 4)
    assert time.monotonic() - begun > 0.8  # of what is read: free pages are not


def test_progress_rises_to_the_whole(path):
    told = []
    verify(path, on_progress=lambda done, total: told.append((done, total)))
    size = sum(file.stat().st_size for file in segments(path))
    assert told == sorted(told)
    assert told[-1] == (size, size)


# ---- the command ----


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "kvstore", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_the_command_says_what_is_wrong_and_exits_with_3(path):
    sound = command("verify", path)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert "sound; 612 rows" in sound.stdout
    _, block = block_of(segments(path)[1], "large")
    flip_value(segments(path)[1], block)
    broken = command("verify", path, "--rate", "100MB/s", "--since-last", "--state", path / "n")
    assert broken.returncode == 3
    assert "segment 2, stream 's', field 'noise', 50 rows, from 1970-01-01T" in broken.stderr
    listed = command("verify", path, "--json")
    assert listed.returncode == 3
    assert json.loads(listed.stdout)["damages"][0]["field"] == "noise"


def test_wrong_usage_exits_with_2(path):
    assert command("verify", path, "--rate", "0").returncode == 2
    assert command("verify", path, "--state", "x").returncode == 2
    assert command("verify", path / "nothing").returncode == 1


def test_a_signal_stops_the_command(path):
    code = "import sys; from kvstore.cli import main; sys.argv[0] = 'kvstore'; main()"
    with start(code, "verify", path, "--rate", "10kB/s", stderr=subprocess.PIPE) as child:
        deadline = time.monotonic() + 120
        while not any(name.endswith(".mdb") for name in files_open_in(child.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=180) == 128 + signal.SIGTERM


def files_open_in(pid):
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed just now
            yield str(link.readlink())
