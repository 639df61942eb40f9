"""``python -m bench.scale.child``: one worker. Reads acts from stdin, answers on stdout.

An answer holds what the act found, and when it started and ended on the clock that all
processes share.
"""

from __future__ import annotations

import json
import sys
import time

import kvstore
from bench.figure import BenchError
from bench.scale.acts import ACTS
from kvstore.errors import KvstoreError


def main() -> None:
    """Do what is asked until the input ends."""
    kvstore.keep_freed_memory()
    for line in sys.stdin:
        act, arguments = json.loads(line)
        started = time.perf_counter_ns()
        try:
            found = ACTS[act](**arguments)
        except (BenchError, KvstoreError, OSError, MemoryError) as error:
            print(json.dumps({"error": f"{act}: {type(error).__name__}: {error}"}), flush=True)
            continue
        span = {"started_s": started / 1e9, "ended_s": time.perf_counter_ns() / 1e9}
        print(json.dumps({**span, **found}), flush=True)


if __name__ == "__main__":
    main()
