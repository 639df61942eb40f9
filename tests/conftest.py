"""Fixtures that tests share: a path whose store is checked at the end, and recorded power cuts."""

from __future__ import annotations

import gc
import shutil
import signal

import pytest
from hypothesis import settings
from kafka_server import forgetful, kafka  # noqa: F401 - fixtures
from postgres_server import postgres, postgres_server  # noqa: F401 - fixtures
from powercut import checker, recorder
from registry_server import registry  # noqa: F401 - a fixture
from stores import SEED, check_store, scratch

from kvstore import environment

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it for what runs behind &
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else our children ignore it, too

settings.register_profile("alike", derandomize=True)
if not SEED:
    settings.load_profile("alike")


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


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that records what a process writes and syncs."""
    library = recorder.compile_shim(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("there is no C compiler to build the recording shim with")
    return library


@pytest.fixture
def record(shim, request):
    """Record the test's own module run as a program, whole or with one guard broken."""
    place = checker.fast_folder()
    (place / "root").mkdir()

    def run(broken, *, lying=False):
        command = [request.module.__file__, place / "root", broken]
        log_path = place / "log"
        return recorder.record(command, place / "root", shim=shim, log_path=log_path, lying=lying)

    yield run
    shutil.rmtree(place)
