"""A thousand streams in one store, beside the same rows in a single stream.

Readings of three numbers, ten in an append, streams in turns. Every stream has a batch of its own
in each commit: what is it that costs, the streams or their rows? Each store is written, and
looked at, by processes of their own, whose memory is watched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from bench import process
from bench.figure import Figure, Measurement, Setting
from bench.measure import interleaved, scratch
from bench.scale.rows import file_bytes, part_bytes
from bench.scale.scalars import TOGETHER
from bench.scale.worker import Answer, alone

STREAMS: Final = 1000
PLACES: Final = 50  # streams that are read
ROW_SHARE_BYTES: Final = 400  # one row per so many bytes
ROWS_EACH_MIN: Final = 2 * TOGETHER


class Round(NamedTuple):
    """What was found of one store in one round."""

    written: Answer
    look: Answer
    info_cli: process.Pipeline
    bytes_per_row: float


class Quantity(NamedTuple):
    """One figure: its name, unit, and how it is taken from a round."""

    name: str
    unit: str
    of: Callable[[Round], float]


QUANTITIES: Final = (
    Quantity("write", "rows/s", lambda found: found.written["rows_s"]),
    Quantity("write-memory", "MB", lambda found: found.written["anon_mb"]),
    Quantity("stored", "bytes/row", lambda found: found.bytes_per_row),
    Quantity("open", "ms", lambda found: found.look["open_s"] * 1e3),
    Quantity("info", "ms", lambda found: found.look["info_s"] * 1e3),
    Quantity("info-cli", "ms", lambda found: found.info_cli.wall_s * 1e3),
    Quantity("first-row", "ms", lambda found: found.look["first_s"] * 1e3),
    Quantity("full-read", "ns/row", lambda found: found.look["row_s"] * 1e9),
    Quantity("read-memory", "MB", lambda found: found.look["anon_mb"]),
)


def many_streams(setting: Setting) -> list[Figure]:
    """Write and look at either store in turns."""
    rows = max(STREAMS * ROWS_EACH_MIN, part_bytes(setting) // ROW_SHARE_BYTES)
    kept: dict[int, list[Round]] = {STREAMS: [], 1: []}
    sides = [partial(_side, kept, streams, rows, setting) for streams in kept]
    interleaved(setting.pairs, *sides)
    batches = {"rows": rows, "batches": kept[STREAMS][0].written["batches"]}
    return [
        Figure(
            name=f"streams-{quantity.name}",
            unit=quantity.unit,
            limit_name="the same rows in one stream",
            values=[quantity.of(found) for found in kept[STREAMS]],
            limits=[quantity.of(found) for found in kept[1]],
            details={"streams": STREAMS, **batches} if quantity.name == "write" else {},
        )
        for quantity in QUANTITIES
    ]


def _side(kept: dict[int, list[Round]], streams: int, rows: int, setting: Setting) -> float:
    with scratch(setting.folder, bytes_needed=100 * rows) as folder:
        kept[streams].append(_measured(folder / "run.kv", streams, rows, setting))
    return 0.0


def _measured(store: Path, streams: int, rows: int, setting: Setting) -> Round:
    written = alone("write_streams", path=store, streams=streams, rows=rows)
    asked = {"streams": streams, "rows": rows, "places": PLACES, "seed": setting.seed}
    look = alone("look_at_streams", store=store, **asked)
    shown = process.run(process.kvstore("info", store), watched=0)
    return Round(written, look, shown, file_bytes(store) / rows)


MEASUREMENTS: Final = (
    Measurement("streams", f"{STREAMS:,} streams in one store, beside one stream", many_streams),
)
