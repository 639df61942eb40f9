"""``verify``: a whole store against itself; names stream, field and time span of each damage.

Each segment is checked (check.py), then they are held against one another: file sizes and
summaries of sealed segments, definitions of streams, sequences that go on from one to the next.
Never changes a byte of the store; what ``since_last`` remembers stands in a file of its own
beside it.

Segments are read without LMDB, so no damage can harm us. While a writer lives, a transaction
holds one commit of the active one. That pins the pages which later commits free: its file grows
by some 30 KB for each commit until it is checked, and is sealed the earlier for it. The other
ways lost: LMDB itself would have to run in a child process, which a damaged page may kill or
send in circles; a copy needs room.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvstore import codec
from kvstore.check import SegmentCheck
from kvstore.environment import open_environment, translated
from kvstore.errors import KvstoreError, StoreError, StoreFormatError
from kvstore.layout import Layout, sync_folder
from kvstore.pages import PageFile, Report
from kvstore.state import Dropped, Sealed, State, Totals
from kvstore.untrusted import Damage, read_state

_TRIES_MAX: Final = 20  # writers that may begin while the active segment is read
_PAUSE_S_MIN: Final = 0.01  # shorter ones are saved up: sleeping is not that exact
OnProgress = Callable[[int, int], None]  # bytes done, bytes in all


class VerifyReport(NamedTuple):
    """What was looked at, and what is wrong. skipped: segments found verified before.

    notes: what should be known beside.
    """

    path: str
    damages: tuple[Damage, ...]
    segments: int
    skipped: int
    rows: int
    bytes: int
    notes: tuple[str, ...] = ()


class _Checked(NamedTuple):
    """What the check of one segment tells the check of the whole."""

    state: State
    totals: dict[int, Totals]
    rows: int


def verify(
    path: str | os.PathLike[str],
    *,
    rate_bytes_s: float | None = None,
    since_last: bool = False,
    state_path: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Check everything in a store as of now; a writer may be writing to it.

    rate_bytes_s: at most so many bytes a second are read. since_last: leave out sealed segments
    that an earlier run, even an interrupted one, with since_last found sound and whose size and
    time of change are what they were; damage that came without a write is not seen in those.
    state_path: where that is remembered; by default PATH.verified, beside the store. Where that
    cannot be written, ``notes`` says so.

    In the writer's own process, a commit that failed is tried again only once the active segment
    has been looked at. Raises StoreNotFound, StoreFormatError for a newer format, and StoreError
    where files may not be read.
    """
    known = _Known(path, state_path, wanted=since_last)
    return _Verify(Layout(path), _Pace(rate_bytes_s), known, on_progress).run()


class _Pace:
    """Sleeps so that no more than ``rate_bytes_s`` are spent a second."""

    def __init__(self, rate_bytes_s: float | None):
        self.rate_bytes_s = rate_bytes_s
        self._started = time.monotonic()
        self._spent = 0

    def spend(self, size: int) -> None:
        if self.rate_bytes_s is None:
            return
        self._spent += size
        pause = self._started + self._spent / self.rate_bytes_s - time.monotonic()
        if pause > _PAUSE_S_MIN:
            time.sleep(pause)


class _Known:
    """Which sealed segments were found sound before, in a small file outside the store.

    Beside the store rather than in the user's own folder: it travels with the disk, and a
    service has no home. The store's own bytes never change by reading.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        state_path: str | os.PathLike[str] | None,
        *,
        wanted: bool,
    ):
        beside = Path(path).resolve()
        self.problem = ""
        self._path = Path(state_path) if state_path else beside.with_name(beside.name + ".verified")
        self._wanted = wanted
        self._sound: dict[int, list[Any]] = {}

    def load(self, store_id: bytes) -> None:
        self._store_id = store_id
        if self._wanted and self._path.exists():
            with translated(self._path):
                data = self._path.read_bytes()
            with suppress(KvstoreError, ValueError, TypeError):  # damaged: all is checked
                owner, sound = codec.unpacked(data, self._path.name)
                self._sound = dict(sound) if owner == store_id else {}

    def has(self, number: int, file: Path) -> bool:
        return self._wanted and number in self._sound and self._sound[number] == _stamp(file)

    def add(self, number: int, stamp: list[int]) -> None:
        if not self._wanted or self.problem:
            return
        self._sound[number] = stamp
        try:
            self._write()
        except StoreError as error:  # a full disk: what was found matters more
            self.problem = f"what was verified cannot be remembered for --since-last: {error}"

    def _write(self) -> None:
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with translated(self._path):
            try:
                with fresh.open("wb") as file:
                    file.write(codec.packed([self._store_id, self._sound]))
                    file.flush()
                    os.fsync(file.fileno())
                fresh.replace(self._path)
                sync_folder(self._path.parent)
            finally:
                fresh.unlink(missing_ok=True)


def _stamp(file: Path) -> list[int]:
    with translated(file):
        found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


class _Verify:
    """One run."""

    def __init__(self, layout: Layout, pace: _Pace, known: _Known, on_progress: OnProgress | None):
        self._layout = layout
        self._pace = pace
        self._known = known
        self._on_progress = on_progress
        self._damages: list[Damage] = []
        self._missing: list[Damage] = []
        self._store_id = b""
        self._sizes: dict[int, int] = {}
        self._newest: _Checked | None = None
        self._done_bytes = self._segment_bytes = self._segments = self._skipped = self._rows = 0

    def run(self) -> VerifyReport:
        self._check_identity()
        numbers = self._check_newest()
        sealed = self._newest.state.sealed if self._newest else {}
        for number in sorted({*numbers[:-1], *sealed}):
            self._check_sealed(number, sealed.get(number))
        self._check_sequences()
        self._damages += self._still_missing()
        return VerifyReport(
            str(self._layout.path),
            tuple(sorted(self._damages, key=lambda each: each.segment)),
            self._segments,
            self._skipped,
            self._rows,
            self._done_bytes,
            tuple(filter(None, [self._known.problem])),
        )

    def _check_newest(self) -> list[int]:
        """Check the segment with the highest number; the numbers that there are."""
        for _ in range(_TRIES_MAX):
            numbers, before = self._layout.numbers(), len(self._damages)
            self._sizes = {number: self._size(number) for number in numbers}
            if not numbers:
                self._damages.append(Damage(0, "there is no segment, expected at least one"))
                break
            try:
                self._newest = self._check(numbers[-1], is_active=True)
            except StoreError:
                if self._layout.segment_path(numbers[-1]).exists():
                    raise
            if self._newest or self._layout.segment_path(numbers[-1]).exists():
                break
            del self._damages[before:]  # sealed and dropped meanwhile: look again
            self._segments -= 1
        return numbers

    def _check_identity(self) -> None:
        try:
            self._store_id = self._layout.store_id()
        except StoreFormatError as error:
            if error.__cause__ is None:
                raise  # a newer format is no damage
            self._damages.append(Damage(0, str(error)))
        self._known.load(self._store_id)

    def _size(self, number: int) -> int:
        with suppress(FileNotFoundError):
            return self._layout.segment_path(number).stat().st_size
        return 0

    # ---- one segment ----

    def _check_sealed(self, number: int, summary: Sealed | None) -> None:
        file = self._layout.segment_path(number)
        before = len(self._damages)
        try:
            stamp = _stamp(file)
            if summary and stamp[0] != summary.file_bytes:
                what = f"the file has {stamp[0]} bytes, expected {summary.file_bytes}"
                self._damages.append(Damage(number, what))
            elif self._known.has(number, file):
                self._skipped += 1
                self._done_bytes += self._sizes.get(number, 0)
                return
            checked = self._check(number)
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            rows = sum(totals.rows for totals in summary.totals.values()) if summary else 0
            self._missing.append(Damage(number, "the segment is missing", rows=rows))
            return
        if summary and checked:
            self._compare(checked, summary)
        if len(self._damages) == before and summary:
            self._known.add(number, stamp)

    def _compare(self, checked: _Checked, summary: Sealed) -> None:
        if checked.state.last_commit_ns != summary.last_commit_ns:
            what = "its last commit is not the one that later segments know: commits are lost"
            self._damages.append(Damage(summary.number, what))
        elif checked.totals != summary.totals:
            what = "its totals are not those that later segments know"
            self._damages.append(Damage(summary.number, what))
        for name, info in checked.state.streams.items():
            newest = self._newest and self._newest.state.streams.get(name)
            if newest and (
                newest.stream_id != info.stream_id
                or newest.versions[: len(info.versions)] != info.versions
                or newest.schema.first(len(info.schema.fields)) != info.schema
            ):
                what = "its definition of the stream is not the one that later segments extend"
                self._damages.append(Damage(summary.number, what, name))

    def _check(self, number: int, *, is_active: bool = False) -> _Checked | None:
        """Check one segment; None where nothing can be said of it."""
        self._segments += 1
        self._segment_bytes = 0
        checked: _Checked | None = None
        try:
            checked, found = self._look(number, is_active=is_active)
        except StoreError as error:
            if not _is_damage(error):
                raise
            found = [Damage(number, str(error))]
        self._damages += found
        self._done_bytes += max(self._sizes.get(number, 0), self._segment_bytes)
        self._segment_bytes = 0
        self._spend(0)
        if checked is not None:
            self._rows += checked.rows
            self._check_owner(number, checked.state)
        return checked

    def _look(self, number: int, *, is_active: bool) -> tuple[_Checked, list[Damage]]:
        for _ in range(_TRIES_MAX):
            found: list[Damage] = []
            seen_writer = self._layout.writer()
            with self._opened(number, found, is_active=is_active) as file:
                check = SegmentCheck(number, file, found.append, self._spend)
                check.run()
            has_begun = is_active and self._layout.writer() != seen_writer
            if not (found and has_begun):  # else what was read may be torn
                break
        totals = {key: each for key, each in check.state.totals.items() if each.rows}
        rows = sum(each.rows for each in check.found.values())
        return _Checked(check.state, totals, rows), found

    @contextmanager
    def _opened(self, number: int, found: list[Damage], *, is_active: bool) -> Iterator[PageFile]:
        path = self._layout.segment_path(number)

        def structure(what: str) -> None:
            found.append(Damage(number, what))

        if is_active and self._layout.is_shared(number):
            with _pinned(path, structure) as file:
                yield file
        else:
            with PageFile(path, structure) as file:
                yield file

    def _check_owner(self, number: int, state: State) -> None:
        if state.number != number:
            self._damages.append(Damage(number, f"the file holds segment {state.number}"))
        if state.store_id and self._store_id not in (b"", state.store_id):
            self._damages.append(Damage(number, f"the file is of the store {state.store_id.hex()}"))

    def _spend(self, size: int) -> None:
        self._pace.spend(size)
        self._segment_bytes += size
        if self._on_progress:
            total = max(sum(self._sizes.values()), 1)
            self._on_progress(min(self._done_bytes + self._segment_bytes, total), total)

    # ---- the whole ----

    def _check_sequences(self) -> None:
        """Each segment goes on, in each stream, where the one before it ended."""
        if self._newest is None:
            return
        state = self._newest.state
        each_totals = {number: each.totals for number, each in state.sealed.items()}
        each_totals[state.number] = self._newest.totals
        following: dict[int, int] = {}
        for number in sorted(each_totals):
            if number - 1 not in each_totals:
                following = {}  # what came before was dropped
            for stream_id, totals in each_totals[number].items():
                begins = totals.next_sequence - totals.batches
                if following.get(stream_id, begins) != begins:
                    what = f"begins with batch {begins}, expected {following[stream_id]}"
                    self._damages.append(Damage(number, what, f"number {stream_id}"))
                following[stream_id] = totals.next_sequence
        for name, info in state.streams.items():
            gone = state.dropped.get(info.stream_id, Dropped()).totals.batches
            batches = state.stream_totals(info.stream_id).batches + gone
            expected = state.stream_totals(info.stream_id).next_sequence
            if batches != expected:
                what = f"its meta table knows {batches} batches, expected {expected}"
                self._damages.append(Damage(state.number, what, name))

    def _still_missing(self) -> list[Damage]:
        """Of the segments that were not there, those that were not dropped meanwhile.

        A drop is recorded in the active segment before the file goes.
        """
        if not self._missing or self._newest is None:
            return self._missing
        number = self._layout.active()
        with self._opened(number, [], is_active=True) as file:
            state = read_state(file.items(b"meta"), number, lambda _: None)
        return [each for each in self._missing if each.segment in state.sealed]


def _is_damage(error: StoreError) -> bool:
    cause = error.__cause__
    is_broken = isinstance(cause, OSError) and cause.errno == errno.EIO
    return is_broken or isinstance(error, StoreFormatError)


@contextmanager
def _pinned(path: Path, report: Report) -> Iterator[PageFile]:
    """The file as of its last commit, whose pages stay as they are meanwhile."""
    environment = open_environment(path, "shared")
    try:
        for remaining in reversed(range(_TRIES_MAX)):
            with (
                environment.read() as transaction,
                PageFile(path, report, txn_id=transaction.id()) as file,
            ):
                if file.meta or not remaining:  # else two commits came before it was opened
                    yield file
                    return
    finally:
        environment.close()
