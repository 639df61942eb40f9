"""The active segment and the state of the store: every transaction goes through here.

    group ── room made ── put + commit ──> state ── full or old? ── roll ──> next segment

Used by one thread at a time: the commit thread. It asks retention.py what has to go, records
the drop, and only then unlinks. A disk that is full all the same has a reserve of its own, so
that dropping and closing still work. It never encodes and never looks at rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np

from kvstore import codec, libc, retention
from kvstore.changes import Change, Drop, Queued, next_state
from kvstore.entries import EncodedBatch
from kvstore.errors import DiskFull, StoreError
from kvstore.gaps import Gap
from kvstore.layout import Layout, ticks_ns
from kvstore.segment import MAP_SPARE_BYTES, Segment
from kvstore.state import FORMAT, Sealed, Session, State, Totals
from kvstore.timestamps import format_time

_NS: Final = np.dtype(np.int64)
_NO_CLOCK_BEFORE_NS: Final = 1_735_689_600 * 10**9  # 2025: older than this format
_BLOCK_SPARE_BYTES: Final = 8 << 10  # pages that a block does not fill, and its share of the tree
_COMMIT_SPARE_BYTES: Final = 128 << 10  # pages that a transaction copies


class Active:
    """Owns the segment that takes the writes.

    segment_bytes: size at which it is sealed; None for what suits the store's settings.
    interval_s: the flush interval, kept for the next opening to tell what a power cut cost.
    let_go: called before these dropped segments are removed, for this process to close them.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        segment_bytes: int | None,
        interval_s: float | None,
        let_go: Callable[[Sequence[int]], object],
    ):
        self.layout = layout
        self._let_go = let_go
        self._segment_bytes = segment_bytes
        self._disk_bytes = layout.disk_bytes()
        self._is_rolling = False
        self._steps: list[Queued] = []  # of the wall clock, for the next commit
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
            # By the wall clock: where it has jumped, a segment is sealed early, at worst.
            wall_age_ns = max(0, time.time_ns() - self.state.created_ns)
            self._begun_ns = self._clock.now_ns() - wall_age_ns
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
        # What reads only the old version must not find the new one's blocks in a segment of it.
        is_old = self.state.version < FORMAT and any(item.batch is not None for item in group)
        if is_old or self._is_full():
            self._with_room(self.roll)
        batches = [item.finished() for item in group if item.batch is not None]
        self._make_room(_needed_bytes(batches, group))
        self._note_clock_step()
        self._with_room(lambda: self._put(batches, [*group, *self._steps]))
        self._steps = []
        self._roll_if_full()

    def change(self, *changes: Change) -> None:
        """Commit changes that bring no rows; if need be with the last room there is."""
        group = [Queued(change=change) for change in changes]
        self._with_reserve(lambda: self._put([], group))

    def _with_reserve(self, act: Callable[[], None]) -> None:
        try:
            act()
        except DiskFull:
            self.layout.release_reserve()
            try:
                act()
            finally:
                self.layout.keep_reserve()

    def _put(self, batches: Sequence[EncodedBatch], group: Sequence[Queued]) -> None:
        if self._is_rolling:
            self.roll()  # again: what readers may take for sealed must not change any more
        state, records = next_state(
            self.state, batches, group, now_ns=time.time_ns(), clock_ns=self._clock.now_ns()
        )
        size = sum(batch.stored_bytes for batch in batches)
        environment = self._segment.environment
        with libc.appending(environment.path, environment.used_bytes(), size):
            self._segment.commit(batches, records)
        self.state = state

    def _note_clock_step(self) -> None:
        limit_s = self.state.settings.clock_step_s
        if limit_s is not None and (gap := self._clock.stepped(limit_s)):
            self._steps.append(Queued(change=gap))

    # ---- keeping the limits ----

    def keep_in_order(self) -> None:
        """Seal what is full or old, drop what is too old; what fails is tried again next time."""
        self._roll_if_full()
        with suppress(StoreError, OSError):
            self.drop(retention.aged(self.state, self._clock.now_ns()))

    def keep_limits(self) -> None:
        """The same for all limits, before there are rows to make room for."""
        self.keep_in_order()
        with suppress(StoreError, OSError):
            self.drop(retention.plan(self.state, self._sizes(0)).drop)

    def _roll_if_full(self) -> None:
        """Now rather than in the next commit, which tries again where this fails."""
        with suppress(StoreError, OSError):
            if self._is_full():
                self.roll()

    def _sizes(self, needed: int) -> retention.Sizes:
        leaving = sum(self._unlinking.values())
        used = self._segment.environment.used_bytes()
        return retention.Sizes(used, needed, leaving, self.layout.free_bytes())

    def _make_room(self, needed: int) -> None:
        """Drop what has to go for that many bytes; DiskFull where nothing more may."""
        if not (self.state.settings.limits_size and needed):
            return
        needed += _COMMIT_SPARE_BYTES
        self._drop_for(needed)
        while not retention.is_within(self.state, self._sizes(needed)):
            self._wait_for_unlinks()
            self._drop_for(needed)  # more: a reader may hold what has been dropped

    def _drop_for(self, needed: int) -> None:
        settings = self.state.settings
        plan = retention.plan(self.state, self._sizes(needed))
        if plan.missing and settings.drops_oldest and self._has_rows():
            self.seal()  # so that it can go, too: the disk may be smaller than a segment
            plan = retention.plan(self.state, self._sizes(needed))
        self.drop(plan.drop)
        if plan.missing:
            raise DiskFull(
                f"{self.layout.path}: full by its own limit: {plan.missing}; "
                + (_ALL_PINNED if self.state.pins and settings.drops_oldest else _RAISE_LIMIT)
            )

    def _with_room(self, act: Callable[[], None]) -> None:
        """Do it; on a full disk, where that is wanted, drop the oldest until it can be done."""
        while True:
            try:
                return act()
            except DiskFull:
                if not self.state.settings.drops_oldest:
                    raise
                if not any(retention.unpinned(self.state)) and self._has_rows():
                    self.seal()
                oldest = next(retention.unpinned(self.state), None)
                if oldest is None:
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
        unlinker = threading.Thread(target=self._unlink, name="kvstore-unlink", daemon=True)
        try:
            unlinker.start()
        except RuntimeError:  # at exit no thread begins any more
            self._unlink()
        else:
            self._unlinker = unlinker

    def _unlink(self) -> None:
        with suppress(StoreError, OSError):  # what stays is removed at the next opening
            self._let_go(list(self._unlinking))
            self.layout.remove(list(self._unlinking))
            self.layout.keep_reserve()  # there is room again, before others take it
        self._unlinking = {}

    def _wait_for_unlinks(self) -> None:
        if self._unlinker:
            self._unlinker.join()
            self._unlinker = None

    # ---- rolling ----

    def _limit_bytes(self) -> int:
        return retention.segment_bytes(self.state.settings, self._segment_bytes, self._disk_bytes)

    def _is_full(self) -> bool:
        if not self._has_rows():
            return False  # however much it carries: a roll would not make it smaller
        environment = self._segment.environment
        limit = min(self._limit_bytes(), environment.map_bytes() - MAP_SPARE_BYTES)
        is_old = retention.is_due(self._begun_ns, self._clock.now_ns(), self.state.settings)
        return is_old or environment.used_bytes() >= limit

    def _has_rows(self) -> bool:
        return any(totals.rows for totals in self.state.totals.values())

    def seal(self) -> None:
        """Roll before its time; if need be with the last room there is."""
        self._with_reserve(self.roll)

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
            version=FORMAT,
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


def _needed_bytes(batches: Sequence[EncodedBatch], group: Sequence[Queued]) -> int:
    """What a group takes at most; 0 where it brings neither rows nor marks."""
    marks = [codec.packed(item.marks) for item in group if item.marks]
    return sum(b.stored_bytes + _BLOCK_SPARE_BYTES * len(b.blocks) for b in batches) + sum(
        len(each) + _BLOCK_SPARE_BYTES for each in marks
    )


class _Clock:
    """The store's own clock: the wall clock's steps do not reach it while a writer lives.

    Between sessions it goes on by what the wall clock says has passed, never back; and not at
    all where that clock was plainly wrong: a device without a battery wakes in 1970.
    """

    def __init__(self, state: State):
        self._wall_ns = time.time_ns()
        self._ticks_ns = self._began_ns = ticks_ns()
        newest = max(state.last_commit_ns, state.session.opened_ns, state.session.closed_ns)
        newest = newest or state.created_ns
        rested_ns = max(0, self._wall_ns - newest) if newest >= _NO_CLOCK_BEFORE_NS else 0
        self._base_ns = (state.clock_ns or newest) + rested_ns

    def now_ns(self) -> int:
        return self._base_ns + ticks_ns() - self._began_ns

    def stepped(self, limit_s: float) -> Gap | None:
        """The wall clock's step since the last call, where it is beyond the limit."""
        wall_ns, now_ns = time.time_ns(), ticks_ns()
        expected_ns = self._wall_ns + now_ns - self._ticks_ns
        step_s = (wall_ns - expected_ns) / 1e9
        self._wall_ns, self._ticks_ns = wall_ns, now_ns
        if abs(step_s) <= limit_s:
            return None
        kind = "clock_ahead" if step_s > 0 else "clock_back"
        first, last = sorted((expected_ns, wall_ns))
        return Gap(kind, first, last, detail=f"this machine's clock was set by {step_s:+.3f} s")


def _unclean(state: State, now_ns: int) -> Gap:
    interval_s = state.session.interval_s
    durable_ns = state.last_commit_ns or state.session.opened_ns
    lost = (
        "came after the last flush"
        if interval_s is None
        else (f"arrived within {interval_s:g} s and during one commit, and no more than 96 MB")
    )
    return Gap(
        "unclean_stop",
        durable_ns,
        now_ns,
        detail=f"durable until {format_time(np.int64(durable_ns), _NS)}; lost at most what {lost}",
    )
