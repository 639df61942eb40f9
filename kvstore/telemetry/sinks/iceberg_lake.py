"""A lake: an Iceberg catalog with the tables readings, dead_letters and quality_counts.

The only module that opens a catalog, and the border where errors of pyiceberg, of its database
and of the disk become ours. By default the catalog is an SQLite file in the lake's folder (one
host); a PostgreSQL or REST catalog serves several.

A table changes by ``swap`` only: the catalog's compare-and-set of which metadata is current. It
has three ends: done; LostRace (somebody else was first, nothing happened); CommitUnknown (no
answer: it may or may not have happened, and nothing written for it may be deleted).
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy
from pyiceberg.catalog import load_catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    TableAlreadyExistsError,
    ValidationException,
)
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.table import Transaction
from pyiceberg.table.update.snapshot import ExpireSnapshots
from pyiceberg.transforms import BucketTransform, DayTransform
from pyiceberg.types import DoubleType

from kvstore.errors import CommitUnknown, KvstoreError, SinkError
from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks.iceberg_files import make_durable_folder

if TYPE_CHECKING:
    import pyarrow as pa
    from pyiceberg.table.update.schema import UpdateSchema

    from kvstore.telemetry.contract import Contract

NAMESPACE: Final = "telemetry"
READINGS: Final = "readings"
DEAD_LETTERS: Final = "dead_letters"
COUNTS: Final = "quality_counts"
CATALOG_FILE: Final = "catalog.db"

BUCKETS: Final = 4  # files a commit writes for each day that it touches; see NOTES, Iceberg
SWAPS_MAX: Final = 20  # races lost in a row; each means that somebody else got on
SNAPSHOTS_MAX: Final = 400  # of the readings: an hour and more to look back, 10 s a commit
SIDE_SNAPSHOTS_MAX: Final = 40  # of the others, whose past only a rollback asks for
TRIM_SHARE: Final = 8  # some at a time
RACE_WAIT_S: Final = 0.02  # grows with each lost race
BUSY_S: Final = 30  # a writer of an SQLite catalog waits so long for another

_PROPERTIES: Final = {
    "format-version": "2",
    # Its own retry would append rows again that the winner of a race has already stored.
    "commit.retry.num-retries": "0",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}


class LostRace(Exception):
    """Somebody else changed the table first; nothing happened. Load it again and decide again."""


@dataclass(frozen=True, slots=True)
class Lake:
    """The opened catalog. location: as the user gave it, for messages."""

    catalog: Any
    location: str

    def table(self, name: str = READINGS) -> Any:
        """The table as it is now."""
        with translated(self.location):
            try:
                return self.catalog.load_table((NAMESPACE, name))
            except NoSuchTableError as error:
                raise SinkError(
                    f"{self.location} holds no table {NAMESPACE}.{name}: "
                    "is it a lake? `kvstore telemetry ingest … --lake` makes one"
                ) from error

    def close(self) -> None:
        """Let go of the catalog's connections."""
        self.catalog.close()


def open_lake(
    location: str,
    *,
    catalog: Mapping[str, str] | None = None,
    create: bool = False,
    contract: Contract | None = None,
    buckets: int = BUCKETS,
) -> Lake:
    """The lake at a folder or a URI (s3://…).

    catalog: pyiceberg's properties of another catalog, at least ``uri`` (postgresql://… or
    https://…, then REST). create: make what is missing. contract: its fields become columns of a
    new table.
    """
    with translated(location):
        lake = Lake(_catalog(location, catalog, create=create), location)
        if create:
            _make_tables(lake.catalog, contract, buckets)
        return lake


def _catalog(location: str, given: Mapping[str, str] | None, *, create: bool) -> Any:
    remote = "://" in location and not location.startswith("file:")
    path = Path(location.removeprefix("file://")).absolute()
    properties = {
        "warehouse": location if remote else path.as_uri(),
        "py-io-impl": "kvstore.telemetry.sinks.iceberg_files.SyncedFileIO",
        **(given or {}),
    }
    if create and not remote:
        make_durable_folder(str(path))
    if "uri" not in properties:
        properties["uri"] = f"sqlite:///{_catalog_file(path, remote=remote, create=create)}"
    kind = "rest" if properties["uri"].startswith(("http://", "https://")) else "sql"
    properties["uri"] = properties["uri"].replace("postgresql://", "postgresql+psycopg://")
    opened = load_catalog("kvstore", type=kind, **properties)
    if properties["uri"].startswith("sqlite:"):
        sqlalchemy.event.listen(opened.engine, "connect", _set_durable)
        opened.engine.dispose()  # what is connected already has SQLite's defaults
    return opened


def _catalog_file(path: Path, *, remote: bool, create: bool) -> Path:
    if remote:
        raise SinkError(f"{path}: a lake that is no local folder needs a catalog: give its uri")
    file = path / CATALOG_FILE
    if not create and not file.exists():
        raise SinkError(f"no lake at {path}: found no {CATALOG_FILE} there; check the path")
    return file


def _set_durable(connection: sqlite3.Connection, _record: Any) -> None:
    """FULL, and the unlinking of the journal synced as well: else a cut can undo a commit."""
    connection.execute("PRAGMA synchronous=EXTRA")
    connection.execute(f"PRAGMA busy_timeout={BUSY_S * 1000}")


def _make_tables(catalog: Any, contract: Contract | None, buckets: int) -> None:
    with contextlib.suppress(NamespaceAlreadyExistsError):
        catalog.create_namespace(NAMESPACE)
    schema = rows.readings_schema(contract)
    spec = PartitionSpec(
        PartitionField(schema.find_field(rows.TS).field_id, 1000, DayTransform(), "ts_day"),
        PartitionField(
            schema.find_field(rows.DEVICE).field_id, 1001, BucketTransform(buckets), "device_bucket"
        ),
    )
    for name, columns, partitioned in (
        (COUNTS, rows.COUNTS, PartitionSpec()),
        (DEAD_LETTERS, rows.LETTERS, PartitionSpec()),
        (READINGS, schema, spec),
    ):
        if not catalog.table_exists((NAMESPACE, name)):
            with contextlib.suppress(TableAlreadyExistsError):
                catalog.create_table(
                    (NAMESPACE, name), columns, partition_spec=partitioned, properties=_PROPERTIES
                )


def evolve(lake: Lake, contract: Contract) -> None:
    """Add the columns of the contract that the readings lack, as nullable ones."""
    for attempt in races():
        table = lake.table()
        check_types(table, contract)
        present = {field.name for field in table.schema().fields}
        if present.issuperset(name for name, _ in rows.value_columns(contract)):
            return
        transaction = Change(table)
        with translated(lake.location):
            update: UpdateSchema = transaction.update_schema()
            update.union_by_name(rows.readings_schema(contract)).commit()
        with raced(attempt):
            swap(transaction, lake.location)
            return


def check_types(table: Any, contract: Contract) -> None:
    """SinkError where a column is a number and its field of the contract text, or turned round."""
    words = {True: "a number", False: "text"}
    for name, kind in rows.value_columns(contract):
        found = table.schema().as_struct().field_by_name(name)
        if found is not None and found.field_type != kind:
            raise SinkError(
                f"the lake's column {name!r} is {words[found.field_type == DoubleType()]}, and "
                f"{words[kind == DoubleType()]} in the contract: give the field another name"
            )


# ---- changing a table ----

NO_ROOM: Final = (
    "no room on the disk; what was committed is intact: make room and start again, "
    "it goes on where the lake's positions stand"
)


def swap(transaction: Any, location: str) -> None:
    """Commit: the catalog's compare-and-set. LostRace or CommitUnknown where it is not done."""
    try:
        transaction.commit_transaction()
    except (CommitFailedException, ValidationException) as error:
        raise LostRace(str(error)) from error
    except Exception as error:
        what = NO_ROOM if is_full(error) else f"{type(error).__name__}: {error}"
        raise CommitUnknown(
            f"{location}: no answer to a commit ({what}); it may or may not be there: "
            "settle it before going on"
        ) from error


def trim(transaction: Change, most: int) -> None:
    """Let go of the oldest snapshots beyond so many, in the same commit; named ones stay.

    Each costs every commit 0.3 ms, as pyiceberg copies all. What they alone refer to is garbage
    for ``maintain``; rows are in the current one.
    """
    metadata = transaction.table_metadata
    if len(metadata.snapshots) <= most + most // TRIM_SHARE:
        return
    named = {ref.snapshot_id for ref in metadata.refs.values()}
    in_order = sorted(metadata.snapshots, key=lambda each: each.sequence_number)
    old = [each.snapshot_id for each in in_order[:-most] if each.snapshot_id not in named]
    ExpireSnapshots(transaction).by_ids(old).commit()


def races() -> Iterator[int]:
    """Numbers of attempts, with growing waits between them."""
    for attempt in range(SWAPS_MAX):
        if attempt:
            time.sleep(RACE_WAIT_S * attempt)
        yield attempt


@contextlib.contextmanager
def raced(attempt: int) -> Iterator[None]:
    """Swallow a lost race, but for the last one."""
    try:
        yield
    except LostRace as error:
        if attempt == SWAPS_MAX - 1:
            raise SinkError(
                f"lost {SWAPS_MAX} races in a row for the lake's table ({error}); nothing was "
                "kept: let fewer processes write to it, or make larger commits"
            ) from error


@contextlib.contextmanager
def translated(location: str, *, missing: type[Exception] = SinkError) -> Iterator[None]:
    """Errors of the libraries below as ours.

    missing: for a file that is not there: LostRace where the table may have been compacted since
    it was loaded, so that loading it again helps.
    """
    try:
        yield
    except (KvstoreError, LostRace):
        raise
    except FileNotFoundError as error:
        raise missing(f"{location}: a file of the lake is missing: {error}") from error
    except Exception as error:
        if is_full(error):
            raise SinkError(f"{location}: {NO_ROOM}") from error
        raise SinkError(f"{location}: {type(error).__name__}: {error}") from error


def is_full(error: Exception) -> bool:
    """Whether that says that a disk is full: of files, or of the SQLite catalog."""
    number = getattr(error, "errno", None)
    return number in {errno.ENOSPC, errno.EDQUOT} or "disk is full" in str(error)


class Change(Transaction):  # type: ignore[misc]
    """A transaction that works its table's metadata out once for each of its steps.

    pyiceberg copies all snapshots each time that it looks, twenty times a commit: 2 ms a look for
    ten snapshots, and so much more for a thousand.
    """

    _seen: tuple[Any, Any] | None = None

    @property
    def table_metadata(self) -> Any:
        """The metadata as they will be."""
        if self._seen is None or self._seen[0] is not self._updates:
            self._seen = self._updates, super().table_metadata
        return self._seen[1]


# ---- reading ----


def scan(table: Any, tasks: Sequence[Any], columns: Sequence[str], where: Any = None) -> pa.Table:
    """Columns of some of the table's files, as rows that match; evolution and deletes applied."""
    schema = table.schema().select(*columns)
    made = ArrowScan(
        table.metadata,
        table.io,
        schema,
        AlwaysTrue() if where is None else where,
    )
    return made.to_table(tasks)
