"""``verify``: a whole store against itself; names stream, field and time span of each damage.

Each segment is checked (check.py), then they are held against one another: file sizes and
summaries of sealed segments, sequences that continue from one to the next. Never changes a byte
of the store; what ``since_last`` remembers stands in a file of its own beside it.

A segment that nobody writes to is read without LMDB, and cannot harm us. The active one, while
a writer lives, is read through LMDB in a child process: a damaged page may kill it, and then
that is the damage.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvstore import codec
from kvstore.check import Damage, LiveSource, SegmentCheck
from kvstore.environment import translated
from kvstore.errors import KvstoreError, StoreError, StoreFormatError
from kvstore.layout import Layout, sync_folder
from kvstore.pages import PageFile
from kvstore.segment import Sealed, Segment, State, Totals

_CHILD: Final = "from kvstore.verify import check_live; check_live()"
_PAUSE_S_MIN: Final = 0.01  # shorter ones are saved up: sleeping is not that exact
_TELL_BYTES: Final = 1 << 20  # progress of a child, in steps that cost nothing
OnProgress = Callable[[int, int], None]  # bytes done, bytes in all


class VerifyReport(NamedTuple):
    """What was looked at, and what is wrong. skipped: segments found verified before."""

    path: str
    damages: tuple[Damage, ...]
    segments: int
    skipped: int
    rows: int
    bytes: int


class _Checked(NamedTuple):
    """What the check of one segment tells the check of the whole."""

    store_id: bytes
    number: int
    last_commit_ns: int
    totals: dict[int, Totals]
    sealed: dict[int, Sealed]
    rows: int


def verify(
    path: str | os.PathLike[str],
    *,
    rate_bytes_s: float | None = None,
    since_last: bool = False,
    state_path: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Check everything in a store; a writer may be writing to it.

    rate_bytes_s: at most so many bytes a second are read. since_last: leave out sealed segments
    that an earlier run, even an interrupted one, with since_last found sound and whose size and
    time of change are what they were; damage that came without a write is not seen in those.
    state_path: where that is remembered; by default PATH.verified, beside the store.

    Raises StoreNotFound, and StoreFormatError for a newer format.
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
        beside = Path(path).absolute()
        self._path = Path(state_path) if state_path else beside.with_name(beside.name + ".verified")
        self._wanted = wanted
        self._sound: dict[int, list[Any]] = {}

    def load(self, store_id: bytes) -> None:
        self._store_id = store_id
        if self._wanted and self._path.exists():
            with translated(self._path):
                data = self._path.read_bytes()
            try:
                owner, sound = codec.unpacked(data, self._path.name)
            except KvstoreError:
                return  # a damaged note is no note: everything is checked
            self._sound = sound if owner == store_id else {}

    def has(self, number: int, file: Path) -> bool:
        return self._wanted and number in self._sound and self._sound[number] == _stamp(file)

    def add(self, number: int, stamp: list[int]) -> None:
        if not self._wanted:
            return
        self._sound[number] = stamp
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
    return [found.st_size, found.st_mtime_ns]


class _Verify:
    """One run."""

    def __init__(self, layout: Layout, pace: _Pace, known: _Known, on_progress: OnProgress | None):
        self._layout = layout
        self._pace = pace
        self._known = known
        self._on_progress = on_progress
        self._damages: list[Damage] = []
        self._store_id = b""
        self._sizes: dict[int, int] = {}
        self._done_bytes = self._segment_bytes = self._segments = self._skipped = self._rows = 0

    def run(self) -> VerifyReport:
        self._check_identity()
        numbers = self._layout.numbers()
        if not numbers:
            self._damages.append(Damage(0, "there is no segment, expected at least one"))
        self._sizes = {number: self._size(number) for number in numbers}
        active = self._check(numbers[-1], is_active=True) if numbers else None
        sealed = active.sealed if active else {}
        for number in sorted({*numbers[:-1], *sealed}):
            self._check_sealed(number, sealed.get(number))
        self._check_sequences(sealed)
        return VerifyReport(
            str(self._layout.path),
            tuple(sorted(self._damages, key=lambda each: each.segment)),
            self._segments,
            self._skipped,
            self._rows,
            self._done_bytes,
        )

    def _check_identity(self) -> None:
        try:
            self._store_id = self._layout.store_id()
        except StoreFormatError as error:
            if error.__cause__ is None:
                raise  # a newer format is no damage
            self._damages.append(Damage(0, str(error)))
        self._known.load(self._store_id)

    def _size(self, number: int) -> int:
        path = self._layout.segment_path(number)
        return path.stat().st_size if path.exists() else 0

    def _check_sealed(self, number: int, summary: Sealed | None) -> None:
        file = self._layout.segment_path(number)
        if not file.exists():
            if number in self._sizes and summary is None:
                return  # dropped meanwhile
            rows = sum(totals.rows for totals in summary.totals.values()) if summary else 0
            self._damages.append(Damage(number, "the segment is missing", rows=rows))
            return
        if summary and file.stat().st_size != summary.file_bytes:
            what = f"the file has {file.stat().st_size} bytes, expected {summary.file_bytes}"
            self._damages.append(Damage(number, what))
        elif self._known.has(number, file):
            self._skipped += 1
            self._done_bytes += self._sizes.get(number, 0)
            return
        stamp, before = _stamp(file), len(self._damages)
        checked = self._check(number)
        if summary is not None and checked is not None:
            self._compare(checked, summary)
        if len(self._damages) == before and summary is not None:
            self._known.add(number, stamp)

    def _compare(self, checked: _Checked, summary: Sealed) -> None:
        if checked.last_commit_ns != summary.last_commit_ns:
            what = "its last commit is not the one that later segments know: commits are lost"
            self._damages.append(Damage(summary.number, what))
        elif checked.totals != summary.totals:
            what = "its totals are not those that later segments know"
            self._damages.append(Damage(summary.number, what))

    def _check(self, number: int, *, is_active: bool = False) -> _Checked | None:
        """Check one segment; None where nothing can be said of it."""
        self._segments += 1
        self._segment_bytes = 0
        before = len(self._damages)
        seen_writer = self._layout.writer()
        try:
            if is_active and self._layout.is_shared(number):
                checked = self._check_in_child(number)
            else:
                checked = self._check_pages(number)
                if is_active and len(self._damages) > before and self._began(seen_writer):
                    del self._damages[before:]  # a writer began: what was read may be torn
                    checked = self._check_in_child(number)
        except StoreError as error:
            self._damages.append(Damage(number, str(error)))
            checked = None
        self._done_bytes += max(self._sizes.get(number, 0), self._segment_bytes)
        self._segment_bytes = 0
        self._spend(0)
        if checked is not None:
            self._rows += checked.rows
            self._check_owner(number, checked)
        return checked

    def _began(self, seen_writer: bytes) -> bool:
        return self._layout.writer() != seen_writer

    def _check_owner(self, number: int, checked: _Checked) -> None:
        if checked.number != number:
            self._damages.append(Damage(number, f"the file holds segment {checked.number}"))
        if checked.store_id and self._store_id not in (b"", checked.store_id):
            what = f"the file is of the store {checked.store_id.hex()}"
            self._damages.append(Damage(number, what))

    def _check_pages(self, number: int) -> _Checked:
        def structure(what: str) -> None:
            self._damages.append(Damage(number, what))

        with PageFile(self._layout.segment_path(number), structure) as file:
            check = SegmentCheck(number, file, self._damages.append, self._spend)
            check.run()
            file.check_free()
        return _outcome(check)

    def _check_in_child(self, number: int) -> _Checked | None:
        arguments = [str(self._layout.path), str(number), str(self._pace.rate_bytes_s or "")]
        paths = os.pathsep.join(filter(None, sys.path))
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        try:
            with child:
                return self._hear(number, child)
        except BaseException:
            child.kill()
            raise

    def _hear(self, number: int, child: subprocess.Popen[bytes]) -> _Checked | None:
        assert child.stdout is not None
        while True:
            try:
                told = pickle.load(child.stdout)  # noqa: S301  # our own child's
            except (EOFError, pickle.UnpicklingError):
                code = child.wait()
                cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                what = (
                    f"reading it through LMDB killed the process ({cause}): its pages are damaged"
                )
                self._damages.append(Damage(number, what))
                return None
            if isinstance(told, Damage):
                self._damages.append(told)
            elif isinstance(told, int):
                self._progress(told)
            else:
                checked: _Checked = told
                return checked

    def _spend(self, size: int) -> None:
        self._pace.spend(size)
        self._progress(size)

    def _progress(self, size: int) -> None:
        self._segment_bytes += size
        if self._on_progress:
            total = max(sum(self._sizes.values()), 1)
            self._on_progress(min(self._done_bytes + self._segment_bytes, total), total)

    def _check_sequences(self, sealed: dict[int, Sealed]) -> None:
        """Each segment goes on, in each stream, where the one before it ended."""
        following: dict[int, int] = {}
        for number in sorted(sealed):
            if number - 1 not in sealed:
                following = {}  # what came before was dropped
            for stream_id, totals in sealed[number].totals.items():
                begins = totals.next_sequence - totals.batches
                if following.get(stream_id, begins) != begins:
                    what = f"begins with batch {begins}, expected {following[stream_id]}"
                    self._damages.append(Damage(number, what, f"number {stream_id}"))
                following[stream_id] = totals.next_sequence


def _outcome(check: SegmentCheck) -> _Checked:
    state: State = check.state
    return _Checked(
        state.store_id,
        state.number,
        state.last_commit_ns,
        {key: totals for key, totals in state.totals.items() if totals.rows},
        state.sealed,
        sum(totals.rows for totals in check.found.values()),
    )


def check_live() -> None:
    """In the child: check the active segment through LMDB, tell the parent by pickles."""
    path, number, rate = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    out = sys.stdout.buffer
    pace = _Pace(float(rate) if rate else None)
    untold = 0

    def tell(what: object) -> None:
        pickle.dump(what, out)
        out.flush()

    def spend(size: int) -> None:
        nonlocal untold
        pace.spend(size)
        untold += size
        if untold >= _TELL_BYTES:
            tell(untold)
            untold = 0

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without its parent it ends without a word
    layout = Layout(path)
    try:
        segment = Segment.open(layout.segment_path(number), number, "shared", store_id=b"")
        check = SegmentCheck(number, LiveSource(segment), tell, spend, is_live=True)
        check.run()
        segment.close()
    except KvstoreError as error:
        tell(Damage(number, str(error)))
        tell(_Checked(b"", number, 0, {}, {}, 0))
    else:
        tell(_outcome(check))
