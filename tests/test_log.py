"""The talk of a service: the same as text and as JSON, and never more than a disk can bear."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from kvstore.cli.log import LINES_MAX, Log
from kvstore.events import Event


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(capsys):
    def so_far():
        return capsys.readouterr().err.splitlines()

    return so_far


def test_a_json_line_has_time_level_event_message_and_the_event_s_fields(lines):
    log = Log("json")
    log.say("summary", "Two\nlines.", rows=3, last=None)
    log.complain("cut_off", "Bad: é", producer="p")
    first, second = map(json.loads, lines())
    assert datetime.fromisoformat(first.pop("time")).utcoffset().total_seconds() == 0
    assert first == {
        "level": "info", "event": "summary", "message": "Two lines.", "rows": 3, "last": None,
    }  # fmt: skip
    assert (second["level"], second["producer"]) == ("warning", "p")
    assert second["message"] == "Bad: é"


def test_text_is_what_people_read(lines):
    log = Log("text")
    log.say("summary", "Two\nlines.", rows=3)
    log.complain("cut_off", "bad")
    assert lines() == ["Two", "lines.", "kvstore: bad"]


@pytest.mark.parametrize("shape", ["text", "json"])
def test_what_a_producer_sent_forges_no_line_and_moves_no_cursor(lines, shape):
    Log(shape).complain("cut_off", "field 'a\nkvstore: all is well\x1b[2J\udce9\u2028'")
    (line,) = lines()
    said = json.loads(line)["message"] if shape == "json" else line
    assert said.isprintable()


@pytest.mark.parametrize("shape", ["text", "json"])
def test_a_long_message_is_cut(lines, shape):
    Log(shape).complain("cut_off", "x" * 10_000_000)
    (line,) = lines()
    assert len(line) < 2200


def test_of_each_event_some_lines_a_minute_are_shown_and_the_rest_counted(lines, clock):
    log = Log("json", clock)
    for n in range(LINES_MAX + 90):
        log(Event("warning", "refused", f"number {n}"))
        log(Event("info", "tick", "once")) if n == 0 else None
    shown = [json.loads(line) for line in lines()]
    assert [each["event"] for each in shown] == [
        "refused", "tick", *["refused"] * (LINES_MAX - 1), "limited",
    ]  # fmt: skip
    assert shown[-1]["of"] == "refused"
    clock.now_s += 60
    log(Event("warning", "refused", "later"))
    left_out, later = map(json.loads, lines())
    assert (left_out["event"], left_out["of"], left_out["count"]) == ("left_out", "refused", 90)
    assert later["message"] == "later"
