"""Zarr 3: one array a field, chunks of 1-2 MB as its documentation advises, Blosc-LZ4.

Byte shuffle, clevel 5. Zarr never syncs (seen with strace): the bench fsyncs what is new after each
commit; chunks and metadata of several arrays are no transaction. Whole chunks only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.packets import CHUNK_ROWS, COMMIT_ROWS, FIELDS, blocks, pieces
from bench.compare.peer import Syncer

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "Zarr 3, Blosc-LZ4"
PACKAGES: tuple[str, ...] = ("zarr",)
COMPRESSES = True
DURABILITY = "fsync by the bench each 31 MB, no transaction"
LIVE = True


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Append whole chunks to each array; the times last, they say what is there."""
    import zarr  # noqa: PLC0415  # a peer
    from zarr.codecs import BloscCodec  # noqa: PLC0415

    group, syncer = zarr.open_group(path, mode="w"), Syncer(path)
    codec = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")
    arrays = {
        name: group.create_array(
            name,
            shape=(0, *shape),
            dtype=dtype,
            chunks=(CHUNK_ROWS if shape else COMMIT_ROWS, *shape),
            compressors=codec,
        )
        for name, (dtype, shape) in FIELDS.items()
    }
    for block in blocks(batches):
        for name in reversed(FIELDS):
            arrays[name].append(block[name])
        syncer.sync()


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Search the times, then read chunk by chunk."""
    import zarr  # noqa: PLC0415  # a peer

    group = zarr.open_group(path, mode="r")
    arrays = {name: group[name] for name in fields}
    times = group["timestamps"][:]
    for rows in pieces(times, start, stop):
        yield {name: times[rows] if name == "timestamps" else arrays[name][rows] for name in fields}
