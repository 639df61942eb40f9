"""Arrow IPC files with LZ4, one for each commit, record batches of 512 rows, memory-mapped.

LZ4 without a shuffle: the format has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.compare import parts
from bench.compare.columns import batch_of, cut, table, with_times
from bench.compare.packets import CHUNK_ROWS, FIELDS

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "Arrow IPC, LZ4"
PACKAGES: tuple[str, ...] = ("pyarrow",)
COMPRESSES = True
DURABILITY = "each 31 MB, a file each"
LIVE = True


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Write a file for each commit."""
    parts.publish(path, batches, _write)


def _write(path: Path, batch: Batch) -> None:
    from pyarrow import OSFile, ipc  # noqa: PLC0415  # a peer

    rows, options = table(batch), ipc.IpcWriteOptions(compression="lz4")
    with OSFile(str(path), "wb") as sink, ipc.new_file(sink, rows.schema, options=options) as out:
        out.write_table(rows, max_chunksize=CHUNK_ROWS)


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Read record batches, of those at hand only the fields asked for and the times."""
    from pyarrow import ipc, memory_map  # noqa: PLC0415  # a peer

    wanted = with_times(fields)
    numbers = [number for number, name in enumerate(FIELDS) if name in wanted]
    options = ipc.IpcReadOptions(included_fields=numbers)
    times_only = ipc.IpcReadOptions(included_fields=[0])
    for part in parts.within(path, start, stop):
        with memory_map(str(part)) as source:
            file = ipc.open_file(source, options=options)
            times = ipc.open_file(source, options=times_only)
            for number in range(file.num_record_batches):
                stamps = times.get_batch(number).column(0).to_numpy()
                if stamps[-1] >= start and stamps[0] <= stop:
                    yield cut(batch_of(file.get_batch(number), wanted), fields, start, stop)
