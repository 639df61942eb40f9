"""What others ask of the one writing process: small files in a folder of the store.

    requests/<name>.request   record [what, arguments], made whole by a rename
    requests/<name>.reply     record [is_error, result], made by the writer once it is durable

A request survives both processes: it is carried out by the writer that lives, or by the next one
that opens the store. Whoever may write to the folder may ask. A request is answered once its
effect is durable; one that a crash has repeated does no more than once would (operations.py).
"""

from __future__ import annotations

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
    """Leave a request for the writer, durably; the path is for ``claim`` and ``withdraw``."""
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
        names = sorted(path.name for path in layout.requests.iterdir())
    except OSError:
        return
    for name in names:
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


def withdraw(path: Path) -> None:
    """Take a request back, where it is not being carried out yet."""
    with suppress(OSError):
        path.unlink()


def _read(path: Path) -> Request:
    try:
        if path.is_symlink() or path.stat().st_size > REQUEST_BYTES_MAX:
            return Request(path, path.stem, "", {}, "a link, or too large")
        what, arguments = codec.unpacked(path.read_bytes(), path.name)
        return Request(path, path.stem, str(what), dict(arguments))
    except (OSError, DamageError, ValueError, TypeError) as error:
        return Request(path, path.stem, "", {}, f"cannot be read: {error}")


def _is_stale(path: Path) -> bool:
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > _UNCLAIMED_S
    return False
