"""Following: every committed batch once, in commit order, whatever rolls, restarts or dies."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from stores import ROOT, start
from test_forks import in_child

import kvstore
from kvstore import (
    Cursor,
    CursorError,
    CursorFile,
    DamageError,
    GapError,
    StoreFormatError,
    environment,
)
from kvstore.follow import Follower, Source
from kvstore.segment import Segment

TINY = {"segment_bytes": 64 << 10}
BATCH_ROWS = 50


def batch_of(number):
    """Batch `number`: 4 kB, random, at a time that has nothing to do with its number."""
    rng = np.random.default_rng(number)
    return {
        "time": np.full(BATCH_ROWS, float(rng.integers(0, 1000))),
        "v": np.arange(number * BATCH_ROWS, (number + 1) * BATCH_ROWS),
        "noise": rng.integers(0, 2**62, (BATCH_ROWS, 10)),
    }


def append(store, numbers, name="s"):
    for number in numbers:
        store.stream(name).append(batch_of(number))
        store.flush()


def filled(path, count, **options):
    with kvstore.open(path, "w", **TINY, **options) as store:
        append(store, range(count))
    return path


def number_of(batch):
    """Which batch this is; whole, or it is none."""
    number = int(batch["v"][0]) // BATCH_ROWS
    assert np.array_equal(batch["v"], np.arange(number * BATCH_ROWS, (number + 1) * BATCH_ROWS))
    return number


def drained(stream, from_="start", **options):
    """Everything there is to follow now."""
    idle = []
    options.setdefault("sleep", idle.append)
    return list(stream.follow(from_, stop=lambda: bool(idle), **options))


def numbers_of(found):
    return [number_of(each.batch) for each in found]


def segments_of(path):
    return sorted((path / "segments").glob("*.mdb"))


# ---- order, once, restarts ----


def test_batches_come_in_commit_order_not_by_time(path):
    filled(path, 60)
    assert len(segments_of(path)) > 3
    with kvstore.open(path) as store:
        found = drained(store["s"])
        assert numbers_of(found) == list(range(60))
        assert [each.cursor.sequence for each in found] == list(range(1, 61))
        times = [each.batch["time"][0] for each in found]
        assert times != sorted(times)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_lost_or_doubled_in_any_run_of_appends_rolls_and_restarts(path, seed):
    """Two streams, writer and follower in one process; the follower restarts from its text."""
    chance = random.Random(seed)
    appended = {"s": [], "t": []}
    followed = {"s": [], "t": []}
    cursors = {"s": "", "t": ""}
    writer = kvstore.open(path, "w", **TINY)
    reader = kvstore.open(path)
    for _ in range(120):
        act = chance.choice(["append", "append", "append", "follow", "some", "writer", "reader"])
        name = chance.choice(["s", "t"])
        if act == "append":
            number = len(appended["s"]) + len(appended["t"])
            append(writer, [number], name)
            appended[name].append(number)
        elif act == "writer":
            writer.close()
            writer = kvstore.open(path, "w", **TINY)
        elif act == "reader":
            reader.close()
            reader = kvstore.open(path)
        elif appended[name]:
            stream = chance.choice([reader, writer])[name]
            begin = Cursor.parse(cursors[name]) if cursors[name] else "start"
            found = some(stream, begin, 1 if act == "some" else 1000)
            followed[name] += numbers_of(found)
            if found:
                cursors[name] = str(found[-1].cursor)
            assert followed[name] == appended[name][: len(followed[name])]
            assert act == "some" or followed[name] == appended[name]
    reader.close()
    writer.close()


def some(stream, begin, count):
    idle, found = [], []
    for each in stream.follow(begin, stop=lambda: bool(idle), sleep=idle.append):
        found.append(each)
        if len(found) == count:
            break
    return found


def test_the_end_is_what_was_committed_when_follow_was_called(path):
    filled(path, 3)
    with kvstore.open(path, "w", **TINY) as store:
        idle = []
        follower = store["s"].follow("end", stop=lambda: bool(idle), sleep=idle.append)
        append(store, [3])
        assert numbers_of(follower) == [3]


def test_uncommitted_rows_are_not_delivered(path):
    with kvstore.open(path, "w", flush_interval_s=None) as store:
        store.stream("s").append(batch_of(0))
        assert drained(store["s"]) == []
        store.flush()
        assert numbers_of(drained(store["s"])) == [0]


def test_what_is_delivered_was_synced_after_it_was_seen(path, monkeypatch):
    """A commit shows before its last page is durable; a receiver elsewhere survives our power."""
    filled(path, 60)
    synced = []
    sync = os.fdatasync

    def noted(fd):
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        sync(fd)

    with kvstore.open(path) as store:
        begin = drained(store["s"])[-1].cursor
        with kvstore.open(path, "w") as writer:
            append(writer, [60])
        monkeypatch.setattr(os, "fdatasync", noted)
        assert drained(store["s"], begin)
        assert synced == [str(segments_of(path)[-1])]
        assert drained(store["s"], begin._replace(sequence=0))[0].cursor.sequence == 1
        assert set(synced) == {str(segments_of(path)[-1])}, "sealed segments are durable"


def test_fields_may_be_chosen_and_later_ones_are_filled(path):
    filled(path, 1)
    with kvstore.open(path, "w") as store:
        store["s"].add_fields(kvstore.Field("late", "int8", fill=7))
        store["s"].append({**batch_of(1), "late": np.full(BATCH_ROWS, 1, "i1")})
        store.flush()
        found = drained(store["s"], fields=["late", "v"])
        assert [list(each.batch) for each in found] == [["late", "v"]] * 2
        assert [int(each.batch["late"][0]) for each in found] == [7, 1]


def test_large_batches_are_taken_out_a_few_at_a_time(path, monkeypatch):
    monkeypatch.setattr("kvstore.follow.COPIED_BYTES_MAX", 10_000)
    filled(path, 20)
    with kvstore.open(path) as store:
        assert numbers_of(drained(store["s"])) == list(range(20))


def test_stop_is_asked_before_each_batch(path):
    filled(path, 5)
    with kvstore.open(path) as store:
        seen = []
        for each in store["s"].follow(stop=lambda: len(seen) == 2):
            seen.append(number_of(each.batch))  # noqa: PERF401  # stop looks at it meanwhile
        assert seen == [0, 1]


# ---- cursors ----


def test_a_cursor_survives_text_and_pickle():
    cursor = Cursor("00ff", "a: b:c", 12)
    assert Cursor.parse(str(cursor)) == cursor
    assert Cursor.parse(f"{cursor}\n") == cursor
    assert pickle.loads(pickle.dumps(cursor)) == cursor


@pytest.mark.parametrize(
    "text", ["", "a:1", "a:1:", "a:-1:s", "a:x:s", ":1:s", "a" * 1000, f"a:{'9' * 5000}:s"]
)
def test_other_text_is_no_cursor(text):
    with pytest.raises(CursorError, match="cannot be read"):
        Cursor.parse(text)


def test_a_cursor_of_another_place_is_refused(path, tmp_path):
    filled(path, 2)
    with kvstore.open(path, "w") as store:
        append(store, [2], "t")
        mine = drained(store["s"])[-1].cursor
        for wrong, message in [
            (mine._replace(store_id="0" * 32), "belongs to another stream"),
            (mine._replace(stream="t"), "belongs to another stream"),
            (mine._replace(sequence=3), "ahead of the store"),
            ("begin", "use 'start', 'end' or a Cursor"),
        ]:
            with pytest.raises(CursorError, match=message):
                store["s"].follow(wrong)
        assert drained(store["s"], mine) == []


def test_a_cursor_file_is_written_at_intervals_and_at_save(tmp_path):
    now = [0.0]
    kept = CursorFile(tmp_path / "cursor", clock=lambda: now[0])
    assert kept.cursor is None
    kept.note(Cursor("00", "s", 1))
    assert not (tmp_path / "cursor").exists()
    now[0] = 1.0
    kept.note(Cursor("00", "s", 2))
    kept.note(Cursor("00", "s", 3))
    assert CursorFile(tmp_path / "cursor").cursor == Cursor("00", "s", 2)
    kept.save()
    assert CursorFile(tmp_path / "cursor").cursor == Cursor("00", "s", 3)
    assert os.listdir(tmp_path) == ["cursor"]


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff\xfe"])
def test_a_cursor_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "cursor").write_bytes(content)
    with pytest.raises(CursorError, match=r"cursor: cursor .* cannot be read"):
        CursorFile(tmp_path / "cursor")


# ---- gaps and damage ----


def test_a_missing_segment_is_a_gap_and_the_rest_follows(broken_path):
    filled(broken_path, 60)
    segments_of(broken_path)[1].unlink()
    with kvstore.open(broken_path) as store:
        gaps = []
        found = numbers_of(drained(store["s"], on_gap=gaps.append))
        (gap,) = gaps
        assert sorted([*found, *range(gap.first, gap.stop)]) == list(range(60))
        assert "restore it from a backup" in str(gap)
        with pytest.raises(GapError, match=f"{gap.first} to {gap.stop - 1} by sequence"):
            drained(store["s"])
        again = pickle.loads(pickle.dumps(gap))
        assert (str(again), again.first, again.stop) == (str(gap), gap.first, gap.stop)


def source_without(store, dropped, *, from_call=0):
    """The stream as if those segments were dropped, from that look at the state on."""
    looks = []

    def state():
        looks.append(1)
        found = store.state()
        sealed = {n: s for n, s in found.sealed.items() if n not in dropped}
        return (
            pickle.loads(pickle.dumps(found)) if len(looks) <= from_call else _with(found, sealed)
        )

    return Source("s", state, store.open_segment)


def _with(state, sealed):
    copy = pickle.loads(pickle.dumps(state))
    copy.sealed = sealed
    return copy


def follower_of(source, from_, gaps):
    idle = []
    return Follower(
        source,
        from_,
        fields=None,
        poll_s=0.01,
        stop=lambda: bool(idle),
        verify=True,
        on_damage=pytest.fail,
        on_gap=gaps.append,
        sleep=idle.append,
    )


def test_a_follower_that_retention_overtook_reports_the_jump(path):
    filled(path, 60)
    with kvstore.open(path) as store:
        begin = drained(store["s"])[0].cursor
        source, gaps = source_without(store, {1, 2}), []
        found = numbers_of(follower_of(source, begin, gaps))
        (gap,) = gaps
        assert (gap.first, gap.stop) == (1, found[0])
        assert found == list(range(found[0], 60))
        # Whoever begins anew was never promised what is gone.
        assert numbers_of(follower_of(source, "start", [])) == found


def test_a_segment_dropped_under_the_followers_hands_is_a_jump_as_well(broken_path):
    filled(broken_path, 60)
    with kvstore.open(broken_path) as store:
        follower = follower_of(source_without(store, {1}, from_call=2), "start", gaps := [])
        segments_of(broken_path)[0].unlink()
        found = numbers_of(follower)
        (gap,) = gaps
        assert (gap.first, gap.stop) == (0, found[0])
        assert "dropped" in str(gap)


def test_when_everything_is_gone_the_whole_is_a_gap(path):
    filled(path, 30)
    with kvstore.open(path, "w", **TINY) as store:
        state = store.state()
        empty = _with(state, {})
        here = state.totals[1]
        empty.totals = {1: type(here)(next_sequence=here.next_sequence)}
        begin = drained(store["s"])[4].cursor
        source = Source("s", lambda: empty, store.open_segment)
        gaps = []
        list(follower_of(source, begin, gaps))
        assert gaps[-1].stop == 30


def test_a_damaged_batch_is_reported_and_passed_over(broken_path):
    filled(broken_path, 40)
    broken = batch_of(7)["noise"].tobytes()[:64]
    (file,) = [f for f in segments_of(broken_path) if broken in f.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.index(broken)] ^= 1
    file.write_bytes(data)
    with kvstore.open(broken_path) as store:
        seen = []
        found = numbers_of(drained(store["s"], on_damage=seen.append))
        assert found == [n for n in range(40) if n != 7]
        assert [str(error).count("stream 's'") for error in seen] == [1]
        assert "field 'noise'" in str(seen[0])
        with pytest.raises(DamageError):
            drained(store["s"])


@pytest.mark.parametrize(("step", "torn"), [("fetch", DamageError), ("arrivals", StoreFormatError)])
def test_what_looks_damaged_while_a_writer_begins_is_looked_at_twice(path, monkeypatch, step, torn):
    """Read without a lock file: the writer has written over what the transaction showed."""
    filled(path, 1)
    sound, looks = getattr(Segment, step), []

    def torn_once(self, *args, **options):
        looks.append(1)
        if len(looks) == 1:
            raise torn("torn")
        return sound(self, *args, **options)

    monkeypatch.setattr(Segment, step, torn_once)
    with kvstore.open(path) as store:
        assert numbers_of(drained(store["s"])) == [0]


def test_a_hundred_streams_are_followed_at_once(path):
    """Each by a thread, over rolls; every batch of every stream once, in order."""
    count, batches = 100, 6
    seen = {f"s{n}": [] for n in range(count)}

    def follow(name):
        for each in reader[name].follow(poll_s=0.1, stop=lambda: len(seen[name]) == batches):
            seen[name].append(number_of(each.batch))

    with kvstore.open(path, "w", flush_interval_s=None, **TINY) as store:
        for name in seen:
            store.stream(name).append(batch_of(0))
        store.flush()
        with kvstore.open(path) as reader:
            threads = [threading.Thread(target=follow, args=[name]) for name in seen]
            for thread in threads:
                thread.start()
            for number in range(1, batches):
                for name in seen:
                    store.stream(name).append(batch_of(number))
                store.flush()
            for thread in threads:
                thread.join(180)
    assert set(map(tuple, seen.values())) == {tuple(range(batches))}


def test_one_sync_serves_all_who_follow(path, monkeypatch):
    synced, sync = [], os.fdatasync
    with kvstore.open(path, "w") as store:
        append(store, [0], "s")
        append(store, [1], "t")
        monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(fd) or sync(fd))
        for name in ("s", "t", "s"):
            drained(store[name])
        assert len(synced) == 1
        append(store, [2], "s")
        drained(store["s"])
    assert len(synced) == 2


def test_a_follower_is_refused_in_a_forked_child_and_goes_on_in_its_parent(path):
    filled(path, 3)
    with kvstore.open(path) as store:
        batches = iter(store["s"].follow())
        assert number_of(next(batches).batch) == 0

        def child():
            with pytest.raises(kvstore.StoreClosed, match="forked"):
                store["s"].follow()
            with pytest.raises(kvstore.StoreClosed, match="forked"):
                list(batches)

        assert in_child(child) == 0
        assert [number_of(next(batches).batch) for _ in range(2)] == [1, 2]


def test_a_waiting_follower_holds_no_file_but_the_active_segment(path):
    filled(path, 60)
    with kvstore.open(path) as store:
        opened = []

        def look(_):
            opened.extend(e.path for e in environment._opened.values() if path in e.path.parents)

        follower = store["s"].follow(stop=lambda: bool(opened), sleep=look)
        for _ in follower:
            users = [e._users for e in environment._opened.values() if path in e.path.parents]
            assert not any(users), "a transaction is open while the caller works"
            assert len(users) == 1, "a sealed segment is open while the caller works"
        assert opened == [segments_of(path)[-1]]


def test_a_reader_that_slept_past_many_rolls_and_drops_finds_the_active_segment(broken_path):
    filled(broken_path, 3)
    with kvstore.open(broken_path) as store:
        assert len(drained(store["s"])) == 3
        filled_more = kvstore.open(broken_path, "w", **TINY)
        append(filled_more, range(3, 60))
        filled_more.close()
        for file in segments_of(broken_path)[:-1]:
            file.unlink()
        gaps = []
        found = numbers_of(drained(store["s"], on_gap=gaps.append))
        assert gaps[-1].first > 3
        gone = [n for gap in gaps for n in range(gap.first, gap.stop)]
        assert sorted([*found, *gone]) == list(range(60))


# ---- processes ----

WRITER = """
    import sys, time
    import numpy as np
    import kvstore
    sys.path.insert(0, sys.argv[1] + "/tests")
    from test_follow import append
    path, first, stop, pause = sys.argv[2], *map(int, sys.argv[3:6])
    with kvstore.open(path, "w", segment_bytes=64 << 10) as store:
        for number in range(first, stop):
            append(store, [number])
            time.sleep(pause / 1000)
    print("done", flush=True)
"""

FOLLOWER = """
    import sys
    import kvstore
    sys.path.insert(0, sys.argv[1] + "/tests")
    from test_follow import number_of
    path, last = sys.argv[2], int(sys.argv[3])
    kept = kvstore.CursorFile(__import__("pathlib").Path(sys.argv[4]))
    with kvstore.open(path) as store:
        print("open", flush=True)
        for cursor, batch in store["s"].follow(kept.cursor or "start"):
            print(number_of(batch), flush=True)
            kept.note(cursor)
            if number_of(batch) == last:
                break
    kept.save()
"""


def test_a_follower_started_first_sees_writers_come_go_and_die(path, tmp_path):
    filled(path, 1)
    with start(FOLLOWER, ROOT, path, 80, tmp_path / "cursor") as follower:
        assert follower.stdout.readline() == "open\n"
        for first, stop in [(1, 20), (20, 50)]:
            with start(WRITER, ROOT, path, first, stop, 0) as writer:
                assert writer.wait(120) == 0
        with start(WRITER, ROOT, path, 50, 1000, 1) as writer:
            seen = [int(follower.stdout.readline()) for _ in range(60)]
            writer.kill()
        with kvstore.open(path, "w", **TINY) as store:  # and this process writes, too
            done = len(store["s"]) // BATCH_ROWS
            append(store, range(done, max(done, 80) + 1))
        seen += map(int, follower.stdout.read().split())
        assert follower.wait(120) == 0
    assert seen == list(range(seen[-1] + 1))
    assert len(seen) == 81


@pytest.mark.slow
def test_kill_9_of_a_follower_repeats_a_little_and_loses_nothing(path, tmp_path):
    kept = path.parent / "cursor"
    filled(path, 1)
    seen = []
    with start(WRITER, ROOT, path, 1, 200, 2) as writer:
        while not seen or seen[-1] < 199:
            with start(FOLLOWER, ROOT, path, 199, kept) as follower:
                assert follower.stdout.readline() == "open\n"
                time.sleep(0.3)
                follower.kill()
                lines = follower.stdout.readlines()
            run = [int(line) for line in lines if line.endswith("\n")]
            if not run:
                continue
            assert run == list(range(run[0], run[0] + len(run)))
            assert run[0] <= (seen[-1] + 1 if seen else 0), "lost"
            seen += run
        assert writer.wait(120) == 0
    assert set(seen) == set(range(200))


def rows_in(path):
    try:
        with kvstore.open(path) as store:
            return len(store["s"])
    except kvstore.KvstoreError:
        return 0


def test_a_follower_in_the_writers_own_process_sees_its_commits(path):
    seen = []
    with kvstore.open(path, "w", **TINY) as store:
        append(store, [0])
        thread = threading.Thread(
            target=lambda: seen.extend(
                number_of(each.batch)
                for each in store["s"].follow(stop=lambda: bool(seen) and seen[-1] == 99)
            )
        )
        thread.start()
        append(store, range(1, 100))
        thread.join(180)
    assert seen == list(range(100))


# ---- the command line ----


def command(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "kvstore", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_exit_0_and_the_cursor_kept(path, tmp_path, number):
    filled(path, 3)
    kept = tmp_path / "cursor"
    arguments = ["read", path, "--follow", "--cursor-file", kept, "--format", "jsonl"]
    with command(*arguments, "--fields", "v") as child:
        lines = [json.loads(child.stdout.readline())["v"] for _ in range(3 * BATCH_ROWS)]
        child.send_signal(number)
        rest, err = child.communicate(timeout=180)
    assert (child.returncode, rest, err) == (0, b"", b"")
    assert lines == list(range(3 * BATCH_ROWS))
    assert Cursor.parse(kept.read_text()).sequence == 3
    with kvstore.open(path, "w") as store:
        append(store, [3])
    with command(*arguments, "--fields", "v") as child:
        assert json.loads(child.stdout.readline())["v"] == 3 * BATCH_ROWS
        child.send_signal(number)
        child.communicate(timeout=180)


def test_it_ends_without_a_word_when_its_reader_goes_though_nothing_is_new(path):
    filled(path, 1)
    with command("read", path, "--follow", "--format", "csv") as child:
        child.stdout.readline()
        child.stdout.read1()
        child.stdout.close()
        assert child.wait(180) == 0
        assert child.stderr.read() == b""


def test_it_waits_for_a_stream_that_is_not_there_yet(path):
    kvstore.open(path, "w").close()
    arguments = ["read", path, "--follow", "--stream", "s", "--format", "csv", "--fields", "v"]
    with command(*arguments) as child:
        assert child.stderr.readline() == b"Waiting for stream 's'.\n"
        filled(path, 1)
        assert [child.stdout.readline() for _ in range(2)] == [b"v\n", b"0\n"]
        child.terminate()
        child.communicate(timeout=180)
    assert child.returncode == 0


def test_from_end_with_a_cursor_file_goes_on_from_there(path, tmp_path):
    filled(path, 2)
    kept = tmp_path / "cursor"
    with command("read", path, "--follow", "--cursor-file", kept, "--from", "end") as child:
        deadline = time.monotonic() + 120
        while not kept.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.terminate()
        assert child.communicate(timeout=180)[0] == b""
    assert Cursor.parse(kept.read_text()).sequence == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--follow", "--last", "1s"], "--follow goes with"),
        (["--follow", "--limit", "1"], "--follow goes with"),
        (["--follow", "--format", "npz"], "npz needs one"),
        (["--cursor-file", "x"], "go with --follow"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(path, arguments, message):
    filled(path, 1)
    with command("read", path, *arguments) as child:
        _, err = child.communicate(timeout=180)
    assert child.returncode == 2
    assert message in " ".join(err.decode().split())


def test_a_gap_makes_exit_3(broken_path):
    filled(broken_path, 60)
    segments_of(broken_path)[0].unlink()
    with command("read", broken_path, "--follow", "--format", "csv", "--fields", "v") as child:
        child.stdout.readline()
        child.stdout.readline()
        child.terminate()
        _, err = child.communicate(timeout=180)
    assert child.returncode == 3
    assert b"by sequence, are not in the store any more" in err
