"""Two processes read while one writes at full speed: what does each lose?

A store that already holds half of the data. The writer appends as much again, alone and beside
two readers that read everything there is over and over; and the two read without a writer. All
three in turns. All values are checked before; whoever reads checks the
number and time of every row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from bench.capture import check_rows, write_store
from bench.figure import Figure, Measurement, Setting
from bench.measure import GB, interleaved, removed, scratch, settle
from bench.scale.rows import check_store, part_bytes, with_numbers
from bench.scale.worker import Answer, Worker, workers
from bench.workload import PARTICLE_BYTES
from kvstore.generate import Profile

READERS: Final = 2
_READING_S: Final = 0.05  # before the writer begins: a batch or two of each reader
_ALONE_GB_S: Final = 1.0  # readers alone read for as long as a writer at this rate would take


class Place(NamedTuple):
    """Where it happens, with what. rows: in the store before the writer comes."""

    folder: Path
    profile: Profile
    size_bytes: int
    seed: int
    rows: int
    writer: Worker
    readers: Sequence[Worker]


class Rates(NamedTuple):
    """GB/s of raw data; 0 of whoever did not take part."""

    written: float
    read: float


def readers(setting: Setting, profile: Profile) -> list[Figure]:
    """Measure the three in turns."""
    size = part_bytes(setting)
    kept: dict[str, list[Rates]] = {"writer": [], "readers": [], "both": []}
    with (
        scratch(setting.folder, bytes_needed=2 * size) as folder,
        workers(1 + READERS) as (writer, *reading),
    ):
        rows = size // PARTICLE_BYTES
        place = Place(folder, profile, size, setting.seed, rows, writer, reading)
        writer.did("prepare", profile=profile, size_bytes=size, seed=setting.seed + 1, first=rows)
        interleaved(setting.pairs, *(partial(_side, kept, name, place) for name in kept))
    return _figures(profile, kept)


def _figures(profile: Profile, kept: dict[str, list[Rates]]) -> list[Figure]:
    return [
        Figure(
            name=f"readers-{profile}-writer",
            unit="GB/s",
            limit_name="the writer alone",
            values=[rates.written for rates in kept["both"]],
            limits=[rates.written for rates in kept["writer"]],
        ),
        Figure(
            name=f"readers-{profile}-{READERS}-readers",
            unit="GB/s",
            limit_name="the readers alone",
            values=[rates.read for rates in kept["both"]],
            limits=[rates.read for rates in kept["readers"]],
            details={"each_gb_s": median(rates.read for rates in kept["both"]) / READERS},
        ),
    ]


def _side(kept: dict[str, list[Rates]], name: str, place: Place) -> float:
    store = place.folder / "run.kv"
    with removed(store), removed(place.folder / "end") as end:
        work = with_numbers(place.profile, place.size_bytes, place.seed)
        write_store(store, work.batches)
        check_store(store, work.batches)
        del work
        settle(place.size_bytes)
        reading = place.readers if name != "writer" else []
        for reader in reading:
            reader.ask("read_until", store=store, end=end, rows_min=place.rows)
        written: Answer = {}
        if reading:
            time.sleep(_READING_S if name == "both" else place.size_bytes / GB / _ALONE_GB_S)
        if name != "readers":
            written = place.writer.did("append", store=store)
        end.touch()
        read = [reader.answer() for reader in reading]
        check_rows(store, place.rows * (2 if written else 1))
    kept[name].append(Rates(_written_gb_s(written), _read_gb_s(read)))
    return 0.0


def _written_gb_s(answer: dict[str, Any]) -> float:
    if not answer:
        return 0.0
    return float(answer["bytes"] / GB / (answer["ended_s"] - answer["started_s"]))


def _read_gb_s(answers: Sequence[Answer]) -> float:
    """Both together: each by its own time, which includes opening the store."""
    return sum(
        answer["rows"] * PARTICLE_BYTES / GB / (answer["ended_s"] - answer["started_s"])
        for answer in answers
    )


MEASUREMENTS: Final = tuple(
    Measurement(
        f"readers-{profile}",
        f"two processes read while one writes, {profile}",
        partial(readers, profile=profile),
    )
    for profile in ("counts", "uniform")
)
