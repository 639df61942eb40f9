"""Contracts: read from YAML without quiet loss, and refused where a new one breaks the old."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import telemetry_data as data
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvstore.cli import app
from kvstore.errors import ContractError
from kvstore.telemetry import compatibility, contract
from kvstore.telemetry.contract import Contract, ContractField, brief, load, parse
from kvstore.telemetry.records import Chunk, Place, Position
from kvstore.telemetry.sinks.stream import StreamSink
from kvstore.telemetry.validate import Validator

V2 = Path(contract.__file__).parent / "contracts" / "telemetry-v2.yaml"
NOW_US = data.NOW_US


def changed(old, new, count=1):
    text = V2.read_text()
    assert text.count(old) >= 1
    return text.replace(old, new, count).encode()


# ---- the file ----


def test_the_brief_s_examples_are_versions_1_and_2():
    second = brief()
    assert (second.version, second.unknown, second.interval_s, second.latency_s) == (
        2,
        "keep",
        5,
        60,
    )
    assert [field.name for field in second.values] == [
        "temperature", "humidity", "firmware_version", "pressure",
    ]  # fmt: skip
    assert second.values[0] == ContractField(
        "temperature", "number", required=True, unit="Cel", minimum=-90, maximum=90, since=1,
        description="Of the air.",
    )  # fmt: skip
    assert [field.since for field in second.values] == [1, 1, 1, 2]
    assert [field.required for field in second.values] == [True, True, True, False]
    assert second.at(1) == brief(1)


def test_a_contract_is_read_from_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(changed("version: 2.0.0", "version: 7"))
    assert load(path) == replace(brief(), version=7)
    assert load("v1") == brief(1)
    with pytest.raises(ContractError, match="v1 and v2 come with kvstore"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kind: DataContract", "kind: Table", "found 'Table', expected DataContract"),
        ("apiVersion: v3.1.0", "apiVersion: v2.2.2", "apiVersion: found 'v2.2.2'"),
        ("version: 2.0.0", "version: 2.1.0", "version: found '2.1.0'"),
        ("version: 2.0.0", "version: 40000", "version: found 40000"),
        ("value: keep", "value: maybe", "found 'maybe', expected keep"),
        ("{minimum: -90, maximum: 90}", "{minimum: 91, maximum: 90}", "at most the maximum, 90"),
        ("{minimum: -90, maximum: 90}", "{minimum: .nan}", "minimum: found nan, expected a"),
        ("{minimum: -90, maximum: 90}", "{minimum: '1'}", "minimum: found '1', expected a"),
        ("{minimum: -90, maximum: 90}", "{multipleOf: 2}", r"multipleOf: .*nothing enforces"),
        ("required: false", "required: maybe", "pressure: required: found 'maybe'"),
        ("required: false", "unique: true", "unique: found True, expected no unique"),
        ("- name: pressure", "- name: Humidity", "each field once, whatever its case"),
        ("- name: pressure", "- name: extras", "another name"),
        ("- name: pressure", "- name: " + "x" * 64, "1 to 63 characters"),
        ("- name: pressure", "- name: _pressure", "underscore"),
        ("- name: pressure", "- name: 7", "found 7, expected a"),
        ("since, value: 2", "since, value: 3", "since: found 3, expected a version from 1 to 2"),
        ("logicalType: timestamp", "logicalType: string", "timestamp: found .*: the identity"),
        ("- name: device_id", "- name: device", "device_id: found None.*the identity"),
        ("primaryKeyPosition: 1", "primaryKeyPosition: 2", "device_id: found .*: the identity"),
        ("frequency, value: 5", "frequency, value: 0", "frequency: found '0 s'"),
        ("value: 60, unit: s", "value: 60, unit: fortnight", "latency: found '60 fortnight'"),
        ("unit: s, element", "unit: s, unit: m, element", "'unit' stands twice"),
        ("logicalType: object", "logicalType: *x", "not YAML"),
        ("schema:", "schemas:", "schema: found None, expected exactly"),
    ],
)  # fmt: skip
def test_what_nobody_would_enforce_or_understand_is_refused(old, new, said):
    with pytest.raises(ContractError, match=said):
        parse(changed(old, new))


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff", b"a: {", b"{1: 2}", b"!!python/name:os.x"])
def test_what_is_no_contract_is_refused_in_words(text):
    with pytest.raises(ContractError, match=r"^mine: "):
        parse(text, "mine")


def test_a_file_too_long_for_a_contract_is_not_read(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_bytes(b"#" * (contract.FILE_BYTES_MAX + 1))
    with pytest.raises(ContractError, match="is it a contract"):
        load(path)


# ---- from version to version ----

PRESSURE = brief().values[3]
TEMPERATURE = brief().values[0]


def third(*values, **more):
    return replace(brief(), version=3, values=values or brief().values, **more)


def with_field(name, **values):
    """Version 3 with a field changed."""
    fields = [replace(each, **values) if each.name == name else each for each in brief().values]
    return third(*fields)


@pytest.mark.parametrize(
    ("new", "field"),
    [
        (third(*brief().values[:3]), "pressure"),
        (third(*brief().values, ContractField("co2", "number", required=True, since=3)), "co2"),
        (third(*brief().values, ContractField("co2", "number", since=2)), "co2"),
        (with_field("pressure", type="integer"), "pressure"),
        (with_field("pressure", type="string"), "pressure"),
        (with_field("pressure", required=True), "pressure"),
        (with_field("pressure", unit="Pa"), "pressure"),
        (with_field("pressure", since=3), "pressure"),
        (with_field("pressure", minimum=301), "pressure"),
        (with_field("pressure", maximum=1099), "pressure"),
        (third(unknown="reject"), ""),
        (third(unknown="drop"), ""),
        (replace(brief(), values=(*brief().values, ContractField("co2", "number", since=3))), ""),
    ],
)
def test_what_breaks_is_refused(new, field):
    broken = [each for each in compatibility.changes(brief(), new) if each.breaking]
    assert [each.field for each in broken] == [field]
    with pytest.raises(ContractError, match="breaks version 2"):
        compatibility.check(brief(), new)


@pytest.mark.parametrize(
    "new",
    [
        third(*brief().values, ContractField("co2", "number", since=3)),
        with_field("temperature", required=False),
        with_field("pressure", minimum=None, maximum=2000),
        with_field("pressure", minimum=299),
        with_field("pressure", description="better"),
        third(interval_s=1.0),
        third(*reversed(brief().values)),
    ],
)
def test_what_grows_or_loosens_is_allowed(new):
    compatibility.check(brief(), new)
    compatibility.check(brief(), brief())
    compatibility.check(brief(1), brief())


def test_all_that_breaks_is_said_at_once():
    new = third(replace(TEMPERATURE, unit="K", maximum=80))
    with pytest.raises(ContractError) as caught:
        compatibility.check(brief(), new)
    for word in ("unit Cel -> K", "maximum 90 -> 80", "humidity: removed", "pressure: removed"):
        assert word in str(caught.value)


NUMBERS = st.one_of(st.none(), st.integers(-3, 3))


@st.composite
def contracts(draw, version):
    names = draw(st.lists(st.sampled_from("abc"), unique=True, max_size=3))
    fields = []
    for name in names:
        low, high = sorted([draw(st.integers(-3, 3)), draw(st.integers(-3, 3))])
        kind = draw(st.sampled_from(["number", "integer", "string"]))
        limits = {} if kind == "string" else {"minimum": low, "maximum": high}
        since = draw(st.integers(1, version))
        fields.append(
            ContractField(name, kind, required=draw(st.booleans()), since=since, **limits)
        )
    return Contract(version, tuple(fields), draw(st.sampled_from(["keep", "reject", "drop"])))


EVENTS = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from([-3, 0, 0.5, 3, 9, "x", None]) for name in "abcd"}
)


@settings(max_examples=60, deadline=None)
@given(contracts(1), contracts(2), st.lists(EVENTS, max_size=6))
def test_no_event_that_passed_is_rejected_by_what_is_called_compatible(old, new, events):
    """Fields that the old contract did not know aside: nobody had said what they are."""
    if any(change.breaking for change in compatibility.changes(old, new)):
        return
    known = {field.name for field in old.values}
    for event in events:
        payload = data_event({name: v for name, v in event.items() if name in known})
        if passes(payload, old):
            assert passes(payload, new)


def data_event(values):
    return json.dumps({"device_id": "d", "timestamp": "2025-01-20T10:15:30Z", **values}).encode()


def passes(payload, of):
    place = Place("x", 0)
    chunk = Chunk(place, np.array([1]), [payload], Position(place, 2))
    return not Validator(of, now_us=lambda: NOW_US).validate(chunk, run="r").rejections


# ---- against what is stored ----


def stored(path, payloads):
    """A store with these events, valid or not, under version 2."""
    place = Place("file:/x", 0)
    done = Validator(brief(), now_us=lambda: NOW_US).validate(
        Chunk(place, np.arange(1, len(payloads) + 1), payloads, Position(place, len(payloads) + 1)),
        run="r",
    )
    with StreamSink.open(path, brief()) as sink:
        sink.evolve(brief())
        (claim,) = sink.claim([place])
        sink.commit(
            data.Work(
                commit_id="c",
                run="r",
                committed_us=NOW_US,
                claims=(claim,),
                after=(Position(place, len(payloads) + 1),),
                readings=done.readings,
                raw=done.raw,
                rejections=done.rejections,
                seen=done.seen,
                contract_version=2,
            )
        )


def sample(second, **values):
    event = {"temperature": 20, "humidity": 50, "firmware_version": "v1", **values}
    stamp = f"2025-01-20T10:00:{second:02d}Z"
    return json.dumps({"device_id": "d", "timestamp": stamp, **event}).encode()


EVENTS_STORED = [
    sample(0),
    sample(1, temperature=60),
    sample(2, co2=5000, note="kept"),
    sample(3, temperature=95),
    sample(4, temperature=120),
    sample(1, temperature=61),  # a conflict
]


def test_stored_rows_and_rejects_are_tried_under_the_new_contract(path):
    stored(path, EVENTS_STORED)
    colder = with_field("temperature", maximum=50).values
    stricter = third(*colder, ContractField("co2", "number", maximum=4000, since=3))
    looser = with_field("temperature", maximum=100)
    with StreamSink.open(path, brief(), mode="r") as sink:
        found = compatibility.fare(sink, stricter, now_us=lambda: NOW_US)
        assert (found.rows, found.rows_rejected, found.row_reasons) == (3, 2, {"range": 2})
        assert (found.letters, found.letters_accepted) == (2, 0)
        found = compatibility.fare(sink, looser, now_us=lambda: NOW_US)
        assert (found.rows_rejected, found.letters, found.letters_accepted) == (0, 2, 1)
        assert found.letter_reasons == {"range": 1}
        found = compatibility.fare(sink, brief(), now_us=lambda: NOW_US)
        assert (found.rows, found.rows_rejected, found.letters_accepted) == (3, 0, 0)


def run(*words):
    return CliRunner().invoke(app, ["telemetry", "contract", *map(str, words)])


def test_the_commands_say_what_there_is_and_what_breaks(path, tmp_path):
    stored(path, EVENTS_STORED)
    shown = run("show", "v2")
    assert shown.exit_code == 0
    assert "pressure          number     optional  hPa   300      1100     2" in shown.stdout
    assert json.loads(run("show", "--json").stdout)["version"] == 2
    narrow = tmp_path / "narrow.yaml"
    narrow.write_bytes(
        changed("maximum: 90", "maximum: 50").replace(b"version: 2.0.0", b"version: 3")
    )
    assert run("check", "v2", "v1").exit_code == 0
    refused = run("check", narrow, "v2")
    assert isinstance(refused.exception, ContractError)
    found = run("diff", "v2", narrow, "--against", path)
    assert found.exit_code == 3
    assert "BREAKS\ttemperature\tmaximum 90 -> 50" in found.stdout
    assert "rows\t3, of which 1 would be rejected (rejected for: range 1)" in found.stdout
    found = run("diff", "v1", "v2", "--against", path, "--json")
    assert found.exit_code == 0, found.exception
    plain = json.loads(found.stdout)
    assert plain["breaking"] is False
    assert plain["against"]["rows_rejected"] == 0
