"""A thousand streams in one store, beside the same rows in a single stream.

Readings of three numbers, ten in an append, streams in turns. Every stream has a batch of its own
in each commit: what is it that costs, the streams or their rows?
"""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import kvstore
from bench.figure import BenchError, Figure, Measurement, Setting
from bench.measure import interleaved, removed, scratch
from bench.scale.rows import file_bytes, part_bytes
from bench.scale.scalars import TOGETHER, columns, pieces, stream_name
from bench.scale.worker import Answer, alone

if TYPE_CHECKING:
    from kvstore.schema import Batch

STREAMS: Final = 1000
ROW_SHARE_BYTES: Final = 400  # one row per so many bytes
PLACES: Final = 50  # streams that are read
ROWS_EACH_MIN: Final = 2 * TOGETHER
QUANTITIES: Final = (
    ("open", "ms", "open_s", 1e3),
    ("info", "ms", "info_s", 1e3),
    ("first-row", "ms", "first_s", 1e3),
    ("full-read", "ns/row", "row_s", 1e9),
    ("memory", "MB", "anon_mb", 1),
)


class Written(NamedTuple):
    """What one store of so many rows was like."""

    rows_s: float
    bytes_per_row: float
    batches: int


def many_streams(setting: Setting) -> list[Figure]:
    """Write and read both stores in turns."""
    rows = max(STREAMS * ROWS_EACH_MIN, part_bytes(setting) // ROW_SHARE_BYTES)
    made = columns(rows)
    written: dict[int, Written] = {}
    with scratch(setting.folder, bytes_needed=2000 * rows) as folder:
        many, one = interleaved(
            setting.pairs,
            partial(_rows_s, folder / "run.kv", made, STREAMS, written),
            partial(_rows_s, folder / "run.kv", made, 1, written),
        )
        stores = {STREAMS: folder / "many.kv", 1: folder / "one.kv"}
        for streams, store in stores.items():
            _write(store, made, streams)
        looks = _looks(stores, rows, setting)
    return [_write_figure(many, one, written, rows), *_figures(looks)]


def _write_figure(
    many: list[float], one: list[float], written: dict[int, Written], rows: int
) -> Figure:
    return Figure(
        name="streams-write",
        unit="rows/s",
        limit_name="the same rows in one stream",
        values=many,
        limits=one,
        details={
            "streams": STREAMS,
            "rows": rows,
            "batches": written[STREAMS].batches,
            "stored_bytes_per_row": written[STREAMS].bytes_per_row,
            "one_stream_batches": written[1].batches,
            "one_stream_stored_bytes_per_row": written[1].bytes_per_row,
        },
    )


def _figures(looks: dict[int, list[Answer]]) -> list[Figure]:
    return [
        Figure(
            name=f"streams-{name}",
            unit=unit,
            limit_name="a store of one stream",
            values=[look[key] * factor for look in looks[STREAMS]],
            limits=[look[key] * factor for look in looks[1]],
        )
        for name, unit, key, factor in QUANTITIES
    ]


def _looks(stores: dict[int, Path], rows: int, setting: Setting) -> dict[int, list[Answer]]:
    """Look at both stores in turns, each look by a process of its own."""
    looks: dict[int, list[Answer]] = {streams: [] for streams in stores}
    asked = {"rows": rows, "places": PLACES, "seed": setting.seed}

    def side(streams: int) -> float:
        store = stores[streams]
        looks[streams].append(alone("look_at_streams", store=store, streams=streams, **asked))
        return looks[streams][-1]["open_s"]

    interleaved(setting.pairs, *(partial(side, streams) for streams in stores))
    return looks


def _rows_s(path: Path, made: Batch, streams: int, written: dict[int, Written]) -> float:
    with removed(path):
        written[streams] = found = _write(path, made, streams)
    return found.rows_s


def _write(path: Path, made: Batch, streams: int) -> Written:
    """Append all rows and flush; streams are made by their first append, inside the time."""
    rows = len(made["timestamps"])
    with kvstore.open(path, mode="w") as store:
        started = time.perf_counter_ns()
        opened = [store.stream(stream_name(number)) for number in range(streams)]
        for stream, piece in zip(itertools.cycle(opened), pieces(made), strict=False):
            stream.append(piece)
        store.flush()
        taken_s = (time.perf_counter_ns() - started) / 1e9
        info = store.info()
    if sum(stream.rows for stream in info.streams) != rows or len(info.streams) != streams:
        raise BenchError(f"{path} does not hold {rows} rows in {streams} streams")
    batches = sum(stream.batches for stream in info.streams)
    return Written(rows / taken_s, file_bytes(path) / rows, batches)


MEASUREMENTS: Final = (
    Measurement("streams", f"{STREAMS:,} streams in one store, beside one stream", many_streams),
)
