"""One segment held against itself: every block, every index entry, the order, the totals.

Blocks are read, their checksums compared, and decoded; memory is bounded by one batch and 16
bytes for each batch of the segment. Records are not trusted (untrusted.py). Never changes
anything.
"""

from __future__ import annotations

import heapq
import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from kvstore.entries import Entry
from kvstore.errors import DamageError, KvstoreError
from kvstore.pages import PageFile
from kvstore.schema import Array, Field
from kvstore.state import State, StreamInfo, Totals
from kvstore.timestamps import MIN_NS, decode_key, format_time, span_class, time_to_ns
from kvstore.untrusted import (
    BATCH_KEY_BYTES,
    BLOCK_KEY_BYTES,
    Damage,
    decode_block,
    entry_of,
    missing_ranges,
    ranges_text,
    read_state,
    span_texts,
    stretches,
)

_ORDER_KEY: Final = struct.Struct(">IQ")
_STREAM: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">H")
_HASH_MASK: Final = 2**64 - 1
_NS: Final = np.dtype(np.int64)


class SegmentCheck:
    """The check of one segment; ``run`` it, then see ``state`` and ``found``.

    report: called with each Damage. spent: called with the bytes of each entry looked at.
    """

    def __init__(
        self,
        number: int,
        file: PageFile,
        report: Callable[[Damage], None],
        spent: Callable[[int], None],
    ):
        self.state = State(b"", number, 0)
        self.found: dict[int, Totals] = {}
        self._number = number
        self._file = file
        self._report = report
        self._spent = spent
        self._infos: dict[int, StreamInfo] = {}
        self._unreadable: dict[int, int] = {}  # index records, by stream
        self._arrived: dict[int, tuple[array[int], array[int]]] = {}  # sequence, hash of key

    def run(self) -> None:
        """Check everything."""
        self.state = read_state(self._file.items(b"meta"), self._number, self._lose)
        self._infos = {info.stream_id: info for info in self.state.streams.values()}
        self._check_batches()
        self._check_order()
        self._check_totals()
        self._file.check_free()

    # ---- index and blocks ----

    def _check_batches(self) -> None:
        """Index and blocks merged by key: a record comes right before its blocks."""
        both = heapq.merge(
            self._items(b"index", BATCH_KEY_BYTES), self._items(b"blocks", BLOCK_KEY_BYTES),
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
            if len(each) == BLOCK_KEY_BYTES:
                blocks[_NUMBER.unpack(each[BATCH_KEY_BYTES:])[0]] = value
        self._check_batch(entry, blocks)

    def _items(self, table: bytes, key_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self._file.items(table):
            self._spent(len(key) + len(value))
            if len(key) != key_bytes:
                self._lose(f"table {table.decode()}: a key of {len(key)} bytes, not {key_bytes}")
            else:
                yield key, value

    def _entry(self, key: bytes, value: bytes) -> Entry | None:
        stream_id = _STREAM.unpack_from(key)[0]
        sequences, hashes = self._arrived.setdefault(stream_id, (array("Q"), array("Q")))
        sequences.append(decode_key(key[5:])[1])
        hashes.append(hash(key[4:]) & _HASH_MASK)
        try:
            return entry_of(key, value)
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
        for number, field in enumerate(info.schema.fields[: len(entry.blocks)]):
            column = self._column(entry, number, field, blocks.pop(number, None))
            if column is not None and field.name == info.schema.time:
                self._check_times(entry, field, column)
        for number in blocks:
            self._lose_rows(entry, "", f"block {number} is not in the index", rows=0)

    def _column(self, entry: Entry, number: int, field: Field, data: bytes | None) -> Array | None:
        block, frames = entry.blocks[number], entry.frames_of(number)
        try:
            return decode_block(block, data, field, entry.rows, frames)
        except KvstoreError as error:
            self._lose_rows(entry, field.name, str(error))
            return None

    def _check_times(self, entry: Entry, field: Field, times: Array) -> None:
        dtype = field.np_dtype
        plain = times.view(np.int64) if dtype.kind == "M" else times
        try:
            first_ns, last_ns = (time_to_ns(each, dtype) for each in (times[0], times[-1]))
        except KvstoreError as error:
            self._lose_rows(entry, field.name, str(error))
            return
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
        for key, value in self._file.items(b"order"):
            self._spent(len(key) + len(value))
            if len(key) != _ORDER_KEY.size:
                self._lose(f"table order: a key of {len(key)} bytes, not {_ORDER_KEY.size}")
                continue
            stream_id, sequence = _ORDER_KEY.unpack(key)
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
        if not (np.array_equal(listed, indexed) and np.array_equal(listed_keys, indexed_keys)):
            differ = _in_one_only(listed, listed_keys, indexed, indexed_keys)
            which = ranges_text(stretches(differ))
            self._lose(f"order and index differ in the batches {which}", stream_id)
        if (indexed[1:] == indexed[:-1]).any():
            self._lose("a sequence number was given twice", stream_id)
        totals = self.state.totals.get(stream_id, Totals())
        begin = totals.next_sequence - totals.batches
        if missing := missing_ranges(begin, totals.next_sequence, indexed):
            self._lose(f"the index lacks the batches {ranges_text(missing)}", stream_id)

    # ---- totals ----

    def _check_totals(self) -> None:
        for stream_id in sorted({*self.found, *self.state.totals}):
            stored = self.state.totals.get(stream_id, Totals())
            found = self.found.get(stream_id, Totals())
            unreadable = self._unreadable.get(stream_id, 0)
            if unreadable and found.batches + unreadable == stored.batches:
                continue  # that damage is reported
            if found.rows and not self.state.last_commit_ns:
                self._lose("there are rows, but no time of a last commit in the meta table")
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
        rows = entry.rows if rows is None else rows
        start, stop = span_texts(info, (entry.first, entry.last))
        self._report(Damage(self._number, what, self._name(stream_id), field, start, stop, rows))

    def _name(self, stream_id: int) -> str:
        info = self._infos.get(stream_id)
        return info.name if info else f"number {stream_id}" if stream_id else ""


def _in_one_only(*columns: Array) -> Array:
    """First column of the rows (a, b) that only one of two tables (a, b, a, b) has."""
    first, second = (np.concatenate(columns[k::2]) for k in (0, 1))
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    twice = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
    alone = ~(np.append(twice, False) | np.append(False, twice))
    return np.unique(first[alone])
