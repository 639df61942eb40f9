"""The sink on PostgreSQL, with TimescaleDB where there is some. Only here is psycopg imported.

Reading order: ../postgres.sql (the tables, and why), sink.py (one commit), readings.py (what is
there, what is new), batch.py and binary.py (pure), places.py (the fence), session.py (connection,
retries, errors), tables.py (days, growth, retention), letters.py, counts.py, lineages.py, read.py,
preflight.py.
"""

from __future__ import annotations

from kvstore.telemetry.sinks.postgres.preflight import preflight
from kvstore.telemetry.sinks.postgres.sink import SCHEMA, PostgresSink

__all__ = ["SCHEMA", "PostgresSink", "preflight"]
