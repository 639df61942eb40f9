"""The sink on a real PostgreSQL: what every sink has to do, and what only this can get wrong."""

from __future__ import annotations

import uuid
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql
from sink_conformance import SinkConformance

from kvstore.telemetry.sinks.postgres import PostgresSink


@contextmanager
def fresh_schema(url):
    """A new, empty target: a schema with a name that needs quoting."""
    schema = f'Te"l {uuid.uuid4().hex[:8]}'
    yield lambda contract: PostgresSink(url, schema=schema)
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


class TestPostgresSink(SinkConformance):
    @pytest.fixture
    def fresh(self, postgres_server):
        return lambda: fresh_schema(postgres_server)
