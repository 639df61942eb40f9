"""A process that ingests into a lake, killed (SIGKILL) at random moments, and two of them at once.

Slow: each start of Python with pyiceberg takes seconds.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import lakes
import pytest
import telemetry_data as data
from stores import ROOT
from telemetry_model import read_all

pytestmark = pytest.mark.slow

EVENTS = 4000
ROUNDS_MAX = 6
DEADLINE_S = 120


def events(path, source, count=EVENTS):
    """Good events, with a bad one and a duplicate now and then."""
    lines = []
    for n in range(count):
        each = {
            "device_id": f"{source}-{n % 7}",
            "timestamp": f"2025-01-20T{n // 3600:02}:{n // 60 % 60:02}:{n % 60:02}Z",
            "temperature": n % 80,
            "humidity": 50,
            "firmware_version": "v1",
        }
        lines.append("{" if n % 100 == 3 else json.dumps(each))
        if n % 50 == 0:
            lines.append(lines[-1])
    path.write_text("".join(f"{line}\n" for line in lines))


def ingest(path, lake):
    command = [sys.executable, "-m", "kvstore", "telemetry", "ingest", str(path)]
    return subprocess.Popen(
        [*command, "--lake", str(lake), "--batch-rows", "250"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def totals(sink):
    found = {}
    for each in sink.counts():
        found[each.name] = found.get(each.name, 0) + each.value
    return found


def check(lake, sources):
    with lakes.opened(lake) as sink:
        rows, letters, found = read_all(sink), list(sink.dead_letters()), totals(sink)
    good, bad = EVENTS - EVENTS // 100, EVENTS // 100
    again = EVENTS // 50
    assert len(rows) == len({identity for identity, *_ in rows}) == sources * good
    assert len(letters) == sources * bad
    assert found["received"] == sources * (EVENTS + again)
    assert found["stored"] == sources * good
    assert found["duplicates"] == sources * again
    assert found["rejected"] == sources * bad


def test_killed_again_and_again_every_event_has_one_fate():
    rng = random.Random(5)
    with lakes.scratch() as folder:
        events(folder / "events.jsonl", "a")
        killed = 0
        for _ in range(ROUNDS_MAX):
            process = ingest(folder / "events.jsonl", folder / "lake")
            until = time.monotonic() + DEADLINE_S
            wanted = committed(folder / "lake") + rng.randint(2, 4)
            while process.poll() is None and committed(folder / "lake") < wanted:
                assert time.monotonic() < until
                time.sleep(0.01)
            time.sleep(rng.random() * 0.2)  # somewhere within the next commit
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:
                break
            killed += 1
        assert killed > 2
        process = ingest(folder / "events.jsonl", folder / "lake")
        assert process.wait(DEADLINE_S) == 0
        check(folder / "lake", 1)


def committed(lake):
    """The number of the readings' newest metadata file: each commit makes the next."""
    found = (lake / "telemetry/readings/metadata").glob("*.metadata.json")
    return max((int(each.name.partition("-")[0]) for each in found), default=-1)


def test_two_processes_write_to_one_lake():
    with lakes.scratch() as folder:
        lakes.opened(folder / "lake").__exit__(None, None, None)
        running = []
        for name in ("a", "b"):
            events(folder / f"{name}.jsonl", name)
            running.append(ingest(folder / f"{name}.jsonl", folder / "lake"))
        for process in running:
            assert process.wait(DEADLINE_S) == 0
        check(folder / "lake", 2)
        assert data.BRIEF.version == 2
