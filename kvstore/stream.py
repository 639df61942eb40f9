"""One stream of an open store, as its users see it: append, read, count, follow, replay.

Thin: appending is writer.py, reading is reading.py, following follow.py, replaying replay.py.
A handle pickles as its store's path and its name.
"""

from __future__ import annotations

import time as clocks
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kvstore import reading
from kvstore.errors import DamageError, GapError
from kvstore.export.exchange import Exchange
from kvstore.follow import POLL_S, Follower, From, OnGap, Source
from kvstore.reading import Inclusive, Scan
from kvstore.replay import Replay
from kvstore.schema import Batch, BatchLike, Field, Schema
from kvstore.segment import OnDamage, Segment
from kvstore.state import State, StreamInfo
from kvstore.timestamps import TimeLike, Unit, typed_time
from kvstore.writer import StreamWriter, Writer


class Holder(Protocol):
    """The open store that a stream belongs to."""

    def __getitem__(self, name: str, /) -> Stream: ...

    def state(self) -> State: ...  # noqa: D102  # store.py says what each does

    def definition(self, name: str, state: State | None = None) -> StreamInfo: ...  # noqa: D102

    def open_segment(self, number: int, *, keep: bool = True) -> Segment: ...  # noqa: D102

    def is_dropped(self, number: int) -> bool: ...  # noqa: D102

    def writer(self) -> Writer: ...  # noqa: D102


class Stream(Exchange):
    """One stream of an open store; get one from ``store.stream(name)`` or ``store[name]``."""

    def __init__(self, store: Holder, name: str, time: str):
        self._store = store
        self._time = time
        self._writing: StreamWriter | None = None
        self._append: Any = None
        self.name = name

    def __repr__(self) -> str:
        return f"{self._store!r}[{self.name!r}]"

    def __reduce__(self) -> tuple[object, ...]:
        return (_reopened, (self._store, self.name))

    @property
    def schema(self) -> Schema:
        """The fields there are now; StreamNotFound before the first append shows them."""
        return self._store.definition(self.name).schema

    @property
    def time(self) -> str:
        """Name of the time field."""
        info = self._writing.info if self._writing else self._store.definition(self.name)
        return info.schema.time

    def append(
        self, batch: BatchLike, *, copy: bool = True, marks: Mapping[str, Any] | None = None
    ) -> None:
        """Add rows: arrays by field name with a shared first axis, or one row of scalars.

        Rows may come in any order of time. Returns before they are durable: see ``flush``.
        copy=False saves a copy where the arrays are never changed again. marks become durable
        in the same transaction as these rows.
        """
        if self._writing is None:
            self._writing = self._define(batch)
            self._append = self._store.writer().append
        self._append(self._writing, batch, copy=copy, marks=marks)

    def add_fields(self, *fields: Field) -> None:
        """Append fields to the schema. Earlier rows read as NaN, NaT, None or ``Field.fill``."""
        writer = self._store.writer()
        writer.define(self.name, self.schema.extended(fields))

    def read(
        self,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
        ordered: bool = False,
        verify: bool = True,
        on_damage: OnDamage | None = None,
    ) -> Iterator[Batch]:
        """Batches of the rows with start <= time <= stop, as dicts of new arrays.

        A large first batch comes in two pieces, a short one first, so that a read begins soon.
        start, stop: float seconds, ISO 8601 text, datetime, datetime64, or int with ``unit``;
        None is the very beginning or end. inclusive="left" leaves ``stop`` itself out.
        fields: which ones, in this order; all by default.
        ordered: merge rows strictly by time; else batches come by their first time and may
        overlap where data arrived late. verify=False skips the checksums.
        on_damage: called with a DamageError for each batch that cannot be read, which is then
        left out, but for a first piece; by default the error is raised.
        """
        scan = self._scan(start, stop, unit=unit, inclusive=inclusive, on_damage=on_damage)
        return reading.read(scan, fields, ordered=ordered, verify=verify)

    def follow(
        self,
        from_: From = "start",
        *,
        fields: Sequence[str] | None = None,
        poll_s: float = POLL_S,
        stop: Callable[[], bool] = lambda: False,
        verify: bool = True,
        on_damage: OnDamage | None = None,
        on_gap: OnGap | None = None,
        sleep: Callable[[float], object] = clocks.sleep,
    ) -> Follower:
        """Every committed batch once, in commit order, and those to come: iterate over it.

        Each comes as Followed(cursor, batch); ``cursor`` is the place behind the batch. Keep it
        with what you made of the batch, and go on from there: ``follow(cursor)``, in any process.
        from_: a Cursor, "start" for the oldest batch there is, "end" for what comes from now on.
        Asks for news every poll_s seconds, until ``stop()`` is true.
        on_damage, on_gap: called for what cannot be delivered, damaged or dropped before its
        turn, which is then passed over; by default the DamageError or GapError is raised.
        """
        store = self._store
        source = Source(self.name, store.state, lambda n: store.open_segment(n, keep=False))
        return Follower(
            source,
            from_,
            fields=fields,
            poll_s=poll_s,
            stop=stop,
            verify=verify,
            on_damage=on_damage or _raise,
            on_gap=on_gap or _raise,
            sleep=sleep,
        )

    def replay(
        self,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        speed: float = 1.0,
        loop: bool = False,
        fields: Sequence[str] | None = None,
        unit: Unit | None = None,
        on_damage: OnDamage | None = None,
        stop_when: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = clocks.perf_counter,
        sleep: Callable[[float], object] = clocks.sleep,
    ) -> Replay:
        """The rows of a range again, in order, at the pace of their times: iterate over it once.

        Batches are handed out at (their first time - the first time of all) / speed after the
        first, cut so that rows leave within a millisecond of their own time. speed=0: as fast as
        possible. loop: begin anew at the end. Ends early once ``stop_when()`` is true.
        ``lateness()`` of the result says how well the pace was kept. on_damage is told, too, of
        a segment that retention drops before its turn: a replay may take hours.
        """
        time = self.schema.time
        names = None if fields is None else list(fields)
        drop_time = names is not None and time not in names
        wanted = [*names, time] if names is not None and drop_time else names
        return Replay(
            lambda: self._replayed(start, stop, fields=wanted, unit=unit, on_damage=on_damage),
            time,
            drop_time=drop_time,
            speed=speed,
            loop=loop,
            stop=stop_when,
            clock=clock,
            sleep=sleep,
        )

    def _replayed(
        self,
        start: TimeLike | None,
        stop: TimeLike | None,
        *,
        fields: Sequence[str] | None,
        unit: Unit | None,
        on_damage: OnDamage | None,
    ) -> Iterator[Batch]:
        scan = self._scan(start, stop, unit=unit, inclusive="both", on_damage=on_damage)

        def is_dropped(number: int) -> bool:
            if found := self._store.is_dropped(number):
                totals = dict(scan.state.per_segment(scan.info.stream_id))[number]
                rows = reading.rows_text(scan.info.schema, totals)
                scan.on_damage(
                    DamageError(
                        f"stream {self.name!r}, {rows}: the segment was dropped before its turn"
                    )
                )
            return found

        scan = scan._replace(
            is_dropped=is_dropped,
            open_segment=lambda number: self._store.open_segment(number, keep=False),
        )
        return reading.read(scan, fields, ordered=True, verify=True)

    def count(
        self,
        start: TimeLike | None = None,
        stop: TimeLike | None = None,
        *,
        unit: Unit | None = None,
        inclusive: Inclusive = "both",
    ) -> int:
        """Number of rows in a range, from the index."""
        return reading.count(
            self._scan(start, stop, unit=unit, inclusive=inclusive, on_damage=None)
        )

    def first(self) -> Batch | None:
        """The earliest row, as a batch of one row; None where the stream is empty."""
        return self._row_at(0)

    def last(self) -> Batch | None:
        """The latest row, the last to arrive among equals, as a batch of one row."""
        return self._row_at(-1)

    def span(self) -> tuple[Any, Any] | None:
        """(first, last) time in the stream's own time dtype; None where it is empty."""
        state = self._store.state()
        if self.name not in state.streams:
            return None
        info = state.streams[self.name]
        totals, dtype = state.stream_totals(info.stream_id), info.schema.time_dtype
        if totals.first is None:
            return None
        return typed_time(totals.first, dtype), typed_time(totals.last, dtype)

    def __len__(self) -> int:
        """Rows committed; O(segments)."""
        state = self._store.state()
        info = state.streams.get(self.name)
        return state.stream_totals(info.stream_id).rows if info else 0

    def _row_at(self, end: int) -> Batch | None:
        span = self.span()
        if span is None:
            return None
        row: Batch | None = None
        unit: Unit | None = "ns" if isinstance(span[end], np.int64) else None
        for batch in self.read(span[end], span[end], unit=unit, ordered=True):
            row = {name: column[-1:] if end else column[:1] for name, column in batch.items()}
            if not end:
                break
        return row

    def _scan(
        self,
        start: TimeLike | None,
        stop: TimeLike | None,
        *,
        unit: Unit | None,
        inclusive: Inclusive,
        on_damage: OnDamage | None,
    ) -> Scan:
        state = self._store.state()
        info = self._store.definition(self.name, state)
        range_ = reading.make_range(info.schema, start, stop, unit=unit, inclusive=inclusive)
        return Scan(
            info,
            state,
            range_,
            self._store.open_segment,
            self._store.is_dropped,
            on_damage or _raise,
        )

    def _define(self, batch: BatchLike) -> StreamWriter:
        writer = self._store.writer()
        found = writer.find(self.name)
        if found is None:
            schema = Schema.infer(batch, self._time)
            schema.columns(batch)  # a batch that is refused must not leave a stream behind
            found = writer.define(self.name, schema)
        return found


def _reopened(store: Holder, name: str) -> Stream:
    return store[name]


def _raise(error: DamageError | GapError) -> None:
    raise error
