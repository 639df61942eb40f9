"""The group committer: a queue of encoded batches -> transactions of the active segment.

One thread takes whatever is queued and has it committed in one transaction with the marks that
belong to it: after ``interval_s``, at GROUP_BYTES, or when flush asks. A failed commit puts its
group back at the head of the queue, in order; nothing is lost or overtaken. Between commits the
thread serves calls and requests, and keeps the store within its limits.

It never encodes and never looks at rows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, TypeVar

from kvstore import operations
from kvstore.active import Active
from kvstore.changes import Queued
from kvstore.errors import KvstoreError, StoreClosed, StoreError
from kvstore.layout import Layout
from kvstore.state import State
from kvstore.stats import CommitStats

GROUP_BYTES: Final = 32 << 20  # a commit of this size comes close to bare writes
QUEUE_BYTES_MAX: Final = 64 << 20  # beside the group being committed: 0.2 s of 300 MB/s
COMMIT_BYTES_MAX: Final = 1 << 30  # where rows and marks must be one transaction
RETRY_S: Final = 1.0  # after a failed commit, unless flush asks earlier
TICK_S: Final = 0.25  # between looks at requests, ages and silences
_GROUPS_OF_MAX_BYTES: Final = 16
T = TypeVar("T")


class Committer:
    """Owns the queue and the commit thread; the active segment is used by nobody else.

    seal: called with ``lock`` held before a group is taken, to queue what is still staged.
    staged_bytes: how much that would be. tick: called with ``lock`` held every now and then.
    let_go: see Active.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        interval_s: float | None,
        segment_bytes: int | None,
        seal: Callable[[], None],
        tick: Callable[[], None],
        let_go: Callable[[Sequence[int]], object],
    ):
        self.lock = threading.Lock()
        self.staged_bytes = 0
        self.stats = CommitStats()
        self._layout = layout
        self._interval_s = interval_s
        self._seal = seal
        self._tick = tick
        self._work = threading.Condition(self.lock)
        self._progress = threading.Condition(self.lock)
        self._queue: deque[Queued] = deque()
        self._queued_bytes = 0
        self.is_full = False  # more rows would not fit into one transaction with those queued
        self.oldest_s: float | None = None  # since when something waits for its commit
        self._asked = self._answered = 0
        self._failed_s = 0.0
        self._tick_s = 0.0  # at once: requests may be waiting
        self.error: BaseException | None = None
        self._closing = False
        self._calls: list[tuple[Future[Any], Callable[[Active], Any]]] = []
        self._active = Active(
            layout, segment_bytes=segment_bytes, interval_s=interval_s, let_go=let_go
        )
        self._sequences = {
            info.stream_id: self.state.stream_totals(info.stream_id).next_sequence
            for info in self.state.streams.values()
        }
        self._thread = threading.Thread(target=self._run, name="kvstore-commit", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """The store as last committed."""
        return self._active.state

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

    def call(self, act: Callable[[Active], T]) -> T:
        """Have the commit thread do something between two commits; its result or error."""
        done: Future[T] = Future()
        with self.lock:
            if self._closing:
                raise StoreClosed(f"{self._layout.path}: being closed; open the store again")
            self._calls.append((done, act))
            self._work.notify()
        return done.result()

    def close(self) -> None:
        """Stop the thread and close the segment; what is still queued is given up."""
        with self.lock:
            self._closing = True
            self._work.notify()
        self._thread.join()
        self._active.close()

    def forget(self) -> None:
        """Give up all that is queued; the lock is held, and only flush may have committed."""
        assert self._interval_s is None
        self._queue.clear()
        self._queued_bytes = self.staged_bytes = 0
        self.oldest_s = self.error = None
        self._answered = self._asked

    # ---- the commit thread ----

    def _run(self) -> None:
        while True:
            with self.lock:
                self._wait()
                calls, self._calls = self._calls, []
                if self._closing and self._gave_up():
                    break
                is_due = self._is_due()
                is_sealed = is_due and self._sealed()
                group, ticket = self._take() if is_sealed else ([], self._answered)
                self._progress.notify_all()  # there is room
            try:
                with self.stats.timed(len(group)):
                    self._active.commit(group)
            except BaseException as error:  # noqa: BLE001  # handed to the next append or flush
                with self.lock:
                    self._failed(group, error)
            else:
                self._succeeded(ticket) if is_sealed else None
            del group  # its memory, before the next wait
            self._serve(calls)
        self._serve(calls)
        if not (self._queue or self.staged_bytes):
            self._active.end_session()

    def _wait(self) -> None:
        """Until there is something to do, at the latest until it is time to look around."""
        while not (self._is_due() or self._calls) and time.monotonic() < self._tick_s:
            self._work.wait(min(self._patience_s(), max(self._tick_s - time.monotonic(), 0)))

    def _sealed(self) -> bool:
        """Have the staged rows queued; whether that went well."""
        try:
            self._seal()
        except BaseException as error:  # noqa: BLE001  # out of memory
            self._failed([], error)
            return False
        return True

    def _serve(self, calls: Sequence[tuple[Future[Any], Callable[[Active], Any]]]) -> None:
        """Between commits: what was called for, what others ask for, what the limits demand."""
        for done, act in calls:
            try:
                done.set_result(act(self._active))
            except BaseException as error:  # noqa: BLE001  # the caller's
                done.set_exception(error)
        if time.monotonic() < self._tick_s:
            return
        self._tick_s = time.monotonic() + TICK_S
        try:
            with suppress(KvstoreError, OSError):  # tried again at the next tick
                operations.answer(self._active)
            self._active.keep_in_order()
            with self.lock:
                self._tick()
        except BaseException as error:  # noqa: BLE001  # a thread that ended would let all wait
            with self.lock:
                self._failed([], error)

    def _gave_up(self) -> bool:
        is_asked = self._asked > self._answered  # by a flush beside close: it waits
        return self.error is not None or not (self._queue or self.staged_bytes or is_asked)

    def _take(self) -> tuple[list[Queued], int]:
        """What goes into the next commit, and the last flush that it answers.

        About one group, however much is queued: LMDB holds a transaction in memory.
        """
        group: list[Queued] = []
        size = 0
        while self._queue:
            may_end = not group or not group[-1].joined
            if size >= self._group_bytes() and may_end and self._interval_s is not None:
                return group, self._answered
            group.append(self._queue.popleft())
            size += group[-1].size
            self._queued_bytes -= group[-1].size
        self.oldest_s = None
        return group, self._asked

    def _group_bytes(self) -> int:
        """What is committed at once; a small part of a store that is limited to little."""
        limit = self.state.settings.max_bytes
        return GROUP_BYTES if limit is None else min(GROUP_BYTES, limit // _GROUPS_OF_MAX_BYTES)

    def _is_due(self) -> bool:
        if self._closing or (self._asked > self._answered and self.error is None):
            return True
        if self.oldest_s is None or self._interval_s is None:
            return False
        now = time.monotonic()
        if self.error is not None:
            return now >= self._failed_s + RETRY_S
        full = self._queued_bytes + self.staged_bytes >= self._group_bytes()
        return full or now >= self.oldest_s + self._interval_s

    def _patience_s(self) -> float:
        if self.oldest_s is None or self._interval_s is None:
            return TICK_S
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
