"""What would keep the sink from working, found without changing anything."""

from __future__ import annotations

from typing import Final, LiteralString

from kvstore.errors import SinkError
from kvstore.telemetry.contract import Contract
from kvstore.telemetry.sinks.postgres.session import Session, address
from kvstore.telemetry.sinks.postgres.sink import SCHEMA
from kvstore.telemetry.sinks.postgres.tables import Tables

_WRITTEN: Final = ("readings", "dead_letters", "counts", "places", "commits", "lineages")
_RIGHTS: Final = "SELECT, INSERT, UPDATE, DELETE"


def preflight(url: str, contract: Contract) -> list[str]:
    """What is wrong, in words; an empty list if nothing is."""
    try:
        at = address(url)
        session = Session(at, "kvstore telemetry check")
    except SinkError as error:
        return [str(error)]
    try:
        with session.translating():
            _ = session.connection
        tables = Tables(session, at.schema or SCHEMA)
        return [*_of_server(session), *_of_tables(session, tables, contract)]
    except SinkError as error:
        return [str(error)]
    finally:
        session.close()


def _of_server(session: Session) -> list[str]:
    found = []
    ((fsync, pages, replica),) = session.read(
        "SELECT current_setting('fsync'), current_setting('full_page_writes'), pg_is_in_recovery()"
    )
    if fsync != "on" or pages != "on":
        found.append(
            f"{session.shown}: fsync is {fsync}, full_page_writes is {pages}: a power cut may take "
            "what was committed; set both to on"
        )
    if replica:
        found.append(
            f"{session.shown}: this server is a replica: it takes no writes; name the primary"
        )
    return found


def _of_tables(session: Session, tables: Tables, contract: Contract) -> list[str]:
    if not tables.exist():
        query: LiteralString = "SELECT has_database_privilege(current_database(), 'CREATE')"
        ((may,),) = session.read(query)
        return (
            [] if may else [f"{session.shown}: no right to make a schema; GRANT CREATE ON DATABASE"]
        )
    tables.look()
    query = (
        "SELECT has_table_privilege(%s::regclass, right_name) FROM unnest(%s::text[]) right_name"
    )
    found = []
    for name in _WRITTEN:
        rights = _RIGHTS.split(", ")
        answers = session.read(query, [tables.regclass(name), rights])
        missing = [right for right, (may,) in zip(rights, answers, strict=True) if not may]
        if missing:
            found.append(f"{session.shown}: no right to {', '.join(missing)} on {name}; GRANT it")
    return [*found, *_of_columns(session, tables, contract)]


def _of_columns(session: Session, tables: Tables, contract: Contract) -> list[str]:
    missing = tables.missing(contract)
    query = "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = %s::regclass"
    ((owner,),) = session.read(query, [tables.regclass("readings")])
    if missing and not owner:
        names = ", ".join(field.name for field in missing)
        return [f"{session.shown}: readings lacks {names}, and only its owner can add columns"]
    return []
