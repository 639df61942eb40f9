"""A full disk, on small mounted volumes: a clear error, nothing lost, and on it goes with room.

Each test fills the volume with a ballast file, and makes room by deleting it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from exports import LIBRARY
from stores import ROOT, check_store, quick_first, run

import kvstore
from kvstore import DiskFull, commit
from kvstore.follow import Cursor, CursorFile
from kvstore.packets import encode

VOLUME_BYTES = 16 << 20
PAGE = 4096
ROW_BYTES = 80


def mounted(kind, folder):
    """Mount a small volume on the folder; what went wrong, if it did."""
    if kind == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "-o", f"size={VOLUME_BYTES}", "none", folder]]
    else:
        image = folder.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(VOLUME_BYTES)
        commands = [
            ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", image],
            ["mount", "-o", "loop", image, folder],
        ]
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            return f"{command[0]}: {error.stderr.strip()}"
    return ""


@pytest.fixture(scope="module", params=quick_first(["tmpfs", "ext4"]))
def volume(request, tmp_path_factory):
    """A folder with VOLUME_BYTES of room, its own file system."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a volume")
    folder = tmp_path_factory.mktemp("volumes") / request.param
    folder.mkdir()
    if problem := mounted(request.param, folder):
        pytest.skip(f"cannot mount a volume: {problem}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def path(volume):
    """A store on the volume; removed afterwards, as is the ballast."""
    yield volume / "run.kv"
    subprocess.run(["rm", "-rf", volume / "run.kv", volume / "ballast"], check=True)


def free_bytes(volume):
    found = os.statvfs(volume)
    return found.f_bavail * found.f_frsize


@contextmanager
def ballast(volume, *, leaving):
    """Fill the volume up to that many bytes."""
    file = volume / "ballast"
    with file.open("wb") as out:
        while (rest := free_bytes(volume) - leaving) > 0:
            try:
                out.write(bytes(min(rest, 1 << 20)))
                out.flush()
            except OSError:
                break
    try:
        yield
    finally:
        file.unlink()


def batch(first, rows):
    v = np.arange(first, first + rows)
    noise = (v[:, None].astype("u8") * np.uint64(0x9E3779B97F4A7C15)) ^ np.arange(8, dtype="u8")
    return {"time": v.astype(float), "v": v, "noise": noise * noise}


def check_rows(store, rows):
    """Exactly these rows, bit for bit, through this handle."""
    found = list(store["s"].read()) if "s" in store else []
    for name, values in batch(0, rows).items():
        every = [np.zeros((0, *values.shape[1:]), values.dtype), *(b[name] for b in found)]
        assert np.array_equal(np.concatenate(every), values), name


def rows_elsewhere(path):
    """Rows as another process counts them, reading each."""
    code = """
        import sys, kvstore
        with kvstore.open(sys.argv[1]) as store:
            print(sum(len(b["v"]) for b in store["s"].read()) if "s" in store else 0)
    """
    return int(run(code, path))


def fill(store, *, rows_each, first=0):
    """Append and flush until the disk is full: rows durable, rows appended."""
    durable = appended = first
    while durable == appended:
        try:
            store.stream("s").append(batch(appended, rows_each))
            appended += rows_each
            store.flush()
        except DiskFull as error:
            assert "no room on the disk" in str(error)  # noqa: PT017  # how many it takes varies
            assert "make room" in str(error)  # noqa: PT017
        else:
            durable = appended
    return durable, appended


@pytest.mark.parametrize("rows_each", [1, 300, 20_000])
def test_a_full_disk_loses_nothing_and_goes_on(volume, path, rows_each):
    with kvstore.open(path, "w", flush_interval_s=None) as store:
        room = max(3 * rows_each * ROW_BYTES, 250_000)
        with ballast(volume, leaving=room):
            durable, appended = fill(store, rows_each=rows_each)
            assert durable > 0
            check_rows(store, durable)
            assert rows_elsewhere(path) == durable
            for use in (store.flush, lambda: store.stream("s").append(batch(appended, 1))):
                with pytest.raises(DiskFull):
                    use()
            check_rows(store, durable)
        store.flush()
        check_rows(store, appended)
        store.stream("s").append(batch(appended, rows_each))
        store.flush(marks={"end": 1})
        check_rows(store, appended + rows_each)
    check_store(path)


def test_appending_goes_on_by_itself_once_there_is_room(volume, path, monkeypatch):
    monkeypatch.setattr(commit, "RETRY_S", 0.05)
    with kvstore.open(path, "w", flush_interval_s=0.01) as store:
        with ballast(volume, leaving=300_000):
            appended = 0
            with suppress(DiskFull):
                while True:
                    store.stream("s").append(batch(appended, 100))
                    appended += 100
                    time.sleep(0.02)
            durable = len(store["s"])
            check_rows(store, durable)
            assert durable < appended
        deadline = time.monotonic() + 120
        while len(store["s"]) < appended:
            assert time.monotonic() < deadline, store._writer._committer.error
            time.sleep(0.02)
        store.stream("s").append(batch(appended, 100))
        store.flush()
        check_rows(store, appended + 100)
    check_store(path)


def test_closing_on_a_full_disk_says_what_was_lost(volume, path):
    store = kvstore.open(path, "w", flush_interval_s=None)
    with ballast(volume, leaving=400_000):
        durable, appended = fill(store, rows_each=500)
        with pytest.raises(DiskFull):
            store.close()
        store.close()
        assert rows_elsewhere(path) == durable < appended
    with kvstore.open(path, "w") as store:
        check_rows(store, durable)
        store.stream("s").append(batch(durable, 500))
    check_store(path)


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))]
)
def test_a_disk_that_fills_at_any_point_of_a_roll(volume, path, first):
    """Small segments, and a little more room each time: full in the middle of every step."""
    for pages in range(int(first), 48, 4):
        store = kvstore.open(path, "w", flush_interval_s=None, segment_bytes=64 << 10)
        with store:
            with ballast(volume, leaving=pages * PAGE):
                durable, appended = fill(store, rows_each=40)
                check_rows(store, durable)
                if pages % 12 == int(first):
                    assert rows_elsewhere(path) == durable
            store.flush()
            check_rows(store, appended)
            durable = appended
            for _ in range(3):
                store.stream("s").append(batch(durable, 40))
                durable += 40
                store.flush()
            check_rows(store, durable)
        check_store(path)
        subprocess.run(["rm", "-rf", path], check=True)


def test_a_disk_that_fills_while_the_store_is_created(volume, path):
    outcomes = set()
    for pages in range(24):
        with ballast(volume, leaving=pages * PAGE):
            try:
                kvstore.open(path, "w").close()
            except DiskFull:
                outcomes.add("full")
            else:
                outcomes.add("created")
        with kvstore.open(path, "w") as store:
            store.stream("s").append(batch(0, 40))
        check_store(path)
        assert not list((path / "segments").glob("*.tmp"))
        subprocess.run(["rm", "-rf", path], check=True)
    assert outcomes == {"full", "created"}


def test_opening_for_writing_on_a_full_disk(volume, path):
    """A copied store has no lock file: LMDB mapped a sparse one, and died of SIGBUS."""
    with kvstore.open(path, "w") as store:
        store.stream("s").append(batch(0, 1000))
    for lock_file in (path / "segments").glob("*-lock"):
        lock_file.unlink()
    code = """
        import sys, kvstore
        try:
            kvstore.open(sys.argv[1], "w").close()
        except kvstore.DiskFull:
            print("full")
    """
    with ballast(volume, leaving=0):
        assert run(code, path) == "full\n"
        assert rows_elsewhere(path) == 1000
    assert run(code, path) == ""
    check_store(path)


def test_reading_works_on_a_full_disk(volume, path):
    with kvstore.open(path, "w") as store:
        store.stream("s").append(batch(0, 1000))
    with ballast(volume, leaving=0):
        assert rows_elsewhere(path) == 1000
        with kvstore.open(path) as store:
            check_rows(store, 1000)


# ---- exports and imports ----

EXPORTS = """
    import sys, kvstore
    with kvstore.open(sys.argv[1]) as store:
        for out in sys.argv[2:]:
            try:
                store["s"].export(out, fields=["noise"])
            except kvstore.KvstoreError as error:
                print(error)
"""
PLAIN = ("npz", "npy", "csv", "jsonl")


def test_an_export_that_fills_the_disk_leaves_what_was_there(volume, path, tmp_path):
    suffixes = [*PLAIN, *(s for s, name in LIBRARY.items() if importlib.util.find_spec(name))]
    with kvstore.open(tmp_path / "from.kv", "w") as store:
        store.stream("s").append(batch(0, 30_000))
    files = {suffix: path / f"out.{suffix}" for suffix in suffixes}
    before = {
        suffix: file / "zarr.json" if suffix == "zarr" else file for suffix, file in files.items()
    }
    for file in before.values():
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("before")
    with ballast(volume, leaving=400_000):
        free = free_bytes(volume)
        lines = run(EXPORTS, tmp_path / "from.kv", *files.values()).splitlines()
        for suffix, line in zip(suffixes, lines, strict=True):
            assert f"out.{suffix}: " in line
            assert "No space left on device" in line
            assert "nothing there was changed" in line
        assert free_bytes(volume) == free
    assert sorted(os.listdir(path)) == sorted(file.name for file in files.values())
    assert all(file.read_text() == "before" for file in before.values())


def test_an_import_that_fills_the_disk_keeps_what_was_committed(volume, path, tmp_path):
    np.savez(tmp_path / "in.npz", **batch(0, 60_000))
    code = """
        import sys, kvstore
        try:
            with kvstore.open(sys.argv[1], "w", flush_interval_s=0.01) as store:
                store.stream("s", time="time").import_file(sys.argv[2])
        except kvstore.DiskFull:
            print("full")
    """
    with ballast(volume, leaving=1_000_000):
        assert run(code, path, tmp_path / "in.npz") == "full\n"
    with kvstore.open(path) as store:
        check_rows(store, len(store["s"]) if "s" in store else 0)
    check_store(path)


# ---- with retention ----


def test_on_a_full_disk_the_oldest_go_where_that_is_wanted(volume, path):
    """Even where others have taken all the room there is."""
    options = kvstore.Settings(when_full="drop-oldest")
    with kvstore.open(path, "w", settings=options, segment_bytes=256 << 10) as store:
        for number in range(20):
            store.stream("s").append(batch(1000 * number, 1000))
            store.flush()
        with ballast(volume, leaving=0):
            for number in range(20, 60):
                store.stream("s").append(batch(1000 * number, 1000))
                store.flush()
            found = np.concatenate([b["v"] for b in store["s"].read()])
            assert found[-1] == 59_999
            assert np.array_equal(np.diff(found), np.ones(len(found) - 1))
            assert len(found) >= 10_000
            assert rows_elsewhere(path) == len(found)
            (gap,) = [gap for gap in store.gaps() if gap.kind == "dropped"]
            assert gap.rows == found[0]
    check_store(path)


@pytest.mark.parametrize("least", [None, 2 << 20])
def test_a_disk_smaller_than_a_segment_does_not_stop_it_for_good(volume, path, least):
    options = kvstore.Settings(when_full="drop-oldest", min_free_bytes=least)
    rng = np.random.default_rng(1)
    with kvstore.open(path, "w", settings=options) as store:
        for number in range(100):  # 40 MB on 16 MiB
            noise = rng.random(25_000)
            store.stream("s").append({"time": number + np.arange(25_000) / 25_000, "v": noise})
            store.flush()
            assert free_bytes(volume) >= (least or 0) - (256 << 10)  # a fresh segment
        assert store["s"].last()["v"][0] == noise[-1]
        (gap,) = store.gaps()
        assert gap.rows + len(store["s"]) == 2_500_000
    check_store(path)


def test_a_clean_stop_on_a_full_disk_is_recorded(volume, path):
    with kvstore.open(path, "w") as store, ballast(volume, leaving=0):
        assert (path / "reserve").stat().st_blocks
        store.close()
    with kvstore.open(path, "w") as store:
        assert store.gaps() == ()


def test_pins_drops_and_settings_on_a_full_disk(volume, path):
    """Each is durable when it returns, or refused with a clear error and without effect."""
    with kvstore.open(path, "w", segment_bytes=64 << 10) as store:
        for number in range(10):
            store.stream("s").append(batch(1000 * number, 1000))
            store.flush()
        with ballast(volume, leaving=0):
            pin = store.pin(0.0, 500.0, "door")
            store.set(max_age_s=3600.0)
            assert store.drop(5000.0)["segments"] > 0
            store.unpin(pin)
        assert store.settings.max_age_s == 3600.0
        assert store["s"].first()["v"][0] == 0
    check_store(path)


# ---- beside the store ----


def command(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "kvstore", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        **options,
    )


def test_a_cursor_that_cannot_be_kept_leaves_the_earlier_one(volume, path):
    path.mkdir()
    kept = CursorFile(path / "cursor")
    kept.note(Cursor("00", "s", 1))
    kept.save()
    with ballast(volume, leaving=0):
        kept.note(Cursor("00", "s", 2))
        with pytest.raises(DiskFull):
            kept.save()
        assert os.listdir(path) == ["cursor"]
        assert CursorFile(path / "cursor").cursor == Cursor("00", "s", 1)
    kept.save()
    assert CursorFile(path / "cursor").cursor == Cursor("00", "s", 2)


def test_metrics_that_find_no_room_do_not_keep_from_capturing(volume, path, tmp_path):
    path.mkdir()
    packet = b"".join(encode(batch(0, 1000)))
    words = ["write", tmp_path / "run.kv", "--stream", "s", "--metrics-file", path / "kv.prom"]
    with ballast(volume, leaving=0):
        done = command(*words, input=packet)
        assert done.returncode == 0, done.stderr
        assert b"kv.prom: metrics not written: [Errno 28]" in done.stderr
        assert os.listdir(path) == []
    check_store(tmp_path / "run.kv")


def test_metrics_that_can_never_be_written_are_named(tmp_path):
    metrics = tmp_path / "none" / "kv.prom"
    done = command("write", tmp_path / "run.kv", "/dev/null", "--metrics-file", metrics)
    assert done.returncode == 1
    assert b"none/kv.prom: metrics cannot be written: No such file or directory" in done.stderr


def test_a_plot_that_fills_the_disk_leaves_what_was_there(volume, path, tmp_path):
    pytest.importorskip("matplotlib")
    with kvstore.open(tmp_path / "run.kv", "w") as store:
        store.stream("s").append(batch(0, 1000))
    path.mkdir()
    (path / "out.png").write_text("before")
    with ballast(volume, leaving=PAGE):
        done = command("plot", tmp_path / "run.kv", "-o", path / "out.png")
        assert done.returncode == 1
        assert b"No space left on device; nothing there was changed" in done.stderr
        assert os.listdir(path) == ["out.png"]
        assert (path / "out.png").read_text() == "before"
