"""Lakes for tests: in memory where the disk is not what is tested. Not a test module."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import telemetry_data as data

from kvstore.telemetry.records import Work
from kvstore.telemetry.sinks.iceberg import IcebergSink
from kvstore.telemetry.sinks.iceberg_lake import READINGS, Lake, open_lake


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="kvstore-lake-", dir=shm if shm.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def fresh_lake():
    """As telemetry_model.Fresh wants it."""
    with scratch() as folder:
        yield lambda contract: IcebergSink.open(str(folder / "lake"), contract)


def opened(path: Path, contract=data.BRIEF) -> IcebergSink:
    sink = IcebergSink.open(str(path), contract)
    sink.evolve(contract)
    return sink


def lake_at(path: Path) -> Lake:
    return open_lake(str(path))


def first_work(sink: IcebergSink, rows=(), rejections=(), place=data.PLACE) -> Work:
    return data.work(sink.claim([place]), rows, rejections)


def data_files(path: Path, table: str = READINGS) -> set[Path]:
    """Data files in the folder, wanted or not."""
    return set((path / "telemetry" / table / "data").rglob("*.parquet"))
