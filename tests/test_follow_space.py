"""A follower holds no space and no wrong file: dropped segments, a store made anew, a backup."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from stores import ROOT, run, start
from test_follow import (
    BATCH_ROWS,
    append,
    batch_of,
    command,
    drained,
    filled,
    number_of,
    numbers_of,
    segments_of,
)

import kvstore
from kvstore import Cursor, CursorError, StoreFormatError
from kvstore.backup import backup

WRITE = """
    import sys
    sys.path.insert(0, sys.argv[1] + "/tests")
    from test_follow import append
    import kvstore
    with kvstore.open(sys.argv[2], "w", segment_bytes=64 << 10) as store:
        append(store, range(*map(int, sys.argv[3:])))
"""


def written(path, first, stop):
    """By a process of its own: what a writer has open is not the follower's doing."""
    run(WRITE, ROOT, path, first, stop)


def deleted_but_open(pid="self"):
    """Segments that were removed and whose space that process still holds."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[5] for line in lines if line.endswith(".mdb (deleted)")}


def drop_sealed(path):
    for file in segments_of(path)[:-1]:
        file.unlink()


@pytest.mark.slow
def test_a_caller_that_sits_on_a_batch_holds_at_most_the_segment_it_came_from(broken_path):
    written(broken_path, 0, 3)
    with kvstore.open(broken_path) as store:
        idle = []
        follower = store["s"].follow(
            on_gap=lambda _: None, stop=lambda: bool(idle), sleep=idle.append
        )
        batches = iter(follower)
        next(batches)
        for turn in range(2):
            written(broken_path, 3 + 40 * turn, 43 + 40 * turn)
            store.state()
            assert len(store._segments) == 1, "only the active one stays open"
        drop_sealed(broken_path)
        assert len(deleted_but_open()) <= 1
        list(batches)
        assert deleted_but_open() == set()


@pytest.mark.slow
def test_the_command_lets_go_of_dropped_segments_while_its_reader_is_stuck(broken_path):
    written(broken_path, 0, 350)
    with command("read", broken_path, "--follow") as child:
        child.stdout.read(4)  # it has begun; 1.5 MB do not fit into the pipe
        time.sleep(0.2)
        written(broken_path, 350, 390)
        drop_sealed(broken_path)
        deadline = time.monotonic() + 120
        while deleted_but_open(child.pid):
            assert time.monotonic() < deadline, "still held"
            time.sleep(0.05)
        assert child.poll() is None
        child.kill()


# ---- retention ----

KEPT_BYTES = 2 << 20  # of the store under its limit; a batch is 4 kB
LIMITED = """
    import sys
    sys.path.insert(0, sys.argv[1] + "/tests")
    from test_follow import append
    import kvstore
    settings = kvstore.Settings(max_bytes=int(sys.argv[3]))
    with kvstore.open(sys.argv[2], "w", segment_bytes=256 << 10, settings=settings) as store:
        append(store, range(*map(int, sys.argv[4:])))
"""


@pytest.mark.slow
def test_retention_that_overtakes_a_follower_is_one_gap_with_the_right_count(path):
    run(LIMITED, ROOT, path, KEPT_BYTES, 0, 3)
    gaps = []
    with kvstore.open(path) as store:
        follower = store["s"].follow(on_gap=gaps.append)
        found = numbers_of([next(iter(follower))])
        run(LIMITED, ROOT, path, KEPT_BYTES, 3, 700)  # while its caller sits on the batch
        (dropped,) = [gap for gap in store.gaps() if gap.kind == "dropped"]
        found += numbers_of(drained(store["s"], follower.cursor, on_gap=gaps.append))
        (gap,) = gaps
        assert gap.stop == dropped.occurrences, "the store counts the same batches"
        assert sorted([*found, *range(gap.first, gap.stop)]) == list(range(700))
        assert f"{gap.stop - gap.first} batches" in str(gap)
        assert deleted_but_open() == set()


@pytest.mark.slow
def test_a_follower_beside_a_writer_under_its_limit_accounts_for_every_batch(path):
    """Slow at times: some is dropped under its hands, in whatever state of its work."""
    kvstore.open(path, "w").close()
    seen = []

    def gone(gap):
        seen.extend([None] * (gap.stop - gap.first))

    with start(LIMITED, ROOT, path, KEPT_BYTES, 0, 1500) as writer, kvstore.open(path) as store:
        while "s" not in store:
            time.sleep(0.01)
        for each in store["s"].follow(stop=lambda: len(seen) == 1500, on_gap=gone):
            assert number_of(each.batch) == len(seen), "lost, or twice"
            seen.append(number_of(each.batch))
            if len(seen) % 300 == 1:
                time.sleep(0.3)
        assert deleted_but_open() == set()
        assert writer.wait(180) == 0


def test_the_command_reports_the_gap_once_and_exits_with_3(path, tmp_path):
    run(LIMITED, ROOT, path, KEPT_BYTES, 0, 3)
    kept = tmp_path / "cursor"
    arguments = ["read", path, "--follow", "--cursor-file", kept, "--fields", "v"]
    with command(*arguments, "--format", "csv") as child:
        for _ in range(1 + 3 * BATCH_ROWS):  # what is still in the pipe is not handed over
            child.stdout.readline()
        wait_for(lambda: kept.exists() and Cursor.parse(kept.read_text()).sequence == 3)
        child.terminate()
        child.communicate(timeout=180)
        assert child.returncode == 0
    run(LIMITED, ROOT, path, KEPT_BYTES, 3, 60)
    kvstore.drop(path, before="2001-01-01")  # all there is: no batch comes behind the gap
    with command(*arguments, stdout=subprocess.DEVNULL) as child:
        wait_for(lambda: Cursor.parse(kept.read_text()).sequence == 60)
        child.terminate()
        err = child.stderr.read().decode()
    assert child.returncode == 3
    assert err.count("\n") == 1
    assert "57 batches, 3 to 59 by sequence, are not in the store any more: dropped" in err


def wait_for(is_so):
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- other files under its name ----


def test_a_store_made_anew_under_a_follower_is_said_not_waited_on(broken_path):
    written(broken_path, 0, 3)
    with kvstore.open(broken_path) as store:
        follower = store["s"].follow("end", sleep=lambda _: again())

        def again():
            shutil.rmtree(broken_path)
            written(broken_path, 0, 3)

        with pytest.raises(StoreFormatError, match="a segment of the store"):
            next(iter(follower))


def test_a_backup_that_is_brought_up_to_date_can_be_followed(path, tmp_path):
    copy = tmp_path / "copy.kv"
    filled(path, 3)
    backup(path, copy)
    with kvstore.open(copy) as store:
        first = drained(store["s"])
        assert numbers_of(first) == [0, 1, 2]
        for stop in (5, 7, 60):  # without a roll, and with some
            with kvstore.open(path, "w", segment_bytes=(stop - 5) << 20 or 64 << 10) as writer:
                append(writer, range(len(writer["s"]) // 50, stop))
            backup(path, copy)
            assert numbers_of(drained(store["s"])) == list(range(stop))


def test_an_older_copy_put_in_its_place_is_said_not_waited_on(path, tmp_path):
    older = tmp_path / "older.kv"
    with kvstore.open(path, "w") as writer:
        append(writer, range(3))
    backup(path, older)
    with kvstore.open(path, "w") as writer:
        append(writer, [3])
    with kvstore.open(path) as store:

        def restore(_):
            shutil.copy(segments_of(older)[0], path / "copied")
            (path / "copied").rename(segments_of(path)[0])

        with pytest.raises(CursorError, match="restored from an older copy"):
            next(iter(store["s"].follow("end", sleep=restore)))


# ---- names ----


def test_a_cursor_file_knows_its_stream_when_others_have_come(path, tmp_path):
    kept = tmp_path / "cursor"
    with kvstore.open(path, "w") as store:
        append(store, [0], "room")
    arguments = ["read", path, "--follow", "--cursor-file", kept, "--format", "csv"]
    with command(*arguments, "--fields", "v") as child:
        assert child.stdout.readline() == b"v\n"
        child.stdout.readline()
        child.terminate()
        child.communicate(timeout=180)
    assert Cursor.parse(kept.read_text()).stream == "room"
    with kvstore.open(path, "w") as store:
        append(store, [1], "particles")
        append(store, [2], "room")
    with command(*arguments, "--fields", "v") as child:
        assert [child.stdout.readline() for _ in range(2)] == [b"v\n", b"100\n"]
        child.terminate()
        child.communicate(timeout=180)


def test_a_cursor_file_of_another_store_is_refused_and_not_waited_on(path, tmp_path):
    (tmp_path / "cursor").write_text(f"{'0' * 32}:7:elsewhere\n")
    filled(path, 1)
    arguments = ["read", path, "--follow", "--cursor-file", tmp_path / "cursor"]
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", *map(str, arguments)],
        cwd=ROOT, capture_output=True, timeout=180, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"no stream 'elsewhere'; there are: s" in done.stderr


def test_from_end_gets_all_of_a_stream_that_begins_later(path):
    kvstore.open(path, "w").close()
    arguments = ["read", path, "--follow", "--from", "end", "--format", "csv", "--fields", "v"]
    with command(*arguments, "--stream", "s") as child:
        assert child.stderr.readline() == b"Waiting for stream 's'.\n"
        filled(path, 2)
        lines = [child.stdout.readline() for _ in range(2)]
        child.terminate()
        child.communicate(timeout=180)
    assert lines == [b"v\n", b"0\n"]


# ---- fields ----


def test_a_device_without_a_newer_field_does_not_stop_its_follower(path):
    """No honest value fills a whole number: a batch without it comes without it."""
    with kvstore.open(path, "w") as store:
        append(store, [0])
        store["s"].add_fields(kvstore.Field("doors", "int8"))
        append(store, [1])  # from a device with the old firmware
        store["s"].append({**batch_of(2), "doors": np.ones(BATCH_ROWS, "i1")})
        store.flush()
        found = drained(store["s"])
        assert numbers_of(found) == [0, 1, 2]
        assert ["doors" in each.batch for each in found] == [False, False, True]
        with pytest.raises(kvstore.NoFillError, match="'doors'"):
            drained(store["s"], fields=["v", "doors"])


def test_columns_stay_when_a_field_is_added_and_packets_gain_it(path):
    filled(path, 1)
    rows = ["read", path, "--follow", "--format", "jsonl"]
    with command(*rows) as lines, command("read", path, "--follow") as packets:
        first = json.loads(lines.stdout.readline())
        with kvstore.open(path, "w") as store:
            store["s"].add_fields(kvstore.Field("doors", "int8"))
            store["s"].append({**batch_of(1), "doors": np.ones(BATCH_ROWS, "i1")})
        rest = [json.loads(lines.stdout.readline()) for _ in range(2 * BATCH_ROWS - 1)]
        assert {tuple(row) for row in [first, *rest]} == {("time", "v", "noise")}
        assert [list(packet_from(packets.stdout)) for _ in range(2)] == [
            ["time", "v", "noise"],
            ["time", "v", "noise", "doors"],
        ]
        for child in (lines, packets):
            child.terminate()
            child.communicate(timeout=180)
    with command(*rows) as late:  # its columns include one that the first batch cannot fill
        out, err = late.communicate(timeout=180)
    assert (late.returncode, out) == (1, b"")
    assert b"kvstore: field 'doors' (int8) was added later" in err


def packet_from(pipe):
    return pickle.loads(pipe.read(int.from_bytes(pipe.read(4), "big")))
