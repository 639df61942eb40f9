"""Avro payloads of a schema registry, turned into the JSON events that the contract speaks of.

The wire format is Confluent's: a zero byte, the schema's id as 4 bytes big-endian, the body. A
decoded event carries the header ``kvstore.avro.schema.id``. What cannot be decoded goes on as it
came, with the reason in the header ``kvstore.avro.error``: no JSON, so that the contract rejects
it, and its bytes are kept. A registry that does not answer is an error, never a rejection.

Only this module imports fastavro. NaN becomes null, which JSON has instead; bytes become base64.
"""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import fastavro
import msgspec

from kvstore.errors import SourceError
from kvstore.telemetry.contract import DEVICE, TIMESTAMP, Contract
from kvstore.telemetry.records import Headers

MAGIC: Final = 0
PREFIX_BYTES: Final = 5
SCHEMA_ID: Final = "kvstore.avro.schema.id"
ERROR: Final = "kvstore.avro.error"
MISSING_S: Final = 30.0  # an id that the registry does not know is asked for again after that
MISSING_MAX: Final = 1_000  # such ids that are remembered: garbage has any
ANSWER_S: Final = 10.0  # one question to the registry
TRIES: Final = 4  # with 0.5, 1 and 2 s between them: a restart of the registry
_FIRST_PAUSE_S: Final = 0.5
_NOT_FOUND: Final = 404
_REFUSED: Final = range(400, 500)
_ERROR_CHARS: Final = 200  # of a reason in a header
_MEDIA: Final = "application/vnd.schemaregistry.v1+json"

_encode = msgspec.json.Encoder(decimal_format="number").encode


@dataclass(frozen=True, slots=True)
class Registry:
    """A schema registry by its URL. ``user:password@`` in it is sent as basic authentication."""

    url: str
    pause: Callable[[float], None] = time.sleep

    def schema(self, schema_id: int) -> Any | None:
        """The parsed schema of that id, or None where the registry has none."""
        answer = self._ask("GET", f"/schemas/ids/{schema_id}")
        return None if answer is None else fastavro.parse_schema(json.loads(answer["schema"]))

    def register(self, subject: str, schema: Any) -> int:
        """The id under which the subject has the schema, from now on if not before."""
        body = json.dumps({"schema": json.dumps(schema)}).encode()
        answer = self._ask("POST", f"/subjects/{quote(subject, safe='')}/versions", body)
        if answer is None:
            raise SourceError(f"{self.shown}: no such path; expected a schema registry")
        return int(answer["id"])

    @property
    def shown(self) -> str:
        """The URL without user and password."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        why: object = ""
        for attempt in range(TRIES):
            if attempt:
                self.pause(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(  # noqa: S310 - the scheme is checked in _request
                    self._request(method, path, body), timeout=ANSWER_S
                ) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code == _NOT_FOUND:
                    return None
                why = f"{error.code} {error.reason}"
                if error.code in _REFUSED:
                    break
            except (OSError, ValueError) as error:
                why = error
        raise SourceError(f"{self.shown}: the schema registry does not answer: {why}")

    def _request(self, method: str, path: str, body: bytes | None) -> urllib.request.Request:
        parts = urlsplit(self.shown)
        if parts.scheme not in {"http", "https"}:
            raise SourceError(f"{self.shown}: expected http://host:port of a schema registry")
        url = self.shown.rstrip("/") + path
        request = urllib.request.Request(url, body, method=method)  # noqa: S310 - checked
        request.add_header("Accept", _MEDIA)
        if body is not None:
            request.add_header("Content-Type", _MEDIA)
        user, _, _ = urlsplit(self.url).netloc.rpartition("@")
        if user:
            token = base64.b64encode(unquote(user).encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        return request


class Decoder:
    """Decodes payloads; asks the registry once for each schema, whose number bounds the memory."""

    def __init__(self, registry: Registry):
        self._registry = registry
        self._schemas: dict[int, Any] = {}
        self._missing_s: dict[int, float] = {}

    def decode(
        self, payloads: Sequence[bytes | None], headers: Sequence[Headers]
    ) -> tuple[list[bytes | None], list[Headers]]:
        """JSON where there was Avro, and what is to be known of it among the headers."""
        pairs = [self._one(payload) for payload in payloads]
        return (
            [json_text for json_text, _ in pairs],
            [(*before, *more) for before, (_, more) in zip(headers, pairs, strict=True)],
        )

    def _one(self, payload: bytes | None) -> tuple[bytes | None, Headers]:
        if payload is None:
            return None, ()
        if len(payload) < PREFIX_BYTES or payload[0] != MAGIC:
            return payload, _failed("not of a schema registry: expected a zero byte and an id")
        schema_id = int.from_bytes(payload[1:PREFIX_BYTES], "big")
        if (schema := self._schema(schema_id)) is None:
            return payload, _failed(f"the registry has no schema {schema_id}")
        body = io.BytesIO(payload)
        body.seek(PREFIX_BYTES)
        try:
            event = _encode(fastavro.schemaless_reader(body, schema, None))
        except Exception as error:  # noqa: BLE001 - fastavro raises whatever bytes provoke
            return payload, _failed(f"not of schema {schema_id}: {type(error).__name__}: {error}")
        if body.tell() != len(payload):
            return payload, _failed(f"{len(payload) - body.tell()} bytes behind schema {schema_id}")
        return event, ((SCHEMA_ID, str(schema_id).encode()),)

    def _schema(self, schema_id: int) -> Any | None:
        if (known := self._schemas.get(schema_id)) is not None:
            return known
        now_s = time.monotonic()
        if now_s < self._missing_s.get(schema_id, 0.0) + MISSING_S and schema_id in self._missing_s:
            return None
        if (found := self._registry.schema(schema_id)) is not None:
            return self._schemas.setdefault(schema_id, found)
        if len(self._missing_s) >= MISSING_MAX:
            self._missing_s.clear()
        self._missing_s[schema_id] = now_s
        return None


def _failed(reason: str) -> Headers:
    return ((ERROR, reason[:_ERROR_CHARS].encode()),)


def schema_of(contract: Contract) -> dict[str, Any]:
    """The contract as an Avro schema; fields that may be absent default to null."""
    fields: list[dict[str, Any]] = [
        {"name": DEVICE, "type": "string"},
        {"name": TIMESTAMP, "type": "string"},
    ]
    for each in contract.values:
        kind = "double" if each.is_number else "string"
        if each.required:
            fields.append({"name": each.name, "type": kind})
        else:
            fields.append({"name": each.name, "type": ["null", kind], "default": None})
    return {"type": "record", "name": "Telemetry", "namespace": "kvstore", "fields": fields}


class Encoder:
    """JSON lines -> the wire format, of one schema, registered for the topic's values."""

    def __init__(self, registry: Registry, topic: str, schema: Any):
        self._prefix = bytes([MAGIC]) + registry.register(f"{topic}-value", schema).to_bytes(
            4, "big"
        )
        self._schema = fastavro.parse_schema(schema)

    def encode(self, line: bytes) -> bytes:
        """ValueError where the line does not fit the schema, unknown fields included."""
        out = io.BytesIO()
        out.write(self._prefix)
        try:
            event = msgspec.json.decode(line)
            fastavro.schemaless_writer(out, self._schema, event, strict_allow_default=True)
        except Exception as error:
            raise ValueError(f"not of the Avro schema: {error}") from error
        return out.getvalue()
