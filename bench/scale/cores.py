"""How reading scales with threads of one process, and with processes; memcpy beside it.

The same rows each time, warm, an equal share for each worker. All values are checked once,
before; each read checks the number and time of every row. Where processes gain and threads
do not, it is the interpreter's lock; where memcpy stops as well, it is cores or memory.
Efficiency is the rate divided by so many times that of one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal, NamedTuple

from bench.capture import write_store
from bench.figure import Figure, Measurement, Setting
from bench.measure import GB, interleaved, scratch
from bench.scale.rows import check_store, part_bytes, with_numbers
from bench.scale.worker import Together, Worker, together, workers
from bench.workload import PARTICLE_BYTES
from kvstore.generate import Profile

WORKERS_MAX: Final = 4
TIMES: Final = 4  # each store is read so often in one run: 8 GB where the whole is 1 TB
Kind = Literal["threads", "processes"]
KINDS: Final[tuple[Kind, ...]] = ("threads", "processes")


class Task(NamedTuple):
    """So many rows of a store, to be shared among workers."""

    store: Path
    rows: int

    @property
    def size_bytes(self) -> int:
        """Raw bytes of them."""
        return self.rows * PARTICLE_BYTES


class Point(NamedTuple):
    """One point of the curve, an entry a run; cpu_s: of the reading processes together."""

    read_gb_s: list[float]
    copied_gb_s: list[float]
    cpu_share: list[float]


def cores(setting: Setting, profile: Profile) -> list[Figure]:
    """Read with 1 to 4 threads, and with 1 to 4 processes."""
    size = part_bytes(setting)
    with (
        scratch(setting.folder, bytes_needed=2 * size) as folder,
        workers(WORKERS_MAX) as asked,
    ):
        work = with_numbers(profile, size, setting.seed)
        task = Task(folder / "run.kv", work.rows)
        write_store(task.store, work.batches)
        check_store(task.store, work.batches)
        del work  # leaves its memory to the page cache
        for kind in KINDS:
            _read(task, kind, asked), _copy(task, kind, asked)
        points = {
            kind: [_point(task, kind, asked[:count], setting) for count in _counts(asked)]
            for kind in KINDS
        }
    gil_share = _gil_share(points)
    return [
        _figure(profile, kind, number, points[kind], gil_share)
        for kind in KINDS
        for number in range(len(points[kind]))
    ]


def _counts(asked: Sequence[Worker]) -> range:
    return range(1, len(asked) + 1)


def _point(task: Task, kind: Kind, asked: Sequence[Worker], setting: Setting) -> Point:
    shares: list[float] = []

    def read() -> float:
        done = [_read(task, kind, asked) for _ in range(TIMES)]
        wall_s = sum(each.wall_s for each in done)
        shares.append(sum(a["cpu_s"] for each in done for a in each.answers) / wall_s)
        return TIMES * task.size_bytes / GB / wall_s

    def copy() -> float:
        done = _copy(task, kind, asked)
        return sum(answer["bytes"] for answer in done.answers) / GB / done.wall_s

    read_gb_s, copied_gb_s = interleaved(setting.pairs, read, copy)
    return Point(read_gb_s, copied_gb_s, shares)


def _read(task: Task, kind: Kind, asked: Sequence[Worker]) -> Together:
    """Share the rows among threads of the first worker, or among all of them."""
    if kind == "threads":
        its = {"store": task.store, "first": 0, "rows": task.rows, "threads": len(asked)}
        return together(asked[:1], "read_shares", [its])
    bounds = [task.rows * n // len(asked) for n in range(len(asked) + 1)]
    each: list[dict[str, Any]] = [
        {"store": task.store, "first": first, "rows": stop - first, "threads": 1}
        for first, stop in pairwise(bounds)
    ]
    return together(asked, "read_shares", each)


def _copy(task: Task, kind: Kind, asked: Sequence[Worker]) -> Together:
    if kind == "threads":
        its = {"size_bytes": TIMES * task.size_bytes, "threads": len(asked)}
        return together(asked[:1], "memcpy", [its])
    its = {"size_bytes": TIMES * task.size_bytes // len(asked), "threads": 1}
    return together(asked, "memcpy", [its] * len(asked))


def _gil_share(points: dict[Kind, list[Point]]) -> float:
    """What threads lack to processes, of so many as there are cores: 0 where it is nothing."""
    count = min(len(points["threads"]), max(2, len(os.sched_getaffinity(0))))
    threads, processes = (median(points[kind][count - 1].read_gb_s) for kind in KINDS)
    return max(0.0, 1 - threads / processes)


def _figure(
    profile: Profile, kind: Kind, number: int, points: list[Point], gil_share: float
) -> Figure:
    point, count = points[number], number + 1
    one, one_copied = median(points[0].read_gb_s), median(points[0].copied_gb_s)
    return Figure(
        name=f"cores-{profile}-{kind}-{count}",
        unit="GB/s",
        limit_name=f"memcpy, {count} {kind}",
        values=point.read_gb_s,
        limits=point.copied_gb_s,
        details={
            "efficiency": median(point.read_gb_s) / count / one,
            "memcpy_efficiency": median(point.copied_gb_s) / count / one_copied,
            "cores_busy": median(point.cpu_share),
            "threads_lack_to_processes": gil_share,
        },
    )


MEASUREMENTS: Final = tuple(
    Measurement(
        f"cores-{profile}",
        f"reading by 1 to {WORKERS_MAX} threads and processes, {profile}",
        partial(cores, profile=profile),
    )
    for profile in ("counts", "uniform")
)
