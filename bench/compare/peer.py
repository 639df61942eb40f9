"""What a peer's module offers, and the few acts that several of them share.

    NAME          as it stands in the table
    PACKAGES      what to install for it, by the names under which it is imported
    COMPRESSES    whether the store does; decides which targets it counts for
    DURABILITY    what a power cut may take, in a few words, for the table
    LIVE          whether another process can read while one writes
    write(path, batches)        everything, durable when it returns, committing about each 32 MB
    read(path, start, stop, fields)   batches in order of time, both ends included

Arrays that `read` yields are C-contiguous and stay valid. `read` opens, and closes at its end.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from kvstore.schema import Batch

OURS = "kvstore_"
LIMIT = "bare"
PEERS = (
    "naive",
    "hdf5",
    "hdf5_blosc",
    "zarr_blosc",
    "arrow_ipc",
    "parquet",
    "sqlite",
    "rocksdb",
    "mcap_lz4",
    "lance_fixed",
    "lance_lists",
    "duckdb_",
    "tiledb_lz4",
    "arctic",
)
ALL = (OURS, LIMIT, *PEERS)
EVER = float("inf")


class Peer(Protocol):
    """A module of peers/."""

    NAME: str
    PACKAGES: tuple[str, ...]
    COMPRESSES: bool
    DURABILITY: str
    LIVE: bool

    def write(self, path: Path, batches: Iterable[Batch]) -> None:
        """Write everything; durable when it returns."""

    def read(self, path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
        """Yield what is in [start, stop]."""


def peer(name: str) -> Peer:
    """Import a peer's module; its packages are imported when it is used."""
    return cast("Peer", importlib.import_module(f"bench.compare.peers.{name}"))


def missing(found: Peer) -> list[str]:
    """Name the packages that are not installed here."""
    return [name for name in found.PACKAGES if importlib.util.find_spec(name) is None]


def versions(found: Peer) -> dict[str, str]:
    """Name the installed distributions of a peer's packages."""
    known = _distributions()
    return {
        package: importlib.metadata.version(known[package][0])
        for package in found.PACKAGES
        if package in known
    }


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def files(path: Path) -> list[Path]:
    """Every file of a store."""
    if path.is_dir():
        return [file for file in sorted(path.rglob("*")) if file.is_file()]
    return sorted(path.parent.glob(path.name + "*"))  # SQLite's and DuckDB's logs lie beside


def size_bytes(path: Path) -> int:
    """Bytes that a store takes on the disk, its logs included; holes count as nothing."""
    return sum(min(file.stat().st_blocks * 512, file.stat().st_size) for file in files(path))


class Syncer:
    """fsync for stores that leave it to the file system: what is new since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[Path, tuple[int, int]] = {}

    def sync(self) -> None:
        """Bring every new or changed file, and its folder, to the disk."""
        folders = set()
        for file in files(self._path):
            found = (file.stat().st_mtime_ns, file.stat().st_size)
            if self._seen.get(file) != found:
                sync(file)
                self._seen[file] = found
                folders.add(file.parent)
        for folder in folders:
            sync(folder)


def sync(path: Path) -> None:
    """Fsync one file or folder by its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
