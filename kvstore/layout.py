"""A store's directory: its names, its identity file, the writer lock, making new segments.

    run.kv/store.msgpack           format version, store id, creation time; written last
    run.kv/writer.lock             flock held by the writing process; holds its pid and start
    run.kv/segments/00000001.mdb   the segments; the highest number is the active one
    run.kv/reserve                 room that a full disk still has for closing in order
    run.kv/requests/               asked of the writing process by others (requests.py)

Every change of a name is followed by an fsync of its folder before anything relies on it.
Clocks and randomness are taken here, at the edge.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvstore import codec
from kvstore.environment import lock_path, reserve_lock_file, translated
from kvstore.errors import DamageError, StoreFormatError, StoreLocked, StoreNotFound
from kvstore.segment import Segment, create_segment
from kvstore.state import FORMAT, FORMATS, State

_IDENTITY: Final = "store.msgpack"
_LOCK: Final = "writer.lock"
_SEGMENTS: Final = "segments"
_RESERVE: Final = "reserve"
_REQUESTS: Final = "requests"
RESERVE_BYTES: Final = 256 << 10  # a small commit takes some 40 KB, a new segment 100 KB
_SEGMENT_NAME: Final = re.compile(r"[0-9]{8,}\.mdb")
_PATHS_MAX: Final = 64
_LOCK_BYTES: Final = 64  # more than the two numbers in it
_LOCK_TRIES: Final = 25  # a reader's probe holds the lock for microseconds: 0.5 s is ample
_LOCK_WAIT_S: Final = 0.02


class Layout:
    """The paths of one store, and the acts that change its directory."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.segments = self.path / _SEGMENTS
        self.requests = self.path / _REQUESTS
        self._lock_path = str(self.path / _LOCK)
        self._paths: dict[int, Path] = {}

    def segment_path(self, number: int) -> Path:
        """Where a segment's file is. Kept: each look at a store asks for the same few."""
        path = self._paths.get(number)
        if path is None:
            if len(self._paths) >= _PATHS_MAX:
                self._paths.clear()
            path = self._paths[number] = self.segments / f"{number:08d}.mdb"
        return path

    def numbers(self) -> list[int]:
        """Numbers of the segments there are, ascending; the last is the active one."""
        with translated(self.segments):
            names = os.listdir(self.segments)
        return sorted(int(name[:-4]) for name in names if _SEGMENT_NAME.fullmatch(name))

    def active(self) -> int:
        """Number of the active segment: the highest, looked for from the end, as it is there."""
        with translated(self.segments):
            names = os.listdir(self.segments)
        names.sort()
        names.sort(key=len)  # numbers beyond eight digits come last
        for name in reversed(names):
            if _SEGMENT_NAME.fullmatch(name):
                return int(name[:-4])
        raise StoreFormatError(
            f"{self.segments}: no segment there, expected at least one: restore the store "
            "from a backup"
        )

    def is_active(self, number: int) -> bool:
        """Whether what was the active segment still is; cheap while a writer keeps it open.

        The next one may be dropped by now and this one not, being pinned. Its lock file goes when
        it is sealed, before anything later can be dropped.
        """
        if lock_path(self.segment_path(number)).exists():
            return not self.segment_path(number + 1).exists()
        return self.active() == number

    def exists(self) -> bool:
        """Whether a store stands here; a creation cut short does not count."""
        return (self.path / _IDENTITY).is_file()

    def store_id(self) -> bytes:
        """The id given at creation; StoreNotFound or StoreFormatError where there is none."""
        return self.identity()[0]

    def identity(self) -> tuple[bytes, int]:
        """The store's id, and when it was made, in ns since 1970."""
        if not self.exists():
            raise StoreNotFound(
                f"{self.path}: no store here; check the path (mode='w' and kvstore write make one)"
            )
        with translated(self.path):
            data = (self.path / _IDENTITY).read_bytes()
        try:
            version, *rest = codec.unpacked(data, _IDENTITY)
        except (DamageError, ValueError, TypeError) as error:
            raise StoreFormatError(f"{self.path}: {_IDENTITY} is damaged: {error}") from error
        if version not in FORMATS:
            raise StoreFormatError(
                f"{self.path}: format version {version}, this kvstore reads up to {FORMAT}: "
                "use the kvstore release that wrote it, or a newer one"
            )
        store_id, created_ns = rest
        return bytes(store_id), created_ns

    def create(self, segment_bytes: int) -> None:
        """Make an empty store, or finish a creation that was cut short.

        Where segments are there already, the identity file is written again from the last: a
        store that lost only this file keeps its rows.
        """
        numbers = self.numbers()
        if numbers:
            state = _stored_state(self.segment_path(numbers[-1]), numbers[-1])
            sync_folder(self.segments)
        else:
            state = State(uuid.uuid4().bytes, 1, time.time_ns())
            self.roll(state, segment_bytes)
        identity = codec.packed([state.version, state.store_id, state.created_ns])
        write_durably(self.path / _IDENTITY, identity)

    def prepare(self) -> None:
        """Make the store's folders, durably; refuse a folder that holds something else."""
        known = {_LOCK, _SEGMENTS, _RESERVE, _REQUESTS, _IDENTITY + ".tmp"}
        with translated(self.path):
            found = set(os.listdir(self.path)) if self.path.exists() else set()
            if foreign := sorted(found - known):
                raise StoreFormatError(
                    f"{self.path}: a folder with other files ({foreign[0]}, …), not a store; "
                    "give the store a folder of its own"
                )
            for folder in (self.path, self.segments):
                folder.mkdir(exist_ok=True)
                sync_folder(folder.parent)

    def roll(self, state: State, segment_bytes: int) -> Path:
        """Make the segment that ``state`` describes under its final name, durably.

        One that is there already is the same: its roll failed after the rename, and nothing
        was committed since. Readers may have it open, so it stays.
        """
        final = self.segment_path(state.number)
        with translated(final):
            if not final.exists():
                fresh = final.with_suffix(".tmp")
                create_segment(fresh, state, segment_bytes)
                reserve_lock_file(final)  # before readers see it, and before a disk is full
                fresh.rename(final)
            sync_folder(self.segments)
        return final

    def tidy(self) -> None:
        """Remove what a roll cut short left behind, and lock files of sealed segments."""
        active = self.segment_path(self.active()).name
        with translated(self.segments):
            # A killed writer may have renamed and not synced: nothing durable may rest on that.
            sync_folder(self.segments)
            sync_folder(self.path)
            for entry in os.listdir(self.segments):
                if entry.endswith(".tmp") or (
                    entry.endswith(".mdb-lock") and not entry.startswith(active)
                ):
                    (self.segments / entry).unlink(missing_ok=True)

    def unlisted(self, state: State) -> list[int]:
        """Segments that a drop cut short has left behind: older, and known to hold nothing."""
        return [n for n in self.numbers() if n < state.number and n not in state.sealed]

    def remove(self, numbers: Iterable[int]) -> None:
        """Unlink dropped segments, durably; readers that have one open keep what they hold."""
        with translated(self.segments):
            for number in numbers:
                self.segment_path(number).unlink(missing_ok=True)
            sync_folder(self.segments)

    def keep_reserve(self) -> None:
        """Set room aside, where there is any."""
        with suppress(OSError), (self.path / _RESERVE).open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def release_reserve(self) -> None:
        """Give that room back to the disk: for a commit that puts things in order."""
        with suppress(OSError):
            (self.path / _RESERVE).unlink()

    def free_bytes(self) -> int:
        """What the disk has left for this process."""
        with translated(self.path):
            found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def disk_bytes(self) -> int:
        """The size of the disk."""
        with translated(self.path):
            found = os.statvfs(self.path)
        return found.f_blocks * found.f_frsize

    def writer(self) -> bytes:
        """What the writer lock says: changes whenever a writer starts; cheap."""
        try:
            fd = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            return os.read(fd, _LOCK_BYTES)
        finally:
            os.close(fd)

    def is_shared(self, number: int) -> bool:
        """Whether a writer has the active segment open now, or may have."""
        return self.has_writer() and lock_path(self.segment_path(number)).exists()

    def has_writer(self) -> bool:
        """Whether some process is writing now."""
        with suppress(OSError), (self.path / _LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


class WriterLock:
    """The store's one writing process: held until ``release`` or the process's end."""

    def __init__(self, layout: Layout):
        self._path = layout.path / _LOCK
        with translated(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
        try:
            self._acquire()
            with translated(self._path):
                os.ftruncate(self._fd, 0)
                self.announce()
        except BaseException:
            os.close(self._fd)
            raise
        _held.add(self._fd)

    def _acquire(self) -> None:
        for _ in range(_LOCK_TRIES):
            with suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(_LOCK_WAIT_S)
        holder = os.pread(self._fd, 64, 0).split()
        pid = holder[0].decode() if holder else "unknown"
        raise StoreLocked(
            f"{self._path.parent}: process {pid} is writing to this store; wait until it ends, "
            "or read instead: any number of readers may be open"
        )

    def announce(self) -> None:
        """Change what the lock says: readers look again for the active segment's lock file."""
        os.pwrite(self._fd, b"%d %d\n" % (os.getpid(), time.time_ns()), 0)

    def release(self) -> None:
        """Let the next writer in."""
        _held.discard(self._fd)
        os.close(self._fd)


_held: set[int] = set()


def _close_in_child() -> None:
    """A child's copy would keep the lock held after the parent released it or died."""
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _stored_state(path: Path, number: int) -> State:
    segment = Segment.open(path, number, "alone", store_id=b"")
    try:
        return segment.state()
    finally:
        segment.close()


def ticks_ns() -> int:
    """A clock that nobody sets, and that goes on while the machine is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file as a whole: after a power cut it is the old or the new one."""
    fresh = path.with_name(path.name + ".tmp")
    with translated(path):
        try:
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
