"""Telemetry: events, exactly once, into the operational store and the lake.

    source ── poll ──> validate ──> sink: readings + dead letters + counts + positions, ONE commit

Reading order: records.py (what travels), contract.py (what an event is), validate.py (bytes to
readings or rejections), pipeline.py (the loop), sink.py and source.py (what each end promises),
then the three sinks and the three sources. Only sources/stream.py and sinks/stream.py use a store.
"""
