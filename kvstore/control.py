"""Limits, pins and drops of a store, whether or not somebody is writing to it.

Where nobody writes, this process becomes the writer for a moment. Else it leaves a request
(requests.py), which the writing process carries out between two of its commits. Either way the
change is durable on return.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kvstore import requests
from kvstore.errors import StoreError, StoreLocked
from kvstore.gaps import Gap
from kvstore.layout import Layout
from kvstore.settings import Settings, storable
from kvstore.store import open_store
from kvstore.timestamps import TimeLike, Unit, range_ns

PATIENCE_S: Final = 30.0  # a commit takes less, even on a slow disk
_POLL_S: Final = 0.02
_NOTED_AT_ONCE: Final = 30  # a request has at most 64 KiB, a gap's texts less than 2
_TRY_S: Final = 1.0  # between looks whether the writer is still there
StorePath = str | os.PathLike[str]


def configure(path: StorePath, **changes: Any) -> Settings:
    """Change some of a store's Settings, such as max_bytes=800 * 10**9; all as they are now."""
    Settings().changed(changes)  # before it is left for another process, where it may not even fit
    return Settings(**_ask(path, "set", changes))


def pin(
    path: StorePath,
    start: TimeLike | None,
    stop: TimeLike | None,
    label: str = "",
    *,
    unit: Unit | None = None,
) -> int:
    """Keep all segments that hold rows of this time range, now or later; the pin's number."""
    first, last = range_ns(start, stop, unit=unit)
    asked = {"start_ns": first, "stop_ns": last, "label": storable(label)}
    return int(_ask(path, "pin", asked)["pin_id"])


def unpin(path: StorePath, pin_id: int) -> None:
    """Let retention have a pinned range again."""
    _ask(path, "unpin", {"pin_id": pin_id})


def drop(path: StorePath, before: TimeLike, *, unit: Unit | None = None) -> dict[str, Any]:
    """Drop the segments whose rows are all before a time: see ``Store.drop``."""
    return _ask(path, "drop", {"before_ns": range_ns(before, None, unit=unit)[0]})


def note_gaps(path: StorePath, gaps: Sequence[Gap]) -> int:
    """Record gaps that no recorded one covers; how many."""
    new = 0
    for first in range(0, len(gaps), _NOTED_AT_ONCE):
        some = [list(gap) for gap in gaps[first : first + _NOTED_AT_ONCE]]
        new += int(_ask(path, "note", {"gaps": some})["new"])
    return new


def _ask(path: StorePath, what: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    layout = Layout(path)
    layout.store_id()  # before a folder for requests is made where no store is
    posted: Path | None = None
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        if not layout.has_writer():
            with suppress(StoreLocked), open_store(path, "w") as store:
                if posted is None:
                    return store.writer().perform(what, arguments)
                answer = _awaited(posted, deadline_s)  # carried out on opening
                if answer is not None:
                    return answer
        if posted is None:
            posted = requests.post(layout, what, arguments)
        answer = _awaited(posted, min(time.monotonic() + _TRY_S, deadline_s))
        if answer is not None:
            return answer
    raise StoreError(
        f"{layout.path}: the writing process has not answered within {PATIENCE_S:.0f} s; what was "
        "asked for stays asked, and is carried out once it answers or another one opens the store"
    )


def _awaited(posted: Path, deadline_s: float) -> dict[str, Any] | None:
    while True:
        claimed = requests.claim(posted)
        if claimed is not None:
            is_error, result = claimed
            if is_error:
                raise StoreError(str(result))
            answer: dict[str, Any] = result
            return answer
        if time.monotonic() >= deadline_s:
            return None
        time.sleep(_POLL_S)
