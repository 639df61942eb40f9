"""What every sink has to do, as tests: one class a sink inherits them and says how it is opened.

    class TestStreamSink(SinkConformance):
        @pytest.fixture
        def fresh(self): return a context manager as telemetry_model.Fresh says

Not a test module.
"""

from __future__ import annotations

import numpy as np
import pytest
import telemetry_data as data
from telemetry_model import check_sink_against_model, read_all, state_of

from kvstore.errors import Fenced
from kvstore.telemetry import counts
from kvstore.telemetry.contract import Contract, ContractField
from kvstore.telemetry.records import LetterChange, Outcome, Position, Reason, State

EXAMPLES = 20


class SinkConformance:
    """The tests. ``open_sink(contract)`` opens a sink on one and the same target."""

    examples = EXAMPLES

    @pytest.fixture
    def open_sink(self, fresh):
        with fresh() as open_sink:
            yield open_sink

    @pytest.fixture
    def sink(self, open_sink):
        with open_sink(data.BRIEF) as sink:
            sink.evolve(data.BRIEF)
            yield sink

    # ---- the model ----

    def test_it_does_as_the_model(self, fresh):
        check_sink_against_model(fresh, examples=self.examples)

    # ---- positions, claims, fences ----

    def test_a_new_sink_is_empty(self, sink):
        assert state_of(sink) == {"positions": [], "rows": [], "letters": [], "counts": []}

    def test_a_place_never_read_is_claimed_at_minus_one(self, sink):
        claims = sink.claim([data.PLACE, data.OTHER])
        assert [position for position, _ in claims] == [
            Position(data.PLACE, -1),
            Position(data.OTHER, -1),
        ]
        assert [claim.epoch for claim in sink.claim([data.OTHER])] == [claims[1].epoch + 1]

    def test_a_claim_gives_the_committed_position_with_its_token(self, open_sink):
        with open_sink(data.BRIEF) as sink:
            sink.evolve(data.BRIEF)
            claim = sink.claim([data.PLACE])[0]
            sink.commit(data.work(claim, [data.row(offset=7)], token="0f:128"))
        with open_sink(data.BRIEF) as sink:
            again = sink.claim([data.PLACE])[0]
            assert again.position == Position(data.PLACE, 8, "0f:128")
            assert again.epoch > claim.epoch
            assert sink.positions() == [again.position]
            assert sink.positions(data.PLACE.source) == [again.position]
            assert sink.positions(data.OTHER.source) == []

    def test_a_place_that_was_claimed_and_never_committed_has_no_position(self, sink):
        sink.claim([data.PLACE])
        assert sink.positions() == []

    def test_an_earlier_claim_commits_nothing(self, sink):
        old = sink.claim([data.PLACE])[0]
        new = sink.claim([data.PLACE])[0]
        with pytest.raises(Fenced):
            sink.commit(data.work(old, [data.row()], [data.rejection(2)]))
        assert state_of(sink) == {"positions": [], "rows": [], "letters": [], "counts": []}
        assert sink.commit(data.work(new, [data.row()])).stored == 1

    def test_one_stale_claim_among_several_undoes_all(self, sink):
        first, other = sink.claim([data.PLACE, data.OTHER])
        sink.claim([data.OTHER])
        rows = [data.row(offset=1), data.row("b", place=data.OTHER, offset=1)]
        with pytest.raises(Fenced):
            sink.commit(data.work([first, other], rows))
        assert read_all(sink) == []

    def test_a_commit_is_not_made_twice(self, sink):
        made = data.work(sink.claim([data.PLACE]), [data.row()], [data.rejection(2)])
        sink.commit(made)
        before = state_of(sink)
        with pytest.raises(Fenced):
            sink.commit(made)
        assert state_of(sink) == before

    def test_positions_move_without_readings(self, sink):
        claim = sink.claim([data.PLACE])[0]
        assert sink.commit(data.work(claim, next_=100)) == Outcome(0, 0, 0, 0)
        assert sink.positions() == [Position(data.PLACE, 100)]

    # ---- settling ----

    def test_a_commit_is_found_by_its_id(self, open_sink):
        with open_sink(data.BRIEF) as sink:
            sink.evolve(data.BRIEF)
            claim = sink.claim([data.PLACE])[0]
            rows = [data.row(), data.row(offset=2), data.row(offset=3, temperature=1.0)]
            made = data.work(claim, rows, [data.rejection(4)])
            assert sink.settle(made) is None
            outcome = sink.commit(made)
            assert outcome == Outcome(stored=1, duplicates=1, rejected=2, conflicts=1)
            assert sink.settle(made) == outcome
            assert sink.settle(data.next_work(made)) is None
        with open_sink(data.BRIEF) as sink:
            assert sink.settle(made) == outcome

    # ---- duplicates and conflicts ----

    def test_a_reading_sent_again_changes_nothing(self, sink):
        made = data.work(sink.claim([data.PLACE]), [data.row(pressure=1013.0)])
        sink.commit(made)
        before = read_all(sink)
        again = data.next_work(made, [data.row(pressure=1013.0, offset=2)] * 2)
        assert sink.commit(again) == Outcome(0, 2, 0, 0)
        assert read_all(sink) == before
        assert list(sink.dead_letters()) == []

    @pytest.mark.parametrize(
        ("first", "second", "same"),
        [
            ({"temperature": 0.0}, {"temperature": -0.0}, True),
            ({"temperature": 20.0}, {"temperature": 20.000000000000004}, False),
            ({"temperature": 20.0}, {"temperature": None}, False),
            ({"pressure": None}, {}, True),
            ({"pressure": 1000.0}, {}, False),
            ({"firmware_version": "v1"}, {"firmware_version": "v1 "}, False),
            ({"firmware_version": ""}, {"firmware_version": None}, False),
            ({"extras": '{"a":1}'}, {"extras": '{"a":1}'}, True),
            ({"extras": '{"a":1}'}, {"extras": '{"a":1.0}'}, False),
            ({"extras": '{"a":1}'}, {}, False),
            ({"temperature": 1.0, "humidity": 2.0}, {"temperature": 2.0, "humidity": 1.0}, False),
            ({"firmware_version": "\u00e9"}, {"firmware_version": "e\u0301"}, False),
        ],
    )
    @pytest.mark.parametrize("apart", ["one commit", "two commits", "two sessions"])
    def test_equality_of_values(self, open_sink, first, second, same, apart):
        rows = [data.row(offset=1, **first), data.row(offset=2, **second)]
        expected = Outcome(1, 1, 0, 0) if same else Outcome(1, 0, 1, 1)
        with open_sink(data.BRIEF) as sink:
            sink.evolve(data.BRIEF)
            claim = sink.claim([data.PLACE])[0]
            if apart == "one commit":
                assert sink.commit(data.work(claim, rows)) == expected
                return
            made = data.work(claim, rows[:1])
            sink.commit(made)
            if apart == "two commits":
                total = sink.commit(data.next_work(made, rows[1:]))
                assert total == expected._replace(stored=0)
                return
        with open_sink(data.BRIEF) as sink:
            total = sink.commit(data.work(sink.claim([data.PLACE]), rows[1:]))
            assert total == expected._replace(stored=0)

    def test_identity_is_exact_to_the_microsecond(self, sink):
        rows = [data.row("a", 0), data.row("a", 0.000001), data.row("A", 0), data.row("a ", 0)]
        assert sink.commit(data.work(sink.claim([data.PLACE]), rows)).stored == 4

    def test_of_a_conflict_the_first_stays_and_the_other_becomes_a_dead_letter(self, sink):
        claim = sink.claim([data.PLACE])[0]
        rows = [data.row(offset=5), data.row(offset=6, temperature=-7.0)]
        sink.commit(data.work(claim, rows))
        assert [lineage[2] for _, _, lineage in read_all(sink)] == [5]
        (letter,) = sink.dead_letters()
        rejected = letter.rejection
        assert (rejected.place, rejected.offset) == (data.PLACE, 6)
        assert rejected.payload == data.raw(rows[1])
        assert [reason.code for reason in rejected.reasons] == [counts.CONFLICT]
        assert (rejected.device_id, rejected.ts_us) == (rows[1].device_id, rows[1].ts_us)
        assert letter.state == State.OPEN
        assert letter.first_seen_us == data.NOW_US

    def test_a_conflict_read_again_makes_no_second_letter(self, sink):
        """Somebody set the position back: the same place is read a second time."""
        claim = sink.claim([data.PLACE])[0]
        rows = [data.row(offset=5), data.row(offset=6, temperature=-7.0)]
        sink.commit(data.work(claim, rows, [data.rejection(7)]))
        letters = list(sink.dead_letters())
        back = data.work(sink.claim([data.PLACE]), next_=5)
        sink.commit(back)
        sink.commit(data.next_work(back, rows, [data.rejection(7)]))
        assert list(sink.dead_letters()) == letters

    # ---- values and schemas ----

    def test_values_come_back_exactly(self, sink):
        odd = [5e-324, 1.7976931348623157e308, 0.1, -273.15, 2.0**53 + 2, 1e22]
        rows = [data.row(second=n, offset=n, temperature=v) for n, v in enumerate(odd)]
        text = "ünï€ \U0001f600 'quoted\", \\ tab\t and new\nline"
        rows.append(data.row("späce d", 99, offset=99, firmware_version=text, extras='{"ü":"€"}'))
        sink.commit(data.work(sink.claim([data.PLACE]), rows))
        found = {values for _, values, _ in read_all(sink)}
        assert found == {(frozenset(each.values.items()), each.extras) for each in rows}

    def test_lineage_is_kept(self, sink):
        each = data.row(place=data.OTHER, offset=2**40)
        sink.commit(data.work(sink.claim([data.OTHER]), [each], run="run-x"))
        ((_, _, lineage),) = read_all(sink)
        assert lineage == (*data.OTHER, 2**40, data.NOW_US, data.BRIEF.version, "run-x")

    def test_a_contract_that_grew_gets_nullable_columns(self, open_sink):
        with open_sink(data.BRIEF_1) as sink:
            sink.evolve(data.BRIEF_1)
            old = data.row(second=1)
            sink.commit(data.work(sink.claim([data.PLACE]), [old], contract=data.BRIEF_1))
        grown = Contract(
            3,
            (
                *data.BRIEF.values,
                ContractField("battery", "integer", since=3),
                ContractField("note", "string", since=3),
            ),
        )
        with open_sink(grown) as sink:
            sink.evolve(grown)
            sink.evolve(grown)  # nothing to do
            new = data.row(second=2, offset=2, battery=87.0, note="ok", pressure=1000.0)
            again = data.row(second=1, offset=3)
            made = data.work(sink.claim([data.PLACE]), [new, again], contract=grown)
            assert sink.commit(made) == Outcome(1, 1, 0, 0)
            (batch,) = [batch for batch in sink.read() if len(batch)][:1] or [None]
            assert set(batch.values) >= {field.name for field in grown.values}
            assert [dict(values) for _, (values, _), _ in read_all(sink)] == [
                dict(old.values),
                dict(new.values),
            ]

    # ---- reading ----

    def test_reading_takes_the_start_and_leaves_the_stop(self, sink):
        rows = [data.row(device, n, offset=n) for n in range(5) for device in ("a", "b")]
        sink.commit(data.work(sink.claim([data.PLACE]), rows[::-1]))
        ends = data.BASE_US + data.SECOND_US, data.BASE_US + 3 * data.SECOND_US
        found = [identity for identity, *_ in read_all(sink, *ends)]
        assert sorted(found) == [(d, ends[0] + n * data.SECOND_US) for d in "ab" for n in (0, 1)]
        assert [i for i, *_ in read_all(sink, *ends, device_id="b")] == [
            ("b", ends[0]),
            ("b", ends[0] + data.SECOND_US),
        ]
        assert len(read_all(sink, ends[0])) == 8
        assert len(read_all(sink, None, ends[0])) == 2
        assert read_all(sink, device_id="nobody") == []

    def test_late_readings_come_in_order_of_time(self, sink):
        made = data.work(sink.claim([data.PLACE]), [data.row(second=s, offset=s) for s in (9, 5)])
        sink.commit(made)
        sink.commit(data.next_work(made, [data.row(second=s, offset=20 + s) for s in (7, 1, 12)]))
        seconds = [(ts - data.BASE_US) // data.SECOND_US for (_, ts), *_ in read_all(sink)]
        assert seconds == [1, 5, 7, 9, 12]

    def test_many_readings_in_bounded_batches(self, sink):
        rows = [data.row(f"d{n % 7}", n // 7, offset=n) for n in range(3000)]
        made = data.work(sink.claim([data.PLACE]), rows)
        assert sink.commit(made).stored == 3000
        again = [each._replace(offset=5000 + each.offset) for each in rows]
        assert sink.commit(data.next_work(made, again)).duplicates == 3000
        assert sum(map(len, sink.read())) == 3000

    # ---- dead letters ----

    def test_a_dead_letter_keeps_all_of_its_event(self, open_sink):
        reasons = [
            Reason("out_of_range", "temperature", "999"),
            Reason("missing_field", "humidity"),
        ]
        payload = bytes(range(256)) * 3
        rejections = [
            data.rejection(1, payload=payload, reasons=reasons, device_id="a", ts_us=data.BASE_US),
            data.rejection(2, payload=None),
            data.rejection(3, payload=b""),
        ]
        with open_sink(data.BRIEF) as sink:
            sink.evolve(data.BRIEF)
            sink.commit(data.work(sink.claim([data.PLACE]), [], rejections))
        with open_sink(data.BRIEF) as sink:
            letters = list(sink.dead_letters())
        assert [letter.rejection for letter in letters] == rejections
        assert {(each.state, each.replays, each.first_seen_us, each.run) for each in letters} == {
            (State.OPEN, 0, data.NOW_US, "run-1")
        }
        assert {letter.contract_version for letter in letters} == {2}

    def test_dead_letters_can_be_selected(self, sink):
        there = [
            data.rejection(1, reasons=[Reason("a_code"), Reason("b_code")]),
            data.rejection(2, reasons=[Reason("b_code")]),
            data.rejection(1, place=data.OTHER, reasons=[Reason("c_code")]),
        ]
        sink.commit(data.work(sink.claim([data.PLACE, data.OTHER]), [], there))
        sink.change_letters([LetterChange(data.PLACE, 2, State.DISCARDED, 0)])

        def found(**wanted):
            letters = sink.dead_letters(**wanted)
            return [(each.rejection.place, each.rejection.offset) for each in letters]

        assert found() == [(data.PLACE, 1), (data.PLACE, 2), (data.OTHER, 1)]
        assert found(reason="b_code") == [(data.PLACE, 1), (data.PLACE, 2)]
        assert found(reason="b_code", state=State.OPEN) == [(data.PLACE, 1)]
        assert found(state=State.DISCARDED) == [(data.PLACE, 2)]
        assert found(place=data.OTHER) == [(data.OTHER, 1)]
        assert found(offset=1) == [(data.PLACE, 1), (data.OTHER, 1)]
        assert found(place=data.PLACE, offset=2) == [(data.PLACE, 2)]
        assert found(reason="nothing") == []

    def test_a_replay_stores_its_row_and_changes_its_letter_in_one_commit(self, sink):
        claim = sink.claim([data.PLACE])[0]
        refused = data.rejection(4, device_id="sensor-1", ts_us=data.BASE_US)
        sink.commit(data.work(claim, [], [refused]))
        before = sink.positions()
        change = LetterChange(data.PLACE, 4, State.REPLAYED, 1)
        replay = data.work([], [data.row(offset=4)], changes=[change], seen=[])
        assert sink.commit(replay) == Outcome(1, 0, 0, 0)
        (letter,) = sink.dead_letters()
        assert (letter.state, letter.replays) == (State.REPLAYED, 1)
        assert letter.rejection == refused
        assert sink.positions() == before
        assert sink.settle(replay) == Outcome(1, 0, 0, 0)

    def test_a_replay_that_conflicts_stays_open_for_that_reason(self, sink):
        claim = sink.claim([data.PLACE])[0]
        refused = data.rejection(4)
        sink.commit(data.work(claim, [data.row(offset=3)], [refused]))
        change = LetterChange(data.PLACE, 4, State.REPLAYED, 1)
        row = data.row(offset=4, temperature=5.0)
        assert sink.commit(data.work([], [row], changes=[change], seen=[])) == Outcome(0, 0, 1, 1)
        (letter,) = sink.dead_letters()
        assert (letter.state, letter.replays) == (State.OPEN, 1)
        assert letter.rejection.payload == refused.payload
        assert [reason.code for reason in letter.rejection.reasons] == [counts.CONFLICT]
        assert list(sink.dead_letters(reason=counts.CONFLICT)) == [letter]
        assert list(sink.dead_letters(reason=refused.reasons[0].code)) == []

    def test_letters_are_discarded_and_opened_again(self, open_sink):
        with open_sink(data.BRIEF) as sink:
            sink.evolve(data.BRIEF)
            sink.commit(data.work(sink.claim([data.PLACE]), [], [data.rejection(1)]))
            for state in (State.DISCARDED, State.OPEN, State.DISCARDED):
                sink.change_letters([LetterChange(data.PLACE, 1, state, 0)])
                assert [letter.state for letter in sink.dead_letters()] == [state]
        with open_sink(data.BRIEF) as sink:
            assert [letter.state for letter in sink.dead_letters()] == [State.DISCARDED]

    # ---- counts ----

    def test_counts_add_up_by_device_and_hour(self, sink):
        claim = sink.claim([data.PLACE])[0]
        rows = [
            data.row("a", 0, offset=1),
            data.row("a", 0, offset=2),
            data.row("a", 0, offset=3, temperature=1.0),
            data.row("a", 3600, offset=4),
            data.row("b", 0, offset=5),
        ]
        made = data.work(claim, rows, [data.rejection(6)])
        sink.commit(made)
        sink.commit(data.next_work(made, [data.row("b", 0, offset=7)]))
        hour = data.hour_of(data.BASE_US)
        found = {(c.device_id, c.hour_us, c.name): c.value for c in counts.summed(sink.counts())}
        assert found == {
            ("a", hour, "received"): 3,
            ("a", hour, "stored"): 1,
            ("a", hour, "duplicates"): 1,
            ("a", hour, "rejected"): 1,
            ("a", hour, "reason:conflict"): 1,
            ("a", hour + counts.HOUR_US, "received"): 1,
            ("a", hour + counts.HOUR_US, "stored"): 1,
            ("b", hour, "received"): 2,
            ("b", hour, "stored"): 1,
            ("b", hour, "duplicates"): 1,
            ("", data.hour_of(data.NOW_US), "received"): 1,
            ("", data.hour_of(data.NOW_US), "rejected"): 1,
            ("", data.hour_of(data.NOW_US), "reason:invalid_utf8"): 1,
        }
        later = sink.counts(hour + 1, hour + counts.HOUR_US + 1)
        assert {(c.device_id, c.name) for c in later} == {("a", "received"), ("a", "stored")}
        assert {c.hour_us for c in sink.counts(None, hour + 1)} == {hour}

    def test_received_is_stored_and_duplicates_and_rejected(self, sink):
        rng = np.random.default_rng(1)
        claim = sink.claim([data.PLACE])[0]
        made = data.work(claim, next_=0)
        sink.commit(made)
        for commit in range(4):
            rows = [
                data.row(
                    f"d{rng.integers(3)}",
                    int(rng.integers(20)),
                    offset=commit * 100 + n,
                    temperature=float(rng.integers(2)),
                )
                for n in range(30)
            ]
            made = data.next_work(made, rows, [data.rejection(commit * 100 + 50)])
            sink.commit(made)
        totals: dict[str, int] = {}
        for count in sink.counts():
            totals[count.name] = totals.get(count.name, 0) + count.value
        assert totals["received"] == 4 * 31
        assert totals["received"] == totals["stored"] + totals["duplicates"] + totals["rejected"]
        assert totals["rejected"] == len(list(sink.dead_letters()))
