"""The Linux calls that Python lacks, by ctypes: early write-back, malloc thresholds, pipe sizes.

Each but ``exchange`` and ``sync_filesystem`` is an optimisation or a convenience: where the
platform lacks the call, it does nothing and the program is only slower. Nothing here is called
by ``import kvstore``.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

PIPE_BYTES: Final = 1 << 20  # what an unprivileged process may ask for by default
APPEND_BYTES_MIN: Final = 4 << 20  # smaller commits gain nothing
_POLL_S: Final = 0.001
_FOLIO_BYTES: Final = 2 << 20  # the largest that Linux has, on most machines
_SYNC_FILE_RANGE_WRITE: Final = 2
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; older kernels refuse it
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_PR_SET_PDEATHSIG: Final = 1
_MMAP_BYTES: Final = 32 << 20  # the most that glibc takes for this threshold
_KEPT_BYTES: Final = 256 << 20  # two groups in flight and their copies in LMDB's dirty pages

_libc = ctypes.CDLL(None, use_errno=True)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing a range of dirty pages, without waiting for it.

    No durability follows from it: the fdatasync that comes after finds less to do.
    """
    with suppress(AttributeError):
        _libc.sync_file_range(
            ctypes.c_int(fd),
            ctypes.c_int64(offset),
            ctypes.c_int64(length),
            ctypes.c_uint(_SYNC_FILE_RANGE_WRITE),
        )


def keep_freed_memory() -> None:
    """Have glibc keep freed buffers of up to 256 MB instead of giving them back at once.

    A process that moves gigabytes through buffers of a few megabytes otherwise spends much of
    its time on page faults. Affects the whole process, so it is the program's decision: the
    ``kvstore`` command calls it, ``import kvstore`` and ``kvstore.open`` never do.
    """
    with suppress(AttributeError):
        _libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        _libc.mallopt(_M_ARENA_MAX, 1)  # else each thread's own arena trims by other rules


def populate(address: int, size: int) -> None:
    """Have the kernel back memory that is about to be written, all of it in one call.

    Page faults one by one take half as long again. Costs 2 µs where the memory is there already,
    as its middle page tells.
    """
    middle = (address + size // 2) // mmap.PAGESIZE * mmap.PAGESIZE
    is_there = ctypes.c_ubyte(1)
    with suppress(AttributeError):
        _libc.mincore(ctypes.c_void_p(middle), ctypes.c_size_t(1), ctypes.byref(is_there))
        if not is_there.value & 1:
            start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - start
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)


def enlarge_pipe(fd: int) -> None:
    """Give a pipe 1 MiB of room; whatever is no pipe is left alone."""
    with suppress(OSError, AttributeError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def exchange(a: Path, b: Path) -> None:
    """Let two files or folders swap their names in one step; OSError where that cannot be."""
    names = os.fsencode(a), os.fsencode(b)
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot be replaced in one step ({os.strerror(number)})", str(b))


@contextmanager
def appending(path: Path, begin: int, size: int) -> Iterator[None]:
    """While the body appends ``size`` bytes to a file, from ``begin`` on, help the kernel with it.

    The disk starts on what is already in the cache, so that the fdatasync at the end of a commit
    waits for little; and the page cache takes no folio of 2 MB (see _keep_folios_small). Together
    two to four times the rate of large commits on a virtual machine (NOTES.md, "Writing"). Does
    nothing below APPEND_BYTES_MIN. The file may be made so long at once; its content is the body's.
    """
    if size < APPEND_BYTES_MIN:
        yield
        return
    done = threading.Event()
    with path.open("r+b", buffering=0) as file:
        with suppress(OSError):  # of what helps, nothing may fail a commit
            _keep_folios_small(file.fileno(), begin, begin + size)
        follower = threading.Thread(
            target=_follow_writes, args=(file.fileno(), begin, size, done), daemon=True
        )
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()


def _keep_folios_small(fd: int, begin: int, end: int) -> None:
    """Have a clean page in the page cache for each 2 MB of a range that is about to be written.

    A write of megabytes fills folios of 2 MB, as far as nothing is cached there yet. Free memory
    in pieces of that size is just what the kernel of a virtual machine reports to its host, which
    takes it back: its first touch costs ten times that of smaller pieces. Lost: writing in pieces
    of 1 MB, which LMDB does not offer; fallocate, which caches nothing.
    """
    if os.fstat(fd).st_size < end:
        os.ftruncate(fd, end)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead: one page each
    first = begin // _FOLIO_BYTES * _FOLIO_BYTES + _FOLIO_BYTES - mmap.PAGESIZE
    for place in range(first, end, _FOLIO_BYTES):
        if place >= begin:
            os.pread(fd, 1, place)


def _follow_writes(fd: int, begin: int, size: int, done: threading.Event) -> None:
    while not done.wait(_POLL_S):
        start_writeback(fd, begin, size)


def sync_filesystem(folder: Path) -> None:
    """Put all that was written to the folder's file system on the disk: one call, many files."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        if _libc.syncfs(ctypes.c_int(fd)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(fd)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it does."""
    with suppress(AttributeError):
        _libc.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL))
