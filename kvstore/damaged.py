"""Damage that was found, as gaps in the store: known to whoever asks it what is missing.

Recorded once: what a recorded gap of its stream covers is not recorded again, however often the
store is verified.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from kvstore import control, retention
from kvstore.gaps import Gap
from kvstore.state import State, Totals
from kvstore.store import Store, open_store
from kvstore.timestamps import range_ns
from kvstore.untrusted import Damage


def record_damages(path: str | os.PathLike[str], damages: Sequence[Damage]) -> int:
    """Note what ``verify`` found as gaps of the store, durably; how many there are new.

    Also while another process writes, which then does it. StoreFormatError or DamageError where
    the newest segment is too damaged to be opened.
    """
    with open_store(path) as store:
        state = store.state()
    return control.note_gaps(path, list(damage_gaps(state, damages)))


def note(store: Store, gaps: Iterable[Gap]) -> int:
    """The same for an open store's own writer, of any gaps."""
    asked = {"gaps": [list(gap) for gap in gaps]}
    return int(store.writer().perform("note", asked)["new"])


def damage_gaps(state: State, damages: Iterable[Damage]) -> Iterator[Gap]:
    """What each makes doubtful: its own time span, or that of all its segment holds.

    Damage that concerns no rows, such as to ``store.msgpack``, is no gap.
    """
    for damage in damages:
        field = f", field {damage.field!r}" if damage.field else ""
        detail = f"segment {damage.segment}{field}: {damage.what}"
        if damage.start:
            start_ns, stop_ns = range_ns(damage.start, damage.stop or damage.start)
            yield Gap("damaged", start_ns, stop_ns, damage.stream, damage.rows, detail=detail)
            continue
        for name, info in state.streams.items():
            totals = _totals(state, damage.segment).get(info.stream_id, Totals())
            if damage.stream in ("", name):
                rows = damage.rows if damage.stream else 0
                for span in retention.spans_ns(state, {info.stream_id: totals}):
                    yield Gap("damaged", *span, name, rows, detail=detail)


def _totals(state: State, number: int) -> dict[int, Totals]:
    if number == state.number:
        return state.totals
    return state.sealed[number].totals if number in state.sealed else {}
