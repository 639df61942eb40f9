"""A file or folder appears complete or not at all, and what it replaces is whole until then."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exports import same, small_store, timed_rows
from stores import ROOT

import kvstore
from kvstore import libc
from kvstore.errors import KvstoreError
from kvstore.export.atomic import replacing
from kvstore.export.files import write_file
from kvstore.schema import Field

X = [Field("x", "f8")]


def rows(count):
    return [{"x": np.arange(float(count))}]


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_folder(path, text):
    with replacing(path, marker="mark") as fresh:
        (fresh / "mark").write_text("")
        (fresh / "inner").mkdir()
        (fresh / "inner" / "data").write_text(text)


# ---- what is replaced ----


def test_a_folder_is_replaced_by_the_new_one_and_nothing_is_left_of_the_old(tmp_path):
    for text in ("first", "second"):
        write_folder(tmp_path / "out", text)
        assert tree(tmp_path) == {"out/mark": b"", "out/inner/data": text.encode()}


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    write_folder(tmp_path / "out", "first")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "out", marker="mark") as fresh:
        (fresh / "mark").write_text(str(1 / 0))
    assert tree(tmp_path) == {"out/mark": b"", "out/inner/data": b"first"}


def test_at_no_instant_is_a_folder_missing(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "first")
    seen = []
    exchange = libc.exchange

    def watched(fresh, target):
        seen.append(tree(target)["inner/data"])
        exchange(fresh, target)
        seen.append(tree(target)["inner/data"])

    monkeypatch.setattr(libc, "exchange", watched)
    write_folder(tmp_path / "out", "second")
    assert seen == [b"first", b"second"]


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(KvstoreError, match="no folder with a mark: remove it, or name another"):
        write_folder(tmp_path / "out", "first")
    assert tree(tmp_path) == {"out/thesis.tex": b"years of work"}


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_a_file_replaces_files_only(tmp_path, kind):
    out = tmp_path / "out.csv"
    if kind == "folder":
        out.mkdir()
    elif kind == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to("/dev/null")
    with pytest.raises(KvstoreError, match="name another"):
        write_file(rows(3), X, out)
    assert os.listdir(tmp_path) == ["out.csv"]
    assert out.exists()
    assert not out.is_file()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "out.csv").symlink_to("real.csv")
    write_file(rows(1), X, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "x\n0.0\n"


def test_a_file_system_that_cannot_exchange_is_named_and_nothing_changes(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "first")

    def refused(_, target):
        raise OSError(22, "cannot be replaced in one step (Invalid argument)", str(target))

    monkeypatch.setattr(libc, "exchange", refused)
    with pytest.raises(KvstoreError, match=r"replaced in one step.*nothing there was changed"):
        write_folder(tmp_path / "out", "second")
    assert tree(tmp_path) == {"out/mark": b"", "out/inner/data": b"first"}


def test_exchange_says_what_the_system_says(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        libc.exchange(tmp_path / "a", tmp_path / "b")


def test_a_name_that_is_too_long_is_named(tmp_path):
    with pytest.raises(KvstoreError, match="File name too long"):
        write_file(rows(1), X, tmp_path / f"{'x' * 250}.csv")


# ---- leftovers ----


def test_what_a_killed_one_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".out.csv.123.tmp").write_text("half")
    (tmp_path / ".out.zarr.123.tmp").mkdir()
    kept = [".out.csv.tmp", ".out.csv.abc.tmp", ".out.csv.1.tmp.csv", "out.csv.1.tmp"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    write_file(rows(1), X, tmp_path / "out.csv")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "out.csv", ".out.zarr.123.tmp"])


def test_what_another_still_writes_is_not(tmp_path, monkeypatch):
    with replacing(tmp_path / "out.csv") as first:
        first.write_text("first")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with replacing(tmp_path / "out.csv") as second:
            second.write_text("second")
        assert (tmp_path / "out.csv").read_text() == "second"
        assert first.exists()
    assert (tmp_path / "out.csv").read_text() == "first"
    assert os.listdir(tmp_path) == ["out.csv"]


def test_all_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    fsync, exchange = os.fsync, libc.exchange
    name = {}

    def synced(fd):
        done.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    def exchanged(a, b):
        name["fresh"] = a
        done.append("exchange")
        exchange(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(libc, "exchange", exchanged)
    write_folder(tmp_path / "out", "first")
    done.clear()
    write_folder(tmp_path / "out", "second")
    fresh = str(name["fresh"])
    step = done.index("exchange")
    assert {f"{fresh}/inner/data", f"{fresh}/mark", f"{fresh}/inner", fresh} <= set(done[:step])
    assert done[step + 1 :] == [str(tmp_path)]


# ---- of real files ----


def test_a_zarr_is_overwritten_as_a_whole(path, tmp_path):
    zarr = pytest.importorskip("zarr", minversion="3")
    out = tmp_path / "out.zarr"
    write_file([{"x": np.arange(3.0), "y": np.arange(3)}], [*X, Field("y", "i8")], out)
    write_file(rows(2), X, out)
    group = zarr.open_group(out, mode="r")
    assert list(group) == ["x"]
    assert same(group["x"][...], np.arange(2.0))
    assert os.listdir(tmp_path) == ["out.zarr"]


def test_a_zarr_that_fails_leaves_the_old_one(tmp_path):
    pytest.importorskip("zarr", minversion="3")
    out = tmp_path / "out.zarr"
    write_file(rows(3), X, out)
    before = tree(tmp_path)

    def failing():
        yield {"x": np.arange(400_000.0)}
        raise KvstoreError("found, expected, do")

    with pytest.raises(KvstoreError, match="found"):
        write_file(failing(), X, out)
    assert tree(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
import kvstore
from kvstore import libc
from kvstore.export.atomic import replacing
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def after(a, b, exchange=libc.exchange):
    exchange(a, b)
    kill()
libc.exchange = after if sys.argv[2] == "after" else kill
with replacing(Path(sys.argv[1]), marker="mark") as fresh:
    (fresh / "mark").write_text("new")
"""


@pytest.mark.parametrize(("when", "found"), [("before", b"old"), ("after", b"new")])
def test_a_kill_around_the_exchange_leaves_one_whole_folder(tmp_path, when, found):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mark").write_text("old")
    command = [sys.executable, "-c", KILLED, str(out), when]
    done = subprocess.run(
        command, check=False, timeout=180, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -9
    assert tree(out) == {"mark": found}
    assert len(os.listdir(tmp_path)) == 2
    write_folder(out, "third")
    assert os.listdir(tmp_path) == ["out"]


IMPORTED = """
import os, signal, sys, time
from pathlib import Path
import kvstore
from kvstore.export import files
kill_at = int(sys.argv[3])
def appended(self, batch, append=kvstore.Stream.append, **options):
    append(self, batch, **options)
    self._store.flush()
    global kill_at
    kill_at -= 1
    if not kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
kvstore.Stream.append = appended
with kvstore.open(sys.argv[1], "w") as store:
    store.stream("s").import_file(sys.argv[2])
"""


def test_a_kill_in_the_middle_of_an_import_leaves_its_first_rows(path, tmp_path):
    batches = [{"time": np.arange(200_000.0), "v": np.arange(200_000)}]
    fields = [Field("time", "f8"), Field("v", "i8")]
    write_file(batches, fields, tmp_path / "in.npz", time="time")
    done = command(path, tmp_path / "in.npz", 2, code=IMPORTED)
    assert done.returncode == -9
    with kvstore.open(path) as store:
        found = np.concatenate([batch["v"] for batch in store["s"].read()])
    assert 0 < len(found) < 200_000
    assert same(found, np.arange(len(found)))


# ---- the command ----

CODE = "import sys; sys.argv[0] = 'kvstore'; from kvstore.cli import main; main()"


def command(*args, code=CODE, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        check=False, timeout=180, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip


def test_reports_in_json_and_a_closed_pipe_is_no_failure(path, tmp_path):
    rows_, schema = timed_rows("float64")
    small_store(path, rows_, schema)
    done = command("export", path, "-o", tmp_path / "a.csv", "--json", capture_output=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.pop("seconds") > 0
    assert report == {
        "file": str(tmp_path / "a.csv"), "stream": "all", "rows": 3, "damaged_batches": 0
    }  # fmt: skip
    done = command(
        "import", tmp_path / "new.kv", tmp_path / "a.csv", "--stream", "b", "--json",
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["files"] == [{"file": str(tmp_path / "a.csv"), "rows": 3}]
    read, write = os.pipe()
    os.close(read)
    done = command(
        "export", path, "-o", tmp_path / "b.csv", "--json", stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, f"3 rows to {tmp_path / 'b.csv'}\n".encode())


SLOWLY = """
import sys
sys.argv[0] = "kvstore"
from kvstore.cli import main, terminal
terminal._SHOW_AFTER_S = terminal._REFRESH_S = 0.01
from kvstore.store import Stream
import time
def slow(method):
    def later(self, *args, **options):
        time.sleep(0.05)
        return method(self, *args, **options)
    return later
def slow_read(self, *args, read=Stream.read, **options):
    for batch in read(self, *args, **options):
        time.sleep(0.05)
        yield batch
Stream.append, Stream.read = slow(Stream.append), slow_read
main()
"""


def test_a_terminal_sees_rows_rate_and_time_left(path, tmp_path):
    rows_, schema = timed_rows("float64")
    small_store(path, rows_, schema)
    leader, follower = os.openpty()
    shown = b""
    for args in (
        ["export", path, "-o", tmp_path / "a.csv"],
        ["import", tmp_path / "new.kv", tmp_path / "a.csv"],
    ):
        done = command(*args, code=SLOWLY, stderr=follower)
        assert done.returncode == 0
    os.close(follower)
    while True:
        try:
            shown += os.read(leader, 1 << 16)
        except OSError:
            break
    os.close(leader)
    text = shown.decode()
    assert "3 rows to " in text
    assert " rows  " in text.partition("3 rows to")[0]
    assert re.search(r"a\.csv  \d rows  [\d.]+ k/s", text.partition("3 rows to")[2])
    assert text.count("-:--:--") + text.count("0:00:00") > 2
