"""Raw telemetry exports to a regular grid: one Parquet file per hour, phase and module.

From the bottom: measures (the table), series (tags to tree and column), readings, cells, tags and
chunk (rows to readings), exports (input files), grid, hours (output files), tally, day (the unit
of work), manifest, plan, etl.
"""
