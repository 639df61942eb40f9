"""The embedded sink does what every sink has to do, and what only it promises."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from sink_conformance import SinkConformance
from stores import check_store, scratch

from kvstore.telemetry.sinks.stream import StreamSink


@contextmanager
def fresh_store():
    with scratch() as folder:
        path = folder / "ops.kv"
        yield lambda contract: StreamSink.open(path, contract)
        if path.exists():
            check_store(path)


class TestStreamSink(SinkConformance):
    examples = 30

    @pytest.fixture
    def fresh(self):
        return fresh_store
