"""The lake as a sink: what every sink does, and what is Iceberg's own."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest
from sink_conformance import SinkConformance

from kvstore.telemetry.sinks.iceberg import IcebergSink


def scratch() -> Path:
    """A folder in memory where there is one: what is tested here is no disk."""
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="kvstore-lake-", dir=shm if shm.is_dir() else None))


@contextlib.contextmanager
def fresh_lake():
    folder = scratch()
    try:
        yield lambda contract: IcebergSink.open(str(folder / "lake"), contract=contract)
    finally:
        shutil.rmtree(folder)


class TestIcebergSink(SinkConformance):
    examples = 4

    @pytest.fixture
    def fresh(self):
        return fresh_lake
