"""Parquet with LZ4, a file for each commit, byte stream split in place of a byte shuffle.

Row groups of one commit: the documentation wants them large. No dictionary: values are measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare import parts
from bench.compare.columns import batch_of, cut, table, with_times
from bench.compare.packets import CHUNK_ROWS

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "Parquet, LZ4"
PACKAGES: tuple[str, ...] = ("pyarrow",)
COMPRESSES = True
DURABILITY = "each 31 MB, a file each"
LIVE = True
_ENCODING = {
    "scattering.list.element": "BYTE_STREAM_SPLIT",
    "spectral.list.element": "BYTE_STREAM_SPLIT",
}


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Write a file for each commit."""
    parts.publish(path, batches, _write)


def _write(path: Path, batch: Batch) -> None:
    from pyarrow import parquet  # noqa: PLC0415  # a peer

    parquet.write_table(
        table(batch), path, compression="lz4", use_dictionary=False, column_encoding=_ENCODING
    )


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Read the files that overlap, in pieces of 512 rows."""
    from pyarrow import parquet  # noqa: PLC0415  # a peer

    wanted = with_times(fields)
    for part in parts.within(path, start, stop):
        with parquet.ParquetFile(part, memory_map=True) as file:
            for record in file.iter_batches(CHUNK_ROWS, columns=wanted):
                found = cut(batch_of(record, wanted), fields, start, stop)
                if len(next(iter(found.values()))):
                    yield found
