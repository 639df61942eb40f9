"""What a sink does, as plain dicts, and a comparison of any sink with it under hypothesis.

    def test_it_does_as_the_model(): check_sink_against_model(fresh)

``fresh()`` is a context manager: a new, empty target, as a function that opens a sink on it under
a contract. A target may be opened again after its sink was closed. Not a test module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import telemetry_data as data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import Fenced
from kvstore.telemetry import counts
from kvstore.telemetry.contract import Contract
from kvstore.telemetry.records import (
    Claim,
    Count,
    DeadLetter,
    LetterChange,
    Outcome,
    Place,
    Position,
    Readings,
    Reason,
    Rejection,
    State,
    Work,
)
from kvstore.telemetry.sink import Sink

Open = Callable[[Contract], Sink]
Fresh = Callable[[], AbstractContextManager[Open]]
CONFLICT = (Reason(counts.CONFLICT),)


# ---- what a sink holds, in a shape that can be compared ----


def plain(value: Any) -> float | str | None:
    """As values are compared: NaN is null, and -0.0 is 0.0."""
    if value is None or isinstance(value, str):
        return value
    return None if np.isnan(value) else float(value) + 0.0


def rows_of(readings: Readings) -> list[tuple[Any, ...]]:
    """Each reading as a tuple: identity, (values, extras), lineage."""
    lineage = readings.lineage
    columns = {name: list(map(plain, column)) for name, column in readings.values.items()}
    return [
        (
            (readings.device_id[i], int(readings.ts_us[i])),
            (
                frozenset((name, v[i]) for name, v in columns.items() if v[i] is not None),
                readings.extras[i],
            ),
            (
                lineage.source[i],
                int(lineage.partition[i]),
                int(lineage.offset[i]),
                int(lineage.ingested_us[i]),
                int(lineage.contract_version[i]),
                lineage.run[i],
            ),
        )
        for i in range(len(readings))
    ]


def read_all(sink: Sink, *args: Any, **options: Any) -> list[tuple[Any, ...]]:
    return [each for batch in sink.read(*args, **options) for each in rows_of(batch)]


def state_of(sink: Sink) -> dict[str, Any]:
    """All that a sink says of itself."""
    rows = read_all(sink)
    times = [identity[1] for identity, *_ in rows]
    assert times == sorted(times), "readings are in order of time"
    assert len({identity for identity, *_ in rows}) == len(rows), "each identity once"
    letters = list(sink.dead_letters())
    places = [(each.rejection.place, each.rejection.offset) for each in letters]
    assert places == sorted(set(places)), "letters are in order of place and offset, each once"
    return {
        "positions": sorted(sink.positions()),
        "rows": sorted(rows),
        "letters": letters,
        "counts": counts.summed(sink.counts()),
    }


class Model:
    """A sink of plain dicts."""

    def __init__(self) -> None:
        self.positions: dict[Place, Position] = {}
        self.epochs: dict[Place, int] = {}
        self.rows: dict[tuple[str, int], tuple[Any, ...]] = {}
        self.letters: dict[tuple[Place, int], DeadLetter] = {}
        self.counts: Counter[tuple[str, int, str]] = Counter()

    def claim(self, places: list[Place]) -> list[Claim]:
        for place in places:
            self.epochs[place] = self.epochs.get(place, 0) + 1
        return [
            Claim(self.positions.get(place, Position(place, -1)), self.epochs[place])
            for place in places
        ]

    def commit(self, work: Work) -> Outcome:
        for position, epoch in work.claims:
            place = position.place
            now = self.positions.get(place, Position(place, -1))
            if now != position or self.epochs.get(place) != epoch:
                raise Fenced
        fates = [self._put(row) for row in rows_of(work.readings)]
        conflicting = [i for i, fate in enumerate(fates) if fate == counts.CONFLICT]
        rejections = [*work.rejections, *(_conflict(work, i) for i in conflicting)]
        for each in rejections:
            letter = DeadLetter(each, work.committed_us, work.contract_version, work.run)
            self.letters.setdefault((each.place, each.offset), letter)
        self._change(work, {(_place(work, i), _offset(work, i)) for i in conflicting})
        self._count(work, fates)
        self.positions |= {position.place: position for position in work.after}
        return Outcome(
            fates.count(counts.STORED),
            fates.count(counts.DUPLICATES),
            len(work.rejections) + len(conflicting),
            len(conflicting),
        )

    def change_letters(self, changes: list[LetterChange]) -> None:
        for place, offset, state, replays in changes:
            letter = self.letters[place, offset]
            self.letters[place, offset] = replace(letter, state=state, replays=replays)

    def state(self) -> dict[str, Any]:
        totals = [Count(*key, value) for key, value in self.counts.items()]
        return {
            "positions": sorted(self.positions.values()),
            "rows": sorted((identity, *rest) for identity, rest in self.rows.items()),
            "letters": [letter for _, letter in sorted(self.letters.items())],
            "counts": counts.summed(totals),
        }

    def _put(self, row: tuple[Any, ...]) -> str:
        identity, values, lineage = row
        if identity not in self.rows:
            self.rows[identity] = (values, lineage)
            return counts.STORED
        return counts.DUPLICATES if self.rows[identity][0] == values else counts.CONFLICT

    def _change(self, work: Work, conflicting: set[tuple[Place, int]]) -> None:
        """What was replayed and conflicts stays open, for that reason now."""
        for place, offset, state, replays in work.changes:
            letter = self.letters[place, offset]
            if state == State.REPLAYED and (place, offset) in conflicting:
                rejection = replace(letter.rejection, reasons=CONFLICT)
                letter = replace(letter, rejection=rejection, state=State.OPEN, replays=replays)
            else:
                letter = replace(letter, state=state, replays=replays)
            self.letters[place, offset] = letter

    def _count(self, work: Work, fates: list[str]) -> None:
        for device_id, hour_us, name, value in work.seen:
            self.counts[device_id, hour_us, name] += value
        for i, fate in enumerate(fates):
            readings = work.readings
            at = readings.device_id[i], data.hour_of(int(readings.ts_us[i]))
            names = [fate]
            if fate == counts.CONFLICT:
                names = [counts.REJECTED, counts.reason(counts.CONFLICT)]
            for name in names:
                self.counts[(*at, name)] += 1


def _place(work: Work, i: int) -> Place:
    lineage = work.readings.lineage
    return Place(lineage.source[i], int(lineage.partition[i]))


def _offset(work: Work, i: int) -> int:
    return int(work.readings.lineage.offset[i])


def _conflict(work: Work, i: int) -> Rejection:
    readings = work.readings
    return Rejection(
        _place(work, i),
        _offset(work, i),
        work.raw[i],
        CONFLICT,
        device_id=readings.device_id[i],
        ts_us=int(readings.ts_us[i]),
    )


# ---- the comparison ----

PLACES = (data.PLACE, data.OTHER)

EVENTS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "device": st.sampled_from(["a", "b", "sensor-Ω"]),
                "second": st.sampled_from([0, 0.000001, 1, 3599, 3600, 90_000, -1e9]),
                "temperature": st.sampled_from([20.0, 20.000000000000004, -0.0, 0.0, None]),
                "firmware_version": st.sampled_from(["v1", "v2", None]),
                "extras": st.sampled_from([None, '{"a":1}', '{"a":2}']),
            }
        ),
        st.sampled_from(["missing_field", "invalid_json"]),
    ),
    max_size=6,
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.sampled_from(PLACES), EVENTS),
        st.tuples(st.just("commit both"), EVENTS),
        st.tuples(st.just("claim"), st.sampled_from(PLACES)),
        st.tuples(st.just("stale"), st.sampled_from(["epoch", "position"]), EVENTS),
        st.tuples(st.just("again")),
        st.tuples(st.just("replay"), st.integers(0, 9), EVENTS),
        st.tuples(st.just("discard"), st.integers(0, 9)),
        st.tuples(st.just("evolve")),
        st.tuples(st.just("reopen")),
    ),
    max_size=12,
)


def check_sink_against_model(fresh: Fresh, *, examples: int = 30) -> None:
    """Whatever is done to a sink, it answers and holds what the model does."""

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(steps=STEPS)
    def check(steps: list[tuple[Any, ...]]) -> None:
        with fresh() as open_sink:
            Comparison(open_sink).run(steps)

    check()


class Comparison:
    """A sink and the model, side by side."""

    def __init__(self, open_sink: Open):
        self._open = open_sink
        self._contract = data.BRIEF_1
        self._model = Model()
        self._claims: dict[Place, Claim] = {}
        self._done: Work | None = None
        self._sink: Sink

    def run(self, steps: list[tuple[Any, ...]]) -> None:
        steps = [*steps, ("reopen",)]
        while steps:
            with self._open(self._contract) as self._sink:
                self._sink.evolve(self._contract)
                assert state_of(self._sink) == self._model.state()
                while steps:
                    (name, *args), steps = steps[0], steps[1:]
                    if name == "reopen":
                        break
                    getattr(self, "_" + name.replace(" ", "_"))(*args)
                assert state_of(self._sink) == self._model.state()

    def _claim(self, *places: Place) -> None:
        claims = self._model.claim(list(places))
        assert self._sink.claim(places) == claims
        self._claims |= {claim.position.place: claim for claim in claims}

    def _claimed(self, *places: Place) -> list[Claim]:
        self._claim(*(place for place in places if place not in self._claims))
        return [self._claims[place] for place in places]

    def _commit(self, place: Place, events: list[Any]) -> None:
        self._do(self._work(self._claimed(place), events))

    def _commit_both(self, events: list[Any]) -> None:
        self._do(self._work(self._claimed(*PLACES), events))

    def _stale(self, what: str, events: list[Any]) -> None:
        claims = self._claimed(*PLACES)
        first = claims[0]
        if what == "epoch":
            stale = first._replace(epoch=first.epoch - 1)
        else:
            stale = first._replace(position=first.position._replace(next=first.position.next + 1))
        self._fenced(self._work([stale, claims[1]], events))

    def _again(self) -> None:
        """A commit that was made is not made twice, and is found."""
        if self._done is None:
            return
        if self._done.claims and self._done.after != tuple(p for p, _ in self._done.claims):
            self._fenced(self._done)

    def _replay(self, number: int, events: list[Any]) -> None:
        letters = list(self._model.letters.values())
        rows = [event for event in events if not isinstance(event, str)][:1]
        if not letters or not rows:
            return
        letter = letters[number % len(letters)]
        if letter.state == State.REPLAYED:
            return
        where = letter.rejection.place, letter.rejection.offset
        change = LetterChange(*where, State.REPLAYED, letter.replays + 1)
        row = self._row(rows[0], *where)
        made = data.work([], [row], changes=[change], contract=self._contract, seen=[])
        self._do(made)

    def _discard(self, number: int) -> None:
        letters = list(self._model.letters.values())
        if letters:
            letter = letters[number % len(letters)]
            where = letter.rejection.place, letter.rejection.offset
            state = State.OPEN if letter.state == State.DISCARDED else State.DISCARDED
            changes = [LetterChange(*where, state, letter.replays)]
            self._sink.change_letters(changes)
            self._model.change_letters(changes)

    def _evolve(self) -> None:
        self._contract = data.BRIEF
        self._sink.evolve(self._contract)

    def _do(self, made: Work) -> None:
        assert self._sink.settle(made) is None
        outcome = self._model.commit(made)
        assert self._sink.commit(made) == outcome
        assert self._sink.settle(made) == outcome
        self._done = made
        for claim, position in zip(made.claims, made.after, strict=True):
            self._claims[position.place] = claim._replace(position=position)

    def _fenced(self, made: Work) -> None:
        with pytest.raises(Fenced):
            self._model.commit(made)
        with pytest.raises(Fenced):
            self._sink.commit(made)
        if made is not self._done:
            assert self._sink.settle(made) is None

    def _work(self, claims: list[Claim], events: list[Any]) -> Work:
        rows, rejections = [], []
        nexts = {position.place: max(position.next, 0) for position, _ in claims}
        for number, event in enumerate(events):
            place = list(nexts)[number % len(nexts)]
            offset, nexts[place] = nexts[place], nexts[place] + 1 + number % 2
            if isinstance(event, str):
                rejections.append(data.rejection(offset, place=place, reasons=[Reason(event, "x")]))
            else:
                rows.append(self._row(event, place, offset))
        return data.work(claims, rows, rejections, contract=self._contract, token="t")

    def _row(self, event: dict[str, Any], place: Place, offset: int) -> data.Row:
        given = dict(event)
        if self._contract.version > 1 and given["temperature"] == 20.0:
            given["pressure"] = 1013.0
        return data.row(**given, place=place, offset=offset)
