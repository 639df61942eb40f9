"""What travels through the pipeline: chunks in, readings and rejections on, a Work per commit.

Plain records without behaviour beyond their own consistency; no I/O. Times are int64
microseconds since 1970, UTC: the resolution in which every sink compares identities.

Identity of a reading is (device_id, ts_us). Two readings are equal where all values are, after
typing: 68 = 68.0, absent = null, extras as canonical JSON. Lineage does not count.

Identity of an event is its place: (source, partition, offset).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Headers = tuple[tuple[str, bytes | None], ...]


class Place(NamedTuple):
    """One partition of one source.

    source: a stable identity, such as ``kafka:<cluster id>/<topic>``, ``file:<absolute path>`` or
    ``kvstore:<store id>/<stream>``. partition: 0 where the source has none.
    """

    source: str
    partition: int


class Position(NamedTuple):
    """How far a place was read: ``next`` is the number of the first event not yet read.

    token: the source's own proof that the place is still the same thing, and where in it the
    position lies (a topic's id; a file's fingerprint and byte offset). Sinks keep it unread.
    """

    place: Place
    next: int
    token: str = ""


class Claim(NamedTuple):
    """A worker's right to commit for a place: valid until somebody else claims the place.

    epoch: grows by one with each claim of the place in that sink.
    """

    position: Position
    epoch: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Events of one place, in order of their offsets.

    offsets: ascending, not always dense (aborted and compacted records leave holes); for files
    and stdin the number of the line, from 1. payloads: the raw bytes, None for a Kafka tombstone.
    keys, headers: None where the source has none, else one per event. after: the position
    behind the last event *read*, which may lie behind offsets[-1] + 1.
    appended_us: when the source took each event, where it knows (for lag), else None.
    """

    place: Place
    offsets: NDArray[np.int64]
    payloads: Sequence[bytes | None]
    after: Position
    keys: Sequence[bytes | None] | None = None
    headers: Sequence[Headers] | None = None
    appended_us: NDArray[np.int64] | None = None


class Reason(NamedTuple):
    """Why an event was rejected: ``code`` is one of validate.CODES or ``conflict``.

    field: the one that it is about, else "". found: what was there, shortened, else "".
    """

    code: str
    field: str = ""
    found: str = ""


@dataclass(frozen=True, slots=True)
class Rejection:
    """An event that the contract refuses, with everything needed to look at it and to replay it.

    device_id, ts_us: where they could be made out, for counting; else "" and None.
    """

    place: Place
    offset: int
    payload: bytes | None
    reasons: tuple[Reason, ...]
    key: bytes | None = None
    headers: Headers = ()
    device_id: str = ""
    ts_us: int | None = None


class State(StrEnum):
    """What became of a dead letter."""

    OPEN = "open"
    REPLAYED = "replayed"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A rejection as a sink keeps it; unique by (place, offset) within a sink."""

    rejection: Rejection
    first_seen_us: int
    contract_version: int
    run: str
    state: State = State.OPEN
    replays: int = 0


class LetterChange(NamedTuple):
    """What a replay or a discard does to one dead letter, in the same commit as its row."""

    place: Place
    offset: int
    state: State
    replays: int


Column = NDArray[np.float64] | list[str | None]


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where each of n readings came from; lists and arrays of n."""

    source: list[str]
    partition: NDArray[np.int32]
    offset: NDArray[np.int64]
    ingested_us: NDArray[np.int64]
    contract_version: NDArray[np.int16]
    run: list[str]


@dataclass(frozen=True, slots=True)
class Readings:
    """n valid readings by column, in order of arrival.

    values: one column per field of the contract but the two of the identity, in the contract's
    order: float64 with NaN for null where the field is a number, else text with None for null.
    (JSON has no NaN, so that no value is lost by that.) extras: unknown fields as canonical JSON
    (sorted keys, no spaces), None where there are none.
    """

    device_id: list[str]
    ts_us: NDArray[np.int64]
    values: Mapping[str, Column]
    extras: list[str | None]
    lineage: Lineage

    def __len__(self) -> int:
        return len(self.device_id)


class Fate(IntEnum):
    """What a sink did with a reading."""

    STORED = 0
    DUPLICATE = 1
    CONFLICT = 2


class Count(NamedTuple):
    """One figure of quality, added up over commits, by device and hour.

    device_id: "" where it could not be made out. hour_us: begin of the hour of the event's own
    time, of the ingest where it has none. name: see counts.py.
    """

    device_id: str
    hour_us: int
    name: str
    value: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one commit carries: all of it becomes durable and visible, or nothing.

    claims: what each place was read from, and the epochs; after: what it is read up to, in the
    same order. commit_id: names the commit, so that one whose reply was lost can be looked for.
    raw: the event that each reading was made of, for the dead letter of a conflict.
    seen: counts that are known before the sink decides on each reading (received, late, …).
    changes: dead letters whose state this commit changes (a replay; claims may then be empty).
    """

    commit_id: str
    run: str
    committed_us: int
    claims: tuple[Claim, ...]
    after: tuple[Position, ...]
    readings: Readings
    raw: Sequence[bytes | None]
    rejections: Sequence[Rejection] = ()
    seen: Sequence[Count] = ()
    changes: Sequence[LetterChange] = ()
    contract_version: int = 1


class Outcome(NamedTuple):
    """What a commit did. received = stored + duplicates + rejected, conflicts inside rejected."""

    stored: int
    duplicates: int
    rejected: int
    conflicts: int
