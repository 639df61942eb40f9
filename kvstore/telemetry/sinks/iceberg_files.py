"""Files of a lake on a local disk: durable, with their folders, when their ``close`` returns.

pyiceberg syncs nothing: after a power cut its catalog can point at metadata, manifests and data
files that are empty. This FileIO syncs each file as it is closed, and every folder that got a new
name. Files are closed before the catalog is told of them, so that what a catalog points at is
there. Other schemes (s3, gs, …) are durable at close by themselves, and pass through.

Sync at close, rather than all files at once before the swap: pyiceberg writes the last of them,
the table's metadata, inside the call that swaps.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Final

from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

BUFFER_BYTES: Final = 1 << 20  # Parquet pages come in pieces of some KB

# Folders whose names are known to be durable. A lake has one a partition: a few thousand strings.
_DURABLE_MAX: Final = 100_000
_durable: set[str] = set()


class SyncedFileIO(PyArrowFileIO):  # type: ignore[misc]
    """pyiceberg's own, but that local files are synced."""

    def new_output(self, location: str) -> Any:
        """A file to write."""
        scheme, netloc, path = self.parse_location(location, self.properties)
        if scheme != "file":
            return super().new_output(location)
        return _SyncedFile(location, path, self.fs_by_scheme(scheme, netloc))


class _SyncedFile(PyArrowFile):  # type: ignore[misc]
    def create(self, overwrite: bool = False) -> io.BufferedWriter:  # noqa: FBT001, FBT002
        path = str(self._path)
        make_durable_folder(str(Path(path).parent))
        return _SyncedStream(io.FileIO(path, "wb" if overwrite else "xb"), BUFFER_BYTES)


class _SyncedStream(io.BufferedWriter):
    """Closing syncs the file, then the folder that holds its name."""

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        finally:
            super().close()
        raw = self.raw
        assert isinstance(raw, io.FileIO)
        sync_folder(str(Path(os.fsdecode(raw.name)).parent))


def make_durable_folder(path: str) -> None:
    """Make the folder and those above it, and sync the names of all that are new to us."""
    if path in _durable and Path(path).is_dir():  # somebody may have removed it since
        return
    parent = str(Path(path).parent)
    if parent != path:
        make_durable_folder(parent)
        Path(path).mkdir(exist_ok=True)
        if os.access(parent, os.R_OK | os.W_OK):  # else its names are none of ours
            sync_folder(parent)
    if len(_durable) >= _DURABLE_MAX:
        _durable.clear()
    _durable.add(path)


def sync_folder(path: str) -> None:
    """Make the folder's names durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
