"""HDF5 with Blosc-LZ4 by hdf5plugin: byte shuffle, clevel 5; else as hdf5.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.peers import hdf5

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "HDF5, Blosc-LZ4"
PACKAGES: tuple[str, ...] = ("h5py", "hdf5plugin")
COMPRESSES = True
DURABILITY = hdf5.DURABILITY
LIVE = True


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Write through the Blosc filter."""
    import hdf5plugin  # noqa: PLC0415  # a peer

    blosc = hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE)
    hdf5.write_with(path, batches, dict(blosc))


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Read through the Blosc filter, which hdf5plugin registers."""
    import hdf5plugin  # noqa: F401, PLC0415  # a peer

    yield from hdf5.read(path, start, stop, fields)
