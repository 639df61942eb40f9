"""The two meta pages at the head of an LMDB 0.9 file, which say what the rest of it is.

Read without LMDB, which maps a file and dies of one that is shorter than it says. The layout is
that of mdb.c, little-endian, 64-bit: a page header of 16 bytes, then MDB_meta.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.errors import StoreFormatError

PAGE_SIZES: Final = frozenset(1 << bits for bits in range(9, 17))  # what LMDB can have
DEFAULT_PAGE_BYTES: Final = 4096
_PAGE: Final = struct.Struct("<QHHI")  # number, pad, flags, lower and upper end of free space
_META: Final = struct.Struct("<IIQQ48s48sQQ")
_TABLE: Final = struct.Struct("<IHHQQQQQ")
META_BYTES: Final = _PAGE.size + _META.size
TABLE_BYTES: Final = _TABLE.size
_MAGIC: Final = 0xBEEFC0DE
_FORMAT_0_9: Final = 1
_IS_META: Final = 8
_REMEDY: Final = (
    "restore it from a backup, bring out what is left with kvstore recover, or move it away to "
    "use the rest of the store"
)


class Table(NamedTuple):
    """LMDB's record of one tree. page_bytes: the file's in the list of free pages, else 0."""

    page_bytes: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflow: int
    entries: int
    root: int

    @classmethod
    def unpack(cls, record: bytes) -> Table:
        """From the TABLE_BYTES of it in a file."""
        return cls(*_TABLE.unpack(record))


class Meta(NamedTuple):
    """One of a file's two meta pages."""

    address: int
    map_bytes: int
    txn_id: int
    last_page: int
    free: Table
    main: Table

    @property
    def page_bytes(self) -> int:
        """The size of the file's pages."""
        return self.free.page_bytes


def parse(page: bytes, number: int) -> Meta | None:
    """Meta page 0 or 1 from its first META_BYTES; None where they are not one of LMDB 0.9."""
    if len(page) < META_BYTES:
        return None
    there, _, flags, _ = _PAGE.unpack_from(page)
    magic, version, address, map_bytes, *tables, last_page, txn_id = _META.unpack_from(
        page, _PAGE.size
    )
    if (magic, version, flags, there) != (_MAGIC, _FORMAT_0_9, _IS_META, number):
        return None
    free, main = map(Table.unpack, tables)
    if free.page_bytes not in PAGE_SIZES:
        return None
    return Meta(address, map_bytes, txn_id, last_page, free, main)


def check_file(path: Path) -> None:
    """Raise StoreFormatError unless the file is LMDB 0.9's and as long as it claims to be."""
    with path.open("rb") as file:
        first = parse(file.read(META_BYTES), 0)
        file.seek(first.page_bytes if first else DEFAULT_PAGE_BYTES)
        second = parse(file.read(META_BYTES), 1)
        size = os.fstat(file.fileno()).st_size
    found = [meta for meta in (first, second) if meta]
    if not found:
        raise StoreFormatError(
            f"{path}: no LMDB 0.9 file ({size} bytes): damaged or foreign; {_REMEDY}"
        )
    newest = max(found, key=lambda meta: meta.txn_id)
    needed = (newest.last_page + 1) * newest.page_bytes
    if size < needed:
        raise StoreFormatError(
            f"{path}: truncated: {size} bytes, expected at least {needed}; {_REMEDY}"
        )
