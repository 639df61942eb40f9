"""The group committer: a queue of encoded batches -> transactions -> segments that roll.

One thread takes whatever is queued, puts it into one LMDB transaction with the totals and
marks that belong to it, and commits: after ``interval_s``, at GROUP_BYTES, or when flush
asks. It owns the active segment and the store's state as last committed. A failed commit
puts its group back at the head of the queue, in order; nothing is lost or overtaken.

It never encodes and never looks at rows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from kvstore import codec, libc
from kvstore.errors import KvstoreError, StoreError
from kvstore.layout import Layout
from kvstore.segment import (
    MAP_SPARE_BYTES,
    EncodedBatch,
    Sealed,
    Segment,
    State,
    StreamInfo,
    Totals,
    mark_key,
    stream_record,
    total_key,
)
from kvstore.stats import CommitStats

GROUP_BYTES: Final = 32 << 20  # a commit of this size comes close to bare writes
QUEUE_BYTES_MAX: Final = 64 << 20  # beside the group being committed: 0.2 s of 300 MB/s
COMMIT_BYTES_MAX: Final = 1 << 30  # where rows and marks must be one transaction
RETRY_S: Final = 1.0  # after a failed commit, unless flush asks earlier


@dataclass(slots=True)
class Queued:
    """One thing to commit: a batch, a stream's definition, or marks."""

    size: int = 0
    batch: EncodedBatch | None = None  # without its sequence and blocks, which come last
    blocks: Future[list[codec.Block]] | Sequence[codec.Block] = ()
    define: StreamInfo | None = None
    marks: Mapping[str, Any] | None = None
    joined: bool = False  # in one transaction with what is queued next


class Committer:
    """Owns the queue, the commit thread, the active segment and the committed state.

    seal: called with ``lock`` held before a group is taken, to queue what is still staged.
    staged_bytes: how much that would be.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        interval_s: float | None,
        segment_bytes: int,
        seal: Callable[[], None],
    ):
        self.lock = threading.Lock()
        self.staged_bytes = 0
        self.stats = CommitStats()
        self._layout = layout
        self._interval_s = interval_s
        self._segment_bytes = segment_bytes
        self._seal = seal
        self._work = threading.Condition(self.lock)
        self._progress = threading.Condition(self.lock)
        self._queue: deque[Queued] = deque()
        self._queued_bytes = 0
        self.is_full = False  # more rows would not fit into one transaction with those queued
        self.oldest_s: float | None = None  # since when something waits for its commit
        self._asked = self._answered = 0
        self._failed_s = 0.0
        self.error: BaseException | None = None
        self._closing = False
        number, store_id = layout.active(), layout.store_id()
        self._segment = Segment.open(layout.segment_path(number), number, "write", store_id)
        try:
            # A commit that a kill cut short may show and yet not be durable: a roll would
            # build on it.
            self._segment.environment.sync()
            self.state: State = self._segment.state()
        except BaseException:
            self._segment.close()
            raise
        self._sequences = {
            info.stream_id: self.state.stream_totals(info.stream_id).next_sequence
            for info in self.state.streams.values()
        }
        self._thread = threading.Thread(target=self._run, name="kvstore-commit", daemon=True)
        self._thread.start()

    # ---- called by the writer, with the lock held ----

    def put(self, item: Queued) -> None:
        """Queue one thing; its batch is given the stream's next sequence."""
        if item.batch is not None:
            sequence = self._sequences.get(item.batch.stream_id, 0)
            self._sequences[item.batch.stream_id] = sequence + 1
            item.batch = item.batch._replace(sequence=sequence)
        self._queue.append(item)
        self._queued_bytes += item.size
        self.is_full = self._interval_s is None and self._queued_bytes > COMMIT_BYTES_MAX
        self.note_rows()

    def note_rows(self) -> None:
        """Something waits to be committed: start the clock, wake the thread where it is due."""
        if self.oldest_s is None:
            self.oldest_s = time.monotonic()
            self._work.notify()
        elif self._queued_bytes + self.staged_bytes >= GROUP_BYTES:
            self._work.notify()

    def wait_for_room(self) -> None:
        """Block while more than the queue's limit is held; returns early on an error."""
        if self._interval_s is not None and self.held_bytes() > QUEUE_BYTES_MAX:
            self._progress.wait_for(lambda: self.held_bytes() <= QUEUE_BYTES_MAX or self.error)

    def held_bytes(self) -> int:
        """Of rows that wait for their commit, beside those in it."""
        return self._queued_bytes + self.staged_bytes

    def check_size(self, size: int, *, joined: bool) -> None:
        """StoreError, before anything is queued, where one transaction would grow too large."""
        if self._interval_s is None:
            size += self._queued_bytes + self.staged_bytes
        elif not joined:
            return
        if size > COMMIT_BYTES_MAX:
            raise StoreError(
                f"{self._layout.path}: {size} bytes in one transaction, at most "
                f"{COMMIT_BYTES_MAX}: append less at once or flush more often; without marks "
                "and with a flush_interval_s there is no limit"
            )

    def wait_until_durable(self) -> None:
        """Ask for a commit of all that is queued or staged, and wait for it."""
        self.error = None
        self._asked += 1
        ticket = self._asked
        self._work.notify()
        self._progress.wait_for(lambda: self._answered >= ticket or self.error)
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what the last commit failed with, if it failed."""
        if isinstance(self.error, KvstoreError):
            raise self.error
        if self.error is not None:
            raise StoreError(f"{self._layout.path}: commit failed: {self.error!r}") from self.error

    # ---- without the lock ----

    def overdue_s(self) -> float:
        """For how long a commit has been running, or due and not begun."""
        since, oldest_s = self.stats.running_since_s, self.oldest_s
        if since is None and oldest_s is not None and self._interval_s is not None:
            since = oldest_s + self._interval_s
        return 0.0 if since is None else max(0.0, time.monotonic() - since)

    def close(self) -> None:
        """Stop the thread and close the segment; what is still queued is given up."""
        with self.lock:
            self._closing = True
            self._work.notify()
        self._thread.join()
        self._segment.close()

    # ---- the commit thread ----

    def _run(self) -> None:
        while True:
            with self.lock:
                while not self._is_due():
                    self._work.wait(self._patience_s())
                if self._closing and self._gave_up():
                    return
                try:
                    self._seal()
                except BaseException as error:  # noqa: BLE001  # out of memory
                    self._failed([], error)
                    continue
                group, ticket = self._take()
                self._progress.notify_all()  # there is room
            try:
                with self.stats.timed(len(group)):
                    self._commit(group)
            except BaseException as error:  # noqa: BLE001  # handed to the next append or flush
                with self.lock:
                    self._failed(group, error)
            else:
                self._succeeded(ticket)
            del group  # its memory, before the next wait

    def _gave_up(self) -> bool:
        return self.error is not None or not (self._queue or self.staged_bytes)

    def _take(self) -> tuple[list[Queued], int]:
        """What goes into the next commit, and the last flush that it answers.

        About one group, however much is queued: LMDB holds a transaction in memory.
        """
        group: list[Queued] = []
        size = 0
        while self._queue:
            may_end = not group or not group[-1].joined
            if size >= GROUP_BYTES and may_end and self._interval_s is not None:
                return group, self._answered
            group.append(self._queue.popleft())
            size += group[-1].size
            self._queued_bytes -= group[-1].size
        self.oldest_s = None
        return group, self._asked

    def _is_due(self) -> bool:
        if self._closing or (self._asked > self._answered and self.error is None):
            return True
        if self.oldest_s is None or self._interval_s is None:
            return False
        now = time.monotonic()
        if self.error is not None:
            return now >= self._failed_s + RETRY_S
        full = self._queued_bytes + self.staged_bytes >= GROUP_BYTES
        return full or now >= self.oldest_s + self._interval_s

    def _patience_s(self) -> float | None:
        if self.oldest_s is None or self._interval_s is None:
            return None
        due = self._failed_s + RETRY_S if self.error else self.oldest_s + self._interval_s
        return max(0.0, due - time.monotonic())

    def _failed(self, group: list[Queued], error: BaseException) -> None:
        self._queue.extendleft(reversed(group))
        self._queued_bytes += sum(item.size for item in group)
        self.oldest_s = self._failed_s = time.monotonic()
        self.error = error
        self._progress.notify_all()

    def _succeeded(self, ticket: int) -> None:
        with self.lock:
            self.is_full = False
            self._answered = ticket
            self.error = None
            self._progress.notify_all()

    def _commit(self, group: list[Queued]) -> None:
        if not group:
            return
        if self._is_full():
            self._roll()  # again: what readers may take for sealed must get no more rows
        batches = [_finished(item) for item in group if item.batch is not None]
        state, records = _next_state(self.state, batches, group)
        size = sum(batch.stored_bytes for batch in batches)
        with libc.early_writeback(self._segment.environment.path, size):
            self._segment.commit(batches, records)
        self.state = state
        with suppress(StoreError, OSError):  # the rows are safe; tried again before the next
            if self._is_full():
                self._roll()

    def _is_full(self) -> bool:
        if not any(totals.rows for totals in self.state.totals.values()):
            return False  # however much it carries: a roll would not make it smaller
        environment = self._segment.environment
        limit = min(self._segment_bytes, environment.map_bytes() - MAP_SPARE_BYTES)
        return environment.used_bytes() >= limit

    def _roll(self) -> None:
        old, path = self.state, self._segment.environment.path
        sealed = Sealed(
            old.number,
            path.stat().st_size,
            old.last_commit_ns,
            {key: totals for key, totals in old.totals.items() if totals.rows},
        )
        state = replace(
            old,
            number=old.number + 1,
            created_ns=time.time_ns(),
            totals={key: Totals(next_sequence=t.next_sequence) for key, t in old.totals.items()},
            sealed={**old.sealed, old.number: sealed},
        )
        final = self._layout.roll(state, self._segment_bytes)
        fresh = Segment.open(final, state.number, "write", state.store_id)
        self._segment.close()
        self._segment, self.state = fresh, state
        path.with_name(path.name + "-lock").unlink(missing_ok=True)


def _finished(item: Queued) -> EncodedBatch:
    assert item.batch is not None
    blocks = item.blocks.result() if isinstance(item.blocks, Future) else item.blocks
    return item.batch._replace(blocks=blocks)


def _next_state(
    old: State, batches: Sequence[EncodedBatch], group: Sequence[Queued]
) -> tuple[State, dict[bytes, Any]]:
    """The state once the group is committed, and the meta records that say so."""
    state = replace(
        old,
        last_commit_ns=time.time_ns(),
        streams=dict(old.streams),
        totals=dict(old.totals),
        marks=dict(old.marks),
    )
    records: dict[bytes, Any] = {b"commit": state.last_commit_ns}
    for batch in batches:
        totals = state.totals.get(batch.stream_id, Totals()).plus(batch.totals)
        state.totals[batch.stream_id] = records[total_key(batch.stream_id)] = totals
    for item in group:
        if item.define:
            state.streams[item.define.name] = item.define
            records |= stream_record(item.define)
        for name, value in (item.marks or {}).items():
            state.marks[name] = records[mark_key(name)] = value
    return state, records
