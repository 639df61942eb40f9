"""Dead letters after the fact, and the audit: each event has one fate, replayed or not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import telemetry_data as data
from stores import scratch
from telemetry_model import read_all

from kvstore.errors import SettingsError, SourceError
from kvstore.telemetry import rejects
from kvstore.telemetry.audit import audit
from kvstore.telemetry.pipeline import Pipeline
from kvstore.telemetry.records import LetterChange, State
from kvstore.telemetry.rejects import Wanted, name_of, parse_name
from kvstore.telemetry.sinks.stream import StreamSink
from kvstore.telemetry.sources.files import FilesSource

WIDE = replace(
    data.BRIEF,
    version=3,
    values=tuple(replace(field, minimum=None, maximum=None) for field in data.BRIEF.values),
)


def event(device="a", second=0, **values):
    made = {
        "device_id": device,
        "timestamp": f"2025-01-20T10:15:{second:02}Z",
        "temperature": 20.0,
        "humidity": 50,
        "firmware_version": "v1",
    }
    return json.dumps(made | values).encode()


LINES = [
    event("a", 1),  # 1 stored
    event("a", 1),  # 2 duplicate
    event("a", 1, temperature=5),  # 3 conflict
    event("a", 2, humidity=150),  # 4 range: passes a wider contract
    event("a", 1, humidity=150),  # 5 range: conflicts then
    event("b", 3, humidity=150),  # 6 range
    event("b", 3, humidity=150),  # 7 range: the same as 6, a duplicate then
    b"{",  # 8 json: never
    b'{"device_id":"\xff"}',  # 9 utf8: never
    event("b", 4),  # 10 stored
]


@pytest.fixture
def folder():
    with scratch() as folder:
        (folder / "events.jsonl").write_bytes(b"\n".join(LINES) + b"\n")
        yield folder


@pytest.fixture
def sink(folder):
    with StreamSink.open(folder / "ops.kv", data.BRIEF) as sink:
        ingest(folder, sink)
        yield sink


def ingest(folder, sink):
    source = folder / "events.jsonl"
    Pipeline(lambda: FilesSource([source], run="r"), sink, data.BRIEF,
             clock=lambda: data.NOW_US).run()  # fmt: skip


def replay(sink, contract=data.BRIEF, wanted=Wanted(), **options):  # noqa: B008
    sink.evolve(contract)
    return rejects.replay(sink, contract, wanted, clock=lambda: data.NOW_US + 10**10, **options)


def letters(sink, **wanted):
    found = rejects.select(sink, Wanted(**wanted))
    return {each.rejection.offset: each for each in found}


def totals(sink):
    found = {}
    for count in sink.counts():
        found[count.name] = found.get(count.name, 0) + count.value
        assert found[count.name] >= 0 or count.value < 0
    assert found["received"] == len(LINES)
    assert found["received"] == found["stored"] + found.get("duplicates", 0) + found["rejected"]
    return {name: value for name, value in found.items() if value}


def balanced_by_device_and_hour(sink):
    cells = {}
    for device, hour, name, value in sink.counts():
        sign = {"received": 1, "stored": -1, "duplicates": -1, "rejected": -1}.get(name, 0)
        cells[device, hour] = cells.get((device, hour), 0) + sign * value
    return set(cells.values()) <= {0}


# ---- replay ----


def test_a_replay_under_the_same_contract_changes_no_reading(sink):
    before = read_all(sink), totals(sink)
    done = replay(sink, dry_run=False)
    assert (done.letters, done.stored, done.duplicates, done.conflicts) == (7, 0, 0, 1)
    assert (read_all(sink), totals(sink)) == before
    assert {(each.state, each.replays) for each in letters(sink).values()} == {(State.OPEN, 1)}
    assert dict(done.again) == {"range": 4, "json": 1, "utf8": 1, "missing": 1}


def test_what_passes_a_wider_contract_becomes_readings_once(sink):
    before = totals(sink)
    assert before["reason:range"] == 4
    done = replay(sink, WIDE, Wanted(reason="range"))
    assert (done.letters, done.passing) == (4, 4)
    assert (done.stored, done.duplicates, done.conflicts) == (2, 1, 1)
    found = letters(sink)
    states = {offset: each.state for offset, each in found.items()}
    assert states == {3: "open", 4: "replayed", 5: "open", 6: "replayed", 7: "replayed",
                      8: "open", 9: "open"}  # fmt: skip
    assert [reason.code for reason in found[5].rejection.reasons] == ["conflict"]
    after = totals(sink)
    assert after == {
        "received": 10, "stored": 4, "duplicates": 2, "rejected": 4,
        "reason:conflict": 2, "reason:json": 1, "reason:utf8": 1, "reason:missing": 1,
    }  # fmt: skip
    assert balanced_by_device_and_hour(sink)
    again = replay(sink, WIDE)
    assert (again.stored, again.duplicates) == (0, 0)
    assert totals(sink) == after


def test_lineage_of_a_replayed_reading_is_its_events_own_place(sink):
    replay(sink, WIDE, Wanted(offset=4))
    (row,) = [row for row in read_all(sink) if row[2][2] == 4]
    assert row[2][0].endswith("/events.jsonl")
    assert row[2][4] == WIDE.version


def test_a_dry_run_says_what_would_pass_and_changes_nothing(sink):
    before = list(sink.dead_letters()), read_all(sink), totals(sink)
    done = replay(sink, WIDE, dry_run=True)
    assert (done.letters, done.passing, done.stored) == (7, 5, 0)
    assert (list(sink.dead_letters()), read_all(sink), totals(sink)) == before


def test_replays_go_on_in_rounds_and_parts(sink, monkeypatch):
    monkeypatch.setattr(rejects, "LETTERS_OF_A_ROUND", 3)
    monkeypatch.setattr(rejects, "LETTERS_AT_ONCE", 2)
    done = replay(sink, WIDE)
    assert (done.letters, done.stored, done.duplicates) == (7, 2, 1)
    assert balanced_by_device_and_hour(sink)


def test_discarded_letters_stay_and_can_be_opened_again(sink):
    assert rejects.discard(sink, Wanted(reason="json"), dry_run=True) == 1
    assert letters(sink)[8].state == State.OPEN
    assert rejects.discard(sink, Wanted(reason="json")) == 1
    assert letters(sink)[8].state == State.DISCARDED
    assert rejects.discard(sink, Wanted(reason="json")) == 0
    assert rejects.discard(sink, Wanted(state=State.DISCARDED), state=State.OPEN) == 1
    assert letters(sink, state=State.OPEN).keys() == {3, 4, 5, 6, 7, 8, 9}


def test_a_letter_keeps_the_raw_bytes_and_is_found_by_its_name(sink):
    letter = letters(sink)[9]
    assert letter.rejection.payload == LINES[8]
    name = name_of(letter.rejection.place, letter.rejection.offset)
    place, offset = parse_name(name)
    assert list(sink.dead_letters(place=place, offset=offset)) == [letter]
    with pytest.raises(SettingsError, match="source#partition@offset"):
        parse_name("9")


# ---- audit ----


def audited(folder, sink, contract=data.BRIEF):
    return audit(folder / "events.jsonl", sink, contract, now_us=data.NOW_US)


def test_each_line_has_its_fate(folder, sink):
    found = audited(folder, sink)
    assert (found.lines, found.stored, found.duplicates, found.rejected) == (10, 2, 1, 7)
    assert found.is_sound


def test_after_a_replay_too(folder, sink):
    replay(sink, WIDE)
    found = audited(folder, sink, WIDE)
    assert (found.lines, found.stored, found.duplicates, found.rejected) == (10, 4, 2, 4)
    assert found.replayed == 3
    assert found.is_sound


def test_lines_behind_the_position_are_not_read_yet(folder, sink):
    with (folder / "events.jsonl").open("ab") as file:
        file.write(event("z") + b"\n" + event("z") + b"\n\n")
    found = audited(folder, sink)
    assert (found.lines, found.unread) == (10, 2)
    assert found.is_sound


def commit(sink, offset):
    """One more reading of that line; the position stays where it is."""
    (position,) = sink.positions()
    row = data.row("x", offset=offset, place=position.place)
    claims = sink.claim([position.place])
    sink.commit(data.work(claims, [row], next_=position.next, token=position.token))


def break_stored(sink, folder):
    """A reading that no line is the origin of."""
    commit(sink, 99)


def break_twice(sink, folder):
    """A second reading of the first line."""
    commit(sink, 1)


def break_both(sink, folder):
    """A reading of a line that is a dead letter."""
    commit(sink, 8)


def break_position(sink, folder):
    """The position moved over lines that were not taken."""
    with (folder / "events.jsonl").open("ab") as file:
        file.write(event("z", 1) + b"\n" + b"[\n" + event("a", 1, temperature=-1) + b"\n")
    place = sink.positions()[0].place
    with FilesSource([folder / "events.jsonl"], run="r") as source:
        claims = []
        source.start(lambda ps: [c.position for c in claims.extend(sink.claim(ps)) or claims],
                     lambda *_: None)  # fmt: skip
        (chunk,) = source.poll(events_max=99, bytes_max=9999, wait_s=0)
    made = data.work(claims[-1])
    sink.commit(replace(made, after=(chunk.after,)))
    assert sink.positions()[0].place == place


def break_letter(sink, folder):
    """A letter said to be replayed, and there is no reading."""
    letter = letters(sink)[4]
    sink.change_letters([LetterChange(letter.rejection.place, 4, State.REPLAYED, 1)])


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (break_stored, ([], [], [99])),
        (break_twice, ([], [1], [])),
        (break_both, ([], [8], [])),
        (break_position, ([11, 12, 13], [], [])),
        (break_letter, ([4], [], [])),
    ],
)
def test_each_fault_is_found(folder, sink, fault, expected):
    fault(sink, folder)
    found = audited(folder, sink)
    assert (found.missing, found.twice, found.strange) == expected
    assert not found.is_sound


def test_a_file_that_was_not_ingested_is_no_sound_one(folder, sink):
    (folder / "events.jsonl").write_bytes(b"{}\n")
    with pytest.raises(SourceError, match="nothing of this file"):
        audited(folder, sink)
