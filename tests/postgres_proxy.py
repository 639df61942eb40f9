"""A proxy in front of PostgreSQL that cuts the connection at a COMMIT. Not a test module.

It forwards bytes between Unix sockets; once armed, the first piece from a client that holds
``COMMIT`` is forwarded or not, and then both ends are closed: the client never learns which.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

Cut = Literal["before", "after", "at once"]
SOCKET = ".s.PGSQL.5432"


class Proxy:
    """cut: what happens at the next COMMIT. before: it is not forwarded; after: it is, and its
    answer awaited and thrown away; at once: it is, and nothing awaited."""

    def __init__(self, url: str, folder: Path):
        self.cut: Cut | None = None
        self.cuts = 0
        self.url = f"postgresql://postgres@{urlsplit(url).path}?host={folder}"
        self._target = f"{parse_qs(urlsplit(url).query)['host'][0]}/{SOCKET}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / SOCKET))
        self._listener.listen()
        self._threads: list[threading.Thread] = []

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._carry, args=[client], daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
            self._listener.close()

    def _carry(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._target)
        with client, server:
            while True:
                ready, _, _ = select.select([client, server], [], [])
                if server in ready:
                    piece = server.recv(1 << 16)
                    if not piece:
                        return
                    client.sendall(piece)
                if client in ready:
                    piece = client.recv(1 << 16)
                    if not piece:
                        return
                    if self.cut and b"COMMIT\0" in piece:
                        self._cut(server, piece)
                        return
                    server.sendall(piece)

    def _cut(self, server: socket.socket, piece: bytes) -> None:
        cut, self.cut = self.cut, None
        self.cuts += 1
        if cut != "before":
            server.sendall(piece)
        if cut == "after":
            assert server.recv(1 << 16)


@contextmanager
def proxy(url: str, folder: Path) -> Iterator[Proxy]:
    """One in front of the server of that URL; folder: a short path of its own."""
    made = Proxy(url, folder)
    thread = threading.Thread(target=made.serve, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.close()
        thread.join(30)
