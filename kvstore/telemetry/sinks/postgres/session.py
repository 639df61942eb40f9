"""A session with PostgreSQL: connected, lost and made again; one transaction at a time; its errors.

What the rest relies on:

- ``run`` carries an act out in one transaction, and again where the server undid it for the sake
  of another (deadlock, serialization, lock timeout) or the connection broke before COMMIT was
  sent: within ATTEMPTS_MAX and TRY_S. So an act touches nothing but the database.
- Where the connection breaks while COMMIT is under way, CommitUnknown is raised, unless doing the
  act twice is harmless.
- Times are int64 microseconds since 1970 both ways, exact over the whole range: a datetime ends at
  9999, a float loses microseconds.
- No password in any message: the address is shown without one, and libpq's words are searched.
"""

from __future__ import annotations

import random
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, LiteralString, NamedTuple, TypeAlias, TypeVar
from urllib.parse import unquote

import psycopg
from psycopg import errors, sql
from psycopg.adapt import Buffer, Dumper, Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Format, TransactionStatus
from psycopg.rows import TupleRow

from kvstore.errors import CommitUnknown, KvstoreError, SinkError
from kvstore.telemetry.sinks.postgres.binary import EPOCH_US, TS_US_MIN

T = TypeVar("T")
Connection: TypeAlias = psycopg.Connection[TupleRow]
Query: TypeAlias = LiteralString | sql.SQL | sql.Composed

VERSION_MIN: Final = 140_000  # date_bin

# Tries of one transaction, and for how long. Short: who calls knows how long to go on (the pipeline
# does for minutes, and looks at signals meanwhile); this is for what is over in a moment.
ATTEMPTS_MAX: Final = 10
TRY_S: Final = 15.0
PAUSE_S_MAX: Final = 2.0

# For a lock that another session holds. Workers hold theirs for one commit, about a second; a
# claim then goes on by ending the other's session, see places.py.
LOCK_WAIT_S: Final = 5.0
# A worker that stands still between two statements loses its session, and its locks with it.
IDLE_IN_TRANSACTION_S: Final = 60.0
CONNECT_S: Final = 10
# A peer that is gone without a word (power, network) is noticed after this, not after two hours.
DEAD_PEER_S: Final = 30

_SETTINGS: Final = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "client_encoding": "UTF8",
    "default_transaction_isolation": "read committed",  # each look sees what was committed since
    "lock_timeout": f"{LOCK_WAIT_S * 1000:.0f}",
    "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_S * 1000:.0f}",
    "client_min_messages": "warning",
    "jit": "off",  # compiling a join takes longer than the join
}

_UNDONE: Final = (errors.SerializationFailure, errors.DeadlockDetected, errors.LockNotAvailable)


_SCHEMA: Final = re.compile(r"([?&])schema=([^&]*)")


class Address(NamedTuple):
    """Where the server is: what libpq is given, and what people are shown. schema: if named."""

    parameters: dict[str, Any]
    shown: str
    password: str
    schema: str | None


def named(*parts: str) -> sql.SQL:
    """A name in quotes, for queries that are executed with parameters, if only with ().

    Those take each % for a placeholder, and psycopg does not double one in a name.
    """
    return sql.SQL(sql.Identifier(*parts).as_string(None).replace("%", "%%"))


def literal(text: str) -> sql.SQL:
    """A text in quotes, for the same queries."""
    return sql.SQL(sql.Literal(text).as_string(None).replace("%", "%%"))


class Micros:
    """A time as a parameter: microseconds since 1970."""

    __slots__ = ("us",)

    def __init__(self, us: int):
        self.us = us


class _MicrosDumper(Dumper):
    format = Format.BINARY
    oid = psycopg.adapters.types["timestamptz"].oid

    def dump(self, obj: Micros) -> bytes:
        if not TS_US_MIN <= obj.us < 2**63:
            raise SinkError(f"{obj.us} µs from 1970 is no time that PostgreSQL holds")
        return struct.pack(">q", obj.us - EPOCH_US)


class _MicrosLoader(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> int:
        return int.from_bytes(data, "big", signed=True) + EPOCH_US


class Session:
    """One connection at a time to one database. worker: its application_name, for who looks."""

    def __init__(self, at: Address, worker: str):
        self._address = at
        self.worker = worker
        self._connection: Connection | None = None

    @property
    def shown(self) -> str:
        """The address, without a password."""
        return self._address.shown

    @property
    def connection(self) -> Connection:
        """The connection, outside of any transaction; made where there is none."""
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        return self._connection

    def close(self) -> None:
        """End the session; what it had not committed is undone."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def run(self, act: Callable[[Connection], T], *, twice: bool = True) -> T:
        """Carry the act out in one transaction. twice: whether doing it again is harmless."""
        deadline = time.monotonic() + TRY_S
        for attempt in range(1, ATTEMPTS_MAX + 1):
            try:
                return self._once(act, twice=twice)
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                if not self._passing(error):
                    raise self.translated(error) from error
                pause_s = min(PAUSE_S_MAX, 0.02 * 2**attempt) * random.uniform(0.5, 1)  # noqa: S311
                if attempt == ATTEMPTS_MAX or time.monotonic() + pause_s > deadline:
                    raise self.translated(error) from error
                time.sleep(pause_s)
            except psycopg.Error as error:
                raise self.translated(error) from error
        raise AssertionError("unreachable")

    def read(self, query: Query, parameters: Sequence[object] = ()) -> list[TupleRow]:
        """All rows of a query, in a transaction of its own."""
        return self.run(lambda c: c.execute(query, parameters, binary=True).fetchall())

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Errors of psycopg leave as ours."""
        try:
            yield
        except psycopg.Error as error:
            raise self.translated(error) from error

    def translated(self, error: Exception) -> KvstoreError:
        """What it means, in our words, and what to do."""
        return SinkError(f"{self.shown}: {self._clean(str(error))}; {_remedy(error)}")

    def end_sessions(self, workers: Sequence[str]) -> int:
        """End other sessions of these workers: who stands still keeps no locks. Gives how many."""
        query: LiteralString = (
            "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = ANY(%s) AND pid <> pg_backend_pid()"
        )
        ((count,),) = self.read(query, [list(workers)])
        return int(count)

    # ---- inside ----

    def _once(self, act: Callable[[Connection], T], *, twice: bool) -> T:
        connection = self.connection
        connection.execute("BEGIN", prepare=False)
        try:
            result = act(connection)
        except BaseException:
            self._undo(connection)
            raise
        try:
            connection.execute("COMMIT", prepare=False)
        except psycopg.Error as error:
            if twice or not _lost(connection):
                self._undo(connection)
                raise
            raise CommitUnknown(
                f"{self.shown}: the connection was lost during COMMIT; it may have happened or "
                f"not: settle before going on ({self._clean(str(error))})"
            ) from error
        return result

    def _undo(self, connection: Connection) -> None:
        """Back to where no transaction is open; a connection in any other state is given up."""
        try:
            if not _lost(connection):
                connection.execute("ROLLBACK", prepare=False)
        except psycopg.Error:
            pass
        if _lost(connection) or connection.info.transaction_status != TransactionStatus.IDLE:
            self.close()

    def _passing(self, error: Exception) -> bool:
        """Whether trying again may help: nothing was kept, and it was not our doing."""
        if isinstance(error, _UNDONE):
            return True
        refused = ("28", "3D", "42")  # authorization, no such database, no right to
        return self._connection is None and not (getattr(error, "sqlstate", None) or "").startswith(
            refused
        )

    def _connect(self) -> Connection:
        parameters = {
            "connect_timeout": CONNECT_S,
            "keepalives_idle": DEAD_PEER_S,
            "tcp_user_timeout": DEAD_PEER_S * 1000,
            **self._address.parameters,
            "application_name": self.worker,
        }
        connection = psycopg.connect(make_conninfo(**parameters), autocommit=True)
        try:
            self._configure(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _configure(self, connection: Connection) -> None:
        connection.adapters.register_dumper(Micros, _MicrosDumper)
        connection.adapters.register_loader("timestamptz", _MicrosLoader)
        # Committed means durable, whatever the server's or the role's default is.
        connection.execute(
            "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) "
            "AS given(name, value) UNION ALL SELECT set_config('synchronous_commit', 'on', false) "
            "WHERE current_setting('synchronous_commit') = 'off'",
            [list(_SETTINGS), list(_SETTINGS.values())],
        )
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise SinkError(
                f"{self.shown}: the database's encoding is {encoding}, expected UTF8; make one "
                "with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
            )
        if connection.info.server_version < VERSION_MIN:
            raise SinkError(
                f"{self.shown}: PostgreSQL {connection.info.server_version // 10000} was found, "
                f"{VERSION_MIN // 10000} or later is expected"
            )

    def _clean(self, text: str) -> str:
        """One line without the password."""
        line = " ".join(text.split())
        password = self._address.password
        return line.replace(password, "***") if password else line


def address(url: str) -> Address:
    """Read a postgresql:// URL, which may have our own parameter ``schema`` behind its ?.

    Never shows what it cannot read, as a password may be in it.
    """
    expected = (
        "expected postgresql://user@host:port/database; a password is best given as PGPASSWORD"
    )
    if not url.startswith(("postgresql://", "postgres://")):
        raise SinkError(f"this is no address of a PostgreSQL database; {expected}")
    authority = url.partition("://")[2].partition("/")[0].partition("?")[0]
    if authority.count("@") > 1:
        raise SinkError(
            f"the address has more than one @ before the database's name; {expected}, with @ "
            "written as %40 where it is part of a name or password"
        )
    found = _SCHEMA.search(url)
    try:
        parameters = conninfo_to_dict(_SCHEMA.sub(r"\1", url).replace("?&", "?"))
    except psycopg.Error:
        raise SinkError(
            f"the address of the PostgreSQL database cannot be read; {expected}"
        ) from None
    host, port = parameters.get("host") or "", parameters.get("port")
    shown = f"postgresql://{host}{f':{port}' if port else ''}/{parameters.get('dbname') or ''}"
    schema = unquote(found[2]) if found else None
    return Address(dict(parameters), shown, str(parameters.get("password") or ""), schema)


def storable(text: str) -> str:
    """A text that PostgreSQL can hold: U+FFFD for what it cannot."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _lost(connection: Connection) -> bool:
    return connection.closed or connection.info.status != psycopg.pq.ConnStatus.OK


# By the beginning of the SQLSTATE, the longest first.
_REMEDIES: Final = {
    "53100": "its disk is full: nothing of this was kept; make room, then go on",
    "42501": "grant the role what postgres.sql names at its head",
    "53": "the server is short of something; raise its limit or use smaller batches",
    "28": "check user and password (PGPASSWORD)",
    "3D": "check the name of the database",
    "55P03": f"waited {LOCK_WAIT_S:.0f} s several times; pg_stat_activity shows who holds the lock",
    "08": "see that the server runs and can be reached",
    "57P": "see that the server runs and can be reached",
}


def _remedy(error: Exception) -> str:
    state = getattr(error, "sqlstate", None) or ""
    for beginning, remedy in _REMEDIES.items():
        if state.startswith(beginning):
            return remedy
    if isinstance(error, psycopg.OperationalError) and not state:
        return "see that the server runs, can be reached, and knows user and password (PGPASSWORD)"
    return "nothing of this transaction was kept"
