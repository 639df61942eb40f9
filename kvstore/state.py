"""The state of a store as one commit left it: what the meta table holds, and its records.

Streams with their schemas, totals, marks, summaries of sealed segments, what was dropped, the
writing session, settings, pins and gaps. docs/format.md, section 9, has the bytes. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from kvstore.gaps import Gap
from kvstore.schema import Field, Schema
from kvstore.settings import Pin, Settings

FORMAT: Final = 2  # of the segments that are made; version 1 had no frames (codec.py)
FORMATS: Final = (1, 2)  # that are read
GONE: Final = object()  # in place of a meta record: delete it
_STREAM: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")


Part: TypeAlias = tuple[str, Any, Any]
"""Of a state: an attribute, the key in it or None, the value there."""


class Totals(NamedTuple):
    """What a segment holds of one stream. first, last: in the stream's own time type."""

    rows: int = 0
    batches: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    first: Any = None
    last: Any = None
    next_sequence: int = 0

    def plus(self, other: Totals) -> Totals:
        """Both together; next_sequence is the later one."""
        if not other.rows:
            return self._replace(next_sequence=max(self.next_sequence, other.next_sequence))
        return Totals(
            self.rows + other.rows,
            self.batches + other.batches,
            self.raw_bytes + other.raw_bytes,
            self.stored_bytes + other.stored_bytes,
            other.first if self.first is None else min(self.first, other.first),
            other.last if self.last is None else max(self.last, other.last),
            max(self.next_sequence, other.next_sequence),
        )

    @classmethod
    def summed(cls, parts: Sequence[Totals]) -> Totals:
        """All together, as ``plus`` does it one by one."""
        next_sequence = max((part.next_sequence for part in parts), default=0)
        held = [part for part in parts if part.rows]
        if not held:
            return cls(next_sequence=next_sequence)
        rows, batches, raw_bytes, stored_bytes, firsts, lasts, _ = zip(*held, strict=True)
        return cls(
            sum(rows),
            sum(batches),
            sum(raw_bytes),
            sum(stored_bytes),
            min(firsts),
            max(lasts),
            next_sequence,
        )


class StreamInfo(NamedTuple):
    """A stream as the meta table holds it. versions: field counts that its schema has had."""

    stream_id: int
    name: str
    schema: Schema
    versions: tuple[int, ...]


class Sealed(NamedTuple):
    """The one-line summary of a sealed segment, carried by every later one.

    clock_ns: the store's own clock (State) at its last commit.
    """

    number: int
    file_bytes: int
    last_commit_ns: int
    totals: dict[int, Totals]
    clock_ns: int = 0


class Dropped(NamedTuple):
    """What retention has removed of one stream, in all. recorded_ns: when last."""

    totals: Totals = Totals()
    segments: int = 0
    recorded_ns: int = 0


class Session(NamedTuple):
    """The newest writing process. closed_ns: 0 while it writes, or where it never closed.

    interval_s: its flush interval, None where only flush commits.
    """

    opened_ns: int = 0
    closed_ns: int = 0
    interval_s: float | None = None


@dataclass(slots=True)
class State:
    """All of a segment's meta table: what the store is as of one commit.

    clock_ns: the store's own clock, by which segments age. It never goes back, and while a
    writer lives it does not jump either. gaps: only where they were asked for.
    """

    store_id: bytes
    number: int
    created_ns: int
    commit: int = 0  # LMDB's transaction id of what was read; not stored
    last_commit_ns: int = 0
    streams: dict[str, StreamInfo] = field(default_factory=dict)
    totals: dict[int, Totals] = field(default_factory=dict)
    marks: dict[str, Any] = field(default_factory=dict)
    sealed: dict[int, Sealed] = field(default_factory=dict)
    dropped: dict[int, Dropped] = field(default_factory=dict)
    clock_ns: int = 0
    session: Session = field(default_factory=Session)
    settings: Settings = field(default_factory=Settings)
    pins: dict[int, Pin] = field(default_factory=dict)
    gaps: dict[int, Gap] = field(default_factory=dict)
    version: int = FORMAT
    # Of each stream that was asked for, over all sealed segments; these are never changed in place.
    _sealed_totals: dict[int, Totals] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def stream_totals(self, stream_id: int) -> Totals:
        """A stream's totals over the whole store."""
        held = self._sealed_totals.get(stream_id)
        if held is None:
            held = Totals.summed(
                [
                    totals
                    for sealed in self.sealed.values()
                    if (totals := sealed.totals.get(stream_id))
                ]
            )
            self._sealed_totals[stream_id] = held
        return held.plus(self.totals.get(stream_id, Totals()))

    def per_segment(self, stream_id: int) -> Iterator[tuple[int, Totals]]:
        """Number and totals of each segment that holds rows of a stream, the active one last."""
        for number, sealed in self.sealed.items():
            if (totals := sealed.totals.get(stream_id)) and totals.rows:
                yield number, totals
        if (totals := self.totals.get(stream_id)) and totals.rows:
            yield self.number, totals

    def next_sequence(self, stream_id: int) -> int:
        """The number of a stream's next batch, which the active segment always carries."""
        return self.totals.get(stream_id, Totals()).next_sequence

    def go_on_from(self, earlier: State) -> None:
        """Take over what was summed up there, if it still holds."""
        if self.sealed == earlier.sealed:
            self._sealed_totals = earlier._sealed_totals


def meta_records(state: State) -> dict[bytes, Any]:
    """A state as meta records; docs/format.md describes each."""
    records: dict[bytes, Any] = {
        b"identity": [FORMAT, state.store_id, state.number, state.created_ns],
        b"commit": state.last_commit_ns,
    }
    for info in state.streams.values():
        records |= stream_record(info)
    for stream_id, totals in state.totals.items():
        records[b"total:" + _STREAM.pack(stream_id)] = totals
    for name, value in state.marks.items():
        records[mark_key(name)] = value
    for sealed in state.sealed.values():
        records[numbered_key("sealed", sealed.number)] = sealed
    for stream_id, dropped in state.dropped.items():
        records[dropped_key(stream_id)] = dropped
    for pin in state.pins.values():
        records[numbered_key("pin", pin.pin_id)] = pin
    for number, gap in state.gaps.items():
        records[numbered_key("gap", number)] = gap
    records[b"clock"] = state.clock_ns
    records[b"session"] = state.session
    records[b"settings"] = state.settings._asdict()
    return records


def stream_record(info: StreamInfo) -> dict[bytes, Any]:
    """The meta record of a stream's definition."""
    fields = [each.to_record() for each in info.schema.fields]
    value = [info.name, info.schema.time, list(info.versions), fields]
    return {b"stream:" + _STREAM.pack(info.stream_id): value}


def total_key(stream_id: int) -> bytes:
    """Meta key of a stream's totals."""
    return b"total:" + _STREAM.pack(stream_id)


def dropped_key(stream_id: int) -> bytes:
    """Meta key of what retention removed of a stream."""
    return b"dropped:" + _STREAM.pack(stream_id)


def numbered_key(kind: Literal["sealed", "pin", "gap"], number: int) -> bytes:
    """Meta key of one of many: a sealed segment's summary, a pin, a gap."""
    return kind.encode() + b":" + _U64.pack(number)


def mark_key(name: str) -> bytes:
    """Meta key of a mark."""
    return b"mark:" + name.encode()


def _stream_part(rest: bytes, record: Any) -> Part:
    name, time, versions, fields = record
    schema = Schema.of(tuple(Field.from_record(each) for each in fields), time)
    return "streams", name, StreamInfo(_STREAM.unpack(rest)[0], name, schema, tuple(versions))


def _sealed_part(_: bytes, record: Any) -> Part:
    record[3] = {stream_id: Totals(*each) for stream_id, each in record[3].items()}
    return "sealed", record[0], Sealed(*record)


def _dropped_part(rest: bytes, record: Any) -> Part:
    totals, *others = record
    return "dropped", _STREAM.unpack(rest)[0], Dropped(Totals(*totals), *others)


# By the first part of a record's key, what follows it there and the record itself.
_PARTS: Final[dict[bytes, Callable[[bytes, Any], Part]]] = {
    b"identity": lambda _, record: ("version", None, record[0]),
    b"commit": lambda _, record: ("last_commit_ns", None, record),
    b"clock": lambda _, record: ("clock_ns", None, record),
    b"session": lambda _, record: ("session", None, Session(*record)),
    b"settings": lambda _, record: ("settings", None, Settings.from_record(record)),
    b"stream": _stream_part,
    b"total": lambda rest, record: ("totals", _STREAM.unpack(rest)[0], Totals(*record)),
    b"mark": lambda rest, record: ("marks", rest.decode(), record),
    b"sealed": _sealed_part,
    b"dropped": _dropped_part,
    b"pin": lambda rest, record: ("pins", _U64.unpack(rest)[0], Pin(*record)),
    b"gap": lambda rest, record: ("gaps", _U64.unpack(rest)[0], Gap(*record)),
}


def meta_part(key: bytes, record: Any) -> Part | None:
    """What a record of the meta table says: attribute of State, key in it, value.

    The key is None where the attribute is the value. None for a kind that is not known here.
    """
    kind, _, rest = key.partition(b":")
    read = _PARTS.get(kind)
    return read(rest, record) if read else None


def read_meta_record(state: State, key: bytes, record: Any) -> None:
    """Put one record of the meta table into the state."""
    if part := meta_part(key, record):
        put_part(state, part)


def put_part(state: State, part: Part) -> None:
    """Put what a record says into the state."""
    attribute, key, value = part
    if key is None:
        setattr(state, attribute, value)
    else:
        getattr(state, attribute)[key] = value
