"""Copies of whole files: made from a disk that may be bad, synced, and read back.

Knows nothing of what the files hold; does not translate the system's errors.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kvstore import codec
from kvstore.errors import StoreLocked
from kvstore.layout import sync_folder

_CHUNK_BYTES: Final = 4 << 20
_PAGE_BYTES: Final = 4096


def _nowhere(_: int) -> None:
    pass


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, that one run at a time may fill."""
    if not folder.exists():
        folder.mkdir()
        sync_folder(folder.parent)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreLocked(f"{folder}: another process is filling it; let it end") from error
        yield
    finally:
        os.close(fd)


def copy_file(path: Path, to: Path, on_progress: Callable[[int], None] = _nowhere) -> int:
    """Copy a file; returns its checksum. What a bad disk withholds becomes zeros."""
    checksum = codec.running_checksum()
    with path.open("rb", buffering=0) as source, to.open("wb") as file:
        while chunk := _read(source.fileno(), file.tell()):
            file.write(chunk)
            checksum.update(chunk)
            on_progress(file.tell())
    return int(checksum.intdigest())


def sync_file(copy: Path) -> None:
    """Make a file's bytes durable, and the next read come from the disk."""
    with copy.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(fd: int, place: int) -> bytes:
    """The next piece; page by page where the disk is bad, with zeros for what it withholds."""
    try:
        return os.pread(fd, _CHUNK_BYTES, place)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    stop = min(place + _CHUNK_BYTES, os.fstat(fd).st_size)
    return b"".join(
        _page(fd, at, min(_PAGE_BYTES, stop - at)) for at in range(place, stop, _PAGE_BYTES)
    )


def _page(fd: int, place: int, size: int) -> bytes:
    try:
        return os.pread(fd, size, place).ljust(size, b"\0")
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return bytes(size)


def checksum_of(file: Path) -> int:
    """xxh3-64 of a file."""
    checksum: Any = codec.running_checksum()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            checksum.update(chunk)
    return int(checksum.intdigest())
