"""What would keep a lake from being written, found without changing anything."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.errors import KvstoreError
from kvstore.telemetry.sinks import iceberg_rows as rows
from kvstore.telemetry.sinks.iceberg_commit import loaded
from kvstore.telemetry.sinks.iceberg_lake import CATALOG_FILE, check_types, open_lake

if TYPE_CHECKING:
    from kvstore.telemetry.contract import Contract

FREE_BYTES_MIN: Final = 500_000_000  # a few commits of full batches, and a compaction


def preflight(
    location: str, contract: Contract, catalog: Mapping[str, str] | None = None
) -> list[str]:
    """What is wrong, each with what to do; nothing where all is well."""
    return list(_faults(location, contract, catalog))


def _faults(location: str, contract: Contract, catalog: Mapping[str, str] | None) -> Iterator[str]:
    try:
        rows.value_columns(contract)
        is_local = "://" not in location or location.startswith("file:")
        if is_local:
            yield from _folder_faults(Path(location.removeprefix("file://")).absolute())
        if is_local and not catalog and not (Path(location) / CATALOG_FILE).exists():
            return  # it will be made
        lake = open_lake(location, catalog=catalog)
        try:
            table, _ = loaded(lake)
            check_types(table, contract)
        finally:
            lake.close()
    except KvstoreError as error:
        yield str(error)


def _folder_faults(path: Path) -> Iterator[str]:
    folder = path
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        yield f"{folder}: is a file; expected a folder for the lake"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield f"{folder}: cannot be written by this user; expected write permission"
    elif (free := shutil.disk_usage(folder).free) < FREE_BYTES_MIN:
        yield f"{folder}: {free:,} bytes free on its disk; expected {FREE_BYTES_MIN:,} or more"
