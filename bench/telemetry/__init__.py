"""``python -m bench telemetry``: events, from bytes to what a sink has made durable.

Each figure beside a bare limit of the same run. One option, --events, sets the size of a run. See
run.py; events.py has what all of them read.
"""
