"""Rows as Arrow: a table in memory, an .arrow (IPC) file, and back; arrow_types.py has the types.

IPC files, also known as Feather version 2, are written without compression: they can be used
in place by mmap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvstore.export.arrow_types import batch_of, fields_of, named, record_batch, schema_of
from kvstore.export.chunks import grouped
from kvstore.export.metadata import Loaded, Progress, batch_rows
from kvstore.schema import Batch, Field


def table(batches: Iterable[Batch], fields: Sequence[Field], time: str) -> Any:
    """All rows as a ``pyarrow.Table``, a chunk per batch."""
    schema = schema_of(fields, time)
    return pa.Table.from_batches((record_batch(batch, fields, schema) for batch in batches), schema)


def write(batches: Iterable[Batch], fields: Sequence[Field], path: Path, *, time: str = "") -> int:
    """Write all rows; returns how many."""
    schema = schema_of(fields, time)
    rows = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in grouped(batches):
            part = record_batch(batch, fields, schema)
            writer.write_batch(part)
            rows += part.num_rows
    return rows


def load(path: Path, progress: Progress) -> Loaded:
    """The rows of an IPC file."""
    with named(path), pa.memory_map(str(path)) as source:
        fields, time = fields_of(pa.ipc.open_file(source).schema)
    return Loaded(fields, time, _batches(path, fields, progress))


def _batches(path: Path, fields: Sequence[Field], progress: Progress) -> Iterator[Batch]:
    rows = batch_rows(fields)
    with named(path), pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            whole = reader.get_batch(number)
            for start in range(0, whole.num_rows, rows):
                yield batch_of(whole.slice(start, rows), fields)
                progress((number + start / whole.num_rows) / reader.num_record_batches)
