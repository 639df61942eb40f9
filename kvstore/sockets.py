"""A listening Unix socket: made with stated rights, or handed over by systemd.

Local only: whoever may open the file may send, nobody else. Rules: a file that is not a socket,
or a socket that somebody listens on, is never replaced; what a killed process left behind is.
Only the file that was made here is removed at the end. There is no moment at which the file has
more rights than asked for.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.errors import ListenError

SOCKET_MODE: Final = 0o660
_BACKLOG: Final = 16  # connections that wait to be accepted
_PATH_BYTES_MAX: Final = 107  # of sockaddr_un's 108, with the NUL
_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid
_GROUP: Final = 0o070


class Listener(NamedTuple):
    """inherited: systemd made the socket, and keeps it when this process ends."""

    socket: socket.socket
    path: Path
    rights: str  # in words
    inherited: bool


@contextmanager
def listening(path: Path, *, mode: int = SOCKET_MODE) -> Iterator[Listener]:
    """Listen on a socket at that path: systemd's, if it passed one for it, or a new one.

    A new one belongs to its folder's group. Who may not give it to that group gets a socket
    without rights for any group. Raises ListenError, and OSError of the path.
    """
    if (handed := _handed_over(path)) is not None:
        with handed:
            handed.setblocking(False)
            yield Listener(handed, path, "rights as systemd set them", inherited=True)
        return
    _make_way(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        _bind(made, path)
        own = path.lstat()
        try:
            rights = _set_rights(path, mode)
            made.listen(_BACKLOG)
            made.setblocking(False)
            yield Listener(made, path, rights, inherited=False)
        finally:
            with suppress(OSError):
                if os.path.samestat(own, path.lstat()):
                    path.unlink()


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user id at the other end, as the kernel knows them."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(found)
    return pid, uid


def _handed_over(path: Path) -> socket.socket | None:
    """The socket that systemd opened for this process; None where it opened none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = int(os.environ.get("LISTEN_FDS", "0"))
    passed = [socket.socket(fileno=_FIRST_FD + number) for number in range(count)]
    names = [each.getsockname() for each in passed]
    matching = [s for s, name in zip(passed, names, strict=True) if name == str(path)]
    for each in passed:
        if each not in matching[:1]:
            each.close()
    if not matching or matching[0].type != socket.SOCK_STREAM:
        raise ListenError(
            f"{path}: systemd passed the sockets {names}, none of them a stream at this path; "
            "give --listen unix: with the path that ListenStream= has"
        )
    os.set_inheritable(matching[0].fileno(), False)
    return matching[0]


def _make_way(path: Path) -> None:
    """Remove a socket that nobody listens on; ListenError for anything else that is there."""
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise ListenError(f"{path}: a socket's path has at most {_PATH_BYTES_MAX} bytes")
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ListenError(f"{path}: exists and is no socket; move it away or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        failed = probe.connect_ex(str(path))
    if failed != errno.ECONNREFUSED:
        why = os.strerror(failed) if failed else "somebody listens there"
        raise ListenError(f"{path}: is in use ({why}); stop the other process or name another path")
    path.unlink()


def _bind(made: socket.socket, path: Path) -> None:
    os.fchmod(made.fileno(), 0o600)  # the file never gets more than this from bind
    try:
        made.bind(str(path))
    except OSError as error:  # it carries no file name
        raise ListenError(f"{path}: {error.strerror}; its folder must exist") from error


def _set_rights(path: Path, mode: int) -> str:
    group = _folder_group(path)
    try:
        if path.stat().st_gid != group:
            os.chown(path, -1, group)
    except PermissionError:
        mode &= ~_GROUP
        path.chmod(mode)
        return f"mode {mode:04o}: not a member of its folder's group {group}"
    path.chmod(mode)
    return f"mode {mode:04o}, group {group}"


def _folder_group(path: Path) -> int:
    return path.parent.stat().st_gid
