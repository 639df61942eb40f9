"""Lance: one dataset, a list of fixed size for each array, as its documentation has tensors.

Values of that width are stored as they are, whatever compression the field's metadata asks for
(seen with 14.0.2, formats 2.0 to 2.3). An append is a fragment and a version; Lance never syncs
(seen with strace), so the bench fsyncs what is new after each. A range is a filter on the times,
with a zone map index made after writing.
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

NAME = "Lance, fixed-size lists"
PACKAGES: tuple[str, ...] = ("lance", "pyarrow")
COMPRESSES = False
DURABILITY = "fsync by the bench each 31 MB"
LIVE = True
_FORMAT = "2.2"


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Append a fragment for each commit."""
    write_as(path, batches, fixed=True)


def write_as(path: Path, batches: Iterable[Batch], *, fixed: bool) -> None:
    """Append lists of fixed or of variable size."""
    import lance  # noqa: PLC0415  # a peer

    syncer = Syncer(path)
    for number, block in enumerate(blocks(batches)):
        mode, rows = "append" if number else "create", table(block, fixed=fixed)
        lance.write_dataset(rows, str(path), mode=mode, data_storage_version=_FORMAT)
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
