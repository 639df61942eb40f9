"""The tables of one segment: put a group of batches, scan them by time, fetch their blocks.

Tables (docs/format.md has the bytes): *index*: key -> what a batch is; *blocks*: key + field
number -> a block; *order*: stream, sequence -> key; *meta*: identity, streams, totals, marks
and the summary of every sealed segment.

A scan seeks, in each span class (entries.py), just as far before ``start`` as a batch of that
class can reach. No transaction outlives a call; scans come in pages and seek again, so a slow
reader pins nothing.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvstore import codec
from kvstore.entries import STREAM_CLASS, EncodedBatch, Entry, arrived, read_entry
from kvstore.environment import Environment, Txn, create_environment, open_environment
from kvstore.errors import DamageError, StoreError, StoreFormatError
from kvstore.gaps import Gap
from kvstore.schema import Array, Field
from kvstore.state import (
    FORMAT,
    FORMATS,
    GONE,
    Dropped,
    Part,
    State,
    meta_part,
    meta_records,
    put_part,
)
from kvstore.timestamps import (
    encode_key,
    seek_ns,
)

INLINE_BYTES: Final = 256  # smaller blocks live in the index record: no page of their own
PAGE_ENTRIES: Final = 256  # index records per transaction of a scan: about 50 µs
_FIRST_PAGE_ENTRIES: Final = 8  # of the first one: whoever wants a row or two waits for no more
MAP_SPARE_BYTES: Final = 4 << 30  # address range beyond segment_bytes: no commit is that large
OnDamage = Callable[[DamageError], None]
_SPAN_CLASSES: Final = 65
_GAPS: Final = b"gap:"
_LASTING: Final = frozenset(("streams", "totals", "sealed"))  # nobody is given them to change
_BEHIND_GAPS: Final = b"gap;"  # the next byte after the colon
_STREAM: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_SEQUENCE: Final = struct.Struct(">IQ")
_NUMBER: Final = struct.Struct(">H")


@dataclass(slots=True)
class Known:
    """What a handle has read of the meta table: a record is decoded once, until its bytes change.

    That is most of them, however often a state is read: with a commit, a few change.
    """

    decoded: dict[bytes, tuple[bytes, Part | None]] = field(default_factory=dict)
    state: State | None = None


class Segment:
    """One segment, open for reading or writing."""

    def __init__(self, number: int, environment: Environment):
        self.number = number
        self.environment = environment

    @classmethod
    def open(
        cls,
        path: Path,
        number: int,
        mode: Any,
        store_id: bytes,
        *,
        writer: Callable[[], bytes] = bytes,
        seen_writer: bytes = b"",
    ) -> Segment:
        """Open the file and check that it is that segment of that store.

        mode, writer, seen_writer: as in environment.py. store_id: b"" where it is not known.
        """
        environment = open_environment(path, mode, writer=writer, seen_writer=seen_writer)
        segment = cls(number, environment)
        try:
            segment._check_identity(store_id)
        except BaseException:
            environment.close()
            raise
        return segment

    def shared(self) -> Segment:
        """Another handle on the same open file."""
        self.environment.share()
        return Segment(self.number, self.environment)

    def close(self) -> None:
        """Give up this handle's share of the file."""
        self.environment.close()

    def _check_identity(self, store_id: bytes) -> None:
        with self.environment.read() as txn:
            identity = _identity(self.environment, txn)
        if identity[0] not in FORMATS:
            raise StoreFormatError(
                f"{self.environment.path}: format version {identity[0]}, this kvstore reads "
                f"up to {FORMAT}: use the kvstore release that wrote it, or a newer one"
            )
        if identity[2] != self.number:
            raise StoreFormatError(
                f"{self.environment.path}: holds segment {identity[2]}: renamed? Give it its name"
            )
        if store_id not in (b"", identity[1]):
            raise StoreFormatError(
                f"{self.environment.path}: a segment of the store {identity[1].hex()}, expected "
                f"{store_id.hex()}: move it away, put this store's own segment in its place"
            )

    def state(self, *, gaps: bool = False, known: Known | None = None) -> State:
        """The meta table as of the last commit; its gaps, which may be many, on request.

        known: what was read of it before; it is brought up to date.
        """
        before = known or Known()
        decoded: dict[bytes, tuple[bytes, Part | None]] = {}
        with self.environment.read() as txn:
            _, store_id, number, created_ns = _identity(self.environment, txn)
            state = State(store_id, number, created_ns, txn.id())
            with txn.cursor(self.environment.meta) as cursor:
                more = cursor.first()
                while more:
                    key = bytes(cursor.key())
                    if not gaps and key.startswith(_GAPS):
                        more = cursor.set_range(_BEHIND_GAPS)
                        continue
                    value = bytes(cursor.value())
                    found = before.decoded.get(key)
                    if found is None or found[0] != value:
                        found = value, self._part(key, value)
                    if part := found[1]:
                        put_part(state, part)
                        if part[0] in _LASTING:
                            decoded[key] = found
                    more = cursor.next()
        if before.state is not None:
            state.go_on_from(before.state)
        for info in state.streams.values():
            totals = state.stream_totals(info.stream_id)
            batches = totals.batches + state.dropped.get(info.stream_id, Dropped()).totals.batches
            expected = state.next_sequence(info.stream_id)  # each batch was given the next one
            if batches != expected:
                raise DamageError(
                    f"{self.environment.path}: the meta table knows {batches} batches of "
                    f"stream {info.name!r}, expected {expected}: records are missing"
                )
        if known is not None:
            known.decoded, known.state = decoded, state
        return state

    def _part(self, key: bytes, value: bytes) -> Part | None:
        try:
            return meta_part(key, codec.unpacked(value, "its content"))
        except DamageError as error:
            raise DamageError(f"{self.environment.path}: meta record {key!r}: {error}") from error

    def gaps(self) -> dict[int, Gap]:
        """The gaps recorded as of the last commit."""
        return self.state(gaps=True).gaps

    def entries(
        self, stream_id: int, start_ns: int, stop_ns: int, *, on_damage: OnDamage
    ) -> Iterator[Entry]:
        """Index records of batches that may reach into the range, in key order.

        on_damage: called for a record that cannot be read; if it returns, the scan goes on.
        """
        classes = [
            self._class_entries(stream_id, span, start_ns, stop_ns, on_damage)
            for span in self._classes(stream_id)
        ]
        return heapq.merge(*classes, key=_order) if len(classes) != 1 else classes[0]

    def _classes(self, stream_id: int) -> list[int]:
        found: list[int] = []
        with self.environment.read() as txn, txn.cursor(self.environment.index) as cursor:
            span = 0
            while span < _SPAN_CLASSES and cursor.set_range(STREAM_CLASS.pack(stream_id, span)):
                stream, span = STREAM_CLASS.unpack_from(cursor.key())
                if stream != stream_id:
                    break
                found.append(span)
                span += 1
        return found

    def _class_entries(
        self, stream_id: int, span: int, start_ns: int, stop_ns: int, on_damage: OnDamage
    ) -> Iterator[Entry]:
        prefix = STREAM_CLASS.pack(stream_id, span)
        seek = prefix + encode_key(seek_ns(start_ns, span), 0)
        end = prefix + encode_key(stop_ns, 2**64 - 1)
        count = _FIRST_PAGE_ENTRIES
        while True:
            page = self._page(seek, end, count)
            for key, value in page:
                try:
                    entry = read_entry(key, value)
                except DamageError as error:
                    on_damage(error)
                else:
                    yield entry
            if len(page) < count:
                return
            seek, count = page[-1][0] + b"\0", PAGE_ENTRIES

    def _page(self, seek: bytes, end: bytes, count: int) -> list[tuple[bytes, bytes]]:
        page: list[tuple[bytes, bytes]] = []
        with self.environment.read() as txn, txn.cursor(self.environment.index) as cursor:
            more = cursor.set_range(seek)
            while more and len(page) < count:
                key = bytes(cursor.key())
                if key > end:
                    break
                page.append((key, bytes(cursor.value())))
                more = cursor.next()
        return page

    def arrivals(
        self, stream_id: int, sequence: int, stop: int
    ) -> Iterator[tuple[int, Entry | DamageError]]:
        """Batches by sequence, from ``sequence`` to before ``stop``, as far as one page goes.

        One whose index record cannot be read comes as the error; one that is not here, not at all.
        """
        page = self._order_page(
            _SEQUENCE.pack(stream_id, sequence), _SEQUENCE.pack(stream_id, stop)
        )
        return ((found, arrived(found, key, record)) for found, key, record in page)

    def _order_page(self, seek: bytes, end: bytes) -> list[tuple[int, bytes, bytes | None]]:
        page: list[tuple[int, bytes, bytes | None]] = []
        with self.environment.read() as txn, txn.cursor(self.environment.order) as cursor:
            more = cursor.set_range(seek)
            while more and len(page) < PAGE_ENTRIES and (place := bytes(cursor.key())) < end:
                key = place[: _STREAM.size] + bytes(cursor.value())
                record = txn.get(key, db=self.environment.index)
                if len(place) == _SEQUENCE.size:
                    sequence = _SEQUENCE.unpack(place)[1]
                    page.append((sequence, key, None if record is None else bytes(record)))
                more = cursor.next()
        return page

    def fetch(
        self,
        entry: Entry,
        wanted: Sequence[tuple[int, Field]],
        *,
        part: slice = slice(None),
        verify: bool = True,
    ) -> list[Array]:
        """These rows of these fields, (number, field), decoded into new memory."""
        with self.environment.read() as txn:
            return [
                self._decode(txn, entry, number, field_, part, verify=verify)
                for number, field_ in wanted
            ]

    def _decode(
        self, txn: Txn, entry: Entry, number: int, field_: Field, part: slice, *, verify: bool
    ) -> Array:
        kind, raw_bytes, stored_bytes, expected, *inline = entry.blocks[number]
        if inline:
            data = memoryview(inline[0])
        else:
            data = txn.get(entry.key + _NUMBER.pack(number), db=self.environment.blocks)
        if data is None or len(data) != stored_bytes:
            raise DamageError(f"field {field_.name!r}: its block is missing or cut short")
        try:
            return codec.decode(
                data,
                kind,
                raw_bytes,
                expected,
                field_,
                rows=entry.rows,
                part=part,
                frames=entry.frames_of(number),
                verify=verify,
            )
        except DamageError as error:
            raise DamageError(f"field {field_.name!r}: {error}") from error

    def commit(self, batches: Iterable[EncodedBatch], records: dict[bytes, Any]) -> None:
        """One transaction: the batches, and meta records by key; durable on return.

        A record that is GONE is deleted.
        """
        batches = list(batches)
        needed = sum(batch.stored_bytes for batch in batches) + (1 << 20)
        with self.environment.write(needed) as txn:
            for batch in batches:
                self._put(txn, batch)
            for key, record in records.items():
                if record is GONE:
                    txn.delete(key, db=self.environment.meta)
                else:
                    txn.put(key, codec.packed(record), db=self.environment.meta)

    def _put(self, txn: Txn, batch: EncodedBatch) -> None:
        key = batch.key
        listed = []
        for number, block in enumerate(batch.blocks):
            size = len(block.data)
            entry: list[Any] = [block.codec, block.raw_bytes, size, block.checksum]
            if size < INLINE_BYTES:
                entry.append(bytes(block.data))
            else:
                txn.put(key + _NUMBER.pack(number), block.data, db=self.environment.blocks)
            listed.append(entry)
        record = [key, batch.rows, batch.first, batch.last, listed]
        if any(block.frames for block in batch.blocks):
            record.append([block.frames for block in batch.blocks])
        order_key = _SEQUENCE.pack(batch.stream_id, batch.sequence)
        fresh = txn.put(key, codec.packed(record), overwrite=False, db=self.environment.index)
        if not fresh or not txn.put(order_key, key[4:], overwrite=False, db=self.environment.order):
            raise StoreError(
                f"{self.environment.path}: sequence {batch.sequence} of stream "
                f"{batch.stream_id} is there already; please report this"
            )


def create_segment(path: Path, state: State, segment_bytes: int) -> None:
    """Make a segment file that holds no rows yet but all of ``state``; durable on return."""

    def fill(txn: Txn, meta: Any) -> None:
        for key, record in meta_records(state).items():
            txn.put(key, codec.packed(record), db=meta)

    create_environment(path, segment_bytes + MAP_SPARE_BYTES, fill)


def _order(entry: Entry) -> bytes:
    return entry.order


def _identity(environment: Environment, txn: Txn) -> list[Any]:
    value = txn.get(b"identity", db=environment.meta)
    if value is None:
        raise StoreFormatError(f"{environment.path}: an LMDB file, but no segment of a store")
    identity: list[Any] = codec.unpacked(value, f"{environment.path}: identity")
    return identity
