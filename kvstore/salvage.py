"""What one segment file still holds: batches, found through its tree or page by page.

Nothing is taken on trust: an index record counts only if its checksum and its own key are
right, a block only if the record's checksum of it is. So whatever comes out was put in. Where
the tree is damaged or the file cut short, every page that is there is looked at: first leaf
pages, for records and for where blocks are, then large values themselves.

Where a tree is lost, of a batch that a killed writer left uncommitted and the one that then got
its number, either may come out.

Kept in memory: where each record and block stands, 24 bytes; records are read again when it is
their turn. Blocks that have to be searched for by their checksums take about 200 bytes each.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np

from kvstore import codec
from kvstore.entries import Entry
from kvstore.errors import DamageError, KvstoreError, NoFillError
from kvstore.pages import Node, PageFile
from kvstore.schema import Array, Batch
from kvstore.state import State, StreamInfo, Totals
from kvstore.timestamps import plain_time
from kvstore.untrusted import (
    BATCH_KEY_BYTES,
    BLOCK_KEY_BYTES,
    META_BYTES_MAX,
    PLACED,
    RECORD_BYTES_MAX,
    decode_block,
    entry_of,
    own_key_of,
    read_state,
    take_meta,
)

_STREAM: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">H")
_FRAME_SIZE: Final = struct.Struct("<12xI")  # where a Blosc frame says how long it is
_FRAMES_PER_PAGE: Final = 64  # zeros fill no more than 26; bounds the walk through hostile ones
_SOUGHT_META: Final = (b"identity", b"stream", b"total")


class _Places:
    """Where things stand in the file, by what they are: three columns of numbers."""

    def __init__(self) -> None:
        self._columns = (array("Q"), array("Q"), array("Q"))
        self._sorted: tuple[Array, Array] | None = None

    def add(self, what: int, version: int, place: int) -> None:
        """version: tells copies of the same, of which one is kept, from others."""
        for column, value in zip(self._columns, (what, version, place), strict=True):
            column.append(value)
        self._sorted = None

    def sorted(self) -> tuple[Array, Array]:
        """What and where, by what; different versions in the order in which they were added."""
        if self._sorted is None:
            what, version, place = (np.array(each, np.uint64) for each in self._columns)
            order = np.lexsort((version, what))
            copy = np.zeros(len(order), bool)
            copy[1:] = np.all([np.diff(each[order]) == 0 for each in (what, version)], axis=0)
            kept = np.sort(order[~copy])
            kept = kept[np.argsort(what[kept], kind="stable")]
            self._sorted = what[kept], place[kept]
        return self._sorted

    def of(self, what: int) -> list[int]:
        """Places of one thing."""
        every, places = self.sorted()
        begin, end = (np.searchsorted(every, np.uint64(what), side) for side in ("left", "right"))
        return [int(place) for place in places[begin:end]]


class Salvaged(NamedTuple):
    """A batch that was brought back. filled: fields that were lost, and read as never stored."""

    entry: Entry
    batch: Batch
    filled: dict[str, str]


class Lost(NamedTuple):
    """A batch whose index record is there, but not all of its blocks."""

    entry: Entry
    field: str
    why: str


class SegmentFile:
    """One damaged segment, open for reading. Use in a ``with``.

    problems: what was found wrong with its structure. state: as far as it can be read.
    """

    def __init__(self, path: Path, number: int):
        self.problems: list[str] = []
        self.number = number
        self._file = PageFile(path, self.problems.append)
        self._entries: dict[int, _Places] = {}  # of each stream: sequence, record
        self._own_keys: dict[int, bytes] = {}  # of records in overflow pages; b"": taken
        self._blocks = _Places()  # checksum of key, overflow page
        self._found_large: dict[tuple[int, int], int] | None = None  # size, checksum -> page
        self.state: State = read_state(self._file.items(b"meta"), number, self.problems.append)
        self.is_stated = not self.problems
        if self.problems:
            self._scan_meta()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)

    def _scan_meta(self) -> None:
        """Definitions of streams, and the last totals there are, from any page."""
        for node in self._file.scan():
            if node.key.partition(b":")[0] in _SOUGHT_META and node.size <= META_BYTES_MAX:
                value = self._file.value(node)
                other = State(b"", self.number, 0)
                with suppress(DamageError):
                    take_meta(other, node.key, value if isinstance(value, bytes) else b"")
                    self._take(other)

    def _take(self, other: State) -> None:
        if other.store_id:
            self.state.store_id, self.state.number = other.store_id, other.number
        for name, info in other.streams.items():
            known = self.state.streams.get(name)
            if known is None or known.versions[-1] < info.versions[-1]:
                self.state.streams[name] = info
        for stream_id, totals in other.totals.items():
            known_totals = self.state.totals.get(stream_id, Totals())
            if totals.next_sequence > known_totals.next_sequence:
                self.state.totals[stream_id] = totals

    # ---- finding batches ----

    def load(self, expected: dict[int, Totals], *, is_exact: bool) -> None:
        """Find the batches: through the tree; in every page unless that finds all expected.

        is_exact: there were no others. Else ``expected`` may be of an earlier commit.
        """
        before = len(self.problems)
        for node in self._file.nodes(b"index"):
            self._take_entry(node)
        for node in self._file.nodes(b"blocks"):
            self._take_block(node)
        found = {key: len(np.unique(each.sorted()[0])) for key, each in self._entries.items()}
        wanted = {key: totals.batches for key, totals in expected.items() if totals.batches}
        if len(self.problems) > before or found != wanted:
            for node in self._file.scan():
                self._take_entry(node, expected if is_exact else None)
                self._take_block(node)

    def _take_block(self, node: Node) -> None:
        if len(node.key) == BLOCK_KEY_BYTES:
            self._blocks.add(codec.checksum(node.key), node.overflow or node.place, node.place)

    def _take_entry(self, node: Node, expected: dict[int, Totals] | None = None) -> None:
        """expected: leaves out what stands in pages that were written but never committed."""
        value = self._record(node)
        if value is None:
            return
        try:
            sequence = entry_of(node.key, value).sequence
        except DamageError:
            return
        stream_id = _STREAM.unpack_from(node.key)[0]
        if expected is not None and stream_id in expected:
            totals = expected[stream_id]
            if not totals.next_sequence - totals.batches <= sequence < totals.next_sequence:
                return
        places = self._entries.setdefault(stream_id, _Places())
        places.add(sequence, codec.checksum(value), node.place)

    def _record(self, node: Node) -> bytes | None:
        """What may be an index record; one in overflow pages only once, however many name it."""
        if len(node.key) != BATCH_KEY_BYTES or node.size > RECORD_BYTES_MAX:
            return None
        if not node.overflow:
            return node.value
        own_key = self._own_keys.get(node.overflow)
        if own_key is not None and own_key != node.key:
            return None
        value = self._file.value(node)
        if isinstance(value, str):
            return None
        if own_key is None:
            own_key = own_key_of(value)
        is_it = own_key == node.key
        self._own_keys[node.overflow] = b"" if is_it else own_key
        return value if is_it else None

    # ---- reading batches ----

    def streams(self) -> list[int]:
        """Ids of the streams of which batches were found."""
        return sorted(self._entries)

    def entries(self, stream_id: int) -> Iterator[Entry]:
        """Index records of a stream in order of arrival; rarely, several of one batch."""
        for place in self._entries.get(stream_id, _Places()).sorted()[1]:
            node = self._file.node_at(int(place))
            value = self._file.value(node) if node else ""
            if node and isinstance(value, bytes):
                with suppress(DamageError):  # that disk gives something else each time
                    yield entry_of(node.key, value)

    def batches(self, info: StreamInfo) -> Iterator[Salvaged | Lost]:
        """Every batch of a stream that was found, in order of arrival."""
        fitting = (e for e in self.entries(info.stream_id) if len(e.blocks) in info.versions)
        for _, rivals in groupby(fitting, key=_sequence):
            yield min((self._salvage(info, entry) for entry in rivals), key=_loss)

    def _salvage(self, info: StreamInfo, entry: Entry) -> Salvaged | Lost:
        batch: Batch = {}
        filled: dict[str, str] = {}
        for number, field in enumerate(info.schema.fields[: len(entry.blocks)]):
            column = self._column(info, entry, number)
            if isinstance(column, str):
                if field.name == info.schema.time:
                    return Lost(entry, field.name, column)
                filled[field.name] = column
                try:
                    column = field.filled(entry.rows)
                except NoFillError:
                    return Lost(entry, field.name, filled[field.name])
            batch[field.name] = column
        ends = [plain_time(time) for time in batch[info.schema.time][[0, -1]]]
        if ends != [entry.first, entry.last]:
            return Lost(entry, info.schema.time, "the stream's definition does not fit it")
        return Salvaged(entry, batch, filled)

    def _column(self, info: StreamInfo, entry: Entry, number: int) -> Array | str:
        field, block = info.schema.fields[number], entry.blocks[number]
        why = "its block is missing"
        for data in self._candidates(entry, number):
            try:
                return decode_block(block, data, field, entry.rows)
            except KvstoreError as error:
                why = str(error)
        return why

    def _candidates(self, entry: Entry, number: int) -> Iterator[bytes | None]:
        block = entry.blocks[number]
        if len(block) > PLACED:  # it stands in the record
            yield None
            return
        yield from self._placed(entry, number)
        if self._found_large is None:
            self._found_large = self._search_large()
        if (page := self._found_large.get((block[2], block[3]))) is not None:
            yield self._file.large(page, block[2])

    def _placed(self, entry: Entry, number: int) -> Iterator[bytes]:
        """What leaf pages say is that block."""
        key = entry.key + _NUMBER.pack(number)
        for place in self._blocks.of(codec.checksum(key)):
            node = self._file.node_at(place)
            if node and (node.key, node.size) == (key, entry.blocks[number][2]):
                value = self._file.value(node)
                if isinstance(value, bytes):
                    yield value

    # ---- blocks that no leaf page points to ----

    def _search_large(self) -> dict[tuple[int, int], int]:
        """Their pages, by size and checksum."""
        wanted: dict[tuple[int, bool], dict[int, set[int]]] = {}
        for kind, _, size, checksum, *_ in self._unplaced():
            pages = self._file.overflow_pages(size)
            sizes = wanted.setdefault((pages, kind in (codec.BLOSC, codec.FRAMES)), {})
            sizes.setdefault(size, set()).add(checksum)
        found: dict[tuple[int, int], int] = {}
        steps = self._file.pages * _FRAMES_PER_PAGE if wanted else 0
        for page, count in self._file.scan_overflow() if wanted else ():
            framed = wanted.get((count, True), {})
            told = self._frame_ends(page, max(framed), steps) if framed else []
            steps -= len(told)
            sizes = {size: framed[size] for size in told if size in framed}
            for size, checksums in (*wanted.get((count, False), {}).items(), *sizes.items()):
                checksum = codec.checksum(self._file.large(page, size))
                if checksum in checksums:
                    found[size, checksum] = page
        return found

    def _frame_ends(self, page: int, size: int, steps: int) -> list[int]:
        """Where the first frames of a large value end, by their headers: one is its size."""
        ends: list[int] = []
        end = 0
        while end < size and len(ends) < steps:
            told = _FRAME_SIZE.unpack(self._file.large(page, _FRAME_SIZE.size, end))[0]
            if told < _FRAME_SIZE.size:
                break
            end += told
            ends.append(end)
        return ends

    def _unplaced(self) -> Iterator[Sequence[Any]]:
        """The blocks that are not where the table of blocks says."""
        for stream_id in self._entries:
            for entry in self.entries(stream_id):
                for number, block in enumerate(entry.blocks):
                    if len(block) == PLACED and not self._is_placed(entry, number, block[3]):
                        yield block

    def _is_placed(self, entry: Entry, number: int, checksum: int) -> bool:
        return any(codec.checksum(value) == checksum for value in self._placed(entry, number))


def _sequence(entry: Entry) -> int:
    return entry.sequence


def _loss(result: Salvaged | Lost) -> int:
    return len(result.filled) if isinstance(result, Salvaged) else 2**16
