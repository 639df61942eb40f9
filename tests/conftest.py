"""Fixtures of the store's tests: a path whose store is checked in full when the test is done."""

from __future__ import annotations

import gc

import pytest
from stores import check_store, scratch

from kvstore import environment


@pytest.fixture
def broken_path():
    """Where a store goes that a test damages. Afterwards none of its files may be left open."""
    with scratch() as folder:
        yield folder / "run.kv"
        if left_open(folder):
            gc.collect()  # a traceback may hold a handle
            assert not left_open(folder)


def left_open(folder):
    return [e.path for e in environment._opened.values() if folder in e.path.parents]


@pytest.fixture
def path(broken_path):
    """Where a store goes, all of which must be readable when the test is done."""
    yield broken_path
    if (broken_path / "store.msgpack").exists():
        check_store(broken_path)
