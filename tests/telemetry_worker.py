"""A worker process that strikes itself down: run as a program with its orders as JSON.

It takes its share of a topic into a sink, as `kvstore telemetry ingest` does, and tells what
happens as JSON lines on stdout. In its commit number ``at`` it kills or stops itself at a point:

    before  the sink was asked        during  part of the commit's calls are done
    after   the commit was made       reply   it was made, but the reply was lost: when settling
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

POINTS = ("before", "during", "after", "reply")
ROWS_MAX = 64  # of one commit: several for each worker
WAIT_S = 90.0


# ---- in the worker ----


class Struck:
    """A sink that is struck in its nth commit."""

    def __init__(self, sink, *, point, at, act, fraction=0.5):
        self._sink, self._point, self._at, self._fraction = sink, point, at, fraction
        self._signal = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[act]
        self._commits = self._calls = 0

    def __getattr__(self, name):
        return getattr(self._sink, name)

    def commit(self, work):
        self._commits += 1
        if self._commits < self._at:
            return self._counted(work)
        if self._commits > self._at or not self._point:
            return self._sink.commit(work)
        if self._point == "before":
            self._strike()
        if self._point == "during":
            return self._interrupted(work)
        outcome = self._sink.commit(work)
        if self._point == "after":
            self._strike()
        if self._point == "reply":
            from kvstore.errors import CommitUnknown  # noqa: PLC0415

            raise CommitUnknown("the reply was lost")
        self._point = ""
        return outcome

    def settle(self, work):
        if self._point == "reply":
            self._point = ""
            self._strike()
        return self._sink.settle(work)

    def _counted(self, work):
        """An undisturbed commit, to know how many calls one makes."""
        self._calls = 0

        def count(frame, event, argument):
            self._calls += 1

        return self._profiled(count, work)

    def _interrupted(self, work):
        at_call, self._calls = max(int(self._calls * self._fraction), 1), 0

        def strike(frame, event, argument):
            self._calls += 1
            if self._calls == at_call:
                sys.setprofile(None)
                self._point = ""
                self._strike()

        try:
            return self._profiled(strike, work)
        finally:
            self._at += bool(self._point)  # it had fewer calls than the one before: the next then

    def _profiled(self, function, work):
        sys.setprofile(function)
        try:
            return self._sink.commit(work)
        finally:
            sys.setprofile(None)

    def _strike(self):
        tell("struck")
        os.kill(os.getpid(), self._signal)


def tell(name, **fields):
    print(json.dumps({"event": name, **fields}, default=str), flush=True)


def work(orders):
    from kvstore.telemetry.contract import brief  # noqa: PLC0415
    from kvstore.telemetry.opening import open_sink  # noqa: PLC0415
    from kvstore.telemetry.pipeline import Limits, Pipeline  # noqa: PLC0415
    from kvstore.telemetry.sources.kafka import KafkaSource  # noqa: PLC0415

    def report(event):
        tell(event.name, message=event.message, **event.fields)

    def opened():
        options = {"group.id": orders["group"], **orders["options"]}
        return KafkaSource.open(orders["url"], options, report=report)

    with open_sink(orders["target"], brief()) as sink:
        sink.evolve(brief())
        struck = Struck(sink, **orders["strike"]) if orders["strike"] else sink
        limits = Limits(rows_max=ROWS_MAX, wait_s=0.1)
        Pipeline(
            opened, struck, brief(), limits=limits, report=report, stopped=stop_is_wanted
        ).run()


def stop_is_wanted():
    return bool(select.select([sys.stdin], [], [], 0)[0])


# ---- in the test ----


class Worker:
    """A worker as its test sees it: what it has told, and its process."""

    def __init__(self, kafka, topic, target, *, group=None, strike=None):
        orders = {
            "url": kafka.url(topic),
            "target": str(target),
            "group": group or "g-" + topic,
            "options": kafka.member,
            "strike": strike,
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(orders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.told = []
        self.errors = []
        self._threads = [
            threading.Thread(target=self._listen, daemon=True),
            threading.Thread(target=self._collect, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self):
        """Two threads of the worker may tell at once: several objects in a line, and empty ones."""
        decoder = json.JSONDecoder()
        for line in self.process.stdout:
            rest = line.strip()
            while rest:
                told, end = decoder.raw_decode(rest)
                self.told.append(told)
                rest = rest[end:].strip()

    def _collect(self):
        self.errors.extend(self.process.stderr)

    def count(self, name):
        return sum(each["event"] == name for each in list(self.told))

    def is_stopped(self):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2][1] == "T"
        return False

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def end(self):
        """Ask it to commit and leave; whether it ended well."""
        self.process.stdin.close()
        return self._left()

    def kill(self):
        self.process.kill()
        self._left()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()

    def _left(self):
        self.process.wait(WAIT_S)
        for thread in self._threads:
            thread.join(WAIT_S)
        return self.process.returncode


def await_that(is_so, workers=(), *, every_s=0.05):
    deadline_s = time.monotonic() + WAIT_S
    while not (found := is_so()):
        if time.monotonic() > deadline_s:
            pytest.fail("\n".join(map(where_it_is, workers)))
        time.sleep(every_s)
    return found


def where_it_is(worker):
    """What a worker told last, and where it stands: Python's own word on each of its threads."""
    if worker.process.poll() is None and not worker.is_stopped():
        worker.process.send_signal(signal.SIGUSR1)
        time.sleep(1)
    return f"{worker.process.poll()}, {worker.told[-5:]}\n{''.join(worker.errors[-40:])}"


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    work(json.loads(sys.argv[1]))
