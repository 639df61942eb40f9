"""Day files on a real Dask scheduler with two worker processes, one of which dies in its work."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from dayexports import module, plant, save, scatter, seconds
from test_dayfiles import tree

from kvstore.dayfiles import etl
from kvstore.dayfiles.grid import Settings
from kvstore.errors import DayfilesError

distributed = pytest.importorskip("distributed", reason="Dask is an extra: 'kvstore[dask]'")
daycluster = pytest.importorskip("kvstore.daycluster")
pytestmark = pytest.mark.slow  # two worker processes take seconds to start

DEADLINE_S = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(is_true):
    deadline = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    """Starts scheduler and workers; none of them is left."""
    children = []

    def begin(module, *args):
        command = [sys.executable, "-W", "ignore", "-m", f"distributed.cli.{module}", *args]
        log = (tmp_path / f"{module}-{len(children)}.log").open("wb")
        with log:
            child = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.wait()


def scheduling(start):
    """A scheduler's process, and its address."""
    port = free_port()
    child = start("dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    until(lambda: answers(port))
    return child, f"tcp://127.0.0.1:{port}"


@pytest.fixture
def scheduler(start):
    return scheduling(start)[1]


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def worker(start, scheduler):
    options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")
    return start("dask_worker", scheduler, *options)


def test_a_cluster_whose_worker_dies_makes_the_same_bytes(tmp_path, start, scheduler):
    rows = [
        row
        for day in range(1, 9)
        for row in plant(seconds(f"2024-03-0{day}T22:00:00"), seconds(f"2024-03-0{day}T22:20:00"))
    ]
    scatter(tmp_path / "data", rows)
    etl.convert(tmp_path / "data", tmp_path / "here", Settings())
    dying, _ = worker(start, scheduler), worker(start, scheduler)
    with distributed.Client(scheduler, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=DEADLINE_S)
    killed = []

    def kill_one(progress):
        if progress.days and not killed:
            killed.append(dying.pid)
            os.kill(dying.pid, signal.SIGKILL)

    outcome = etl.convert(
        tmp_path / "data",
        tmp_path / "there",
        Settings(),
        run=daycluster.on_cluster(scheduler),
        progress=kill_one,
    )
    assert killed
    assert len(outcome.made) == len(outcome.records)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_no_scheduler_and_no_workers_are_said(tmp_path, scheduler, monkeypatch):
    scatter(
        tmp_path / "data", plant(seconds("2024-03-01T22:00:00"), seconds("2024-03-01T22:01:00"))
    )
    monkeypatch.setattr(daycluster, "CONNECT_S", 3)
    for address, said in ((scheduler, "no workers"), ("tcp://127.0.0.1:1", "no Dask scheduler")):
        with pytest.raises(DayfilesError, match=said):
            etl.convert(
                tmp_path / "data", tmp_path / "out", Settings(), run=daycluster.on_cluster(address)
            )


@pytest.fixture
def three_days(tmp_path):
    """An input of three days."""
    rows = [(seconds(f"2024-03-0{day}"), "module_current", "1", module(1, 1)) for day in (1, 2, 3)]
    save(tmp_path / "data" / "a.parquet", rows)
    return tmp_path / "data"


def test_a_day_whose_workers_die_ends_the_run_with_advice(tmp_path, start, monkeypatch, three_days):
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    _, address = scheduling(start)
    worker(start, address)
    with distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=DEADLINE_S)
    monkeypatch.setattr(daycluster, "convert_day", lambda _: os._exit(1))
    run = daycluster.on_cluster(address)
    with pytest.raises(DayfilesError, match=r"workers died .* that are done are kept") as ended:
        etl.convert(three_days, tmp_path / "out", Settings(), run=run)
    assert isinstance(ended.value.__cause__, distributed.KilledWorker)


def test_a_scheduler_that_is_lost_ends_the_run_with_advice(tmp_path, start, three_days, caplog):
    """The days that were done stay, and the next run makes the others."""
    child, address = scheduling(start)
    worker(start, address)
    with distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=DEADLINE_S)

    def lose(progress):
        if progress.days == 1:
            child.kill()
            child.wait()

    run = daycluster.on_cluster(address)
    with pytest.raises(DayfilesError, match=r"lost.* that are done are kept"):
        etl.convert(three_days, tmp_path / "out", Settings(), run=run, progress=lose)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    made = etl.convert(three_days, tmp_path / "out").made
    assert 1 <= len(made) < 3


def test_a_run_does_not_wait_for_workers_for_ever(tmp_path, start, monkeypatch, three_days):
    """All died, each at another day: none of the days is given up, and nobody makes them."""
    _, address = scheduling(start)
    worker(start, address)
    with distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=DEADLINE_S)
    monkeypatch.setattr(daycluster, "WORKERS_WAIT_S", 1)
    monkeypatch.setattr(daycluster, "convert_day", lambda _: os._exit(1))
    run = daycluster.on_cluster(address)
    with pytest.raises(DayfilesError, match=r"no workers for 1 s.* that are done are kept"):
        etl.convert(three_days, tmp_path / "out", Settings(), run=run)
