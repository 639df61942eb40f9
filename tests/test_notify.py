"""What systemd is told: heard with a real datagram socket in systemd's part."""

from __future__ import annotations

import os
import socket
import threading
import time

import numpy as np
import pytest

import kvstore
from kvstore.active import Active
from kvstore.cli.intake import Capture, Inputs
from kvstore.cli.log import Log
from kvstore.errors import KvstoreError
from kvstore.every import every
from kvstore.notify import Notifier


@pytest.fixture
def systemd(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20)
        yield listening


def heard(systemd):
    return systemd.recv(10_000).decode().split("\n")


def environ(systemd, **more):
    return {"NOTIFY_SOCKET": systemd.getsockname(), **more}


def test_messages_arrive_in_one_datagram_a_line_each(systemd):
    Notifier(environ(systemd)).send("READY=1", "STATUS=one\ntwo")
    assert heard(systemd) == ["READY=1", "STATUS=one two"]


def test_an_abstract_name_is_understood():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        name = f"kvstore-test-{os.getpid()}"
        listening.bind("\0" + name)
        Notifier({"NOTIFY_SOCKET": "@" + name}).send("READY=1")
        assert heard(listening) == ["READY=1"]


def test_without_systemd_or_with_one_that_is_gone_nothing_happens(tmp_path):
    Notifier({}).send("READY=1")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).send("READY=1")


def test_an_address_that_is_none_is_an_error():
    with pytest.raises(KvstoreError, match=r"NOTIFY_SOCKET='vsock:2:1'.*as systemd sets it"):
        Notifier({"NOTIFY_SOCKET": "vsock:2:1"})


def test_a_systemd_that_does_not_listen_cannot_hang_the_service(systemd):
    notifier = Notifier(environ(systemd))
    for _ in range(1000):  # more than its queue holds
        notifier.send("WATCHDOG=1")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_obeyed_where_it_is_ours(variables, expected):
    assert Notifier(variables).watchdog_s == expected


def test_reports_come_at_once_again_and_again_and_at_the_end():
    calls = []
    with every(0.01, lambda: calls.append(len(calls))):
        assert calls
        while len(calls) < 4:
            time.sleep(0.01)
        before = len(calls)
    assert len(calls) > before
    assert "kvstore-report" not in [thread.name for thread in threading.enumerate()]


def test_the_watchdog_is_fed_only_while_commits_make_progress(path, systemd, monkeypatch):
    gate = threading.Event()
    inner = Active.commit

    def held(self, group):
        gate.wait(180)
        inner(self, group)

    inputs = Inputs([], "s", "", 1000, False, False, None, 0o660, 1)
    notifier = Notifier(environ(systemd, WATCHDOG_USEC="100000"))
    with kvstore.open(path, "w", flush_interval_s=0.01) as store:
        capture = Capture(store, inputs, Log("text"), notifier)
        capture._tell_systemd()
        assert heard(systemd) == ["WATCHDOG=1", "STATUS=0 rows taken in, 0 B queued, 0 producers"]
        monkeypatch.setattr(Active, "commit", held)
        store.stream("s").append({"time": np.arange(3.0)})
        while store.writer().committer.overdue_s() < 0.06:
            time.sleep(0.01)
        capture._tell_systemd()
        assert [line[:7] for line in heard(systemd)] == ["STATUS="]
        gate.set()
        store.flush()
        capture._tell_systemd()
        assert heard(systemd)[0] == "WATCHDOG=1"
