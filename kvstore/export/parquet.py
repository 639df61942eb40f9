"""Rows as Parquet: the types and metadata of arrow.py, compressed with zstd, in row groups.

Row groups end at 32 MB of values or a million rows, whichever comes first, so that readers can
skip by time without holding much. Parquet has no timestamps in seconds: they become
milliseconds, and an import makes seconds of them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kvstore.errors import SchemaError
from kvstore.export.arrow import record_batches, schema_of
from kvstore.export.chunks import grouped
from kvstore.schema import Batch, Field


def write(batches: Iterable[Batch], fields: Sequence[Field], path: Path, *, time: str = "") -> int:
    """Write all rows; returns how many."""
    schema = schema_of(fields, time)
    texts = [field.name for field in fields if field.is_text]
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=texts) as writer:
        for record_batch in record_batches(grouped(batches), fields, schema):
            _write_group(writer, pa.Table.from_batches([record_batch], schema))
            rows += record_batch.num_rows
    return rows


def _write_group(writer: pq.ParquetWriter, group: pa.Table) -> None:
    try:
        writer.write_table(group)
    except pa.ArrowInvalid as error:  # seconds that overflow as milliseconds
        raise SchemaError(
            f"Parquet cannot hold these rows: {error}; use .arrow, or leave the field out"
        ) from error
