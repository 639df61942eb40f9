"""The store as its users see it: open, append, flush, read.

A ``Store`` is a directory opened for reading (any number) or writing (one process); a
``Stream`` is one named sequence in it. Both are thin: writing is writer.py, reading is
reading.py. Handles pickle as their path, opened again for reading.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal, NamedTuple, Self

from kvstore import environment, retention
from kvstore.errors import (
    DiskFull,
    KvstoreError,
    SchemaError,
    StoreClosed,
    StoreError,
    StreamNotFound,
)
from kvstore.gaps import Gap
from kvstore.layout import Layout
from kvstore.schema import Schema
from kvstore.segment import Known, Segment
from kvstore.settings import Pin, Settings
from kvstore.state import State, StreamInfo
from kvstore.stream import Stream
from kvstore.timestamps import TimeLike, Unit, range_ns, typed_time
from kvstore.writer import FLUSH_INTERVAL_S, Writer, check_options

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
    segment_bytes: int | None = None,
    settings: Settings | None = None,
) -> Store:
    """Open the store in a directory; ``kvstore.open`` is this function.

    mode: ``"r"`` reads and never creates or changes anything; ``"w"`` creates the store where
    there is none, and is the only writer (StoreLocked otherwise).
    flush_interval_s: how long an appended row may wait for its commit, in seconds. None: only
    ``flush`` commits, all rows since the last flush and its marks in one transaction.
    segment_bytes: size at which a segment is sealed and the next one begun; at least 64 KiB.
    By default 2 GiB; where the oldest are to be dropped, a sixteenth of max_bytes, or without it
    of the disk, within 64 MiB and 2 GiB.
    settings: limits and what counts as a gap, kept in the store in place of those it has.

    Raises StoreNotFound, StoreFormatError, StoreLocked.
    """
    if mode not in ("r", "w"):
        raise StoreError(f"mode={mode!r}: use 'r' to read, 'w' to create or append")
    layout = Layout(path)
    if mode == "r":
        return Store(layout, None, _Handles())
    check_options(flush_interval_s, segment_bytes, settings)
    if not layout.exists():
        layout.prepare()
    handles = _Handles()
    writer = Writer(
        layout,
        flush_interval_s=flush_interval_s,
        segment_bytes=segment_bytes,
        settings=settings,
        let_go=handles.let_go,
    )
    try:
        return Store(layout, writer, handles)
    except BaseException:
        writer.close()
        raise


class _Handles:
    """Segments kept open between reads. Not the store: who holds these keeps no store alive."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.segments: OrderedDict[int, Segment] = OrderedDict()

    def let_go(self, numbers: Iterable[int]) -> None:
        """Close dropped segments: their space is free only once nobody has them open."""
        with self.lock:
            self.close(numbers)

    def close(self, numbers: Iterable[int]) -> None:
        """The same, with the lock held."""
        for number in list(numbers):
            if segment := self.segments.pop(number, None):
                segment.close()


class Store:
    """An open store; get one from ``kvstore.open``. Usable from several threads."""

    def __init__(self, layout: Layout, writer: Writer | None, handles: _Handles):
        self._layout = layout
        self._store_id, self._created_ns = layout.identity()
        self._writer = writer
        self._generation = environment.generation
        self._closed = False
        self._handles = handles
        self._lock, self._segments = handles.lock, handles.segments
        # At exit, too: the commit thread ends with the interpreter, and rows may be waiting.
        self._shut = weakref.finalize(self, _shut, writer, self._segments)
        self._active = self._keep(self._open_active(layout.active()))
        self._state: State | None = None
        self._known = Known()

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
        self.definition(name)
        return Stream(self, name, "")

    def __contains__(self, name: object) -> bool:
        try:
            self.definition(str(name))
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

    # ---- limits and gaps ----

    @property
    def settings(self) -> Settings:
        """The limits that the store keeps, as of the last commit."""
        return self.state().settings

    def set(self, **changes: Any) -> Settings:
        """Change some of the settings, such as max_bytes=800e9; durable on return."""
        return Settings(**self.writer().perform("set", changes))

    def pins(self) -> tuple[Pin, ...]:
        """The time ranges that retention leaves alone."""
        return tuple(pin for _, pin in sorted(self.state().pins.items()))

    def pin(
        self,
        start: TimeLike | None,
        stop: TimeLike | None,
        label: str = "",
        *,
        unit: Unit | None = None,
    ) -> int:
        """Keep all segments that hold rows of this time range, now or later; the pin's number."""
        first, last = range_ns(start, stop, unit=unit)
        asked = {"start_ns": first, "stop_ns": last, "label": label}
        return int(self.writer().perform("pin", asked)["pin_id"])

    def unpin(self, pin_id: int) -> None:
        """Let retention have a pinned range again."""
        self.writer().perform("unpin", {"pin_id": int(pin_id)})

    def drop(self, before: TimeLike, *, unit: Unit | None = None) -> dict[str, Any]:
        """Drop the segments whose rows are all before a time; what went and what was kept.

        Keys of the result: segments, rows, bytes; kept: those with earlier rows that stay, each
        with its segment, rows and why. Whole segments go, of all streams together.
        """
        with suppress(DiskFull):  # it is to make room
            self.writer().flush()
        return self.writer().perform("drop", {"before_ns": range_ns(before, None, unit=unit)[0]})

    def gaps(self) -> tuple[Gap, ...]:
        """What is known to be missing or doubtful, in the order of its start."""
        state = self.state()
        with self._active_segment() as segment:
            recorded = segment.gaps().values()
        return tuple(sorted([*retention.dropped_gaps(state), *recorded], key=lambda g: g[1:3]))

    def note_gap(
        self,
        kind: str,
        stream: str = "",
        *,
        start_ns: int,
        stop_ns: int,
        rows: int = 0,
        occurrences: int = 1,
        detail: str = "",
    ) -> None:
        """Record a gap, in ns since 1970; durable with the next commit, as rows are."""
        self.writer().note(Gap(kind, start_ns, stop_ns, stream, rows, occurrences, detail))

    def let_go(self) -> None:
        """Close segments that were sealed or dropped meanwhile, and are kept open here."""
        with suppress(KvstoreError):
            self.state()

    def close(self) -> None:
        """Commit what was appended, close the files. Further use raises StoreClosed."""
        if self._closed or self._generation != environment.generation:
            return
        self._closed = True
        self._shut()

    def abandon(self) -> None:
        """Close, and give up what was appended since the last flush.

        For who opened with flush_interval_s=None and could not finish what belongs into one
        transaction: ``close`` would commit the part that is there.
        """
        if self._writer is not None:
            self._writer.abandon()
        self.close()

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
        with self._active_segment() as segment:
            active_bytes = segment.environment.used_bytes()
        return StoreInfo(
            self.path,
            state.store_id.hex(),
            tuple(_stats(state, info) for _, info in sorted(state.streams.items())),
            len(sizes) + 1,
            sum(sizes) + active_bytes,
            self._created_ns,
            state.last_commit_ns,
            dict(state.marks),
        )

    def state(self) -> State:
        """The store as of the last commit; cached until there is a newer one."""
        self._check_usable()
        with self._lock:
            self._go_on_if_sealed()
            commit = self._active.environment.last_commit()
            if self._state is None or commit != self._state.commit:
                self._state = self._active.state(known=self._known)
                there = {*self._state.sealed, self._state.number}
                self._handles.close(self._segments.keys() - there)
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

    def is_dropped(self, number: int) -> bool:
        """Whether that segment has been dropped by now."""
        state = self.state()
        return number != state.number and number not in state.sealed

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

    @contextmanager
    def _active_segment(self) -> Iterator[Segment]:
        """The active segment, which no other thread closes meanwhile."""
        with self._lock:
            self._go_on_if_sealed()
            segment = self._active.shared()
        try:
            yield segment
        finally:
            segment.close()

    def _go_on_if_sealed(self) -> None:
        """Before any use of the active segment, which may be sealed, dropped and closed by now."""
        while not self._is_active():
            # It may be dropped any time, or give its name to another.
            self._handles.close([self._active.number])
            self._active = self._keep(self._open_active(self._layout.active()))
            self._state = None

    def _is_active(self) -> bool:
        """Whether that file still is; where another has its name, the store was made anew."""
        number = self._active.number
        at = self._layout.segment_path(number)
        return self._layout.is_active(number) and self._active.environment.is_at(at)

    def _keep(self, segment: Segment) -> Segment:
        """Hold on to an opened segment, and close the one that was opened first."""
        self._segments[segment.number] = segment
        if len(self._segments) > _OPEN_SEGMENTS_MAX:
            oldest = next(number for number in self._segments if number != self._active.number)
            self._segments.pop(oldest).close()
        return segment

    def definition(self, name: str, state: State | None = None) -> StreamInfo:
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


def _shut(writer: Writer | None, segments: OrderedDict[int, Segment]) -> None:
    try:
        if writer is not None:
            writer.close()
    finally:
        for segment in segments.values():
            segment.close()


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
