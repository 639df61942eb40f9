"""One event at a time, with all that is wrong with it: the way of those that the fast one left.

What this module says of an event is the truth; validate.py only finds out faster that there is
nothing to say. Pure Python and the standard library's JSON, so that a fault in the fast decoder
would show as a difference. Pure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from kvstore.telemetry import stamps
from kvstore.telemetry.contract import (
    DEVICE,
    DEVICE_CHARS_MAX,
    TIMESTAMP,
    Contract,
    ContractField,
)
from kvstore.telemetry.records import Reason

CODES: Final = {
    "empty": "no payload, or nothing but spaces",
    "too_large": "longer than EVENT_BYTES_MAX",
    "utf8": "not valid UTF-8, or half of a surrogate pair",
    "json": "not valid JSON, or nested deeper than DEPTH_MAX",
    "not_object": "valid JSON, but no object",
    "duplicate_key": "a key that stands twice: which one is meant?",
    "nul": "a NUL character, which PostgreSQL's text cannot hold",
    "missing": "a required field that is absent or null",
    "type": "a value of another type than the contract's",
    "number": "a number that float64 cannot hold, or a whole one beyond 2^53",
    "range": "a value below the contract's minimum or above its maximum",
    "device_id": "an empty device_id, or one longer than DEVICE_CHARS_MAX",
    "timestamp": "no RFC 3339 time between 1678 and 2261",
    "offset": "a time without its offset from UTC",
    "future": "a time ahead of the clock by more than the limit",
    "old": "a time older than the age limit",
    "unknown_field": "a field that the contract neither knows nor allows",
}

EVENT_BYTES_MAX: Final = 1 << 20  # as Kafka's own default, message.max.bytes
DEPTH_MAX: Final = 32  # far from the recursion limit, wherever the caller stands
EXACT_MAX: Final = 2**53  # up to here float64 holds every integer
FOUND_CHARS_MAX: Final = 80
REASONS_MAX: Final = 50  # of one event: one of a million fields has a million faults
_CANONICAL: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_NUMBER_CHARS_MAX: Final = 400  # the longest number that float64 can hold has 309 digits


@dataclass(frozen=True, slots=True)
class Limits:
    """What depends on the clock, in µs since 1970; None where there is no limit."""

    latest_us: int | None
    earliest_us: int | None


@dataclass(slots=True)
class Findings:
    """What an event says, as far as it could be made out, and all that is wrong with it.

    It is valid where ``reasons`` is empty. values: of the contract's fields that are neither
    absent nor null, typed. unknown: the names of fields that the contract does not know.
    """

    device_id: str = ""
    ts_us: int | None = None
    finer: bool = False
    values: dict[str, float | str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    extras: str | None = None
    reasons: list[Reason] = field(default_factory=list)

    def blame(self, code: str, name: str = "", found: Any = "") -> None:
        """Note one thing that is wrong."""
        if len(self.reasons) < REASONS_MAX:
            self.reasons.append(Reason(code, _printable(name), _printable(found)))


def examine(payload: bytes | None, contract: Contract, limits: Limits) -> Findings:
    """Everything about one event."""
    findings = Findings()
    if payload is None or not payload.strip(b" \t\r\n"):
        findings.blame("empty")
    elif len(payload) > EVENT_BYTES_MAX:
        findings.blame("too_large", found=f"{len(payload)} bytes")
    elif (event := _object(payload, findings)) is not None:
        _identity(event, limits, findings)
        for each in contract.values:
            _value(each, event.get(each.name), findings)
        _unknown(event, contract, findings)
    if findings.reasons and not _is_clean(findings.device_id):
        findings.device_id = ""  # it names no device that figures should be kept of
    return findings


def _is_clean(text: str) -> bool:
    return text.isprintable() and "\ufffd" not in text


def canonical(extras: Mapping[str, Any]) -> str | None:
    """Unknown fields as one text: sorted keys, no spaces, 68.0 as 68, null as if absent."""
    kept = {name: _plain(value) for name, value in extras.items() if value is not None}
    return _CANONICAL.encode(kept) if kept else None


def _plain(value: Any) -> Any:
    """Of all ways to write a number, one."""
    if isinstance(value, int | str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT_MAX:
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


# ---- bytes -> object ----


class _Pairs(list[tuple[str, Any]]):
    """An object as it was written, so that a key may stand twice."""


class _TooLong(float):
    """A number that float64 cannot hold."""


def _object(payload: bytes, findings: Findings) -> dict[str, Any] | None:
    """The event's fields; None where it is no JSON object."""
    try:
        text = payload.decode()
    except UnicodeDecodeError as error:
        findings.blame("utf8", found=f"byte {error.start}: {payload[error.start]:#04x}")
        text = payload.decode(errors="replace")  # what else is wrong with it?
    try:
        found = _decode(text)
    except (ValueError, RecursionError) as error:
        findings.blame("json", found=str(error))
        return None
    if not isinstance(found, _Pairs):
        findings.blame("not_object", found=type(found).__name__)
        return None
    return _Checker(findings).checked(found)


def _decode(text: str) -> Any:
    return json.loads(
        text,
        object_pairs_hook=_Pairs,
        parse_float=_float,
        parse_int=_int,
        parse_constant=_no_constant,
    )


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _TooLong(value)


def _int(text: str) -> float:
    if len(text) > _NUMBER_CHARS_MAX:  # int() itself refuses 4,300 digits
        return _TooLong("inf")
    value = int(text)
    return value if math.isfinite(_as_float(value)) else _TooLong("inf")


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


class _Checker:
    """Goes through everything in an event, whether the contract knows it or not."""

    def __init__(self, findings: Findings) -> None:
        self._blame = findings.blame
        self._too_deep = False

    def checked(self, pairs: _Pairs) -> dict[str, Any]:
        return self._mapping(pairs, "", 1)

    def _mapping(self, pairs: _Pairs, path: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            name = f"{path}.{key}" if path else key
            if key in found:
                self._blame("duplicate_key", name, value)
            self._text(key, name)
            found[key] = self._any(value, name, depth)
        return found

    def _any(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, str):
            self._text(value, name)
        elif isinstance(value, _TooLong):
            self._blame("number", name)
        elif isinstance(value, list):
            return self._nested(value, name, depth + 1)
        return value

    def _nested(self, value: list[Any], name: str, depth: int) -> Any:
        if depth > DEPTH_MAX:
            if not self._too_deep:
                self._blame("json", name, f"nested deeper than {DEPTH_MAX}")
            self._too_deep = True
            return None
        if isinstance(value, _Pairs):
            return self._mapping(value, name, depth)
        return [self._any(each, name, depth) for each in value]

    def _text(self, text: str, name: str) -> None:
        if "\0" in text:
            self._blame("nul", name, text)
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            self._blame("utf8", name, text)


# ---- object -> typed values ----


def _identity(event: Mapping[str, Any], limits: Limits, findings: Findings) -> None:
    for name in (DEVICE, TIMESTAMP):
        value = event.get(name)
        if value is None:
            findings.blame("missing", name)
        elif not isinstance(value, str):
            findings.blame("type", name, value)
        elif name == DEVICE:
            _device(value, findings)
        else:
            _timestamp(value, limits, findings)


def _device(text: str, findings: Findings) -> None:
    if not 1 <= len(text) <= DEVICE_CHARS_MAX:
        findings.blame("device_id", DEVICE, text)
    else:
        findings.device_id = text


def _timestamp(text: str, limits: Limits, findings: Findings) -> None:
    stamp = stamps.parse(text)
    if not isinstance(stamp, stamps.Stamp):
        findings.blame(stamp, TIMESTAMP, text)
        return
    findings.ts_us, findings.finer = stamp
    if limits.latest_us is not None and stamp.us > limits.latest_us:
        findings.blame("future", TIMESTAMP, text)
        findings.ts_us = None  # else it would count as of a year to come, in every recent window
    if limits.earliest_us is not None and stamp.us < limits.earliest_us:
        findings.blame("old", TIMESTAMP, text)


def _value(expected: ContractField, value: Any, findings: Findings) -> None:
    if value is None:
        if expected.required:
            findings.blame("missing", expected.name)
    elif not expected.is_number:
        if isinstance(value, str):
            findings.values[expected.name] = value
        else:
            findings.blame("type", expected.name, value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        findings.blame("type", expected.name, value)
    elif not isinstance(value, _TooLong):
        _number(expected, float(value) + 0.0, findings)  # -0.0 becomes 0.0


def _number(expected: ContractField, value: float, findings: Findings) -> None:
    findings.values[expected.name] = value
    if expected.type == "integer":
        if not value.is_integer():
            findings.blame("type", expected.name, value)
        elif abs(value) > EXACT_MAX:
            findings.blame("number", expected.name, value)
    low, high = expected.minimum, expected.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        findings.blame("range", expected.name, value)


def _unknown(event: Mapping[str, Any], contract: Contract, findings: Findings) -> None:
    known = {DEVICE, TIMESTAMP, *(each.name for each in contract.values)}
    extras = {name: value for name, value in event.items() if name not in known}
    findings.unknown = tuple(extras)
    if contract.unknown == "reject":
        for name, value in extras.items():
            findings.blame("unknown_field", name, value)
    elif contract.unknown == "keep" and not findings.reasons:
        findings.extras = canonical(extras)


def _printable(value: Any) -> str:
    """Short, and without what a terminal or a database would choke on."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = text[: FOUND_CHARS_MAX + 1]
    if not shown.isprintable():
        shown = "".join(_characters(shown))
    return shown if len(shown) <= FOUND_CHARS_MAX else shown[: FOUND_CHARS_MAX - 1] + "…"


def _characters(text: str) -> Iterator[str]:
    for char in text:
        yield char if char.isprintable() else char.encode("unicode_escape").decode()
