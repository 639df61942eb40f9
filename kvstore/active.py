"""The active segment and the state of the store: every transaction goes through here.

    group ── room made ── put + commit ──> state ── full or old? ── roll ──> next segment

Used by one thread at a time: the commit thread. It asks retention.py what has to go, records
the drop, and only then unlinks. A disk that is full all the same has a reserve of its own, so
that dropping and closing still work. It never encodes and never looks at rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np

from kvstore import libc, retention
from kvstore.changes import Change, Drop, Queued, next_state
from kvstore.errors import DiskFull, StoreError
from kvstore.gaps import Gap
from kvstore.layout import Layout
from kvstore.segment import (
    MAP_SPARE_BYTES,
    EncodedBatch,
    Sealed,
    Segment,
    Session,
    State,
    Totals,
)
from kvstore.timestamps import format_time

_NS: Final = np.dtype(np.int64)
_BLOCK_SPARE_BYTES: Final = 8 << 10  # pages that a block does not fill, and its share of the tree
_COMMIT_SPARE_BYTES: Final = 128 << 10  # pages that a transaction copies


class Active:
    """Owns the segment that takes the writes.

    segment_bytes: size at which it is sealed; None for what suits the store's settings.
    interval_s: the flush interval, kept for the next opening to tell what a power cut cost.
    let_go: called before dropped segments are removed, for this process to close them.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        segment_bytes: int | None,
        interval_s: float | None,
        let_go: Callable[[], object],
    ):
        self.layout = layout
        self._let_go = let_go
        self._segment_bytes = segment_bytes
        self._is_rolling = False
        self._unlinking: dict[int, int] = {}  # number -> bytes
        self._unlinker: threading.Thread | None = None
        number, store_id = layout.active(), layout.store_id()
        self._segment = Segment.open(layout.segment_path(number), number, "write", store_id)
        try:
            # A commit that a kill cut short may show and yet not be durable: a roll would
            # build on it.
            self._segment.environment.sync()
            self.state: State = self._segment.state(gaps=True)
            layout.remove(layout.unlisted(self.state))
            self._clock = _Clock(self.state)
            self._begun_ns = max(
                (s.clock_ns or s.last_commit_ns for s in self.state.sealed.values()),
                default=self.state.clock_ns or self.state.created_ns,
            )
            layout.keep_reserve()
            self._begin_session(interval_s)
        except BaseException:
            self._segment.close()
            raise

    # ---- sessions ----

    def _begin_session(self, interval_s: float | None) -> None:
        """Note that somebody writes; and, where the one before never closed, what that cost."""
        before, now_ns = self.state.session, time.time_ns()
        changes: list[Change] = [Session(now_ns, 0, interval_s)]
        if before.opened_ns and not before.closed_ns:
            changes.insert(0, _unclean(self.state, now_ns))
        with suppress(DiskFull):  # a full disk keeps nobody from opening, reading and dropping
            self.change(*changes)

    def end_session(self) -> None:
        """Note that nothing was left behind, if need be with the last room there is."""
        session = self.state.session._replace(closed_ns=time.time_ns())
        with suppress(StoreError):
            self.change(session)

    def close(self) -> None:
        """Close the files; nothing is committed."""
        self._wait_for_unlinks()
        self._segment.close()

    # ---- committing ----

    def commit(self, group: Sequence[Queued]) -> None:
        """Make a group durable, in one transaction; undone as a whole where this raises."""
        if not group:
            return
        if self._is_full():
            self._with_room(self.roll)
        batches = [item.finished() for item in group if item.batch is not None]
        self._make_room(batches)
        group = [*group, *self._clock_step()]
        self._with_room(lambda: self._put(batches, group))
        self.keep_in_order()

    def change(self, *changes: Change) -> None:
        """Commit changes that bring no rows; if need be with the last room there is."""
        group = [Queued(change=change) for change in changes]
        try:
            self._put([], group)
        except DiskFull:
            self.layout.release_reserve()
            try:
                self._put([], group)
            finally:
                self.layout.keep_reserve()

    def _put(self, batches: Sequence[EncodedBatch], group: Sequence[Queued]) -> None:
        if self._is_rolling:
            self.roll()  # again: what readers may take for sealed must not change any more
        state, records = next_state(
            self.state, batches, group, now_ns=time.time_ns(), clock_ns=self._clock.now_ns()
        )
        size = sum(batch.stored_bytes for batch in batches)
        with libc.early_writeback(self._segment.environment.path, size):
            self._segment.commit(batches, records)
        self.state = state

    def _clock_step(self) -> Iterator[Queued]:
        limit_s = self.state.settings.clock_step_s
        if limit_s is not None and (gap := self._clock.stepped(limit_s)):
            yield Queued(change=gap)

    # ---- keeping the limits ----

    def keep_in_order(self) -> None:
        """Seal what is full or old, drop what is too old; what fails is tried again next time."""
        with suppress(StoreError, OSError):
            if self._is_full():
                self.roll()
            self.drop(retention.aged(self.state, self._clock.now_ns()))

    def _sizes(self, needed: int) -> retention.Sizes:
        leaving = sum(self._unlinking.values())
        used = self._segment.environment.used_bytes()
        return retention.Sizes(used, needed, leaving, self.layout.free_bytes())

    def _make_room(self, batches: Sequence[EncodedBatch]) -> None:
        """Drop what has to go for these batches; DiskFull where nothing more may."""
        settings = self.state.settings
        if not (settings.limits_size and batches):
            return
        needed = sum(b.stored_bytes + _BLOCK_SPARE_BYTES * len(b.blocks) for b in batches)
        sizes = self._sizes(needed + _COMMIT_SPARE_BYTES)
        plan = retention.plan(self.state, sizes)
        self.drop(plan.drop)
        if plan.missing:
            raise DiskFull(
                f"{self.layout.path}: full by its own limit: {plan.missing}; "
                + (_ALL_PINNED if self.state.pins and settings.drops_oldest else _RAISE_LIMIT)
            )
        if not retention.is_within(self.state, self._sizes(sizes.needed)):
            self._wait_for_unlinks()

    def _with_room(self, act: Callable[[], None]) -> None:
        """Do it; on a full disk, where that is wanted, drop the oldest until it can be done."""
        while True:
            try:
                return act()
            except DiskFull:
                oldest = next(retention.unpinned(self.state), None)
                if oldest is None or not self.state.settings.drops_oldest:
                    raise
                self.drop([oldest.number])
                self._wait_for_unlinks()

    def drop(self, numbers: Sequence[int]) -> None:
        """Record that these sealed segments are gone, durably; then remove them."""
        if not numbers:
            return
        sizes = {number: self.state.sealed[number].file_bytes for number in numbers}
        self.change(Drop(tuple(numbers)))
        self._wait_for_unlinks()
        self._unlinking = sizes
        # Removing gigabytes takes a second: on a thread of its own, commits go on meanwhile.
        self._unlinker = threading.Thread(target=self._unlink, name="kvstore-unlink", daemon=True)
        self._unlinker.start()

    def _unlink(self) -> None:
        with suppress(StoreError, OSError):  # what stays is removed at the next opening
            self._let_go()
            self.layout.remove(list(self._unlinking))
            self.layout.keep_reserve()  # there is room again, before others take it
        self._unlinking = {}

    def _wait_for_unlinks(self) -> None:
        if self._unlinker:
            self._unlinker.join()
            self._unlinker = None

    # ---- rolling ----

    def _limit_bytes(self) -> int:
        return retention.segment_bytes(self.state.settings, self._segment_bytes)

    def _is_full(self) -> bool:
        if not any(totals.rows for totals in self.state.totals.values()):
            return False  # however much it carries: a roll would not make it smaller
        environment = self._segment.environment
        limit = min(self._limit_bytes(), environment.map_bytes() - MAP_SPARE_BYTES)
        is_old = retention.is_due(self._begun_ns, self._clock.now_ns(), self.state.settings)
        return is_old or environment.used_bytes() >= limit

    def roll(self) -> None:
        """Seal the segment and go on in a new one, which carries the state."""
        old, path = self.state, self._segment.environment.path
        sealed = Sealed(
            old.number,
            path.stat().st_size,
            old.last_commit_ns,
            {key: totals for key, totals in old.totals.items() if totals.rows},
            old.clock_ns,
        )
        state = replace(
            old,
            number=old.number + 1,
            created_ns=time.time_ns(),
            totals={key: Totals(next_sequence=t.next_sequence) for key, t in old.totals.items()},
            sealed={**old.sealed, old.number: sealed},
        )
        try:
            final = self.layout.roll(state, self._limit_bytes())
            fresh = Segment.open(final, state.number, "write", state.store_id)
        except BaseException:  # once it has its name, readers take this one for sealed
            self._is_rolling = self.layout.segment_path(state.number).exists()
            raise
        self._segment.close()
        self._segment, self.state, self._is_rolling = fresh, state, False
        self._begun_ns = self._clock.now_ns()
        path.with_name(path.name + "-lock").unlink(missing_ok=True)


_RAISE_LIMIT: Final = (
    "raise the limit (kvstore set), drop old data (kvstore drop --before), or let it drop the "
    "oldest by itself (--when-full drop-oldest)"
)
_ALL_PINNED: Final = "what is left is pinned: kvstore unpin, or raise the limit (kvstore set)"


class _Clock:
    """The store's own clock: the wall clock's steps do not reach it while a writer lives.

    Between sessions it goes on by what the wall clock says has passed, never back.
    """

    def __init__(self, state: State):
        self._wall_ns, self._monotonic_ns = time.time_ns(), time.monotonic_ns()
        newest = max(state.last_commit_ns, state.session.opened_ns, state.session.closed_ns)
        rested_ns = max(0, self._wall_ns - (newest or state.created_ns))
        self._base_ns = (state.clock_ns or newest or state.created_ns) + rested_ns
        self._began_ns = self._monotonic_ns

    def now_ns(self) -> int:
        return self._base_ns + time.monotonic_ns() - self._began_ns

    def stepped(self, limit_s: float) -> Gap | None:
        """The wall clock's step since the last call, where it is beyond the limit."""
        wall_ns, monotonic_ns = time.time_ns(), time.monotonic_ns()
        expected_ns = self._wall_ns + monotonic_ns - self._monotonic_ns
        step_s = (wall_ns - expected_ns) / 1e9
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns
        if abs(step_s) <= limit_s:
            return None
        kind = "clock_ahead" if step_s > 0 else "clock_back"
        first, last = sorted((expected_ns, wall_ns))
        return Gap(kind, first, last, detail=f"this machine's clock was set by {step_s:+.3f} s")


def _unclean(state: State, now_ns: int) -> Gap:
    interval_s = state.session.interval_s
    durable_ns = state.last_commit_ns or state.session.opened_ns
    interval = "one flush" if interval_s is None else f"{interval_s:g} s"
    return Gap(
        "unclean_stop",
        durable_ns,
        now_ns,
        detail=f"durable until {format_time(np.int64(durable_ns), _NS)}; lost at most what arrived "
        f"within {interval} and during one commit, and no more than 96 MB",
    )
