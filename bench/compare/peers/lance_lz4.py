"""Lance: one dataset, a list of fixed size for each array, LZ4 by the fields' metadata.

An append is a fragment and a version; Lance leaves syncing to the file system, so the bench fsyncs
what is new after each. A range is a filter on the times, with a zone map index made after writing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare.columns import batch_of, table
from bench.compare.packets import CHUNK_ROWS, blocks
from bench.compare.peer import EVER, Syncer

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "Lance, LZ4"
PACKAGES: tuple[str, ...] = ("lance", "pyarrow")
COMPRESSES = True
DURABILITY = "fsync by the bench each 31 MB"
LIVE = True
_METADATA = {"lance-encoding:compression": "lz4"}


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Append a fragment for each commit."""
    import lance  # noqa: PLC0415  # a peer

    syncer = Syncer(path)
    for number, block in enumerate(blocks(batches)):
        rows = table(block, _METADATA)
        lance.write_dataset(
            rows,
            str(path),
            mode="append" if number else "create",
            data_storage_version="stable",
        )
        syncer.sync()
    lance.dataset(str(path)).create_scalar_index("timestamps", "ZONEMAP")
    syncer.sync()


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Scan in order, in batches of 512 rows."""
    import lance  # noqa: PLC0415  # a peer

    limits = [
        f"timestamps >= {start!r}" if start != -EVER else "",
        f"timestamps <= {stop!r}" if stop != EVER else "",
    ]
    scanner = lance.dataset(str(path)).scanner(
        columns=list(fields),
        filter=" AND ".join(filter(None, limits)) or None,
        batch_size=CHUNK_ROWS,
        scan_in_order=True,
    )
    for record in scanner.to_batches():
        if len(record):
            yield batch_of(record, fields)
