"""What one segment file still holds: batches, found through its tree or page by page.

Nothing is taken on trust: an index record counts only if its checksum and its own key are
right, a block only if the record's checksum of it is. So whatever comes out was put in. Where
the tree is damaged or the file cut short, every page that is there is looked at: first leaf
pages, for records and for where blocks are, then large values themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from kvstore import codec
from kvstore.check import BATCH_KEY_BYTES, decode_block, read_state
from kvstore.errors import DamageError, KvstoreError, NoFillError
from kvstore.pages import Node, PageFile
from kvstore.schema import Array, Batch
from kvstore.segment import Entry, State, StreamInfo, Totals, read_entry, read_meta_record
from kvstore.timestamps import plain_time

_STREAM: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">H")
_BLOCK_KEY_BYTES: Final = BATCH_KEY_BYTES + _NUMBER.size
_PLACED: Final = 4  # values that describe a block which stands in the table of blocks
_BLOSC_SIZE: Final = struct.Struct("<12xI")  # where a Blosc block says how long it is


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
        self.size = self._file.size
        self._entries: dict[tuple[int, int], dict[bytes, Entry]] = {}
        self._blocks: dict[bytes, list[Node]] = {}
        self._searched = False
        self._found_large: dict[tuple[int, int], int] = {}  # size, checksum -> page
        self.state: State = read_state(self._file, number, self.problems.append)
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
            kind = node.key.partition(b":")[0]
            if kind not in (b"identity", b"stream", b"total"):
                continue
            other = State(b"", self.number, 0)
            try:
                record = codec.unpacked(node.value, "meta record")
                if kind == b"identity":
                    _, self.state.store_id, self.state.number, self.state.created_ns = record
                else:
                    read_meta_record(other, node.key, record)
            except (KvstoreError, ValueError, TypeError, struct.error):
                continue
            self._take(other)

    def _take(self, other: State) -> None:
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
            self._blocks.setdefault(node.key, []).append(node)
        found: dict[int, int] = {}
        for stream_id, _ in self._entries:
            found[stream_id] = found.get(stream_id, 0) + 1
        wanted = {key: totals.batches for key, totals in expected.items() if totals.batches}
        if len(self.problems) > before or found != wanted:
            self._scan_batches(expected if is_exact else {})

    def _scan_batches(self, expected: dict[int, Totals]) -> None:
        for node in self._file.scan():
            if len(node.key) == BATCH_KEY_BYTES:
                self._take_entry(node, expected)
            elif len(node.key) == _BLOCK_KEY_BYTES:
                self._blocks.setdefault(node.key, []).append(node)

    def _take_entry(self, node: Node, expected: dict[int, Totals] | None = None) -> None:
        """expected: leaves out what stands in pages that were written but never committed."""
        value = self._file.value(node)
        if isinstance(value, str) or len(node.key) != BATCH_KEY_BYTES:
            return
        try:
            entry = read_entry(node.key, value)
        except (DamageError, TypeError):
            return
        stream_id, sequence = _STREAM.unpack_from(node.key)[0], entry.sequence
        if expected is not None and stream_id in expected:
            totals = expected[stream_id]
            if not totals.next_sequence - totals.batches <= sequence < totals.next_sequence:
                return
        self._entries.setdefault((stream_id, sequence), {}).setdefault(node.key, entry)

    # ---- reading batches ----

    def unknown(self, infos: dict[int, StreamInfo]) -> dict[int, list[Entry]]:
        """What was found of streams whose definition is lost, by stream."""
        found: dict[int, list[Entry]] = {}
        for (stream_id, _), entries in self._entries.items():
            if stream_id not in infos:
                found.setdefault(stream_id, []).append(next(iter(entries.values())))
        return found

    def batches(self, infos: dict[int, StreamInfo]) -> Iterator[tuple[StreamInfo, Salvaged | Lost]]:
        """Every batch that was found, in order of streams and arrival."""
        for stream_id, sequence in sorted(self._entries):
            info = infos.get(stream_id)
            if info is None:
                continue
            results = [
                self._salvage(info, entry)
                for entry in self._entries[stream_id, sequence].values()
                if len(entry.blocks) <= len(info.schema.fields)
            ]
            if results:
                yield info, min(results, key=_loss)

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
        if len(block) > _PLACED:  # it stands in the record
            yield None
            return
        for node in self._blocks.get(entry.key + _NUMBER.pack(number), []):
            value = self._file.value(node)
            if isinstance(value, bytes):
                yield value
        if not self._searched:
            self._search_large()
        if (page := self._found_large.get((block[2], block[3]))) is not None:
            yield self._file.large(page, block[2])

    def _search_large(self) -> None:
        """Look for blocks that no leaf page points to, by size and checksum."""
        self._searched = True
        wanted: dict[int, dict[tuple[int, int], set[int]]] = {}  # pages -> codec, size -> checksums
        for kind, _, size, checksum, *_ in self._unplaced():
            sizes = wanted.setdefault(self._file.overflow_pages(size), {})
            sizes.setdefault((kind, size), set()).add(checksum)
        for page, count in self._file.scan_overflow() if wanted else ():
            for (kind, size), checksums in wanted.get(count, {}).items():
                self._match(page, kind, size, checksums)

    def _unplaced(self) -> Iterator[Sequence[Any]]:
        """The blocks that are not where the table of blocks says."""
        for entries in self._entries.values():
            for entry in entries.values():
                for number, block in enumerate(entry.blocks):
                    if len(block) == _PLACED and not self._is_placed(entry, number, block):
                        yield block

    def _is_placed(self, entry: Entry, number: int, block: Sequence[Any]) -> bool:
        nodes = self._blocks.get(entry.key + _NUMBER.pack(number), [])
        values = (self._file.value(node) for node in nodes if node.size == block[2])
        return any(isinstance(v, bytes) and codec.checksum(v) == block[3] for v in values)

    def _match(self, page: int, kind: int, size: int, checksums: set[int]) -> None:
        if kind == codec.BLOSC:  # says its own size: that saves most of the checksums
            head = self._file.large(page, _BLOSC_SIZE.size)
            if len(head) < _BLOSC_SIZE.size or _BLOSC_SIZE.unpack(head)[0] != size:
                return
        checksum = codec.checksum(self._file.large(page, size))
        if checksum in checksums:
            self._found_large[size, checksum] = page


def _loss(result: Salvaged | Lost) -> int:
    return len(result.filled) if isinstance(result, Salvaged) else 2**16
