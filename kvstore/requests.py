"""What others ask of the one writing process: small files in a folder of the store.

    requests/<name>.request   record [what, arguments], made whole by a rename
    requests/<name>.reply     record [is_error, result], made by the writer once it is durable

A request survives both processes: it is carried out by the writer that lives, or by the next one
that opens the store. Whoever may write to the folder may ask. A request is answered once its
effect is durable; one that a crash has repeated does no more than once would (operations.py).
"""

from __future__ import annotations

import heapq
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvstore import codec
from kvstore.environment import translated
from kvstore.errors import DamageError
from kvstore.layout import Layout, sync_folder, write_durably

REQUEST_BYTES_MAX: Final = 64 << 10
AT_ONCE_MAX: Final = 64  # looked at between two commits, which must go on
_REQUEST: Final = ".request"
_REPLY: Final = ".reply"
_UNCLAIMED_S: Final = 600.0  # a reply that old has nobody who waits for it


class Request(NamedTuple):
    """One thing asked for. name: unique. problem: why it cannot be read, or ""."""

    path: Path
    name: str
    what: str
    arguments: dict[str, Any]
    problem: str = ""


def post(layout: Layout, what: str, arguments: Mapping[str, Any]) -> Path:
    """Leave a request for the writer, durably; the path is for ``claim``."""
    with translated(layout.requests):
        if not layout.requests.exists():
            layout.requests.mkdir(exist_ok=True)
            sync_folder(layout.path)
    path = layout.requests / f"{time.time_ns()}-{uuid.uuid4().hex}{_REQUEST}"
    write_durably(path, codec.packed([what, dict(arguments)]))
    return path


def claim(path: Path) -> tuple[bool, Any] | None:
    """(is_error, result) once the request was carried out, None before."""
    reply = path.with_suffix(_REPLY)
    try:
        data = reply.read_bytes()
    except FileNotFoundError:
        return None
    is_error, result = codec.unpacked(data, reply.name)
    with suppress(OSError):
        reply.unlink()
    return is_error, result


def pending(layout: Layout) -> Iterator[Request]:
    """The requests there are, oldest first."""
    try:
        with os.scandir(layout.requests) as listing:
            names = (entry.name for entry in listing if _is_ours(entry))
            first = heapq.nsmallest(AT_ONCE_MAX, names, key=_turn)
    except OSError:
        return
    for name in first:
        path = layout.requests / name
        if path.suffix == _REQUEST:
            yield _read(path)
        elif _is_stale(path):
            with suppress(OSError):
                path.unlink()


def answer(request: Request, result: Any, *, is_error: bool) -> None:
    """Say what became of a request, and take it away."""
    with translated(request.path):
        write_durably(request.path.with_suffix(_REPLY), codec.packed([is_error, result]))
        request.path.unlink(missing_ok=True)


def _turn(name: str) -> tuple[bool, str]:
    return not name.endswith(_REQUEST), name


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """A folder, a FIFO or a device is nothing to be read, nor to be taken away."""
    return entry.is_symlink() or entry.is_file()


def _read(path: Path) -> Request:
    try:
        # Another file may have taken the name since it was listed: never wait for a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            data = file.read(REQUEST_BYTES_MAX + 1)
        if len(data) > REQUEST_BYTES_MAX:
            return Request(path, path.stem, "", {}, "is too large")
        what, arguments = codec.unpacked(data, path.name)
        return Request(path, path.stem, str(what), dict(arguments))
    except (OSError, DamageError, ValueError, TypeError) as error:
        return Request(path, path.stem, "", {}, f"cannot be read: {error}")


def _is_stale(path: Path) -> bool:
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > _UNCLAIMED_S
    return False
