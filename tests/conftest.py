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
        gc.collect()
        opened = [each.path for each in environment._opened.values()]
        assert not [path for path in opened if folder in path.parents], "left open"


@pytest.fixture
def path(broken_path):
    """Where a store goes, all of which must be readable when the test is done."""
    yield broken_path
    if (broken_path / "store.msgpack").exists():
        check_store(broken_path)
