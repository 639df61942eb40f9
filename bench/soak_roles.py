"""The processes of a soak: ``python -m bench.soak_roles ROLE STORE PLAN`` for each of them.

Each tells what it saw in one line of JSON on stdout and, where moments are to be held against
those of another process, leaves arrays beside the store: all clocks are the monotonic one, which
the processes of a machine share. The writer ends by itself and says in ``ended`` how much there
is; the others end once they have all of it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kvstore
from kvstore.entries import EncodedBatch
from kvstore.layout import Layout
from kvstore.segment import Segment
from kvstore.verify import verify

if TYPE_CHECKING:
    from kvstore.errors import DamageError, GapError
    from kvstore.schema import Batch

STREAM = "particles"
VALUES = 1536  # int32 of a row, as a particle has
ROW_BYTES = 24 + 4 * VALUES
_POOL_ROWS = 4096
_PINNED_S = 1.0  # length of the range that is pinned


class Plan(NamedTuple):
    """What a soak does. Rates in MB/s, 0 for as fast as possible; segment_bytes 0 for its own."""

    seconds: float
    max_bytes: int
    segment_bytes: int
    batch_rows: int
    writer_mb_s: float
    paced_mb_s: float
    verify_mb_s: float
    pinned_for_s: float
    seed: int


class Pace:
    """Sleeps so that no more than a rate goes by."""

    def __init__(self, mb_s: float):
        self._mb_s = mb_s
        self._begun_s = time.monotonic()
        self._spent_mb = 0.0

    def spend(self, size_bytes: int) -> None:
        """Wait until that much more may have gone by."""
        if self._mb_s:
            self._spent_mb += size_bytes / 1e6
            due_s = self._begun_s + self._spent_mb / self._mb_s
            time.sleep(max(0.0, due_s - time.monotonic()))


def write(store_path: Path, plan: Plan) -> dict[str, Any]:
    """Append numbered rows under a limit of size until the time is up."""
    kvstore.keep_freed_memory()
    batches = _numbered(plan)
    pace = Pace(plan.writer_mb_s)
    longest_append_ns = 0
    with (
        _watched() as (commits, unlinks),
        kvstore.open(
            store_path,
            "w",
            segment_bytes=plan.segment_bytes or None,
            settings=kvstore.Settings(max_bytes=plan.max_bytes),
        ) as store,
    ):
        stream = store.stream(STREAM)
        end_s = time.monotonic() + plan.seconds
        rows = 0
        while time.monotonic() < end_s:
            batch = next(batches)
            begun_ns = time.monotonic_ns()
            stream.append(batch, copy=False)
            longest_append_ns = max(longest_append_ns, time.monotonic_ns() - begun_ns)
            rows += plan.batch_rows
            pace.spend(plan.batch_rows * ROW_BYTES)
        store.flush()
        taken_s = time.monotonic() - end_s + plan.seconds
    np.savez(store_path.with_suffix(".writer.npz"), commits=commits, unlinks=unlinks)
    store_path.with_suffix(".ended").write_text(str(rows))
    return {"rows": rows, "seconds": taken_s, "longest_append_ms": longest_append_ns / 1e6}


def follow(store_path: Path, name: str, mb_s: float) -> dict[str, Any]:
    """Follow from the start; hold every row's number against the one before."""
    seen = _Seen()
    with _opened(store_path) as store:
        ended = _until_ended(store_path)
        pace = Pace(mb_s)
        for cursor, batch in store[STREAM].follow(
            stop=lambda: seen.next_number == ended(), on_gap=seen.gap, on_damage=seen.damage
        ):
            seen.batch(cursor.sequence, batch)
            pace.spend(len(batch["number"]) * ROW_BYTES)
    np.save(store_path.with_suffix(f".{name}.npy"), np.array(seen.moments, np.int64))
    return {
        "rows": seen.rows,
        "rows_in_gaps": seen.rows_in_gaps,
        "rows_before_the_first": seen.began_at,
        "gaps": seen.gaps,
        "lost_rows": seen.lost,
        "doubled_rows": seen.doubled,
        "damages": seen.damages,
    }


class _Seen:
    """What a follower got: every row once, or a gap that says that it did not."""

    def __init__(self) -> None:
        self.rows = self.rows_in_gaps = self.gaps = self.lost = self.doubled = self.damages = 0
        self.began_at = -1
        self.next_number = -1
        self.moments: list[tuple[int, int, int, int]] = []
        self._gap_open = False
        self._sequence = 0

    def batch(self, sequence: int, batch: Batch) -> None:
        """A batch, and the sequence behind it."""
        now_ns = time.monotonic_ns()
        numbers, sent_ns = batch["number"], batch["sent_ns"]
        first, jumps = int(numbers[0]), np.diff(numbers) - 1
        if self.began_at < 0:
            self.began_at = self.next_number = first
        self._jump(first - self.next_number, explained=self._gap_open)
        for jump in jumps[jumps != 0]:
            self._jump(int(jump), explained=False)
        self.rows += len(numbers)
        self.next_number = int(numbers[-1]) + 1
        self.moments.append((sequence - 1, now_ns, int(sent_ns[0]), int(sent_ns[-1])))
        self._gap_open = False

    def _jump(self, rows: int, *, explained: bool) -> None:
        if rows < 0:
            self.doubled -= rows
        elif explained:
            self.rows_in_gaps += rows
        else:
            self.lost += rows

    def gap(self, _: GapError) -> None:
        """Batches that were dropped before their turn."""
        self.gaps += 1
        self._gap_open = True

    def damage(self, _: DamageError) -> None:
        """Never to happen."""
        self.damages += 1


def check(store_path: Path, plan: Plan) -> dict[str, Any]:
    """Verify the store at a capped rate, over and over."""
    with _opened(store_path):
        pass
    ended = _until_ended(store_path)
    damages: list[str] = []
    runs = size = 0
    while ended() is None:
        report = verify(store_path, rate_bytes_s=plan.verify_mb_s * 1e6)
        damages += [each.what for each in report.damages]
        runs, size = runs + 1, size + report.bytes
    return {"runs": runs, "gb": size / 1e9, "damages": damages}


def pin(store_path: Path, plan: Plan) -> dict[str, Any]:
    """Pin the last second, wait while its neighbours are dropped, count its rows, unpin."""
    kept = lost = 0
    with _opened(store_path) as store:
        ended = _until_ended(store_path)
        stream = store[STREAM]
        while ended() is None:
            span = stream.span()
            assert span is not None
            stop = float(span[1])
            pinned = kvstore.pin(store_path, stop - _PINNED_S, stop, "soak")
            rows = stream.count(stop - _PINNED_S, stop)
            _wait(plan.pinned_for_s, ended)
            lost += rows - stream.count(stop - _PINNED_S, stop)
            kvstore.unpin(store_path, pinned)
            kept += 1
    return {"pins": kept, "lost_rows": lost}


def _wait(seconds: float, ended: Callable[[], int | None]) -> None:
    due_s = time.monotonic() + seconds
    while time.monotonic() < due_s and ended() is None:
        time.sleep(0.05)


def _numbered(plan: Plan) -> Iterator[Batch]:
    """Batches whose rows are numbered through; the values do not compress."""
    rng = np.random.default_rng(plan.seed)
    pool = rng.integers(-(2**31), 2**31, (_POOL_ROWS + plan.batch_rows, VALUES), dtype=np.int32)
    for number in itertools.count(step=plan.batch_rows):
        at = number * 7 % _POOL_ROWS
        yield {
            "time": np.full(plan.batch_rows, time.time()),
            "number": np.arange(number, number + plan.batch_rows),
            "sent_ns": np.full(plan.batch_rows, time.monotonic_ns()),
            "values": pool[at : at + plan.batch_rows],
        }


@contextlib.contextmanager
def _watched() -> Iterator[tuple[list[tuple[int, int, int]], list[tuple[int, int]]]]:
    """Commits as (begun, done, last sequence or -1), removals of segments as (begun, done)."""
    commits: list[tuple[int, int, int]] = []
    unlinks: list[tuple[int, int]] = []
    commit, remove = Segment.commit, Layout.remove

    def timed_commit(segment: Segment, batches: Any, records: Any) -> None:
        found: list[EncodedBatch] = list(batches)
        begun_ns = time.monotonic_ns()
        commit(segment, found, records)
        last = max((batch.sequence for batch in found), default=-1)
        commits.append((begun_ns, time.monotonic_ns(), last))

    def timed_remove(layout: Layout, numbers: Any) -> None:
        begun_ns = time.monotonic_ns()
        remove(layout, numbers)
        unlinks.append((begun_ns, time.monotonic_ns()))

    Segment.commit, Layout.remove = timed_commit, timed_remove  # type: ignore[method-assign,assignment]
    try:
        yield commits, unlinks
    finally:
        Segment.commit, Layout.remove = commit, remove  # type: ignore[method-assign]


@contextlib.contextmanager
def _opened(store_path: Path) -> Iterator[kvstore.Store]:
    """The store for reading, once its stream is there."""
    while not (store_path / "store.msgpack").exists():
        time.sleep(0.01)
    with kvstore.open(store_path) as store:
        while STREAM not in store or not len(store[STREAM]):
            time.sleep(0.01)
        yield store


def _until_ended(store_path: Path) -> Callable[[], int | None]:
    """How many rows were written, None while that is not known; looks ten times a second."""
    path, due_s, found = store_path.with_suffix(".ended"), 0.0, None

    def ended() -> int | None:
        nonlocal due_s, found
        if found is None and time.monotonic() >= due_s:
            due_s = time.monotonic() + 0.1
            with contextlib.suppress(FileNotFoundError, ValueError):
                found = int(path.read_text())
        return found

    return ended


ROLES: dict[str, Callable[[Path, Plan], dict[str, Any]]] = {
    "writer": write,
    "fast": lambda path, _: follow(path, "fast", 0),
    "paced": lambda path, plan: follow(path, "paced", plan.paced_mb_s),
    "verify": check,
    "pins": pin,
}

if __name__ == "__main__":
    role, path, plan = sys.argv[1:]
    print(json.dumps(ROLES[role](Path(path), Plan(**json.loads(plan)))))
