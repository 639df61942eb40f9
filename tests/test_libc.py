"""Appending with help from the kernel: the content is the body's, whatever else happens."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import numpy as np
import pytest

import kvstore
from kvstore import libc
from kvstore.metapage import check_file

MB = 1 << 20


def written(path, begin, size, content):
    with libc.appending(path, begin, size), path.open("r+b", buffering=0) as file:
        file.seek(begin)
        for place in range(0, len(content), 35 * MB):
            file.write(content[place : place + 35 * MB])
    return path.read_bytes()


@pytest.mark.parametrize("begin", [0, 4096, 2 * MB - 4096, 2 * MB, 3 * MB + 8192])
def test_what_is_appended_is_there_and_no_more(begin, tmp_path):
    path = tmp_path / "file"
    before = os.urandom(begin)
    path.write_bytes(before)
    content = os.urandom(9 * MB)
    assert written(path, begin, len(content), content) == before + content


def test_a_body_that_raises_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"there")
    with pytest.raises(RuntimeError), libc.appending(path, 5, 8 * MB):
        raise RuntimeError
    assert path.read_bytes() == b"there" + bytes(8 * MB)
    assert not [each for each in threading.enumerate() if "_follow_writes" in each.name]


def test_small_appends_are_left_alone(tmp_path):
    path = tmp_path / "file"
    with libc.appending(path, 0, libc.APPEND_BYTES_MIN - 1):
        assert not path.exists()


def test_where_the_kernel_refuses_to_help_the_body_runs_all_the_same(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", refused)
    path = tmp_path / "file"
    path.touch()
    content = os.urandom(5 * MB)
    assert written(path, 0, len(content), content) == content


def test_each_2_mb_has_a_page_in_the_cache_before_they_are_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with libc.appending(path, 4096, 7 * MB):
        cached = [page for page in range(7 * 256) if is_cached(path, page)]
    assert cached == [0, 511, 1023, 1535]


def is_cached(path, page):
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        memory = np.frombuffer(mapped, np.uint8)
        there = ctypes.c_ubyte()
        address = ctypes.c_void_p(memory.ctypes.data + page * mmap.PAGESIZE)
        result = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(1), ctypes.byref(there))
        del memory
    assert result == 0
    return bool(there.value & 1)


def test_a_segment_is_no_longer_than_its_pages(tmp_path):
    noise = np.random.default_rng(1).integers(0, 2**63, (3000, 1024))
    with kvstore.open(tmp_path / "run.kv", "w") as store:
        for number in range(4):
            store.stream("s").append({"time": np.full(3000, float(number)), "noise": noise})
            store.flush()
    (path,) = (tmp_path / "run.kv" / "segments").glob("*.mdb")
    with kvstore.open(tmp_path / "run.kv") as store:
        assert path.stat().st_size == store.info().file_bytes
        assert sum(len(batch["time"]) for batch in store["s"].read()) == 12_000
    check_file(path)
