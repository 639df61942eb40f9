"""An LMDB 0.9 file read page by page, without LMDB: whatever is in it, it cannot harm us.

LMDB trusts its pages: a damaged one may kill the process. Here every number is checked before
it is followed, and what is wrong is reported and left out. Two ways to read: ``items`` walks a
table as of the last commit, ``scan`` takes every leaf page there is, reachable or not.

A file that is being written may be read as of one commit, while a transaction holds that commit's
pages (verify.py). The layout is that of LMDB 0.9's mdb.c, little-endian,
64-bit: page header 16 bytes (number u64, pad u16, flags u16, lower u16, upper u16 or the number
of overflow pages u32), then node offsets u16; a node is lo u16, hi u16, flags u16, key size u16,
key, value; in a branch lo, hi and flags are the child's page number; a large value stands in
overflow pages, and its node holds their number.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

from kvstore import metapage
from kvstore.environment import TABLES, translated
from kvstore.metapage import DEFAULT_PAGE_BYTES, META_BYTES, PAGE_SIZES, TABLE_BYTES, Meta, Table

_HEADER: Final = struct.Struct("<QHHHH")
_OVERFLOW: Final = struct.Struct("<QHHI")
_NODE: Final = struct.Struct("<HHHH")
_PAGE_NUMBER: Final = struct.Struct("<Q")
_HEADER_BYTES: Final = 16
_BRANCH, _LEAF, _LARGE = 1, 2, 4
_IN_OVERFLOW, _IS_TABLE = 1, 2
_FREE_FLAGS: Final = 0x4008  # integer keys; and, kept in the same place, one file without folder
_FREE: Final = "list of free pages"
_TABLES: Final = "list of tables"
_COUNTED: Final = ("branch pages", "leaf pages", "overflow pages", "entries")
_NO_PAGE: Final = 2**64 - 1
_DEPTH_MAX: Final = 32  # LMDB's own limit of a cursor
_VALUE_BYTES_MAX: Final = 1 << 31  # of a block of text; of others an eighth
_OFFSET_BITS: Final = 16
_TRIES_MAX: Final = 5  # of reading a meta page that is just being written

Report = Callable[[str], None]


class Node(NamedTuple):
    """An entry of a leaf page. overflow: page of a large value, whose size is ``size``.

    place: where it stands in the file, for ``node_at``.
    """

    key: bytes
    value: bytes
    flags: int
    size: int
    overflow: int
    place: int


class PageFile:
    """A file of pages, open for reading. Use in a ``with``.

    txn_id: read as of this commit, not the newest; ``meta`` is None where that came too late.
    """

    def __init__(self, path: Path, report: Report, *, txn_id: int | None = None):
        self.path = path
        self._report = report
        with translated(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._fd).st_size
        self.page_bytes = self._find_page_bytes()
        self.pages = self.size // self.page_bytes
        self._seen = bytearray(self.pages)
        self.meta = self._newest_meta() if txn_id is None else self._meta_of(txn_id)
        self.tables = self._find_tables() if self.meta else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    # ---- the last commit ----

    def items(self, table: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values of a table, in order of keys; what is damaged is reported, left out."""
        if table in self.tables:
            yield from self._values(table.decode(), self.tables[table])

    def nodes(self, table: bytes) -> Iterator[Node]:
        """The entries of a table without their large values: see ``value``. Once a table."""
        if table in self.tables and self.tables[table].root != _NO_PAGE:
            yield from self._walk(
                self.tables[table].root, 1, self.tables[table].depth, [0] * len(_COUNTED)
            )

    def check_free(self) -> None:
        """After all tables were read: no page in use may be listed as free, or be unknown."""
        if self.meta is None:
            return
        if (last := self._seen.rfind(1)) > self.meta.last_page:
            self._report(f"page {last} is in use, behind the last one, {self.meta.last_page}")
        for _, value in self._values(_FREE, self.meta.free):
            numbers = struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8])
            if not numbers or numbers[0] != len(numbers) - 1:
                self._report("a record of the list of free pages has the wrong length")
            for number in numbers[1:]:
                if not 1 < number <= self.meta.last_page:
                    self._report(f"page {number} is listed as free: there is none")
                elif number < self.pages and self._seen[number]:
                    self._report(f"page {number} is in use and listed as free")

    def _values(self, name: str, table: Table) -> Iterator[tuple[bytes, bytes]]:
        counts = [0] * len(_COUNTED)
        report, last = self._report, b""
        by_bytes, expected_flags = name != _FREE, _IS_TABLE if name == _TABLES else 0
        if table.flags != (_FREE_FLAGS if name == _FREE else 0):
            report(f"table {name}: has the flags {table.flags}")
        if table.page_bytes != (self.page_bytes if name == _FREE else 0):
            report(f"table {name}: has pages of {table.page_bytes} bytes")
        if table.root != _NO_PAGE:
            for node in self._walk(table.root, 1, table.depth, counts):
                if by_bytes and node.key <= last:
                    report(f"table {name}: an entry is out of order")
                    continue
                last = node.key
                if node.flags & ~_IN_OVERFLOW != expected_flags:
                    report(f"table {name}: an entry has the flags {node.flags}")
                    continue
                value = self.value(node, counts)
                if isinstance(value, str):
                    report(f"table {name}: {value}")
                else:
                    yield node.key, value
        expected = [table.branches, table.leaves, table.overflow, table.entries]
        if counts != expected:
            words = [
                f"{found} {what}, expected {right}"
                for found, what, right in zip(counts, _COUNTED, expected, strict=True)
                if found != right
            ]
            report(f"table {name}: found {'; '.join(words)}")

    def _walk(self, number: int, level: int, depth: int, counts: list[int]) -> Iterator[Node]:
        page = self._page(number, _LEAF if level == depth else _BRANCH)
        if page is None or level > min(depth, _DEPTH_MAX):
            return
        counts[int(level == depth)] += 1
        if level == depth:
            nodes = list(self._nodes(number, page))
            counts[3] += len(nodes)
            yield from nodes
            return
        for low, child in self._children(number, page):
            first = True
            for node in self._walk(child, level + 1, depth, counts):
                if first and node.key < low:
                    self._report(f"page {child}: begins before its place in the tree")
                first = False
                yield node

    def _page(self, number: int, flag: int) -> bytes | None:
        """A page of the tree that is what it should be; None, and a report, where it is not."""
        if not 1 < number < self.pages:
            self._report(f"page {number}: missing, the file has {self.pages}")
            return None
        if self._seen[number]:
            self._report(f"page {number}: in the tree twice")
            return None
        self._seen[number] = 1
        page = self._read(number * self.page_bytes, self.page_bytes)
        there, _, flags, lower, upper = _HEADER.unpack_from(page)
        if there != number or flags != flag:
            self._report(f"page {number}: damaged, its header says page {there}, type {flags}")
            return None
        if not self._is_sound(lower, upper):
            self._report(f"page {number}: damaged, {lower} and {upper} bound its entries")
            return None
        return page

    def _is_sound(self, lower: int, upper: int) -> bool:
        return _HEADER_BYTES <= lower <= upper <= self.page_bytes and lower % 2 == 0

    def _children(self, number: int, page: bytes) -> Iterator[tuple[bytes, int]]:
        for offset in self._offsets(page):
            low, high, top, key_bytes = _NODE.unpack_from(page, offset)
            end = offset + _NODE.size + key_bytes
            if end > self.page_bytes:
                self._report(f"page {number}: damaged, an entry ends behind the page")
                continue
            yield page[offset + _NODE.size : end], low | high << 16 | top << 32

    def _nodes(self, number: int, page: bytes) -> Iterator[Node]:
        for offset in self._offsets(page):
            node = self._node(number, page, offset)
            if node is None:
                self._report(f"page {number}: damaged, an entry ends behind the page")
            else:
                yield node

    def _offsets(self, page: bytes) -> list[int]:
        lower = _HEADER.unpack_from(page)[3]
        count = (lower - _HEADER_BYTES) // 2
        offsets = struct.unpack_from(f"<{count}H", page, _HEADER_BYTES)
        fits = range(lower, self.page_bytes - _NODE.size + 1)
        return [offset if offset in fits else self.page_bytes - _NODE.size for offset in offsets]

    def node_at(self, place: int) -> Node | None:
        """The entry that a node's ``place`` names."""
        number, offset = place >> _OFFSET_BITS, place % (1 << _OFFSET_BITS)
        return self._node(number, self._read(number * self.page_bytes, self.page_bytes), offset)

    def _node(self, number: int, page: bytes, offset: int) -> Node | None:
        low, high, flags, key_bytes = _NODE.unpack_from(page, offset)
        size = low | high << 16
        start = offset + _NODE.size + key_bytes
        end = start + (_PAGE_NUMBER.size if flags & _IN_OVERFLOW else size)
        if end > self.page_bytes or not key_bytes:
            return None
        key, value = page[start - key_bytes : start], page[start:end]
        place = number << _OFFSET_BITS | offset
        if flags & _IN_OVERFLOW:
            return Node(key, b"", flags, size, _PAGE_NUMBER.unpack(value)[0], place)
        return Node(key, value, flags, size, 0, place)

    def value(self, node: Node, counts: list[int] | None = None) -> bytes | str:
        """An entry's value, or in words why it cannot be had. counts: of the tree walked."""
        if not node.flags & _IN_OVERFLOW:
            return node.value
        number, count = node.overflow, self.overflow_pages(node.size)
        if node.size > _VALUE_BYTES_MAX:
            return f"overflow page {number}: {node.size} bytes, at most {_VALUE_BYTES_MAX}"
        if not 1 < number <= self.pages - count:
            return f"overflow page {number}: behind the end of the file, which has {self.pages}"
        data = self._read(number * self.page_bytes, _HEADER_BYTES + node.size)
        there, _, flags, found = _OVERFLOW.unpack_from(data)
        if there != number or flags != _LARGE or found != count:
            return f"overflow page {number}: damaged, its header says page {there}, type {flags}"
        if counts is not None:
            if any(self._seen[number : number + count]):
                return f"overflow page {number}: in the tree twice"
            self._seen[number : number + count] = b"\1" * count
            counts[2] += count
        return data[_HEADER_BYTES:]

    def overflow_pages(self, size: int) -> int:
        """How many pages a large value of that size takes."""
        return (_HEADER_BYTES - 1 + size) // self.page_bytes + 1

    # ---- every page ----

    def scan(self) -> Iterator[Node]:
        """The entries of every whole leaf page in the file, in the tree or left from before."""
        for number in range(2, self.pages):
            page = self._read(number * self.page_bytes, self.page_bytes)
            there, _, flags, lower, upper = _HEADER.unpack_from(page)
            if there == number and flags & 0xF == _LEAF and self._is_sound(lower, upper):
                nodes = (self._node(number, page, offset) for offset in self._offsets(page))
                yield from (node for node in nodes if node is not None)

    def scan_overflow(self) -> Iterator[tuple[int, int]]:
        """(page, number of pages) of every large value that the file holds whole."""
        for number in range(2, self.pages):
            header = self._read(number * self.page_bytes, _HEADER_BYTES)
            there, _, flags, count = _OVERFLOW.unpack(header)
            if there == number and flags & 0xF == _LARGE and 0 < count <= self.pages - number:
                yield number, count

    def large(self, number: int, size: int, offset: int = 0) -> bytes:
        """Bytes of a large value, from ``offset`` on."""
        return self._read(number * self.page_bytes + _HEADER_BYTES + offset, size)

    # ---- meta pages ----

    def _find_page_bytes(self) -> int:
        for page_bytes in (DEFAULT_PAGE_BYTES, *sorted(PAGE_SIZES)):
            for start in (0, page_bytes):
                meta = self._read_meta(start)
                if meta and meta.free.page_bytes == page_bytes:
                    return page_bytes
        return DEFAULT_PAGE_BYTES

    def _read_meta(self, start: int) -> Meta | None:
        meta = metapage.parse(self._read(start, META_BYTES), int(bool(start)))
        return meta if meta and start in (0, meta.page_bytes) else None

    def _meta_of(self, txn_id: int) -> Meta | None:
        """Of a file that is written to; None where two later commits have come already."""
        for _ in range(_TRIES_MAX):
            meta, again = (self._read_meta(txn_id % 2 * self.page_bytes) for _ in range(2))
            if meta is not None and meta == again:  # else read while it was being written
                break
        return meta if meta and meta.txn_id == txn_id else None

    def _newest_meta(self) -> Meta | None:
        metas = [self._read_meta(0), self._read_meta(self.page_bytes)]
        for number, meta in enumerate(metas):
            if meta is None:
                self._report(f"meta page {number}: damaged or none of LMDB 0.9")
        found = [meta for meta in metas if meta is not None]
        if not found:
            return None
        newest = max(found, key=lambda meta: meta.txn_id)
        ids = [meta.txn_id for meta in found]
        if len(ids) == len(metas) and not _alternate(*ids):
            self._report(f"meta pages: transactions {ids}, expected two that follow each other")
        if len({(meta.address, meta.map_bytes, meta.free.page_bytes) for meta in found}) > 1:
            self._report("meta pages: they differ in what never changes")
        needed = (newest.last_page + 1) * self.page_bytes
        if self.size < needed:
            self._report(f"truncated: {self.size} bytes, expected at least {needed}")
        return newest

    def _find_tables(self) -> dict[bytes, Table]:
        assert self.meta is not None
        found = {
            key: Table.unpack(value)
            for key, value in self._values(_TABLES, self.meta.main)
            if len(value) == TABLE_BYTES
        }
        for name in TABLES:
            if name not in found:
                self._report(f"table {name.decode()}: missing")
        return found

    def _read(self, start: int, size: int) -> bytes:
        """So many bytes; zeros, which are no page, for what a bad disk or the end withholds."""
        with translated(self.path):
            try:
                data = os.pread(self._fd, size, start)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self._report(f"bytes {start} to {start + size - 1}: {error.strerror}")
                data = b""
        return data.ljust(size, b"\0")


def _alternate(even: int, odd: int) -> bool:
    """Whether two transactions follow each other, each on the meta page that is its turn."""
    return abs(even - odd) == 1 and even % 2 == 0
