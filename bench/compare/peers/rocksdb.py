"""RocksDB by rocksdict: a key for each packet and field, values in LZ4 blob files.

Blob files, as its documentation advises for values of this size; a write batch of about 32 MB with
sync=True. Values go into the log first and into blob files when a memtable is full. No shuffle.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.compare.columns import cut, with_times
from bench.compare.packets import COMMIT_BYTES, FIELDS, array_of, groups

if TYPE_CHECKING:
    from kvstore.schema import Batch

NAME = "RocksDB (rocksdict), LZ4"
PACKAGES: tuple[str, ...] = ("rocksdict",)
COMPRESSES = True
DURABILITY = "each 32 MB"
LIVE = False
_KEY = struct.Struct(">BdQ")  # field, time (positive doubles sort as their bytes do), number
_BLOB_BYTES_MIN = 4096


def _options() -> Any:
    from rocksdict import DBCompressionType, Options  # noqa: PLC0415  # a peer

    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(2 * COMMIT_BYTES)
    options.set_enable_blob_files(True)
    options.set_min_blob_size(_BLOB_BYTES_MIN)
    options.set_blob_compression_type(DBCompressionType.lz4())
    options.set_compression_type(DBCompressionType.lz4())
    return options


def write(path: Path, batches: Iterable[Batch]) -> None:
    """Put each group in one synced write batch."""
    from rocksdict import Rdict, WriteBatch, WriteOptions  # noqa: PLC0415  # a peer

    database, synced = Rdict(str(path), _options()), WriteOptions()
    synced.sync = True
    number = 0
    for group in groups(batches):
        together = WriteBatch(raw_mode=True)
        for batch in group:
            for field, name in enumerate(FIELDS):
                key = _KEY.pack(field, batch["timestamps"][0], number)
                together.put(key, batch[name].tobytes())
            number += 1
        database.write(together, synced)
    database.flush()  # else each opening would replay the log
    database.close()


def read(path: Path, start: float, stop: float, fields: Sequence[str]) -> Iterator[Batch]:
    """Step an iterator for each field, from the packet before the range on."""
    from rocksdict import AccessType, Rdict  # noqa: PLC0415  # a peer

    database = Rdict(str(path), _options(), access_type=AccessType.read_only())
    wanted = with_times(fields)
    numbers = {name: number for number, name in enumerate(FIELDS)}
    steps = {name: database.iter() for name in wanted}
    for name, step in steps.items():
        step.seek_for_prev(_KEY.pack(numbers[name], max(start, 0.0), 0))
        if not step.valid() or step.key()[0] != numbers[name]:
            step.seek(_KEY.pack(numbers[name], 0.0, 0))
    times = steps["timestamps"]
    while times.valid():
        field, first, _ = _KEY.unpack(times.key())
        if field != numbers["timestamps"] or first > stop:
            break
        batch = {name: array_of(name, step.value()) for name, step in steps.items()}
        found = cut(batch, fields, start, stop)
        if len(next(iter(found.values()))):
            yield found
        for step in steps.values():
            step.next()
    del steps, times
    database.close()
