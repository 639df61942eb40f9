"""Follow, replay and write, chained and restarted; docs/follow.md does what it says."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from stores import ROOT, start
from test_follow import BATCH_ROWS, WRITER, command, filled, rows_in
from test_follow_space import wait_for
from test_readme import bash, blocks_of, never_run, shims

import kvstore
from kvstore.cli.terminal import LOSS

BLOCKS = blocks_of((ROOT / "docs/follow.md").read_text())
PYTHON = [block for block in BLOCKS if block.language == "python"]
KILLS_QUICK, KILLS_LONG = 3, 6


def numbers_in(path):
    """Every row's number; small appends are gathered, and sorted by time in their batch."""
    idle = []
    with kvstore.open(path) as store:
        if "s" not in store:
            return []
        found = store["s"].follow(fields=["v"], stop=lambda: bool(idle), sleep=idle.append)
        batches = [each.batch["v"] for each in found]
    return np.concatenate([np.zeros(0, int), *batches]).tolist()


def chain(source, target, cursor):
    """``kvstore read SOURCE --follow --cursor-file CURSOR | kvstore write TARGET``."""
    follower = command("read", source, "--follow", "--stream", "s", "--cursor-file", cursor)
    receiver = command("write", target, "--stream", "s", stdin=follower.stdout)
    follower.stdout.close()
    return follower, receiver


def ended(child, *codes):
    err = child.communicate(timeout=180)[1].decode()
    assert child.returncode in codes, err
    return err


def test_a_replay_at_full_speed_is_a_copy(path):
    filled(path, 40)
    copy = path.with_name("copy.kv")
    replay = command("replay", path, "--speed", "0", "--json")
    writing = command("write", copy, "--stream", "s", stdin=replay.stdout)
    replay.stdout.close()
    ended(writing, 0)
    report = json.loads(ended(replay, 0))
    assert report["rows"] == 40 * BATCH_ROWS
    assert report.keys() == {
        "pieces", "rows", "max_s", "p99_s", "elapsed_s", "speed", "damaged"
    }  # fmt: skip
    assert sorted(numbers_in(copy)) == sorted(numbers_in(path))


def restarted_chain(path, tmp_path, turns, stop):
    """Chains that ``stop(follower, receiver)`` ends, beside a writer; what the target holds."""
    copy, cursor = path.with_name("copy.kv"), tmp_path / "cursor"
    filled(path, 1)
    chance = random.Random(turns)
    with start(WRITER, ROOT, path, 1, 100_000, 8) as writer:
        for _ in range(turns):
            before = sequence(cursor)
            follower, receiver = chain(path, copy, cursor)
            wait_for(lambda before=before: sequence(cursor) > before)
            time.sleep(chance.random() * 0.3)
            stop(follower, receiver)
        writer.kill()
    follower, receiver = chain(path, copy, cursor)
    rows = rows_in(path)
    wait_for(lambda: copy.exists() and len(set(numbers_in(copy))) == rows)
    stop_in_order(follower, receiver)
    return numbers_in(copy)


def sequence(cursor):
    return kvstore.Cursor.parse(cursor.read_text()).sequence if cursor.exists() else 0


def stop_in_order(follower, receiver):
    follower.send_signal(signal.SIGTERM)
    assert "Stopped" not in ended(receiver, 0)
    ended(follower, 0)


def stop_receiver_first(follower, receiver):
    """It drains the pipe; what the follower writes into it meanwhile nobody takes."""
    receiver.send_signal(signal.SIGINT)
    ended(receiver, 0, LOSS)
    ended(follower, 0)


def kill_follower(follower, receiver):
    follower.kill()
    follower.communicate(timeout=180)
    ended(receiver, 0, LOSS)  # the last packet may be cut off


@pytest.mark.slow
def test_a_chain_that_is_stopped_at_its_head_copies_every_row_once(path, tmp_path):
    found = restarted_chain(path, tmp_path, 2, stop_in_order)
    assert sorted(found) == list(range(len(found)))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [stop_receiver_first, kill_follower])
def test_a_chain_that_is_broken_off_loses_nothing(path, tmp_path, stop):
    found = restarted_chain(path, tmp_path, KILLS_LONG, stop)
    assert set(found) == set(range(max(found) + 1))


def test_what_a_dead_reader_left_in_the_pipe_comes_again(path, tmp_path):
    filled(path, 20)
    cursor = tmp_path / "cursor"
    arguments = ["read", path, "--follow", "--cursor-file", cursor]
    with command(*arguments) as child:
        packet = child.stdout.raw.read(int.from_bytes(child.stdout.raw.read(4), "big"))
        assert len(packet) > 1000
        time.sleep(0.5)  # the others are in the pipe by now
        child.stdout.close()
        assert child.wait(180) == 0
    assert kvstore.Cursor.parse(cursor.read_text()).sequence == 1


# ---- exactly once ----


def copied_with_kills(path, tmp_path, kills):
    script, copy = tmp_path / "copy_stream.py", path.with_name("copy.kv")
    script.write_text(PYTHON[0].text)
    filled(path, 1)
    chance = random.Random(kills)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, script, path, copy, "s"]
    with start(WRITER, ROOT, path, 1, 100_000, 8) as writer:
        for _ in range(kills):
            before = rows_in(copy)
            copier = subprocess.Popen(arguments, env=environment)
            wait_for(lambda before=before: rows_in(copy) > before)
            time.sleep(chance.random() * 0.2)
            copier.kill()
            copier.wait(180)
        writer.kill()
    copier = subprocess.Popen(arguments, env=environment)
    rows = rows_in(path)
    wait_for(lambda: rows_in(copy) == rows)
    copier.kill()
    copier.wait(180)
    assert sorted(numbers_in(copy)) == list(range(rows))


@pytest.mark.slow
def test_the_copier_of_the_docs_copies_exactly_once_however_often_it_is_killed(path, tmp_path):
    copied_with_kills(path, tmp_path, KILLS_QUICK)


@pytest.mark.slow
def test_the_copier_of_the_docs_copies_exactly_once_in_many_kills(path, tmp_path):
    copied_with_kills(path, tmp_path, KILLS_LONG)


# ---- docs/follow.md ----


@pytest.mark.slow
def test_every_block_of_the_docs_is_run(tmp_path, monkeypatch, capsys):
    assert never_run(BLOCKS) == []
    path = shims(tmp_path / "bin", kvstore=f"'{sys.executable}' -m kvstore")
    for block in BLOCKS:
        if block.language == "bash":
            bash(block, tmp_path, PATH=path, PYTHONPATH=str(ROOT))
    assert sorted(numbers_of_particles(tmp_path / "copy.kv")) == sorted(
        numbers_of_particles(tmp_path / "a.kv")
    )
    assert json.loads((tmp_path / "report.json").read_text())["speed"] == 2
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}
    for block in PYTHON:
        exec(compile(block.text, "docs/follow.md", "exec"), names)
    assert ":1:room 20.5" in capsys.readouterr().out


def numbers_of_particles(path):
    with kvstore.open(path) as store:
        return [t for batch in store["particles"].read() for t in batch["timestamps"].tolist()]
