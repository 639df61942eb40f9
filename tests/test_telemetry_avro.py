"""Avro of a schema registry becomes JSON events; what cannot be decoded is kept as it came."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import json

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry_server import serving

from kvstore.errors import SourceError
from kvstore.telemetry import avro
from kvstore.telemetry.contract import brief
from kvstore.telemetry.records import Place, Position
from kvstore.telemetry.validate import Validator

pytestmark = pytest.mark.slow  # servers or many files: CI runs it

EVENT = {
    "device_id": "sensor-123",
    "timestamp": "2025-01-20T10:15:30Z",
    "temperature": 21.4,
    "humidity": 68.0,
    "firmware_version": "v1.2.0",
    "pressure": None,
}


def schema(*fields):
    return {"type": "record", "name": "Event", "fields": list(fields)}


def payload(registry, of, event):
    out = io.BytesIO()
    out.write(b"\0" + registry.add(of).to_bytes(4, "big"))
    fastavro.schemaless_writer(out, fastavro.parse_schema(of), event)
    return out.getvalue()


def decoder(registry, pauses=None):
    sleep = (lambda _: None) if pauses is None else pauses.append
    return avro.Decoder(avro.Registry(registry.url, pause=sleep))


def decoded(registry, *payloads):
    return decoder(registry).decode(payloads, [()] * len(payloads))


def test_an_event_goes_there_and_back(registry):
    encoder = avro.Encoder(avro.Registry(registry.url), "telemetry", avro.schema_of(brief()))
    line = json.dumps({name: value for name, value in EVENT.items() if value is not None})
    (found,), (headers,) = decoded(registry, encoder.encode(line.encode()))
    assert json.loads(found) == EVENT
    assert headers == ((avro.SCHEMA_ID, b"1"),)
    assert registry.seen == ["/subjects/telemetry-value/versions", "/schemas/ids/1"]


def test_old_and_new_schemas_live_in_one_topic(registry):
    """Evolution: each event is read by the schema that it was written with."""
    first = schema({"name": "device_id", "type": "string"})
    second = schema(*first["fields"], {"name": "pressure", "type": ["null", "double"]})
    written = [
        payload(registry, first, {"device_id": "a"}),
        payload(registry, second, {"device_id": "b", "pressure": 1013.0}),
        payload(registry, first, {"device_id": "c"}),
    ]
    found, _ = decoded(registry, *written)
    assert list(map(json.loads, found)) == [
        {"device_id": "a"},
        {"device_id": "b", "pressure": 1013.0},
        {"device_id": "c"},
    ]
    assert len(registry.seen) == 2  # once a schema


def test_logical_types_become_what_the_contract_reads(registry):
    of = schema(
        {"name": "timestamp", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {
            "name": "price",
            "type": {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2},
        },
        {"name": "nan", "type": "double"},
    )
    when = dt.datetime(2025, 1, 20, 10, 15, 30, 250, tzinfo=dt.UTC)
    event = {"timestamp": when, "price": decimal.Decimal("12.50"), "nan": float("nan")}
    (found,), _ = decoded(registry, payload(registry, of, event))
    assert found == b'{"timestamp":"2025-01-20T10:15:30.000250Z","price":12.50,"nan":null}'


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"", b"not of a schema registry"),
        (b"\0\0\0", b"not of a schema registry"),
        (b'{"device_id": "a"}', b"not of a schema registry"),
        (b"\0\0\0\0\x63body", b"has no schema 99"),
        (b"\0\0\0\0\x01\x08ab", b"not of schema 1"),
        (b"\0\0\0\0\x01\x02aXX", b"2 bytes behind"),
    ],
)
def test_what_cannot_be_decoded_is_kept_with_its_reason(registry, broken, reason):
    registry.add(schema({"name": "device_id", "type": "string"}))
    (found,), (headers,) = decoded(registry, broken)
    assert found == broken
    ((name, why),) = headers
    assert name == avro.ERROR
    assert reason in why


def test_the_contract_rejects_what_could_not_be_decoded(registry):
    from kvstore.telemetry.records import Chunk  # noqa: PLC0415

    registry.add(schema({"name": "device_id", "type": "string"}))
    payloads, headers = decoded(registry, b"\0\0\0\0\x01\x08ab", None)
    place = Place("kafka:c/t", 0)
    import numpy as np  # noqa: PLC0415

    chunk = Chunk(
        place, np.arange(2, dtype=np.int64), payloads, Position(place, 2), headers=headers
    )
    found = Validator(brief(), now_us=lambda: 0).validate(chunk, run="r")
    assert [rejection.payload for rejection in found.rejections] == [b"\0\0\0\0\x01\x08ab", None]
    assert found.rejections[0].headers[0][0] == avro.ERROR


def test_headers_of_the_event_are_kept(registry):
    of = schema({"name": "device_id", "type": "string"})
    one = payload(registry, of, {"device_id": "a"})
    _, headers = decoder(registry).decode([one, None], [(("trace", b"7"),), (("x", None),)])
    assert headers == [(("trace", b"7"), (avro.SCHEMA_ID, b"1")), (("x", None),)]


with serving() as _schemas:
    _NUMBER = _schemas.add(avro.schema_of(brief()))
_PARSED = fastavro.parse_schema(avro.schema_of(brief()))


@given(st.binary(max_size=60))
def test_no_bytes_make_the_decoder_fail(body):
    """Whatever comes, it is decoded or kept; a hostile length allocates nothing."""
    found = avro.Decoder(avro.Registry("http://unused"))
    found._schemas[_NUMBER] = _PARSED
    whole = b"\0" + _NUMBER.to_bytes(4, "big") + body
    (event,), (headers,) = found.decode([whole], [()])
    assert event is not None
    assert headers[0][0] == (avro.ERROR if event == whole else avro.SCHEMA_ID)


# ---- the registry itself ----


def test_a_registry_that_fails_for_a_moment_is_asked_again(registry):
    of = schema({"name": "device_id", "type": "string"})
    one = payload(registry, of, {"device_id": "a"})
    registry.faults = [503, 500, 429]
    pauses = []
    with pytest.raises(SourceError, match="does not answer: 429"):
        decoder(registry, pauses).decode([one], [()])
    assert pauses == [0.5, 1.0]
    registry.faults = [503, 500]
    (found,), _ = decoder(registry, pauses).decode([one], [()])
    assert found == b'{"device_id":"a"}'


def test_a_registry_that_is_down_is_an_error_and_rejects_nothing():
    with serving() as gone:
        one = payload(gone, schema({"name": "device_id", "type": "string"}), {"device_id": "a"})
    with pytest.raises(SourceError, match="does not answer"):
        decoder(gone, []).decode([one], [()])


def test_an_unknown_schema_is_asked_for_once_in_a_while(registry, monkeypatch):
    unknown = b"\0\0\0\0\x63body"
    asking = decoder(registry)
    asking.decode([unknown] * 100, [()] * 100)
    assert registry.seen == ["/schemas/ids/99"]
    monkeypatch.setattr(avro, "MISSING_S", -1.0)
    asking.decode([unknown], [()])
    assert registry.seen == ["/schemas/ids/99"] * 2


def test_user_and_password_are_sent_and_never_shown(registry):
    url = registry.url.replace("http://", "http://me:se%40cret@")
    known = avro.Registry(url)
    known.schema(1)
    assert registry.credentials == ["Basic bWU6c2VAY3JldA=="]
    with pytest.raises(SourceError) as caught:
        avro.Registry("ftp://me:secret@host").schema(1)
    assert "secret" not in str(caught.value)
    assert "secret" not in known.shown
