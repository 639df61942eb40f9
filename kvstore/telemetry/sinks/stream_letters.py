"""Dead letters in the embedded sink: what was rejected, raw, and what became of it since.

Bytes are kept as text with surrogateescape, which brings every byte back and leaves UTF-8 legible.
A letter is never changed: changes are rows of their own, and the last one holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from kvstore.schema import Batch, Field, Schema
from kvstore.store import Store
from kvstore.telemetry.counts import CONFLICT
from kvstore.telemetry.records import (
    DeadLetter,
    Headers,
    LetterChange,
    Place,
    Reason,
    Rejection,
    State,
    Work,
)
from kvstore.telemetry.sinks.stream_tables import Origin, objects

if TYPE_CHECKING:
    from numpy.typing import NDArray

LETTERS: Final = "dead_letters"
CHANGES: Final = "letter_changes"
_NO_TIME: Final = int(np.iinfo(np.int64).min)
_NUMBER: Final = Field("number", "int64", description="in order of arrival; serves as the time")

_LETTER_SCHEMA: Final = Schema(
    (
        _NUMBER,
        Field("origin", "int32", description="number in stream origins"),
        Field("offset", "int64"),
        Field("first_seen", "datetime64[us]"),
        Field("payload", "text", description="raw bytes, with surrogateescape"),
        Field("key", "text"),
        Field("headers", "text", description="JSON, bytes as in payload"),
        Field("reasons", "text", description="JSON: [code, field, found] of each"),
        Field("device_id", "text"),
        Field("ts_us", "int64", description="of the event, where it could be made out"),
    ),
    "number",
)
_CHANGE_SCHEMA: Final = Schema(
    (
        _NUMBER,
        Field("source", "text"),
        Field("partition", "int32"),
        Field("offset", "int64"),
        Field("state", "text"),
        Field("replays", "int32"),
        Field("reasons", "text", description="JSON in place of the letter's own, or none"),
    ),
    "number",
)

_Key = tuple[Place, int]


class _Change(NamedTuple):
    state: State
    replays: int
    reasons: tuple[Reason, ...] | None


def append(
    store: Store, rejections: Sequence[Rejection], origins: Sequence[int], work: Work
) -> None:
    """Append these as dead letters of that work. origins: a number for each."""
    first = _next_number(store, LETTERS)
    store.stream(LETTERS, _LETTER_SCHEMA).append(
        {
            "number": np.arange(first, first + len(rejections)),
            "origin": np.array(origins, np.int32),
            "offset": np.array([each.offset for each in rejections], np.int64),
            "first_seen": np.full(len(rejections), work.committed_us, "M8[us]"),
            "payload": objects([_text(each.payload) for each in rejections]),
            "key": objects([_text(each.key) for each in rejections]),
            "headers": objects([_headers_text(each.headers) for each in rejections]),
            "reasons": objects([json.dumps(each.reasons) for each in rejections]),
            "device_id": objects([each.device_id for each in rejections]),
            "ts_us": np.array(
                [_NO_TIME if each.ts_us is None else each.ts_us for each in rejections], np.int64
            ),
        }
    )


def append_changes(store: Store, changes: Sequence[LetterChange], conflicting: set[_Key]) -> None:
    """Append changes; a replay that is among ``conflicting`` leaves its letter open instead."""
    if not changes:
        return
    kept = [
        (place, offset) in conflicting and state == State.REPLAYED
        for place, offset, state, _ in changes
    ]
    states = [
        State.OPEN if stays else each.state for each, stays in zip(changes, kept, strict=True)
    ]
    reasons = [json.dumps([Reason(CONFLICT)]) if stays else None for stays in kept]
    first = _next_number(store, CHANGES)
    store.stream(CHANGES, _CHANGE_SCHEMA).append(
        {
            "number": np.arange(first, first + len(changes)),
            "source": objects([each.place.source for each in changes]),
            "partition": np.array([each.place.partition for each in changes], np.int32),
            "offset": np.array([each.offset for each in changes], np.int64),
            "state": objects([state.value for state in states]),
            "replays": np.array([each.replays for each in changes], np.int32),
            "reasons": objects(reasons),
        }
    )


def among(store: Store, origins: Mapping[Origin, int], keys: set[_Key]) -> set[_Key]:
    """Those of the keys that are dead letters already; looks at all letters."""
    names = {number: key for key, number in origins.items()}
    return {
        key for batch in _batches(store, ["origin", "offset"]) for key in _keys(batch, names)
    } & keys


def read(
    store: Store,
    origins: Mapping[Origin, int],
    *,
    place: Place | None = None,
    offset: int | None = None,
) -> Iterator[DeadLetter]:
    """Letters in the order of places and offsets, with what became of them.

    A first pass finds the order, 12 bytes a letter. Where a place's letters lie in order, as they
    do unless a position was set back, a pass for each place gives them out as they are read.
    """
    if LETTERS not in store:
        return
    names = {number: key for key, number in origins.items()}
    changes = _last_changes(store)
    for each, in_order in _places(store, names):
        if place not in (None, each):
            continue
        wanted = [number for number, key in names.items() if key[:2] == each]
        found = _of_place(store, names, wanted, offset)
        letters = found if in_order else iter(sorted(found, key=_offset))
        yield from (_changed(letter, changes) for letter in letters)


def _places(store: Store, names: Mapping[int, Origin]) -> list[tuple[Place, bool]]:
    """Each place that has letters, in order, and whether they lie in order of their offsets."""
    parts = [(b["origin"], b["offset"]) for b in _batches(store, ["origin", "offset"])]
    if not parts:
        return []
    origin, offset = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    places = {number: Place(*names[number][:2]) for number in np.unique(origin).tolist()}
    return [
        (place, bool((np.diff(offset[_one_of(origin, places, place)]) > 0).all()))
        for place in sorted(set(places.values()))
    ]


def _one_of(
    origin: NDArray[np.int32], places: Mapping[int, Place], place: Place
) -> NDArray[np.bool_]:
    return np.isin(origin, [number for number, each in places.items() if each == place])


def _of_place(
    store: Store, names: Mapping[int, Origin], wanted: Sequence[int], offset: int | None
) -> Iterator[DeadLetter]:
    for batch in _batches(store, None):
        mine = np.isin(batch["origin"], wanted)
        if offset is not None:
            mine &= batch["offset"] == offset
        if mine.any():
            yield from _letters({name: column[mine] for name, column in batch.items()}, names)


def _letters(batch: Batch, names: Mapping[int, Origin]) -> Iterator[DeadLetter]:
    columns = (
        (batch[name].view(np.int64) if name == "first_seen" else batch[name]).tolist()
        for name in _LETTER_SCHEMA.names
    )
    for _, origin, offset, seen_us, payload, key, headers, reasons, device, ts_us in zip(
        *columns, strict=True
    ):
        source, partition, run, version = names[origin]
        rejection = Rejection(
            Place(source, partition),
            offset,
            _bytes(payload),
            _reasons(reasons),
            _bytes(key),
            _headers(headers),
            device,
            None if ts_us == _NO_TIME else ts_us,
        )
        yield DeadLetter(rejection, seen_us, version, run)


def _offset(letter: DeadLetter) -> int:
    return letter.rejection.offset


def _last_changes(store: Store) -> dict[_Key, _Change]:
    found: dict[_Key, _Change] = {}
    if CHANGES in store:
        for batch in store[CHANGES].read():
            columns = (batch[name].tolist() for name in _CHANGE_SCHEMA.names)
            for _, source, partition, offset, state, replays, reasons in zip(*columns, strict=True):
                key = Place(source, partition), offset
                before = found[key].reasons if key in found else None
                now = before if reasons is None else _reasons(reasons)
                found[key] = _Change(State(state), replays, now)
    return found


def _changed(letter: DeadLetter, changes: Mapping[_Key, _Change]) -> DeadLetter:
    rejection = letter.rejection
    change = changes.get((rejection.place, rejection.offset))
    if change is None:
        return letter
    if change.reasons is not None:
        rejection = replace(rejection, reasons=change.reasons)
    return replace(letter, rejection=rejection, state=change.state, replays=change.replays)


def _batches(store: Store, fields: Sequence[str] | None) -> Iterable[Batch]:
    return store[LETTERS].read(fields=fields) if LETTERS in store else ()


def _keys(batch: Batch, names: Mapping[int, Origin]) -> Iterator[_Key]:
    for origin, offset in zip(batch["origin"].tolist(), batch["offset"].tolist(), strict=True):
        yield Place(*names[origin][:2]), offset


def _next_number(store: Store, name: str) -> int:
    span = store[name].span() if name in store else None
    return 0 if span is None else int(span[1]) + 1


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "surrogateescape")


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogateescape")


def _headers_text(headers: Headers) -> str | None:
    return json.dumps([[name, _text(value)] for name, value in headers]) if headers else None


def _headers(text: str | None) -> Headers:
    return tuple((name, _bytes(value)) for name, value in json.loads(text)) if text else ()


def _reasons(text: str) -> tuple[Reason, ...]:
    found: list[Any] = json.loads(text)
    return tuple(Reason(*each) for each in found)
