"""The tables of the PostgreSQL sink: made, grown with the contract, divided by days, thinned out.

The words are in postgres.sql. Every change of them happens in a transaction of its own, under
one advisory lock, after a look whether it is needed at all: a role without the right to change
tables can still write. All of it is harmless to do twice.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import partial
from importlib import resources
from typing import Final, LiteralString, NamedTuple

from psycopg import sql

from kvstore.errors import SinkError
from kvstore.telemetry.contract import Contract, ContractField
from kvstore.telemetry.sinks.postgres.session import Connection, Micros, Session, literal, named

DAY_US: Final = 86_400_000_000

# Days of this century have partitions of their own. Devices that lost their clock say 1970 or 0001:
# one partition holds all before, one all after, so that their number is bounded.
FIRST_DAY: Final = 10_957  # 2000-01-01, in days since 1970
STOP_DAY: Final = 47_482  # 2100-01-01

# Days that one commit may touch: each takes three locks of the server's 6,400 (64 a connection).
DAYS_MAX: Final = 500
# Partitions made in one transaction, for the same reason.
DAYS_AT_ONCE: Final = 50

# PostgreSQL cuts names at 63 bytes without a word; the rollup's columns append four.
NAME_BYTES_MAX: Final = 59
TAKEN: Final = {"device_id", "ts", "extras"} | {
    "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"  # PostgreSQL's own
}  # fmt: skip

_TYPES: Final[dict[bool, LiteralString]] = {True: "double precision", False: 'text COLLATE "C"'}
_BOUNDS: Final = re.compile(r"FROM \('?(.+?)'?\) TO \('?(.+?)'?\)")


class Span(NamedTuple):
    """A part of the readings: start_us <= ts < stop_us, None for no end; and the table of it."""

    start_us: int | None
    stop_us: int | None
    name: str


class Tables:
    """The tables of one schema, and what is known of them until ``look`` is called again."""

    def __init__(self, session: Session, schema: str):
        self._session = session
        self._schema = schema
        self._parts = _parts()
        self._days: set[int] = set()
        self.hypertable = False
        self.columns: dict[str, str] = {}  # those of the contract: name -> type

    def query(self, text: str, **parts: sql.Composable) -> sql.Composed:
        """A text of ours with {schema} and the other names filled in, to be given parameters."""
        schema = named(self._schema)
        return sql.SQL(text).format(schema=schema, **parts)

    def table(self, name: str) -> sql.SQL:
        """A table's full name, quoted."""
        return named(self._schema, name)

    def regclass(self, table: str) -> str:
        """A table's full name as text for regclass."""
        return sql.Identifier(self._schema, table).as_string(None)

    # ---- made and grown ----

    def open(self, *, create: bool) -> None:
        """Look at what is there; make what is not, or say so."""
        if not self.exist():
            if not create:
                raise SinkError(
                    f"{self._session.shown}: there is no telemetry in the schema {self._schema!r}; "
                    "ingest into it first, or name another one as ?schema=NAME"
                )
            self._change(self._create)
        self.look()

    def exist(self) -> bool:
        """Whether they were made."""
        return self._session.run(self._exist)

    def look(self) -> None:
        """Learn columns and days afresh."""
        self.columns = self._session.run(self._found_columns)
        ((kind,),) = self._session.read(
            "SELECT relkind::text FROM pg_class WHERE oid = %s::regclass", [self._readings]
        )
        self.hypertable = kind == "r"
        self._days = set() if self.hypertable else {_day_of(s) for s in self._partitions()}

    def evolve(self, contract: Contract) -> None:
        """Add a nullable column for each field that has none; columns are never taken away."""
        missing = self.missing(contract)
        ((view,),) = self._session.read("SELECT to_regclass(%s)", [self.regclass("latest")])
        if missing or view is None:
            self._change(lambda connection: self._grow(connection, missing))
            self.look()

    def missing(self, contract: Contract) -> list[ContractField]:
        """Fields that have no column yet; raises SinkError for one that cannot have one."""
        return [field for field in contract.values if not self._has(field)]

    def are_as_known(self, connection: Connection) -> bool:
        """Whether the columns are those known; they stay so until the end of the transaction.

        Locks out who alters the table, not who reads or writes.
        """
        connection.execute(
            self.query("LOCK TABLE ONLY {schema}.readings IN ROW EXCLUSIVE MODE"), ()
        )
        return self._found_columns(connection) == self.columns

    def stage(self, connection: Connection) -> sql.SQL:
        """The session's own table for readings that may be there already; made where missing."""
        columns = "\0".join(self.columns).encode("utf-8", "surrogatepass")
        name = f"staged_{zlib.crc32(columns):08x}"
        connection.execute(self.query(self._parts["staged"], staged=named(name)), ())
        return named("pg_temp", name)

    # ---- divided by days ----

    def make_days(self, times_us: Iterable[int]) -> None:
        """Have a partition for each time; TimescaleDB makes its chunks itself."""
        days = {min(max(us // DAY_US, FIRST_DAY - 1), STOP_DAY) for us in times_us}
        if len(days) > DAYS_MAX:
            raise SinkError(
                f"readings of one commit lie on {len(days)} days, expected are {DAYS_MAX} at most: "
                "make batches smaller (fewer than that many events always pass), or limit their age"
            )
        missing = sorted(days - self._days)
        if self.hypertable or not missing:
            return
        for first in range(0, len(missing), DAYS_AT_ONCE):
            some = missing[first : first + DAYS_AT_ONCE]
            self._change(partial(self._make_days, days=some))
        self._days |= set(missing)

    def spans(self) -> list[Span]:
        """The parts of the readings in order of time."""
        return self._chunks() if self.hypertable else self._partitions()

    def drop_before(self, before_us: int) -> list[str]:
        """Drop whole days (chunks) that end at or before that time; gives their names.

        A reading of such a day that is sent again later is stored again: nothing knows of it.
        """
        going = [s for s in self.spans() if s.stop_us is not None and s.stop_us <= before_us]
        if self.hypertable and going:
            self._change(lambda connection: self._drop_chunks(connection, before_us))
        elif going:
            for span in going:  # one by one: each locks readers out for a moment
                self._change(partial(self._drop_partition, name=span.name))
        self.look()
        return [span.name for span in going]

    # ---- inside ----

    @property
    def _readings(self) -> str:
        return self.regclass("readings")

    def _change(self, act: Callable[[Connection], object]) -> None:
        """Change tables, one worker at a time."""

        def alone(connection: Connection) -> None:
            connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"kvstore {self._schema}"]
            )
            act(connection)

        self._session.run(alone)

    def _exist(self, connection: Connection) -> bool:
        # Not to_regclass: it answers from the session's cache and takes no lock that would bring
        # that up to date, so that whoever waited for another's tables made them again.
        found = connection.execute(
            "SELECT FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
            "WHERE nspname = %s AND relname = 'commits'",
            [self._schema],
        )
        return found.fetchone() is not None

    def _create(self, connection: Connection) -> None:
        if self._exist(connection):
            return
        extension = self._extension(connection)
        divided = sql.SQL("" if extension else "PARTITION BY RANGE (ts)")
        connection.execute(self.query(self._parts["tables"], divided=divided), ())
        if extension:
            readings = literal(self._readings)
            text = self._parts["hypertable"]
            connection.execute(self.query(text, extension=extension, readings=readings), ())

    def _extension(self, connection: Connection) -> sql.SQL | None:
        """The schema that TimescaleDB's functions are in, where the database has it."""
        row = connection.execute(
            "SELECT nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace "
            "WHERE extname = 'timescaledb'"
        ).fetchone()
        return named(row[0]) if row else None

    def _found_columns(self, connection: Connection) -> dict[str, str]:
        rows = connection.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            [self._readings],
        )
        return {name: kind for name, kind in rows if name not in TAKEN and name[0] != "_"}

    def _has(self, field: ContractField) -> bool:
        """Whether there is a column for it; raises where there cannot be one."""
        name, wanted = field.name, _TYPES[field.is_number].partition(" COLLATE")[0]
        length = len(name.encode("utf-8", "surrogatepass"))
        if name in TAKEN or name[:1] in ("", "_") or length > NAME_BYTES_MAX or "\0" in name:
            raise SinkError(
                f"a column for the field {name!r} cannot be made: names have 1 to {NAME_BYTES_MAX} "
                f"bytes, begin with no _, and are not among {', '.join(sorted(TAKEN))}"
            )
        found = self.columns.get(name, wanted)
        if found != wanted:
            raise SinkError(
                f"the column {name!r} is of type {found}, the contract expects {wanted}; give the "
                "field another name, or the sink another schema"
            )
        return name in self.columns

    def _grow(self, connection: Connection, fields: Sequence[ContractField]) -> None:
        for field in fields:
            connection.execute(
                self.query(
                    "ALTER TABLE {schema}.readings ADD COLUMN IF NOT EXISTS {name} {type}",
                    name=named(field.name),
                    type=sql.SQL(_TYPES[field.is_number]),
                ),
                (),
            )
            remark = f"{field.description} [{field.unit or '1'}]".strip()
            connection.execute(
                self.query(
                    "COMMENT ON COLUMN {schema}.readings.{name} IS {remark}",
                    name=named(field.name),
                    remark=literal(remark.replace("\0", "")),
                ),
                (),
            )
        columns = self._found_columns(connection)
        numbers = [name for name, kind in columns.items() if kind != "text"]
        rollups = sql.SQL("").join(_rolled_up(name) for name in numbers)
        connection.execute(self.query(self._parts["views"], rollups=rollups), ())

    def _make_days(self, connection: Connection, days: Sequence[int]) -> None:
        there = {_day_of(span) for span in self._partitions_in(connection)}
        for day in days:
            if day not in there:
                name, start, stop = _bounds(day)
                connection.execute(
                    self.query(self._parts["day"], day=named(name), start=start, stop=stop),
                    (),
                )

    def _drop_chunks(self, connection: Connection, before_us: int) -> None:
        extension = self._extension(connection)
        assert extension is not None, "a hypertable without its extension"
        query = self.query("SELECT {e}.drop_chunks(%s::regclass, %s::timestamptz)", e=extension)
        connection.execute(query, [self._readings, Micros(before_us)])

    def _drop_partition(self, connection: Connection, name: str) -> None:
        connection.execute(self.query("DROP TABLE IF EXISTS {table}", table=self.table(name)), ())

    def _partitions(self) -> list[Span]:
        return self._session.run(self._partitions_in)

    def _partitions_in(self, connection: Connection) -> list[Span]:
        rows = connection.execute(
            "SELECT relname, pg_get_expr(relpartbound, c.oid) FROM pg_inherits i "
            "JOIN pg_class c ON c.oid = i.inhrelid WHERE inhparent = %s::regclass",
            [self._readings],
        ).fetchall()
        spans = [Span(*_bounds_found(bounds), name) for name, bounds in rows]
        return sorted(spans, key=lambda s: (s.start_us is not None, s.start_us or 0))

    def _chunks(self) -> list[Span]:
        rows = self._session.read(
            "SELECT range_start, range_end, chunk_name::text FROM timescaledb_information.chunks "
            "WHERE hypertable_schema = %s AND hypertable_name = 'readings' ORDER BY range_start",
            [self._schema],
        )
        return [Span(*row) for row in rows]


def _parts() -> dict[str, str]:
    """postgres.sql by the names of its parts."""
    text = resources.files("kvstore.telemetry.sinks").joinpath("postgres.sql").read_text("utf-8")
    parts = text.split("\n-- ## ")[1:]
    return {name.strip(): body for name, _, body in (part.partition("\n") for part in parts)}


def _rolled_up(name: str) -> sql.Composed:
    column = named(name)
    parts = [
        sql.SQL(", {f}({column}) AS {name}").format(
            f=sql.SQL(f), column=column, name=named(f"{name}_{f}")
        )
        for f in ("avg", "min", "max")
    ]
    return sql.SQL("").join(parts)


def _bounds(day: int) -> tuple[str, sql.Composable, sql.Composable]:
    """A day's partition: its name, and where it starts and stops."""
    if day < FIRST_DAY:
        return "readings_before_2000", sql.SQL("MINVALUE"), _midnight(FIRST_DAY)
    if day >= STOP_DAY:
        return "readings_from_2100", _midnight(STOP_DAY), sql.SQL("MAXVALUE")
    return f"readings_{_date(day):%Y%m%d}", _midnight(day), _midnight(day + 1)


def _date(day: int) -> date:
    return date(1970, 1, 1) + timedelta(days=day)


def _midnight(day: int) -> sql.SQL:
    return literal(f"{_date(day).isoformat()} 00:00:00+00")


def _bounds_found(text: str) -> tuple[int | None, int | None]:
    """The bounds that PostgreSQL prints of a partition, as microseconds."""
    found = _BOUNDS.search(text)
    if found is None:
        raise SinkError(f"readings has a partition {text!r}, expected FROM … TO …; detach it")
    return _bound_us(found[1]), _bound_us(found[2])


def _bound_us(text: str) -> int | None:
    if text in {"MINVALUE", "MAXVALUE"}:
        return None
    moment = datetime.fromisoformat(text).astimezone(UTC)
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))


def _day_of(span: Span) -> int:
    """The day, as ``make_days`` counts them, that a partition of ours is for."""
    return FIRST_DAY - 1 if span.start_us is None else span.start_us // DAY_US
