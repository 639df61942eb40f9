"""Validation: all reasons of an event, and a fast way that agrees with the slow one."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore.telemetry import decode, examine, stamps, validate
from kvstore.telemetry.contract import Contract, ContractField, brief
from kvstore.telemetry.examine import Limits
from kvstore.telemetry.records import Chunk, Place, Position
from kvstore.telemetry.simulate import SPOILT, too_large
from kvstore.telemetry.validate import Validator

NOW_US = 1_800_000_000_000_000  # January 2027
PLACE = Place("file:/x", 3)
FIRST = b"""{
  "device_id": "sensor-123",
  "timestamp": "2025-01-20T10:15:30Z",
  "temperature": 21.4,
  "humidity": 68,
  "firmware_version": "v1.2.0"
}"""
SECOND = b"""{
  "device_id": "sensor-123",
  "timestamp": "2025-01-20T10:16:00Z",
  "temperature": 21.6,
  "humidity": 67,
  "pressure": 1013,
  "firmware_version": "v1.3.0"
}"""
# One field of each kind that a contract can have.
ALL_KINDS = Contract(
    3,
    (
        ContractField("needed", "number", required=True, minimum=-1, maximum=1),
        ContractField("text", "string", required=True),
        ContractField("maybe", "number", minimum=0),
        ContractField("whole", "integer", maximum=10),
        ContractField("count", "integer", required=True),
        ContractField("note", "string"),
    ),
    latency_s=10.0,
)


def chunk(payloads, **more):
    offsets = np.arange(1, 2 * len(payloads) + 1, 2)
    after = Position(PLACE, 2 * len(payloads) + 1)
    return Chunk(PLACE, offsets, payloads, after, **more)


def validated(payloads, contract=None, **options):
    validator = Validator(contract or brief(), now_us=lambda: NOW_US, **options)
    return validator.validate(chunk(payloads), run="r1")


def event(**changes):
    found = json.loads(SECOND) | changes
    return {name: value for name, value in found.items() if value is not ...}


def encoded(**changes):
    return json.dumps(event(**changes)).encode()


def codes(payload, **options):
    """The reasons of one event as (code, field)."""
    done = validated([payload], **options)
    assert len(done.readings) + len(done.rejections) == 1
    return [reason[:2] for each in done.rejections for reason in each.reasons]


def totals(seen):
    found = Counter()
    for count in seen:
        found[count.name] += count.value
    return dict(found)


# ---- what comes out ----


def test_the_brief_s_two_events_pass_both_versions():
    old = validated([FIRST, SECOND], brief(1)).readings
    new = validated([FIRST, SECOND]).readings
    assert old.device_id == new.device_id == ["sensor-123"] * 2
    assert new.ts_us.tolist() == old.ts_us.tolist() == [1737368130000000, 1737368160000000]
    assert new.values["temperature"].tolist() == [21.4, 21.6]
    assert new.values["humidity"].tolist() == [68.0, 67.0]
    assert new.values["firmware_version"] == ["v1.2.0", "v1.3.0"]
    assert np.array_equal(new.values["pressure"], [np.nan, 1013.0], equal_nan=True)
    assert list(new.values) == ["temperature", "humidity", "firmware_version", "pressure"]
    assert new.extras == [None, None]
    assert "pressure" not in old.values
    assert old.extras == [None, '{"pressure":1013}']


def test_each_reading_carries_where_it_came_from():
    done = validated([FIRST, b"{", SECOND])
    lineage = done.readings.lineage
    assert lineage.source == ["file:/x"] * 2
    assert lineage.partition.tolist() == [3, 3]
    assert lineage.offset.tolist() == [1, 5]
    assert lineage.ingested_us.tolist() == [NOW_US] * 2
    assert lineage.contract_version.tolist() == [2, 2]
    assert lineage.run == ["r1"] * 2
    assert done.raw == [FIRST, SECOND]
    (rejection,) = done.rejections
    assert (rejection.place, rejection.offset, rejection.payload) == (PLACE, 3, b"{")


def test_a_rejection_keeps_key_and_headers():
    headers = ((("a", b"1"),), (("b", None),))
    validator = Validator(brief(), now_us=lambda: NOW_US)
    done = validator.validate(chunk([FIRST, b"{"], keys=[b"k", None], headers=headers), run="r")
    assert (done.rejections[0].key, done.rejections[0].headers) == (None, (("b", None),))


def test_a_chunk_of_nothing_gives_nothing():
    done = validated([])
    assert (len(done.readings), done.rejections, done.seen) == (0, [], [])
    assert list(done.readings.values) == [field.name for field in brief().values]


# ---- reasons ----

REQUIRED = ("device_id", "timestamp", "temperature", "humidity", "firmware_version")
EVERYTHING_WRONG = b"""{"device_id":"","timestamp":"now","temperature":99,"humidity":"wet",
    "firmware_version":"\\u0000","pressure":1,"pressure":2}"""
EVERY_REASON = [
    ("nul", "firmware_version"),
    ("duplicate_key", "pressure"),
    ("device_id", "device_id"),
    ("timestamp", "timestamp"),
    ("range", "temperature"),
    ("type", "humidity"),
    ("range", "pressure"),
]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (None, [("empty", "")]),
        (b"", [("empty", "")]),
        (b" \n\t\r", [("empty", "")]),
        (too_large(event()), [("too_large", "")]),
        (b"\xff", [("utf8", ""), ("json", "")]),
        (b"\xef\xbb\xbf" + FIRST, [("json", "")]),
        (b'"x"', [("not_object", "")]),
        (b"null", [("not_object", "")]),
        (FIRST + FIRST, [("json", "")]),
        (encoded(temperature=float("nan")), [("json", "")]),
        (encoded(extra=float("inf")), [("json", "")]),
        (FIRST.replace(b"68", b"068"), [("json", "")]),
        (FIRST.replace(b"}", b",}"), [("json", "")]),
        (encoded(x=json.loads("[" * 32 + "]" * 32)), [("json", "x")]),
        (FIRST.replace(b"68", b'"' + b"[" * 100_000), [("json", "")]),
        (FIRST.replace(b"68", b"[" * 100_000 + b"]" * 100_000), [("json", "")]),
        (FIRST.replace(b'"hum', b'"temperature":21.4,"hum'), [("duplicate_key", "temperature")]),
        (
            FIRST.replace(b'"hum', b'"temp\\u0065rature":21.4,"hum'),
            [("duplicate_key", "temperature")],
        ),
        (FIRST.replace(b'"hum', b'"a":1,"a":1,"hum'), [("duplicate_key", "a")]),
        (FIRST.replace(b'"hum', b'"a":[{"b":1,"b":1}],"hum'), [("duplicate_key", "a.b")]),
        (encoded(firmware_version="v\0"), [("nul", "firmware_version")]),
        (encoded(**{"a\0": 1}), [("nul", r"a\x00")]),
        (encoded(a={"b": ["\0"]}), [("nul", "a.b")]),
        (FIRST.replace(b"v1", b"\\ud800"), [("utf8", "firmware_version")]),
        (FIRST.replace(b'"hum', b'"\\udfff":1,"hum'), [("utf8", r"\udfff")]),
        (FIRST.replace(b'"hum', b'"a":"\xff","hum'), [("utf8", "")]),
        (FIRST.replace(b'"hum', b'"\xc0\x80":1,"hum'), [("utf8", "")]),
        (encoded(temperature=...), [("missing", "temperature")]),
        (encoded(temperature=None), [("missing", "temperature")]),
        (
            encoded(device_id=..., timestamp=None),
            [("missing", "device_id"), ("missing", "timestamp")],
        ),
        (encoded(device_id=7), [("type", "device_id")]),
        (encoded(timestamp=1737368130), [("type", "timestamp")]),
        (encoded(temperature="21.4"), [("type", "temperature")]),
        (encoded(temperature=True), [("type", "temperature")]),
        (encoded(humidity=[1]), [("type", "humidity")]),
        (encoded(firmware_version=1.2), [("type", "firmware_version")]),
        (encoded(pressure={}), [("type", "pressure")]),
        (FIRST.replace(b"68", b"1e400"), [("number", "humidity")]),
        (FIRST.replace(b"68", b"9" * 5000), [("number", "humidity")]),
        (FIRST.replace(b"68", b"9" * 320), [("number", "humidity")]),
        (FIRST.replace(b'"hum', b'"a":[-1e999],"hum'), [("number", "a")]),
        (encoded(humidity=100.00000000000001), [("range", "humidity")]),
        (encoded(humidity=-1e-300), [("range", "humidity")]),
        (encoded(pressure=0), [("range", "pressure")]),
        (encoded(device_id=""), [("device_id", "device_id")]),
        (encoded(device_id="x" * 201), [("device_id", "device_id")]),
        (encoded(timestamp=""), [("timestamp", "timestamp")]),
        (encoded(timestamp="2025-02-29T00:00:00Z"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2025-01-20T24:00:00Z"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2016-12-31T23:59:60Z"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2025-01-20T10:15:30+24:00"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2025-01-20T10:15:30+01:60"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2025-01-20T10:15:30+0100"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2025-01-20"), [("timestamp", "timestamp")]),
        (encoded(timestamp="1677-12-31T23:59:59Z"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2262-01-01T00:00:00Z"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2025-01-20T10:15:30.Z"), [("timestamp", "timestamp")]),
        (encoded(timestamp="\uff12025-01-20T10:15:30Z"), [("timestamp", "timestamp")]),
        (encoded(timestamp="2025-01-20T10:15:30"), [("offset", "timestamp")]),
        (encoded(timestamp="2025-01-20T10:15:30.5"), [("offset", "timestamp")]),
        (encoded(timestamp="2199-01-01T00:00:00Z"), [("future", "timestamp")]),
        (b"{}", [("missing", name) for name in REQUIRED]),
        (EVERYTHING_WRONG, EVERY_REASON),
    ],
)
def test_an_event_is_told_everything_that_is_wrong_with_it(payload, expected):
    assert codes(payload) == expected
    assert all(code in validate.CODES for code, _ in expected)


@pytest.mark.parametrize(
    "payload",
    [
        FIRST,
        SECOND,
        encoded(pressure=None),
        encoded(pressure=...),
        encoded(humidity=100, temperature=-90, pressure=300),
        encoded(device_id="x" * 200),
        encoded(device_id="größe 7"),
        encoded(firmware_version=""),
        encoded(firmware_version="ü" * 300),
        encoded(firmware_version='a"b\\c\n'),
        encoded(x=json.loads("[" * 31 + "]" * 31)),
        encoded(x=2**60),
        encoded(timestamp="2025-01-20T10:15:30.123456789Z"),
        encoded(timestamp="2025-01-20t10:15:30z"),
        encoded(timestamp="2025-01-20 10:15:30-07:30"),
        encoded(timestamp="2024-02-29T00:00:00Z"),
        encoded(timestamp="1678-01-01T00:00:00Z"),
        b" \r\n" + FIRST + b"\t",
    ],
)
def test_what_is_allowed_passes(payload):
    assert codes(payload) == []


def test_the_list_of_reasons_of_one_event_is_bounded():
    payload = json.dumps({f"k\0{n}": 1 for n in range(1000)}).encode()
    (rejection,) = validated([payload]).rejections
    assert len(rejection.reasons) == examine.REASONS_MAX


def test_found_values_are_short_and_fit_a_terminal():
    (rejection,) = validated([encoded(device_id="\x1b[31m" * 100)]).rejections
    (reason,) = rejection.reasons
    assert reason.found.startswith("\\x1b[31m")
    assert len(reason.found) <= examine.FOUND_CHARS_MAX


def test_the_clock_decides_what_is_ahead_and_what_is_old():
    at = "2027-01-15T08:00:00Z"  # NOW_US
    assert codes(encoded(timestamp=at), future_limit_s=0) == []
    assert codes(encoded(timestamp=at.replace("00Z", "00.000001Z")), future_limit_s=0) == [
        ("future", "timestamp")
    ]
    assert codes(encoded(timestamp="2199-01-01T00:00:00Z"), future_limit_s=None) == []
    assert codes(FIRST, age_limit_s=3600) == [("old", "timestamp")]
    assert codes(encoded(timestamp="2027-01-15T07:00:00Z"), age_limit_s=3600) == []


@pytest.mark.parametrize(
    ("policy", "extras", "expected"),
    [
        ("keep", '{"x":1}', []),
        ("drop", None, []),
        ("reject", None, [("unknown_field", "x")]),
    ],
)
def test_unknown_fields_are_kept_dropped_or_rejected(policy, extras, expected):
    contract = dataclasses.replace(brief(), unknown=policy)
    for value in (1, 1.0):  # both ways
        assert codes(encoded(x=value, y=None), contract=contract)[:1] == expected
    if not expected:
        done = validated([encoded(x=1)], contract)
        assert done.readings.extras == [extras]
        assert totals(done.seen)["unknown:x"] == 1


def test_extras_have_one_text_however_they_were_written():
    ways = [
        b'"b":68,"a":[1.0,{"d":-0.0,"c":"\\u00fc"}]',
        b'"a": [1, {"c":"\xc3\xbc", "d":0}], "b":68.0',
    ]
    found = [FIRST.replace(b'"hum', way + b',"z":null,"hum') for way in ways]
    assert validated(found).readings.extras == ['{"a":[1,{"c":"ü","d":0}],"b":68}'] * 2


def test_values_are_equal_after_typing():
    minus = encoded(temperature=-0.0, humidity=68.0)
    plain = encoded(temperature=0, humidity=68)
    values = validated([minus, plain]).readings.values
    assert values["temperature"].tobytes() == np.zeros(2).tobytes()
    assert values["humidity"].tobytes() == np.full(2, 68.0).tobytes()


@pytest.mark.parametrize("spoilt", SPOILT)
def test_each_way_to_spoil_an_event_is_found(spoilt):
    assert codes(spoilt(event()))


def test_the_ways_to_spoil_an_event_cover_every_reason_of_the_brief_s_contract():
    found = {code for spoilt in (*SPOILT, too_large) for code, _ in codes(spoilt(event()))}
    assert found == set(validate.CODES) - {"old", "unknown_field"}


# ---- the fast way and the slow one ----

TIMES = [
    "2025-01-20T10:15:30Z",
    "2025-01-20T10:15:30.5Z",
    "2025-01-20T10:15:30.1234567+01:00",
    "2025-01-20T10:15:30-01:30",
    "2025-01-20T10:15:30",
    "2025-13-20T10:15:30Z",
    "2199-01-20T10:15:30Z",
    "\uff12025-01-20T10:15:30Z",
]
VALUES = {
    "device_id": ["a", "sensor-1", "ü", "", 'q"', "n\0", 7, None],
    "timestamp": [*TIMES, "x", "", 5, None],
    "needed": [0, -0.0, 0.25, 1, 1.5, -2, "1", True, None, 10**30],
    "text": ["t", "", "ü", "\\", "\0", 1, None, ["t"]],
    "maybe": [0, 1e300, -1e-300, None, "x", 2**53 + 1],
    "whole": [1, 10.0, 1.5, 11, -(2**53), -(2**53) - 2, None, False],
    "count": [1, 2**53, 2**53 + 2, 2**64, 0.5, None],
    "note": ["n", "\x7f", None, 1, '"'],
}
UNKNOWN = ["x", "ü", "needed ", "", 'k"', "n\0"]
ANYTHING = [1, 1.0, 0.1, -0.0, "s", "\0", '"', None, True, 2**53 + 1, {"a": 1}, [], [[]]]
PAIRS = st.one_of(
    st.tuples(st.sampled_from(UNKNOWN), st.sampled_from(ANYTHING)),
    *(st.tuples(st.just(name), st.sampled_from(values)) for name, values in VALUES.items()),
)
GOOD = [
    ("device_id", "d1"),
    ("timestamp", "2025-01-20T10:15:30Z"),
    ("needed", 0.5),
    ("text", "t"),
    ("count", 3),
]
PATCHES = [b"", b'"', b"\\", b",", b"\xff", b"\xc3", b"\0", b"{", b"}", b"1", b"e9"]


@st.composite
def payloads(draw):
    """An event, mostly near a good one, as any writer might write it, or cut and patched."""
    pairs = draw(st.one_of(st.just(GOOD), st.permutations(GOOD), st.just([])))
    pairs = [*pairs, *draw(st.lists(PAIRS, max_size=4))]
    if draw(st.booleans()):
        pairs = list(dict(pairs).items())
    space = draw(st.sampled_from(["", " ", "\n", "\t"]))
    written = json.JSONEncoder(ensure_ascii=draw(st.booleans())).encode
    parts = [f"{space}{written(name)}:{written(value)}" for name, value in pairs]
    text = ("{" + ",".join(parts) + "}").encode()
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(PATCHES)) + text[at + draw(st.integers(0, 2)) :]
    return text


def one_by_one(found, contract):
    """What the slow way alone says of each event."""
    limits = Limits(NOW_US + 300_000_000, None)
    return [examine.examine(payload, contract, limits) for payload in found]


def assert_agree(found, contract):
    done = validated(found, contract)
    expected = one_by_one(found, contract)
    good = [each for each in expected if not each.reasons]
    offsets = [1 + 2 * at for at, each in enumerate(expected) if not each.reasons]
    readings = done.readings
    assert readings.lineage.offset.tolist() == offsets
    assert list(done.raw) == [found[offset // 2] for offset in offsets]
    assert readings.device_id == [each.device_id for each in good]
    assert readings.ts_us.tolist() == [each.ts_us for each in good]
    assert readings.extras == [each.extras for each in good]
    for field in contract.values:
        column, slow = readings.values[field.name], [each.values.get(field.name) for each in good]
        if field.is_number:
            assert column.tobytes() == np.array(slow, np.float64).tobytes()
        else:
            assert column == slow
    bad = [(1 + 2 * at, each) for at, each in enumerate(expected) if each.reasons]
    assert [each.offset for each in done.rejections] == [offset for offset, _ in bad]
    for rejection, (_, each) in zip(done.rejections, bad, strict=True):
        assert rejection.reasons == tuple(each.reasons)
        assert (rejection.device_id, rejection.ts_us) == (each.device_id, each.ts_us)
    found_totals = totals(done.seen)
    assert found_totals.get("received", 0) == len(found)
    assert found_totals.get("rejected", 0) == len(bad)
    assert found_totals.get("finer", 0) == sum(each.finer for each in good)
    assert found_totals.get("drift", 0) == sum(bool(each.unknown) for each in good)
    names = Counter(f"unknown:{name}" for each in good for name in each.unknown)
    assert {name: n for name, n in found_totals.items() if name.startswith("unknown:")} == names
    reasons = Counter(f"reason:{code}" for _, e in bad for code in {r.code for r in e.reasons})
    assert {name: n for name, n in found_totals.items() if name.startswith("reason:")} == reasons


def assert_all_agree(samples):
    for sample in samples:
        assert_agree([sample], brief())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(validate, "BLOCK_EVENTS", 7)


@pytest.mark.parametrize("policy", ["keep", "drop", "reject"])
def test_the_fast_way_and_the_slow_one_agree(policy):
    contract = dataclasses.replace(ALL_KINDS, unknown=policy)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(payloads(), max_size=12))
    @example([b'{"device_id":"a","timestamp":"2025-01-20T10:15:30Z","needed":1'] * 2)
    @example([b"{}", b"{}{}", b"}{"])
    def check(found):
        assert_agree(found, contract)

    check()


@pytest.mark.slow
def test_they_agree_on_many_more():
    @settings(max_examples=1000, deadline=None)
    @given(st.lists(payloads(), max_size=20))
    def check(found):
        assert_agree(found, ALL_KINDS)

    check()


def test_good_events_never_take_the_slow_way(monkeypatch):
    """Else the speed would rest on nothing."""
    monkeypatch.setattr(validate, "examine", None)
    texts = ["2025-01-20T10:15:30Z", "2025-01-20T10:15:30.25Z", "2025-01-20T10:15:30.5+01:00"]
    changes = ({}, {"pressure": None}, {"x": 1.5}, {"ü": "ü"}, {"pressure": ...})
    ways = [
        json.dumps(event(timestamp=text, **change), ensure_ascii=False).encode()
        for text in texts
        for change in changes
    ]
    assert len(validated(ways).readings) == len(ways) == 15


def all_sure(_, block, __):
    return np.ones(len(block), bool)


@pytest.mark.parametrize(
    "broken",
    [
        lambda m: m.setattr(decode.Decoder, "_doubt_bytes", lambda *_: None),
        lambda m: m.setattr(decode.Decoder, "_in_limits", all_sure),
        lambda m: m.setattr(decode.Decoder, "_doubt_quotes", lambda *_: None),
        lambda m: m.setattr(decode, "EXACT_MAX", math.inf),
    ],
    ids=["bytes", "limits", "quotes", "exact"],
)  # fmt: skip
def test_each_guard_of_the_fast_way_is_missed_when_it_is_gone(monkeypatch, broken):
    samples = [
        FIRST.replace(b'"hum', b'"temperature":1,"hum'),
        FIRST.replace(b'"hum', b'"a":"\xff","hum'),
        FIRST.replace(b'"hum', b'"temperature":1e9,"hum'),
        encoded(humidity=101),
        FIRST.replace(b'"hum', b'"x":1' + b"0" * 320 + b',"hum'),
    ]
    assert_all_agree(samples)
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        assert_all_agree(samples)


# ---- time stamps ----


NEARLY = r"[12][0-9]{3}-[0-3][0-9]-[0-3][0-9]T[0-2][0-9]:[0-6][0-9]:[0-6][0-9]"
ENDS = ["Z", "+00:00", "-23:59", "+14:00", "", ".5Z", ".1234567Z"]
ENDS += ["-24:00", "+1:00", "Z\n", ".Z", "+00:6é"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.datetimes(datetime(1700, 1, 1), datetime(2250, 1, 1)).map(lambda t: t.isoformat()),  # noqa: DTZ001
            st.from_regex(NEARLY, fullmatch=True),
            st.text(max_size=30),
        ).flatmap(lambda text: st.sampled_from(ENDS).map(lambda end: text + end)),
        max_size=9,
    )
)
def test_times_by_column_are_the_times_one_by_one(texts):
    found = stamps.parse_all(texts)
    for at, text in enumerate(texts):
        slow = stamps.parse(text)
        if found.sure[at]:
            assert (found.us[at], found.finer[at]) == slow
    if texts and all(texts) and not any("\n" in text for text in texts):
        for at, text in enumerate(texts):
            if text.endswith("Z") and "T" in text and isinstance(stamps.parse(text), stamps.Stamp):
                assert found.sure[at]  # the usual kinds are fast


@pytest.mark.parametrize(
    ("text", "us", "finer"),
    [
        ("1970-01-01T00:00:00Z", 0, False),
        ("1969-12-31T23:59:59.9999999Z", -1, True),  # cut off, not towards zero
        ("1970-01-01T00:00:00.0000019Z", 1, True),
        ("1970-01-01T00:00:00.000001000Z", 1, False),
        ("1970-01-01T01:00:00+01:00", 0, False),
        ("1969-12-31T12:00:00-12:00", 0, False),
        ("2025-01-20T10:15:30-00:00", 1737368130000000, False),
    ],
)
def test_finer_digits_are_cut_off_and_said(text, us, finer):
    assert stamps.parse(text) == (us, finer)
    found = stamps.parse_all([text] * 3)
    assert (found.us.tolist(), found.finer.tolist(), found.sure.all()) == (
        [us] * 3,
        [finer] * 3,
        True,
    )


# ---- what is counted ----


def test_a_time_to_come_is_not_believed_where_events_are_counted():
    (rejection,) = validated([encoded(timestamp="2199-01-01T00:00:00Z")]).rejections
    assert rejection.ts_us is None
    assert rejection.device_id == "sensor-123"


def at(seconds, device="d", **more):
    stamp = datetime(2025, 1, 20, 10) + timedelta(seconds=seconds)  # noqa: DTZ001
    return encoded(device_id=device, timestamp=stamp.isoformat() + "Z", **more)


def test_counts_are_by_device_and_the_hour_of_the_event():
    done = validated([at(0), at(3599), at(3600), at(3600, "e"), at(1, humidity=101), b"x"])
    found = {tuple(count[:3]): count.value for count in done.seen}
    ten, eleven, now = 1737367200000000, 1737370800000000, NOW_US // 3_600_000_000 * 3_600_000_000
    assert found == {
        ("d", ten, "received"): 3,
        ("d", ten, "rejected"): 1,
        ("d", ten, "reason:range"): 1,
        ("d", eleven, "received"): 1,
        ("e", eleven, "received"): 1,
        ("", now, "received"): 1,
        ("", now, "rejected"): 1,
        ("", now, "reason:json"): 1,
    }


def test_late_is_what_comes_well_after_newer_ones_of_the_same_device():
    validator = Validator(brief(), now_us=lambda: NOW_US, late_after_s=60)

    def late(*events):
        return totals(validator.validate(chunk(list(events)), run="r").seen).get("late", 0)

    assert late(at(0), at(100), at(40), at(39), at(0, "other")) == 1
    assert late(at(41), at(30)) == 1  # remembered from chunk to chunk
    assert late(at(0, "other"), at(61, "other"), at(0, "other")) == 1
    assert late(at(500), at(600, "third"), at(500, "fourth")) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 400)), max_size=12), max_size=4
    )
)
def test_late_ones_are_those_a_plain_loop_finds(chunks):
    validator = Validator(brief(), now_us=lambda: NOW_US, late_after_s=60)
    newest, expected, found = {}, 0, 0
    for each in chunks:
        seen = validator.validate(
            chunk([at(seconds, device) for device, seconds in each]), run="r"
        ).seen
        found += totals(seen).get("late", 0)
        for device, seconds in each:
            expected += seconds < newest.get(device, 0) - 60
            newest[device] = max(newest.get(device, 0), seconds)
    assert found == expected


def test_how_long_an_event_was_under_way_is_counted_where_the_source_knows():
    validator = Validator(brief(), now_us=lambda: NOW_US)
    ten = 1737367200000000
    sent = np.array([ten + 60_000_000, ten + 60_000_001, ten])
    done = validator.validate(chunk([at(0), at(0), b"x"], appended_us=sent), run="r")
    found = totals(done.seen)
    assert (found["timed"], found["delayed"]) == (2, 1)
    assert "timed" not in totals(validated([at(0)]).seen)


def test_memory_is_bounded_however_many_devices_and_fields_there_are(monkeypatch):
    monkeypatch.setattr("kvstore.telemetry.devices.DEVICES_MAX", 3)
    monkeypatch.setattr("kvstore.telemetry.seen.UNKNOWN_MAX", 3)
    validator = Validator(brief(), now_us=lambda: NOW_US)
    found = Counter()
    for n in range(40):
        done = validator.validate(chunk([at(n, f"d{n % 10}", **{f"x{n}": 1})]), run="r")
        found.update(totals(done.seen))
        assert len(validator._devices.names) <= 5
    assert {name: n for name, n in found.items() if name.startswith("unknown")} == {
        "unknown:x0": 1, "unknown:x1": 1, "unknown:x2": 1, "unknown:*": 37,
    }  # fmt: skip


def test_a_deep_stack_does_not_change_the_verdict():
    """Else the same event would fare differently when it is read again."""
    payload = encoded(x=json.loads("[" * 31 + "]" * 31))

    def from_below(depth):
        return from_below(depth - 1) if depth else codes(payload)

    assert from_below(sys.getrecursionlimit() - 300) == codes(payload) == []
