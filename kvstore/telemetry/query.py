"""Readings of a sink as rows: for a look, and for other programs. Over any sink."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from kvstore.telemetry import counts
from kvstore.telemetry.contract import DEVICE, TIMESTAMP
from kvstore.telemetry.records import Readings
from kvstore.telemetry.sink import Sink

EXTRAS: Final = "extras"
LINEAGE: Final = ("source", "partition", "offset", "ingested", "contract_version", "run")


def newest_us(sink: Sink, device_id: str | None = None) -> int | None:
    """Time of the newest reading: counts say in which hour it lies, so that one hour is read."""
    hours = {
        count.hour_us
        for count in sink.counts()
        if count.name == counts.STORED and device_id in (None, count.device_id)
    }
    for hour_us in sorted(hours, reverse=True):
        found = sink.read(hour_us, hour_us + counts.HOUR_US, device_id=device_id)
        if times := [int(batch.ts_us[-1]) for batch in found if len(batch)]:
            return max(times)
    return None


def rows(batches: Iterable[Readings], *, lineage: bool = False) -> Iterator[dict[str, Any]]:
    """Each reading as plain values; null is None, extras are what they were."""
    for batch in batches:
        stamps = stamps_of(batch.ts_us)
        names = list(batch.values)
        columns = [_plain(column) for column in batch.values.values()]
        traces = list(_lineage(batch)) if lineage else [{}] * len(batch)
        for stamp, device, extras, trace, *values in zip(
            stamps, batch.device_id, batch.extras, traces, *columns, strict=True
        ):
            row = {TIMESTAMP: stamp, DEVICE: device, **dict(zip(names, values, strict=True))}
            row[EXTRAS] = extras and json.loads(extras)
            yield {**row, **trace}


def stamps_of(ts_us: np.ndarray[Any, np.dtype[np.int64]]) -> list[str]:
    """Times as ISO 8601, UTC, to the microsecond."""
    return [f"{text}Z" for text in np.datetime_as_string(ts_us.view("M8[us]"), unit="us").tolist()]


def jsonl(found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A line of JSON for each row."""
    for row in found:
        yield json.dumps(row, ensure_ascii=False) + "\n"


def csv_lines(found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A header and a line for each row; extras as JSON."""
    text = io.StringIO()
    writer = None
    for row in found:
        if writer is None:
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(row)
        extras = row[EXTRAS] and json.dumps(row[EXTRAS], ensure_ascii=False)
        writer.writerow({**row, EXTRAS: extras}.values())
        yield text.getvalue()
        text.seek(0)
        text.truncate()


def _lineage(batch: Readings) -> Iterator[dict[str, Any]]:
    found = batch.lineage
    columns = (
        found.source,
        found.partition.tolist(),
        found.offset.tolist(),
        stamps_of(found.ingested_us),
        found.contract_version.tolist(),
        found.run,
    )
    for values in zip(*columns, strict=True):
        yield dict(zip(LINEAGE, values, strict=True))


def _plain(column: Any) -> list[Any]:
    if isinstance(column, np.ndarray):
        return [None if is_null else value for value, is_null in zip(
            column.tolist(), np.isnan(column).tolist(), strict=True)]  # fmt: skip
    return list(column)
