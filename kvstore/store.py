"""The store as its users see it: open, append, flush, read.

A ``Store`` is a directory opened for reading (any number) or writing (one process); a
``Stream`` is one named sequence in it. Both are thin: writing is writer.py, reading is
reading.py. Handles pickle as their path, opened again for reading.
"""

from __future__ import annotations

import os
import threading
import time as clocks
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Self

import numpy as np

from kvstore import environment, reading
from kvstore.errors import (
    DamageError,
    GapError,
    SchemaError,
    StoreClosed,
    StoreError,
    StreamNotFound,
)
from kvstore.export.conversions import Conversions
from kvstore.follow import POLL_S, Follower, From, OnGap, Source
from kvstore.layout import Layout
from kvstore.reading import Inclusive, Scan
from kvstore.replay import Replay
from kvstore.schema import Batch, BatchLike, Field, Schema
from kvstore.segment import OnDamage, Segment, State, StreamInfo
from kvstore.timestamps import TimeLike, Unit, typed_time
from kvstore.writer import FLUSH_INTERVAL_S, SEGMENT_BYTES, StreamWriter, Writer, check_options

_OPEN_SEGMENTS_MAX: Final = 16  # kept open between reads: a file descriptor and a map each


class StreamStats(NamedTuple):
    """A stream in ``Store.info``. first, last: in the stream's own time dtype, None if empty."""

    name: str
    schema: Schema
    rows: int
    batches: int
    raw_bytes: int
    stored_bytes: int
    first: Any
    last: Any


class StoreInfo(NamedTuple):
    """What a store holds, as of the last commit. Times in ns since 1970."""

    path: str
    store_id: str
    streams: tuple[StreamStats, ...]
    segments: int
    file_bytes: int
    created_ns: int
    last_commit_ns: int
    marks: dict[str, Any]


def open_store(
    path: str | os.PathLike[str],
    mode: Literal["r", "w"] = "r",
    *,
    flush_interval_s: float | None = FLUSH_INTERVAL_S,
    segment_bytes: int = SEGMENT_BYTES,
) -> Store:
    """Open the store in a directory; ``kvstore.open`` is this function.

    mode: ``"r"`` reads and never creates or changes anything; ``"w"`` creates the store where
    there is none, and is the only writer (StoreLocked otherwise).
    flush_interval_s: how long an appended row may wait for its commit, in seconds. None: only
    ``flush`` commits, all rows since the last flush and its marks in one transaction.
    segment_bytes: size at which a segment is sealed and the next one begun; at least 64 KiB.

    Raises StoreNotFound, StoreFormatError, StoreLocked.
    """
    if mode not in ("r", "w"):
        raise StoreError(f"mode={mode!r}: use 'r' to read, 'w' to create or append")
    layout = Layout(path)
    if mode == "r":
        return Store(layout, None)
    check_options(flush_interval_s, segment_bytes)
    if not layout.exists():
        layout.prepare()
    writer = Writer(layout, flush_interval_s=flush_interval_s, segment_bytes=segment_bytes)
    try:
        return Store(layout, writer)
    except BaseException:
        writer.close()
        raise


class Store:
    """An open store; get one from ``kvstore.open``. Usable from several threads."""

    def __init__(self, layout: Layout, writer: Writer | None):
        self._layout = layout
        self._store_id, self._created_ns = layout.identity()
        self._writer = writer
        self._generation = environment.generation
        self._closed = False
        self._lock = threading.Lock()
        self._segments: OrderedDict[int, Segment] = OrderedDict()
        # At exit, too: the commit thread ends with the interpreter, and rows may be waiting.
        self._shut = weakref.finalize(self, _shut, writer, self._segments)
        self._active = self._keep(self._open_active(layout.active()))
        self._state: State | None = None

    @property
    def path(self) -> str:
        """The directory."""
        return str(self._layout.path)

    @property
    def mode(self) -> str:
        """``"r"`` or ``"w"``."""
        return "w" if self._writer else "r"

    @property
    def marks(self) -> dict[str, Any]:
        """The small values committed with rows, by name, as of the last commit."""
        return dict(self.state().marks)

    # ---- streams ----

    def stream(self, name: str, schema: Schema | None = None, *, time: str = "") -> Stream:
        """The stream of that name. When writing, it is made by its first append if new.

        schema: declares the stream, or adds fields at the end of an existing one. Without it
        the first batch shows the schema; ``time`` then names the time field, where it is not
        called timestamps, timestamp or time.
        """
        if self._writer is None:
            return self[name]
        if schema is not None:
            self._writer.define(name, schema)
        found = self._writer.find(name)
        if found is not None and time not in ("", found.info.schema.time):
            raise SchemaError(
                f"{self.path}: the time field of stream {name!r} is {found.info.schema.time!r}, "
                f"not {time!r}; leave time out, or choose another stream"
            )
        return Stream(self, name, time)

    def __getitem__(self, name: str) -> Stream:
        self._info(name)
        return Stream(self, name, "")

    def __contains__(self, name: object) -> bool:
        try:
            self._info(str(name))
        except StreamNotFound:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.state().streams))

    def __len__(self) -> int:
        return len(self.state().streams)

    # ---- writing ----

    def flush(self, marks: Mapping[str, Any] | None = None) -> None:
        """Make everything appended so far durable, and ``marks`` with it; returns once it is.

        Rows and marks go into one transaction, unless the flush interval or 32 MB of rows
        made an earlier commit due in between; open with flush_interval_s=None, or pass marks
        to ``append``, where they must never be apart.
        """
        self.writer().flush(marks)

    def close(self) -> None:
        """Commit what was appended, close the files. Further use raises StoreClosed."""
        if self._closed or self._generation != environment.generation:
            return
        self._closed = True
        self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return (open_store, (str(self._layout.path.absolute()),))

    def __repr__(self) -> str:
        return f"kvstore.open({self.path!r}, mode={self.mode!r})"

    # ---- what is there ----

    def info(self) -> StoreInfo:
        """Streams, rows, bytes and spans; reads one record a segment and stream."""
        state = self.state()
        sizes = [sealed.file_bytes for sealed in state.sealed.values()]
        return StoreInfo(
            self.path,
            state.store_id.hex(),
            tuple(_stats(state, info) for _, info in sorted(state.streams.items())),
            len(sizes) + 1,
            sum(sizes) + self._active.environment.used_bytes(),
            self._created_ns,
            state.last_commit_ns,
            dict(state.marks),
        )

    def state(self) -> State:
        """The store as of the last commit; cached until there is a newer one."""
        self._check_usable()
        with self._lock:
            while self._is_sealed(self._active.number):
                if known := self._segments.pop(self._active.number, None):
                    known.close()  # it may be dropped any time, or give its name to another
                self._active = self._keep(self._open_active(self._layout.active()))
                self._state = None
            commit = self._active.environment.last_commit()
            if self._state is None or commit != self._state.commit:
                self._state = self._active.state()
                self._forget_dropped(self._state)
            return self._state

    def open_segment(self, number: int, *, keep: bool = True) -> Segment:
        """A segment's handle; the caller closes it.

        keep: leave it open for the next call. Who may pause for hours takes keep=False: the
        space of a dropped segment is free only once nobody has it open.
        """
        self._check_usable()
        with self._lock:
            if number not in self._segments:
                path = self._layout.segment_path(number)
                opened = Segment.open(path, number, "alone", self._store_id)
                if not keep:
                    return opened
                self._keep(opened)
            return self._segments[number].shared()

    def writer(self) -> Writer:
        """The writing side; StoreError where the store was opened for reading."""
        self._check_usable()
        if self._writer is None:
            raise StoreError(f"{self.path}: opened for reading; open with mode='w' to write")
        return self._writer

    def _open_active(self, number: int) -> Segment:
        seen = self._layout.writer()  # first: of a writer that starts now, it changes later
        mode: Literal["shared", "alone"] = "shared" if self._layout.is_shared(number) else "alone"
        path = self._layout.segment_path(number)
        return Segment.open(
            path, number, mode, self._store_id, writer=self._layout.writer, seen_writer=seen
        )

    def _is_sealed(self, number: int) -> bool:
        """Whether that segment is not the active one any more; it and the next may be gone.

        So it is where another file has its name: the store was made anew, or is a backup.
        """
        following = self._layout.segment_path(number + 1)
        at = self._layout.segment_path(number)
        return following.exists() or not self._active.environment.is_at(at)

    def _forget_dropped(self, state: State) -> None:
        """Close what was dropped: its space is free only once nobody has it open."""
        for number in [n for n in self._segments if n != state.number and n not in state.sealed]:
            self._segments.pop(number).close()

    def _keep(self, segment: Segment) -> Segment:
        """Hold on to an opened segment, and close the one that was opened first."""
        self._segments[segment.number] = segment
        if len(self._segments) > _OPEN_SEGMENTS_MAX:
            oldest = next(number for number in self._segments if number != self._active.number)
            self._segments.pop(oldest).close()
        return segment

    def _info(self, name: str, state: State | None = None) -> StreamInfo:
        """A stream's definition: the writer's own, which may not be committed yet, or stored."""
        if self._writer is not None and (found := self._writer.find(name)):
            return found.info
        streams = (state or self.state()).streams
        if name not in streams:
            there = ", ".join(sorted(streams)) or "none"
            raise StreamNotFound(f"{self.path}: no stream {name!r}; there are: {there}")
        return streams[name]

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreClosed(f"{self.path}: this handle was closed; open the store again")
        if self._generation != environment.generation:
            raise StoreClosed(
                f"{self.path}: opened before this process was forked; open the store again here"
            )


class Stream(Conversions):
    """One stream of an open store; get one from ``store.stream(name)`` or ``store[name]``."""

    def __init__(self, store: Store, name: str, time: str):
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
        return self._store._info(self.name).schema  # noqa: SLF001

    @property
    def time(self) -> str:
        """Name of the time field."""
        return (self._writing.info if self._writing else self._store._info(self.name)).schema.time  # noqa: SLF001

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

        start, stop: float seconds, ISO 8601 text, datetime, datetime64, or int with ``unit``;
        None is the very beginning or end. inclusive="left" leaves ``stop`` itself out.
        fields: which ones, in this order; all by default.
        ordered: merge rows strictly by time; else batches come by their first time and may
        overlap where data arrived late. verify=False skips the checksums.
        on_damage: called with a DamageError for each batch that cannot be read, which is then
        left out; by default the error is raised.
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
        ``lateness()`` of the result says how well the pace was kept.
        """
        time = self.schema.time
        names = None if fields is None else list(fields)
        drop_time = names is not None and time not in names
        wanted = [*names, time] if names is not None and drop_time else names
        return Replay(
            lambda: self.read(
                start, stop, fields=wanted, unit=unit, ordered=True, on_damage=on_damage
            ),
            time,
            drop_time=drop_time,
            speed=speed,
            loop=loop,
            stop=stop_when,
            clock=clock,
            sleep=sleep,
        )

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
        stats = _stats(state, state.streams[self.name])
        return None if stats.first is None else (stats.first, stats.last)

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
        info = self._store._info(self.name, state)  # noqa: SLF001
        range_ = reading.make_range(info.schema, start, stop, unit=unit, inclusive=inclusive)
        return Scan(info, state, range_, self._store.open_segment, on_damage or _raise)

    def _define(self, batch: BatchLike) -> StreamWriter:
        writer = self._store.writer()
        found = writer.find(self.name)
        if found is None:
            schema = Schema.infer(batch, self._time)
            schema.columns(batch)  # a batch that is refused must not leave a stream behind
            found = writer.define(self.name, schema)
        return found


def _shut(writer: Writer | None, segments: OrderedDict[int, Segment]) -> None:
    try:
        if writer is not None:
            writer.close()
    finally:
        for segment in segments.values():
            segment.close()


def _reopened(store: Store, name: str) -> Stream:
    return store[name]


def _raise(error: DamageError | GapError) -> None:
    raise error


def _stats(state: State, info: StreamInfo) -> StreamStats:
    totals = state.stream_totals(info.stream_id)
    dtype = info.schema.time_dtype
    ends = [None if end is None else typed_time(end, dtype) for end in (totals.first, totals.last)]
    return StreamStats(
        info.name,
        info.schema,
        totals.rows,
        totals.batches,
        totals.raw_bytes,
        totals.stored_bytes,
        *ends,
    )
