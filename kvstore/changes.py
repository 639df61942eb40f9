"""What one transaction does to a store: things queued -> the next state, and the records of it.

Pure: nothing is written here. The state is replaced, never changed in place, so that a commit
that fails leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from kvstore import codec, gaps
from kvstore.entries import EncodedBatch
from kvstore.gaps import Gap
from kvstore.settings import Pin, Settings
from kvstore.state import (
    GONE,
    Dropped,
    Session,
    State,
    StreamInfo,
    Totals,
    dropped_key,
    mark_key,
    numbered_key,
    stream_record,
    total_key,
)


class Drop(NamedTuple):
    """Sealed segments to be dropped."""

    numbers: tuple[int, ...]


class Unpin(NamedTuple):
    """A pin to be taken away."""

    pin_id: int


Change: TypeAlias = Drop | Pin | Unpin | Settings | Session | Gap


@dataclass(slots=True)
class Queued:
    """One thing to commit: a batch, a stream's definition, marks, or another change."""

    size: int = 0
    batch: EncodedBatch | None = None  # without its sequence and blocks, which come last
    blocks: Future[list[codec.Block]] | Sequence[codec.Block] = ()
    define: StreamInfo | None = None
    marks: Mapping[str, Any] | None = None
    change: Change | None = None
    joined: bool = False  # in one transaction with what is queued next

    def finished(self) -> EncodedBatch:
        """The batch with its blocks; waits for them."""
        assert self.batch is not None
        blocks = self.blocks.result() if isinstance(self.blocks, Future) else self.blocks
        return self.batch._replace(blocks=blocks)


def next_state(
    old: State,
    batches: Iterable[EncodedBatch],
    group: Sequence[Queued],
    *,
    now_ns: int,
    clock_ns: int,
) -> tuple[State, dict[bytes, Any]]:
    """The state once the group is committed, and the meta records that say so.

    now_ns: wall clock. clock_ns: the store's own.
    """
    state = replace(
        old,
        clock_ns=clock_ns,
        streams=dict(old.streams),
        totals=dict(old.totals),
        marks=dict(old.marks),
    )
    records: dict[bytes, Any] = {b"clock": clock_ns}
    for batch in batches:
        totals = state.totals.get(batch.stream_id, Totals()).plus(batch.totals)
        state.totals[batch.stream_id] = records[total_key(batch.stream_id)] = totals
    for item in group:
        if item.define:
            state.streams[item.define.name] = item.define
            records |= stream_record(item.define)
        for name, value in (item.marks or {}).items():
            state.marks[name] = records[mark_key(name)] = value
        if item.change is not None:
            records |= _changed(state, item.change, now_ns)
    if any(item.change is None for item in group):  # rows, streams or marks
        state.last_commit_ns = records[b"commit"] = now_ns
    return state, records


def _changed(state: State, change: Change, now_ns: int) -> dict[bytes, Any]:
    if isinstance(change, Settings):
        state.settings = change
        return {b"settings": change._asdict()}
    if isinstance(change, Session):
        state.session = change
        return {b"session": change}
    if isinstance(change, Pin):
        state.pins = {**state.pins, change.pin_id: change}
        return {numbered_key("pin", change.pin_id): change}
    if isinstance(change, Unpin):
        state.pins = {n: pin for n, pin in state.pins.items() if n != change.pin_id}
        return {numbered_key("pin", change.pin_id): GONE}
    if isinstance(change, Drop):
        return _dropped(state, change.numbers, now_ns)
    number, gap = gaps.placed(state.gaps, change._replace(recorded_ns=now_ns))
    state.gaps = {**state.gaps, number: gap}
    return {numbered_key("gap", number): gap}


def _dropped(state: State, numbers: Sequence[int], now_ns: int) -> dict[bytes, Any]:
    records: dict[bytes, Any] = {}
    state.sealed, state.dropped = dict(state.sealed), dict(state.dropped)
    for number in numbers:
        for stream_id, totals in state.sealed.pop(number).totals.items():
            before = state.dropped.get(stream_id, Dropped())
            now = Dropped(before.totals.plus(totals), before.segments + 1, now_ns)
            state.dropped[stream_id] = records[dropped_key(stream_id)] = now
        records[numbered_key("sealed", number)] = GONE
    return records
