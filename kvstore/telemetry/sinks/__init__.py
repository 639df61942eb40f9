"""Where readings go: a kvstore stream, PostgreSQL (TimescaleDB), Iceberg. One module each."""
