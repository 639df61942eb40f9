"""Tell systemd how a service is: the datagrams of sd_notify(3), written by hand.

``READY=1`` once it serves, ``WATCHDOG=1`` while it is alive, ``STATUS=`` for people,
``STOPPING=1`` at the end. Where systemd did not start the process (no NOTIFY_SOCKET), and where
a message cannot be sent, nothing happens: telling is never a reason to fail.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

from kvstore.errors import KvstoreError


class Notifier:
    """The way to systemd. Abstract socket names (``@…``) are understood."""

    def __init__(self, environ: Mapping[str, str] = os.environ):
        name = environ.get("NOTIFY_SOCKET", "")
        if name and name[0] not in "/@":
            raise KvstoreError(
                f"NOTIFY_SOCKET={name!r}: a path or @name is expected, as systemd sets it; "
                "unset it to run without systemd"
            )
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self.watchdog_s = _watchdog_s(environ)

    def send(self, *messages: str) -> None:
        """Send assignments such as ``READY=1`` in one datagram; each is one line."""
        if not self._address:
            return
        text = "\n".join(message.replace("\n", " ") for message in messages)
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
        ):
            sender.setblocking(False)  # a systemd that hangs must not hang the service
            sender.sendto(text.encode(), self._address)


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """WatchdogSec= of the unit, where it is meant for this process."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    limit_s = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    return limit_s or None
