"""What stands in a segment's index for a batch: its key, and the record under it.

A key is stream id, span class, time, sequence. The span class is the bit length of the
batch's own time span. A record says what the batch's blocks are, each with its checksum, and
names its own key, so that it cannot be taken for another's. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore import codec
from kvstore.errors import DamageError
from kvstore.state import Totals
from kvstore.timestamps import MIN_NS, decode_key, encode_key, format_time, span_class

STREAM_CLASS: Final = struct.Struct(">IB")  # what a key begins with
_TIME_OFFSET: Final = STREAM_CLASS.size
_KEY_BYTES: Final = 21
_INT64: Final = np.dtype(np.int64)


class EncodedBatch(NamedTuple):
    """A batch ready to be put: its blocks are compressed, its sequence is assigned."""

    stream_id: int
    first_ns: int
    last_ns: int
    first: Any
    last: Any
    rows: int
    sequence: int = 0
    blocks: Sequence[codec.Block] = ()

    @property
    def key(self) -> bytes:
        """Where it stands in the index, and with a field's number behind it each of its blocks."""
        prefix = STREAM_CLASS.pack(self.stream_id, span_class(self.first_ns, self.last_ns))
        return prefix + encode_key(self.first_ns, self.sequence)

    @property
    def totals(self) -> Totals:
        """What this batch adds to its stream."""
        raw_bytes = sum(block.raw_bytes for block in self.blocks)
        size = self.stored_bytes
        return Totals(self.rows, 1, raw_bytes, size, self.first, self.last, self.sequence + 1)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the blocks as stored."""
        return sum(len(block.data) for block in self.blocks)


class Entry(NamedTuple):
    """An index record: what a scan yields. blocks: (codec, raw, stored, checksum[, data]).

    frames: of each block, (rows, stored, checksum) of each frame; empty where none has several.
    """

    key: bytes
    rows: int
    first: Any
    last: Any
    blocks: Sequence[Sequence[Any]]
    frames: Sequence[Sequence[codec.Frame]] = ()

    @property
    def order(self) -> bytes:
        """Sorts entries of all classes and segments by time, then by arrival."""
        return self.key[_TIME_OFFSET:]

    @property
    def sequence(self) -> int:
        """Arrival number of the batch in its stream."""
        return decode_key(self.key[_TIME_OFFSET:])[1]

    @property
    def raw_bytes(self) -> int:
        """Bytes of the rows when decompressed."""
        return sum(block[1] for block in self.blocks)

    def frames_of(self, number: int) -> Sequence[codec.Frame]:
        """The frames of a field's block; none where it has only one."""
        return self.frames[number] if number < len(self.frames) else ()


def read_entry(key: bytes, value: bytes) -> Entry:
    """An index record; DamageError where it is not the one stored under that key."""
    try:
        record = codec.unpacked(value, "its index record")
    except DamageError as error:
        raise DamageError(f"a batch {_place(key)} cannot be read: {error}") from error
    if record[0] != key:
        raise DamageError(f"a batch {_place(key)} cannot be read: its index record is another's")
    return Entry(*record)


def arrived(sequence: int, key: bytes, value: bytes | None) -> Entry | DamageError:
    """What the order table leads to: the batch of that sequence, or what is wrong with it."""
    if value is None:
        return DamageError(f"a batch {_place(key)} cannot be read: it is missing from the index")
    try:
        entry = read_entry(key, value)
    except DamageError as error:
        return error
    if len(key) != _KEY_BYTES or entry.sequence != sequence:
        return DamageError(f"a batch {_place(key)} stands in the order table as another's")
    return entry


def _place(key: bytes) -> str:
    if len(key) != _KEY_BYTES:
        return f"under a key of {len(key)} bytes, expected {_KEY_BYTES},"
    first_ns = np.int64(max(decode_key(key[_TIME_OFFSET:])[0], MIN_NS))
    return f"that begins at {format_time(first_ns, _INT64)}"
