"""Fixtures of the store's tests: a path whose store is checked in full when the test is done."""

from __future__ import annotations

import gc

import pytest
from stores import check_store, scratch

from kvstore import environment


@pytest.fixture
def broken_path():
    """Where a store goes that a test damages."""
    with scratch() as folder:
        yield folder / "run.kv"


@pytest.fixture
def path(broken_path):
    """Where a test's store goes. Afterwards all of it must be readable, and nothing left open."""
    yield broken_path
    gc.collect()
    assert not environment._opened, "a file of a store was left open"
    if (broken_path / "store.msgpack").exists():
        check_store(broken_path)
