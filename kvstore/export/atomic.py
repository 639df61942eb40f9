"""A file or folder that takes its name only once it is complete and on the disk.

It is made under a hidden name beside the target, ``.NAME.PID.tmp``, synced and renamed; then
its parent is synced. A folder that is in the way is exchanged for the new one in a single step
and deleted afterwards. So whoever opens the target finds the old or the new one, at any instant.

A kill leaves the hidden one behind. Its maker holds a lock on it, and the next to make the
same name removes those that nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstore import libc
from kvstore.errors import KvstoreError
from kvstore.layout import sync_folder


@contextmanager
def replacing(path: Path, *, marker: str = "") -> Iterator[Path]:
    """Yields the name to write to, a file's or, with ``marker``, a folder's that is there.

    marker: name of a file that each such folder has: a folder without it is no such thing, and
    is not replaced. Errors of the system become KvstoreError.
    """
    target = path.resolve()  # a link stays a link
    _check_replaceable(path, target, marker)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _remove_leftovers(target)
        with _made(fresh, folder=bool(marker)):
            yield fresh
            _sync_tree(fresh)
            if marker and target.exists():
                libc.exchange(fresh, target)
            else:
                fresh.replace(target)
            sync_folder(target.parent)
    except KvstoreError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise KvstoreError(f"{path}: {reason}; nothing there was changed") from error


def _check_replaceable(path: Path, target: Path, marker: str) -> None:
    if not target.exists():
        return
    if not marker and not target.is_file():
        what = "a directory" if target.is_dir() else "no regular file"
        raise KvstoreError(f"{path} exists and is {what}: name another (kvstore read has pipes)")
    if marker and not (target / marker).is_file():
        raise KvstoreError(
            f"{path} exists and is no folder with a {marker}: remove it, or name another"
        )


@contextmanager
def _made(fresh: Path, *, folder: bool) -> Iterator[None]:
    """Make it, lock it, and in the end remove what still has that name."""
    if folder:
        fresh.mkdir()
    else:
        fresh.touch(exist_ok=False)
    fd = os.open(fresh, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: leftovers stay
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)
        _remove(fresh)


def _remove_leftovers(target: Path) -> None:
    pattern = re.compile(re.escape(f".{target.name}.") + r"\d+\.tmp")
    for name in filter(pattern.fullmatch, os.listdir(target.parent)):
        leftover = target.with_name(name)
        with suppress(OSError):  # its maker lives, or it is another user's
            fd = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(leftover)
            finally:
                os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    """Sync a file, or a folder and all in it."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync_file(Path(folder, name))
        sync_folder(Path(folder))
    if path.is_file():
        _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
