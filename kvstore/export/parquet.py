"""Rows as Parquet, and back: the types of arrow_types.py, compressed with zstd, in row groups.

Row groups end at 32 MB of values or a million rows, whichever comes first, so that readers can
skip by time without holding much; each page has a checksum, which an import verifies. Parquet
has no timestamps in seconds: they become milliseconds, and an import makes seconds of them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kvstore.errors import SchemaError
from kvstore.export.arrow_types import batch_of, fields_of, named, record_batch, schema_of
from kvstore.export.chunks import grouped
from kvstore.export.metadata import Loaded, Progress, batch_rows
from kvstore.schema import Batch, Field


def write(batches: Iterable[Batch], fields: Sequence[Field], path: Path, *, time: str = "") -> int:
    """Write all rows; returns how many."""
    schema = schema_of(fields, time)
    texts = [field.name for field in fields if field.is_text]
    rows = 0
    with pq.ParquetWriter(
        path, schema, compression="zstd", use_dictionary=texts, write_page_checksum=True
    ) as writer:
        for batch in grouped(batches):
            part = record_batch(batch, fields, schema)
            _write_group(writer, pa.Table.from_batches([part], schema))
            rows += part.num_rows
    return rows


def _write_group(writer: pq.ParquetWriter, group: pa.Table) -> None:
    try:
        writer.write_table(group)
    except pa.ArrowInvalid as error:  # seconds that overflow as milliseconds
        raise SchemaError(
            f"Parquet cannot hold these rows: {error}; use .arrow, or leave the field out"
        ) from error


def load(path: Path, progress: Progress) -> Loaded:
    """The rows of a Parquet file."""
    with named(path), pq.ParquetFile(path) as file:
        fields, time = fields_of(file.schema_arrow)
    return Loaded(fields, time, _batches(path, fields, progress))


def _batches(path: Path, fields: Sequence[Field], progress: Progress) -> Iterator[Batch]:
    rows = 0
    with named(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        for part in file.iter_batches(batch_rows(fields)):
            yield batch_of(part, fields)
            rows += part.num_rows
            progress(rows / file.metadata.num_rows)
