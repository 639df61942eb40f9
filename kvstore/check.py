"""One segment held against itself: every block, every index entry, the order, the totals.

Blocks are read, their checksums compared, and decoded; memory is bounded by one batch and 16
bytes for each batch of the segment. Two sources give the tables: a file that nobody writes to
is read page by page without LMDB (pages.py); the active one, while a writer lives, through LMDB
in short transactions. Never changes anything.
"""

from __future__ import annotations

import heapq
import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from kvstore import codec
from kvstore.environment import Txn
from kvstore.errors import DamageError, KvstoreError
from kvstore.schema import Array, Field
from kvstore.segment import (
    Entry,
    Segment,
    State,
    StreamInfo,
    Totals,
    read_entry,
    read_meta_record,
)
from kvstore.timestamps import MIN_NS, decode_key, format_time, span_class, time_to_ns, typed_time

BATCH_KEY_BYTES: Final = 21
_BLOCK_KEY_BYTES: Final = 23
_ORDER_KEY: Final = struct.Struct(">IQ")
_STREAM: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">H")
_PAGE_ENTRIES: Final = 256  # copied out in one transaction of a live source
_PAGE_BYTES_MAX: Final = 8 << 20
_HASH_MASK: Final = 2**64 - 1
_NS: Final = np.dtype(np.int64)


class Damage(NamedTuple):
    """One thing that is wrong. segment: 0 for the store as a whole; times as text, "" if unknown.

    rows: how many cannot be read because of it; 0 where that is not known.
    """

    segment: int
    what: str
    stream: str = ""
    field: str = ""
    start: str = ""
    stop: str = ""
    rows: int = 0


class Source(Protocol):
    """Where a segment's tables come from."""

    def items(self, table: bytes, /) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values of a table in order of keys."""


class LiveSource:
    """The tables of a segment that is being written: read in pages, each a short transaction."""

    def __init__(self, segment: Segment):
        self._environment = segment.environment

    def items(self, table: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values of a table in order of keys."""
        seek: bytes = b""
        while page := self._page(table, seek):
            yield from page
            seek = page[-1][0] + b"\0"

    def _page(self, table: bytes, seek: bytes) -> list[tuple[bytes, bytes]]:
        page: list[tuple[bytes, bytes]] = []
        size = 0
        with self._environment.read() as txn, self._cursor(txn, table) as cursor:
            more = cursor.set_range(seek) if seek else cursor.first()
            while more and len(page) < _PAGE_ENTRIES and size < _PAGE_BYTES_MAX:
                page.append((bytes(cursor.key()), bytes(cursor.value())))
                size += len(page[-1][1])
                more = cursor.next()
        return page

    def _cursor(self, txn: Txn, table: bytes) -> Any:
        return txn.cursor(getattr(self._environment, table.decode()))


class SegmentCheck:
    """The check of one segment; ``run`` it, then see ``state`` and ``found``.

    report: called with each Damage. spent: called with the bytes of each entry looked at.
    is_live: entries may be added meanwhile; those behind the state are left out.
    """

    def __init__(
        self,
        number: int,
        source: Source,
        report: Callable[[Damage], None],
        spent: Callable[[int], None],
        *,
        is_live: bool = False,
    ):
        self.state = State(b"", number, 0)
        self.found: dict[int, Totals] = {}
        self._number = number
        self._source = source
        self._report = report
        self._spent = spent
        self._is_live = is_live
        self._infos: dict[int, StreamInfo] = {}
        self._unreadable: dict[int, int] = {}  # index records, by stream
        self._arrived: dict[int, tuple[array[int], array[int]]] = {}  # sequence, hash of key

    def run(self) -> None:
        """Check everything."""
        self.state = read_state(self._source, self._number, self._lose)
        self._infos = {info.stream_id: info for info in self.state.streams.values()}
        self._check_batches()
        self._check_order()
        self._check_totals()

    # ---- index and blocks ----

    def _check_batches(self) -> None:
        """Index and blocks merged by key: a record comes right before its blocks."""
        both = heapq.merge(
            self._items(b"index", BATCH_KEY_BYTES), self._items(b"blocks", _BLOCK_KEY_BYTES),
            key=lambda item: item[0],
        )  # fmt: skip
        key: bytes = b""
        entry: Entry | None = None
        blocks: dict[int, bytes] = {}
        for each, value in both:
            if each[:BATCH_KEY_BYTES] != key or len(each) == BATCH_KEY_BYTES:
                self._check_batch(entry, blocks)
                key, entry, blocks = each[:BATCH_KEY_BYTES], None, {}
                if len(each) == BATCH_KEY_BYTES:
                    entry = self._entry(each, value)
                else:
                    self._lose_batch(key, "blocks without an index entry")
            if len(each) == _BLOCK_KEY_BYTES:
                blocks[_NUMBER.unpack(each[BATCH_KEY_BYTES:])[0]] = value
        self._check_batch(entry, blocks)

    def _items(self, table: bytes, key_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self._source.items(table):
            self._spent(len(key) + len(value))
            if len(key) != key_bytes:
                self._lose(f"table {table.decode()}: a key of {len(key)} bytes, not {key_bytes}")
            elif not self._is_later(key):
                yield key, value

    def _is_later(self, key: bytes) -> bool:
        stream_id, sequence = _STREAM.unpack_from(key)[0], decode_key(key[5:21])[1]
        return self._is_live and sequence >= self._next_sequence(stream_id)

    def _next_sequence(self, stream_id: int) -> int:
        return self.state.totals.get(stream_id, Totals()).next_sequence

    def _entry(self, key: bytes, value: bytes) -> Entry | None:
        stream_id = _STREAM.unpack_from(key)[0]
        sequences, hashes = self._arrived.setdefault(stream_id, (array("Q"), array("Q")))
        sequences.append(decode_key(key[5:])[1])
        hashes.append(hash(key[4:]) & _HASH_MASK)
        try:
            return read_entry(key, value)
        except DamageError as error:
            self._unreadable[stream_id] = self._unreadable.get(stream_id, 0) + 1
            self._lose_batch(key, str(error))
            return None

    def _check_batch(self, entry: Entry | None, blocks: dict[int, bytes]) -> None:
        if entry is None:
            return
        stream_id, sequence = _STREAM.unpack_from(entry.key)[0], entry.sequence
        stored = sum(block[2] for block in entry.blocks)
        batch = Totals(
            entry.rows, 1, entry.raw_bytes, stored, entry.first, entry.last, sequence + 1
        )
        self.found[stream_id] = self.found.get(stream_id, Totals()).plus(batch)
        info = self._infos.get(stream_id)
        if info is None or len(entry.blocks) not in info.versions:
            self._lose_rows(entry, "", f"{len(entry.blocks)} blocks fit no schema of the stream")
            return
        for number, (field, block) in enumerate(
            zip(info.schema.fields, entry.blocks, strict=False)
        ):
            column = self._column(entry, field, block, blocks.pop(number, None))
            if column is not None and field.name == info.schema.time:
                self._check_times(entry, field, column)
        for number in blocks:
            self._lose_rows(entry, "", f"block {number} is not in the index", rows=0)

    def _column(self, entry: Entry, field: Field, block: Any, data: bytes | None) -> Array | None:
        try:
            return decode_block(block, data, field, entry.rows)
        except KvstoreError as error:
            self._lose_rows(entry, field.name, str(error))
            return None

    def _check_times(self, entry: Entry, field: Field, times: Array) -> None:
        dtype = field.np_dtype
        plain = times.view(np.int64) if dtype.kind == "M" else times
        first_ns, last_ns = (time_to_ns(each, dtype) for each in (times[0], times[-1]))
        if (plain[0], plain[-1]) != (entry.first, entry.last) or (plain[1:] < plain[:-1]).any():
            self._lose_rows(entry, field.name, "times are not those of the index, or not sorted")
        elif (first_ns, span_class(first_ns, last_ns)) != (
            decode_key(entry.order)[0],
            entry.key[4],
        ):
            self._lose_rows(entry, field.name, "the key is not that of these times")

    # ---- order ----

    def _check_order(self) -> None:
        listed: dict[int, tuple[array[int], array[int]]] = {}
        for key, value in self._source.items(b"order"):
            self._spent(len(key) + len(value))
            if len(key) != _ORDER_KEY.size:
                self._lose(f"table order: a key of {len(key)} bytes, not {_ORDER_KEY.size}")
                continue
            stream_id, sequence = _ORDER_KEY.unpack(key)
            if self._is_live and sequence >= self._next_sequence(stream_id):
                continue
            sequences, hashes = listed.setdefault(stream_id, (array("Q"), array("Q")))
            sequences.append(sequence)
            hashes.append(hash(value) & _HASH_MASK)
        for stream_id in sorted({*listed, *self._arrived, *self.state.totals}):
            self._compare(stream_id, listed.get(stream_id), self._arrived.get(stream_id))

    def _compare(self, stream_id: int, *both: tuple[array[int], array[int]] | None) -> None:
        columns = [[np.array(c, np.uint64) for c in (each or (array("Q"),) * 2)] for each in both]
        (listed, listed_keys), (indexed, indexed_keys) = columns
        by_arrival = np.argsort(indexed, kind="stable")
        indexed, indexed_keys = indexed[by_arrival], indexed_keys[by_arrival]
        if np.array_equal(listed, indexed) and np.array_equal(listed_keys, indexed_keys):
            pass
        else:
            differ = set(zip(listed.tolist(), listed_keys.tolist(), strict=True)) ^ set(
                zip(indexed.tolist(), indexed_keys.tolist(), strict=True)
            )
            which = ranges_text(sorted({sequence for sequence, _ in differ}))
            self._lose(f"order and index differ in the batches {which}", stream_id)
        if len(indexed) and (np.diff(indexed) == 0).any():
            self._lose("a sequence number was given twice", stream_id)
        totals = self.state.totals.get(stream_id, Totals())
        expected = np.arange(totals.next_sequence - totals.batches, totals.next_sequence)
        missing = np.setdiff1d(expected.astype(np.uint64), indexed)
        if len(missing):
            which = ranges_text(missing.tolist())
            self._lose(f"the index lacks the batches {which}", stream_id)

    # ---- totals ----

    def _check_totals(self) -> None:
        for stream_id in sorted({*self.found, *self.state.totals}):
            stored = self.state.totals.get(stream_id, Totals())
            found = self.found.get(stream_id, Totals())
            unreadable = self._unreadable.get(stream_id, 0)
            if unreadable and found.batches + unreadable == stored.batches:
                continue  # that damage is reported
            if found[:6] != stored[:6]:
                self._lose(
                    f"totals say {stored.rows} rows in {stored.batches} batches, "
                    f"{stored.stored_bytes} bytes from {stored.first} to {stored.last}; found "
                    f"{found.rows} in {found.batches}, {found.stored_bytes} bytes from "
                    f"{found.first} to {found.last}",
                    stream_id,
                    rows=max(stored.rows - found.rows, 0),
                )

    # ---- saying so ----

    def _lose(self, what: str, stream_id: int = 0, rows: int = 0) -> None:
        self._report(Damage(self._number, what, self._name(stream_id), rows=rows))

    def _lose_batch(self, key: bytes, what: str) -> None:
        first_ns = np.int64(max(decode_key(key[5:])[0], MIN_NS))
        name = self._name(_STREAM.unpack_from(key)[0])
        self._report(Damage(self._number, what, name, start=format_time(first_ns, _NS)))

    def _lose_rows(self, entry: Entry, field: str, what: str, rows: int | None = None) -> None:
        stream_id = _STREAM.unpack_from(entry.key)[0]
        info = self._infos.get(stream_id)
        ends = ["", ""]
        if info is not None:
            dtype = info.schema.time_dtype
            ends = [format_time(typed_time(t, dtype), dtype) for t in (entry.first, entry.last)]
        rows = entry.rows if rows is None else rows
        start, stop = ends
        self._report(Damage(self._number, what, self._name(stream_id), field, start, stop, rows))

    def _name(self, stream_id: int) -> str:
        info = self._infos.get(stream_id)
        return info.name if info else f"number {stream_id}" if stream_id else ""


def read_state(source: Source, number: int, lose: Callable[[str], None]) -> State:
    """The meta table; ``lose`` is called for each record that cannot be read."""
    state = State(b"", number, 0)
    is_named = False
    for key, value in source.items(b"meta"):
        try:
            record = codec.unpacked(value, f"meta record {key!r}")
            if key == b"identity":
                _, state.store_id, state.number, state.created_ns = record
                is_named = True
            else:
                read_meta_record(state, key, record)
        except (KvstoreError, struct.error) as error:
            lose(str(error))
    if not is_named:
        lose("no identity in the meta table")
    return state


def decode_block(block: Any, data: bytes | None, field: Field, rows: int) -> Array:
    """One block of an index record, decoded; DamageError where it is not what was stored.

    data: what the table of blocks holds for it; None where it is missing or in the record.
    """
    kind, raw_bytes, stored_bytes, expected, *inline = block
    data = inline[0] if inline else data
    if data is None:
        raise DamageError("its block is missing")
    if len(data) != stored_bytes:
        raise DamageError(f"its block has {len(data)} bytes, expected {stored_bytes}")
    return codec.decode(memoryview(data), kind, raw_bytes, expected, field, rows=rows)


def ranges_text(numbers: list[int]) -> str:
    """1-3, 7: ascending numbers, at most ten ranges of them."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:10]]
    return ", ".join([*shown, *["…"][: len(ranges) > 10]])  # noqa: PLR2004
