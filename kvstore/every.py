"""Something done again and again beside the main work, on a thread of its own, and once at the end.

For reports: that they come must not depend on what they report about.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def every(interval_s: float, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` at once, each ``interval_s`` while the body runs, and after it.

    ``act`` deals with its own errors: one that escapes ends the calls.
    """
    done = threading.Event()

    def run() -> None:
        while not done.wait(interval_s):
            act()

    act()
    thread = threading.Thread(target=run, name="kvstore-report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        act()
