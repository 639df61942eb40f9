"""One LMDB file, opened carefully, once in this process, and shared by all who use it.

Only this module imports lmdb. It owns: the check of the file before LMDB maps it (an empty
file would silently become an empty database, a truncated one kills the process on read), the
process-wide table of open files (LMDB forbids opening one twice), locking by readers, and the
translation of LMDB's errors. It knows nothing of what the tables hold.

An environment is opened in one of three ways:

* *write*: the active segment, by the one writing process; sync=True always.
* *shared*: the active segment, for reading while a writer lives; takes a reader slot.
* *alone*: a sealed segment, or the active one while nobody writes; no lock file is touched,
  not a byte of the store changes.

What was opened *alone* changes to *shared* by itself once a writer appears, which it sees by
the writer lock's content. Transactions are short: memory that they show must be copied before
they end.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import lmdb

from kvstore.errors import DiskFull, StoreClosed, StoreError, StoreFormatError
from kvstore.metapage import check_file

Mode = Literal["write", "shared", "alone"]
Txn = Any  # lmdb.Transaction[memoryview]; lmdb's own stubs differ between 2.x and 3.x

TABLES: Final = (b"index", b"blocks", b"order", b"meta")
READERS_MAX: Final = 1022  # 64 bytes each in the lock file, behind a header of twice that
_LOCK_BYTES: Final = 64 * (READERS_MAX + 2)
FILE_MODE: Final = 0o664  # group-writable: readers need the lock file
_MAP_BYTES_ALONE: Final = 1 << 20  # LMDB raises it to the size of a file that does not grow
_MAP_BYTES_OF_FILE: Final = 0  # the range that the file was created with: the same for all
_ENGINES: Final = hasattr(lmdb.Environment, "lib_version")  # py-lmdb 3 bundles 1.0 as well
_ENGINE_0_9: Final[dict[str, Any]] = {"lib_version": 0} if _ENGINES else {}

_FORK_WAIT_S: Final = 5.0  # the longest transaction is one commit

generation = 0
"""Changes in a forked child: a handle that remembers another value is the parent's."""
_opened: dict[tuple[int, int], Environment] = {}
_opened_lock = threading.Lock()
_inherited: list[Environment] = []  # in use when a child was forked: it may not even close them


# A child closes what it inherited, as py-lmdb would refuse it to open the files anew. That is
# safe only between transactions: closing one would free its slot in the parent's reader table.
def _pause_for_fork() -> None:
    _opened_lock.acquire()
    for environment in _opened.values():
        environment.pause()


def _resume_in_parent() -> None:
    for environment in _opened.values():
        environment.resume()
    _opened_lock.release()


def _disown_in_child() -> None:
    global generation  # noqa: PLW0603
    generation += 1
    for environment in _opened.values():
        environment.disown()
    _opened.clear()
    _opened_lock.release()


os.register_at_fork(
    before=_pause_for_fork,
    after_in_parent=_resume_in_parent,
    after_in_child=_disown_in_child,
)


class Environment:
    """A reference-counted LMDB environment; get one from ``open_environment``."""

    def __init__(self, path: Path, mode: Mode, writer: Callable[[], bytes], seen_writer: bytes):
        self.path = path
        self._writer = writer
        self._seen_writer = seen_writer
        self._references = 0
        self._users = 0
        self._changed = threading.Condition()
        self._disowned = False
        self._durable = 0
        self._open(mode)

    def _open(self, mode: Mode) -> None:
        with translated(self.path):
            check_file(self.path)
            if mode != "alone":
                reserve_lock_file(self.path)
            found = self.path.stat()
            self._env: Any = lmdb.open(
                str(self.path),
                map_size=_MAP_BYTES_ALONE if mode == "alone" else _MAP_BYTES_OF_FILE,
                subdir=False,
                readonly=mode != "write",
                lock=mode != "alone",
                create=False,
                mode=FILE_MODE,
                max_dbs=len(TABLES),
                max_readers=READERS_MAX,
                max_spare_txns=0,  # none may live across a fork: see _pause_for_fork
                **_ENGINE_0_9,
            )
            self._open_tables(mode)
        self._file = found.st_dev, found.st_ino
        self.mode, self._is_open = mode, True

    def _open_tables(self, mode: Mode) -> None:
        try:
            self.page_bytes: int = self._env.stat()["psize"]
            if mode != "alone":
                self._env.reader_check()
            self.index, self.blocks, self.order, self.meta = (
                self._env.open_db(name, create=False) for name in TABLES
            )
        except BaseException:
            self._env.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Txn]:
        """A read transaction on the last commit; keep it short, copy what you need."""
        self._enter()
        try:
            with translated(self.path), self._env.begin(buffers=True) as txn:
                yield txn
        finally:
            self._leave()

    @contextmanager
    def write(self, needed_bytes: int) -> Iterator[Txn]:
        """A write transaction: durable once the block ends, undone if it raises.

        needed_bytes: about what it will write, to tell a full disk from a broken one. After a
        failed commit the environment is opened anew, as LMDB allows no other way on.
        """
        self._enter()
        try:
            with translated(self.path, needed_bytes), self._env.begin(write=True) as txn:
                yield txn
        except StoreError:
            self._leave()
            with suppress(StoreError):  # else the next use tries again
                self._reopen("write")
            raise
        except BaseException:
            self._leave()
            raise
        self._leave()

    def sync(self) -> None:
        """Make durable what a killed process may have left in the page cache only."""
        self._enter()
        try:
            with translated(self.path):
                self._env.sync(True)
        finally:
            self._leave()

    def copy_to(self, path: Path) -> None:
        """Copy the file as of one commit to a new one, which is not synced.

        Writing goes on meanwhile; the pages that commits free are reused only afterwards, so
        the file grows by what they free: a few MB at full rate.
        """
        self._enter()
        try:
            with translated(path), path.open("xb") as file:
                self._env.copyfd(file.fileno())
        finally:
            self._leave()

    def wait_until_durable(self, commit: int) -> None:
        """Return once that commit, which was seen, is on the disk; one sync serves all who ask.

        LMDB shows a commit to readers while its last page is still being synced. Works for a
        reader, whom LMDB's own sync refuses.
        """
        if commit <= self._durable:
            return
        with translated(self.path), suppress(FileNotFoundError):  # dropped since: it was durable
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        self._durable = max(self._durable, commit)

    def is_at(self, path: Path) -> bool:
        """Whether that path still names the file: else it was removed, or replaced by a copy."""
        try:
            found = path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._file

    def last_commit(self) -> int:
        """Number of the last commit, LMDB's transaction id; cheap, needs no transaction.

        While a commit waits for the disk, it is counted here and not yet shown to readers.
        """
        return self._info("last_txnid")

    def used_bytes(self) -> int:
        """Bytes of the file that are in use, from its start."""
        return (self._info("last_pgno") + 1) * self.page_bytes

    def map_bytes(self) -> int:
        """The file's address range, which it cannot outgrow."""
        return self._info("map_size")

    def _info(self, what: str) -> int:
        self._enter()
        try:
            with translated(self.path):
                return int(self._env.info()[what])
        finally:
            self._leave()

    def pause(self) -> None:
        """Before a fork: let no transaction run until ``resume`` or ``disown``."""
        self._changed.acquire()
        self._changed.wait_for(lambda: not self._users, _FORK_WAIT_S)

    def resume(self) -> None:
        """In the parent of a fork: go on."""
        self._changed.release()

    def disown(self) -> None:
        """In the child of a fork: make every later use raise."""
        self._disowned = True
        if self._users:
            _inherited.append(self)
        else:
            self._env.close()
        self._changed.release()

    def share(self) -> None:
        """Take one more reference."""
        with _opened_lock:
            self._references += 1

    def close(self) -> None:
        """Give up one reference; the last one closes the file."""
        with _opened_lock:
            self._references -= 1
            if self._references or self._disowned:
                return
            # Under the lock: py-lmdb would refuse to open the file anew until it is closed.
            for key in [key for key, value in _opened.items() if value is self]:
                del _opened[key]
            self._shut()

    def _enter(self) -> None:
        if self._disowned:
            raise StoreClosed(
                f"{self.path}: opened before this process was forked; open the store again here"
            )
        if self.mode == "alone" and (writer := self._writer()) != self._seen_writer:
            # Its lock file may come a moment later: then what the lock says changes once more.
            self._reopen("shared" if lock_path(self.path).exists() else "alone")
            self._seen_writer = writer
        elif not self._is_open:
            self._reopen(self.mode)
        with self._changed:
            self._users += 1

    def _leave(self) -> None:
        with self._changed:
            self._users -= 1
            self._changed.notify_all()

    def _reopen(self, mode: Mode) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
            if self._is_open and self.mode == "write" != mode:
                return  # a reader that decided before the writer did must not undo it
            self._env.close()
            self._is_open = False
            self._open(mode)

    def _shut(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
            self._env.close()


def open_environment(
    path: Path, mode: Mode, *, writer: Callable[[], bytes] = bytes, seen_writer: bytes = b""
) -> Environment:
    """Open a file, or share it where this process has it open already.

    writer: gives the content of the writer lock, which changes when a writer starts and once
    more when its lock file is there. seen_writer: that content before ``mode`` was decided on.
    """
    with _opened_lock:
        try:
            found = path.stat()
            key = (found.st_dev, found.st_ino)
            environment = _opened.get(key)
            if environment is None:
                environment = _opened[key] = Environment(path, mode, writer, seen_writer)
        except (FileNotFoundError, StoreError):
            if path.exists():
                raise
            # Or dropped just now, between a look and the next.
            raise StoreFormatError(f"{path}: missing: restore it from a backup") from None
        if mode == "write" and environment.mode != "write":
            environment._reopen("write")  # noqa: SLF001
        environment._references += 1  # noqa: SLF001
        return environment


def create_environment(path: Path, map_bytes: int, fill: Callable[[Txn, Any], None]) -> None:
    """Make a new file with empty tables and what ``fill(txn, meta)`` puts; durable on return.

    map_bytes: address range that the file is given for life; it can never grow past it.

    lock=False: the file gets its final name later, and a lock file's name would not follow.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    # Under the lock: a child forked now would inherit it open, and could not open the segment.
    with _opened_lock, translated(path, needed_bytes=1 << 16):
        env = lmdb.open(
            str(path),
            map_size=map_bytes,
            subdir=False,
            lock=False,
            mode=FILE_MODE,
            max_dbs=len(TABLES),
            **_ENGINE_0_9,
        )
        try:
            with env.begin(write=True) as txn:
                tables = {name: env.open_db(name, txn=txn) for name in TABLES}
                fill(txn, tables[b"meta"])
        finally:
            env.close()


def lock_path(path: Path) -> Path:
    """Where LMDB keeps the reader table of a file."""
    return path.with_name(path.name + "-lock")


def reserve_lock_file(path: Path) -> None:
    """Make a file's lock file and give it its blocks.

    LMDB maps it sparse: on a full disk the first touch of a page were a SIGBUS.
    """
    try:
        fd = os.open(lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return  # LMDB itself says whether it can do without
        raise
    try:
        os.posix_fallocate(fd, 0, _LOCK_BYTES)
    finally:
        os.close(fd)


@contextmanager
def translated(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn LMDB's and the system's errors into ours, naming the file and the remedy."""
    try:
        yield
    except lmdb.Error as error:
        raise _translate(error, path, needed_bytes) from error
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path) from error
        raise StoreError(f"{path}: {error.strerror or error}") from error


def _translate(error: lmdb.Error, path: Path, needed_bytes: int) -> StoreError:
    code = getattr(error, "code", 0)
    if code in (errno.ENOSPC, errno.EDQUOT) or (
        needed_bytes and "Input/output" in str(error) and _free_bytes(path) < needed_bytes
    ):
        return _disk_full(path)
    if isinstance(error, lmdb.NotFoundError):
        return StoreFormatError(f"{path}: an LMDB file, but no segment of a store: move it away")
    if isinstance(error, lmdb.CorruptedError | lmdb.InvalidError | lmdb.PageNotFoundError):
        remedy = "restore it from a backup, or bring out what is left with kvstore recover"
        return StoreFormatError(f"{path}: damaged: {error}; {remedy}")
    return StoreError(f"{path}: {_remedy(error, path)}{error}")


def _remedy(error: lmdb.Error, path: Path) -> str:
    if isinstance(error, lmdb.MapFullError):
        return "one commit outgrew the segment's address range: "
    if isinstance(error, lmdb.ReadersFullError):
        return f"more than {READERS_MAX} readers at once, close some: "
    if isinstance(error, lmdb.LockError | lmdb.ReadonlyError) or "denied" in str(error):
        lock = lock_path(path).name
        return f"reading while a writer runs needs write permission for the lock file {lock}: "
    return ""


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path.parent)
    return found.f_bavail * found.f_frsize


def _disk_full(path: Path) -> DiskFull:
    return DiskFull(
        f"{path.parent}: no room on the disk ({_free_bytes(path)} bytes free); what was committed "
        "is intact: make room and go on"
    )
