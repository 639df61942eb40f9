"""Fixtures: a real PostgreSQL, the one that KVSTORE_TEST_POSTGRES names, else a private one.

Without either, tests skip on a laptop and fail in CI.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from urllib.parse import quote, urlencode

import pytest
from stores import MEMORY

from bench.postgres import binaries, server

PASSWORD = "hunter2-and-more"  # of the role `locked`, to see that it is shown nowhere
HBA = "local all locked scram-sha-256\nlocal all all trust\n"
# Two workers of pytest have two servers on one machine, and their data in memory.
SMALL = {"shared_buffers": "128MB", "max_wal_size": "256MB"}


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
    with server(bin_path, MEMORY, SMALL, HBA) as url:
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
    user, name = (quote(str(parts.pop(key, ""))) for key in ("user", "dbname"))
    return f"postgresql://{user}@/{name}?{urlencode({k: str(v) for k, v in parts.items()})}"
