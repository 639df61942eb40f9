"""The writing side of a store: appended rows -> staged or cut batches -> blocks -> the committer.

    append ── stage the small, cut the large ── encode ──> queue ──> commit thread (commit.py)

``append`` copies or has compressed before it returns. Rows become durable within the flush
interval, at 32 MB, or when ``flush`` returns; beyond 64 MB queued, ``append`` waits. Where a
commit fails (a full disk), its rows stay queued, and every ``append`` and ``flush`` raises
until a retry succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from kvstore import codec, environment, gaps, operations, retention
from kvstore.changes import Queued
from kvstore.commit import Committer
from kvstore.entries import EncodedBatch
from kvstore.errors import SchemaError, StoreClosed, StoreError
from kvstore.gaps import Gap, Watch
from kvstore.gather import SMALL_BYTES, STAGED_BYTES_MAX, Staging, cut, size_of
from kvstore.layout import Layout, WriterLock, ticks_ns
from kvstore.schema import Array, BatchLike, Field, Schema, check_name
from kvstore.settings import Settings
from kvstore.state import StreamInfo
from kvstore.timestamps import plain_time, time_to_ns

FLUSH_INTERVAL_S: Final = 0.1
SEGMENT_BYTES_MIN: Final = 64 << 10  # room for the tables and what a new segment carries
ENCODERS: Final = 2  # threads: one for each core of the smallest device
_HAND_OVER_BYTES: Final = 64 << 10  # below, waking a thread takes longer than encoding
_MARK_BYTES_MAX: Final = 64 << 10
_FLUSH_INTERVAL_S_MAX: Final = 86400.0


class StreamWriter:
    """One stream's side of the writer: its definition and the rows that wait.

    last: the greatest time that it has stored.
    """

    def __init__(self, info: StreamInfo, last: Any = None):
        self.info = info
        self.staging = Staging(info.schema)
        self.watch = Watch(info.name, info.schema.time_dtype, last, _now_s())


class Writer:
    """Owns the writer lock, the streams' staging and the encoding threads."""

    def __init__(
        self,
        layout: Layout,
        *,
        flush_interval_s: float | None,
        segment_bytes: int | None,
        settings: Settings | None,
        let_go: Callable[[Sequence[int]], object],
    ):
        self._layout = layout
        self._generation = environment.generation
        self._closed = False
        self._streams: dict[str, StreamWriter] = {}
        self._marks: dict[str, Any] = {}  # appended with rows that are still staged
        self._lock = WriterLock(layout)
        try:
            if not layout.exists():
                limits = settings or Settings()
                size = retention.segment_bytes(limits, segment_bytes, layout.disk_bytes())
                layout.create(size)
            layout.store_id()
            layout.tidy()
            self._committer = Committer(
                layout,
                interval_s=flush_interval_s,
                segment_bytes=segment_bytes,
                seal=self._seal_all,
                tick=self._note_silence,
                let_go=let_go,
            )
            self._lock.announce()
        except BaseException:
            self._lock.release()
            raise
        state = self._committer.state
        self._streams = {
            name: StreamWriter(info, state.stream_totals(info.stream_id).last)
            for name, info in state.streams.items()
        }
        self._pool = ThreadPoolExecutor(ENCODERS, "kvstore-encode")
        if settings is not None:
            try:
                self.perform("set", settings._asdict())
            except BaseException:
                self.close()
                raise

    @property
    def committer(self) -> Committer:
        """What commits the rows: its ``stats``, ``held_bytes`` and ``overdue_s`` for reports."""
        return self._committer

    def find(self, name: str) -> StreamWriter | None:
        """The stream of that name, committed or not."""
        self.check_usable()
        return self._streams.get(name)

    def define(self, name: str, schema: Schema) -> StreamWriter:
        """Make a stream, or append fields to its schema; committed with what follows."""
        self.check_usable()
        check_name(name, "stream")
        with self._committer.lock:
            self._committer.raise_error()
            stream = self._streams.get(name)
            if stream is None:
                stream_id = 1 + max((s.info.stream_id for s in self._streams.values()), default=0)
                info = StreamInfo(stream_id, name, schema, (len(schema.fields),))
                stream = self._streams[name] = StreamWriter(info)
            elif stream.info.schema == schema:
                return stream
            else:
                self._seal_for(stream)
                stream.info = _extended(stream.info, schema)
                stream.staging = Staging(schema)
            self._committer.put(Queued(define=stream.info))
        return stream

    def append(
        self,
        stream: StreamWriter,
        batch: BatchLike,
        *,
        copy: bool = True,
        marks: Mapping[str, Any] | None = None,
    ) -> None:
        """Queue rows, and marks that become durable with them.

        With copy=False the caller promises never to change the arrays again.
        """
        committer = self._committer
        if self._generation != environment.generation:
            self.check_usable()  # before the lock, which may be held for ever in a child
        with committer.lock:
            if committer.error or committer.is_full or self._closed:
                self.check_usable()
                committer.raise_error()
                committer.check_size(0, joined=False)
            if marks is None and (packed := stream.staging.add_row(batch)):
                committer.staged_bytes += packed
                if committer.oldest_s is None or stream.staging.bytes >= STAGED_BYTES_MAX:
                    self._note_staged(stream)
                return
        checked = _checked(marks)
        schema, columns = _columns(stream.info, batch)
        size = size_of(columns)
        with committer.lock:
            self.check_usable()
            committer.check_size(size, joined=bool(checked))
            # Decided and done under one lock: another thread may add fields in between.
            if size < SMALL_BYTES and schema is stream.info.schema:
                self._stage(stream, columns, size, checked, copy=copy)
                return
        self._append_large(stream, schema, columns, checked, copy=copy)

    def _stage(
        self,
        stream: StreamWriter,
        columns: list[Array],
        size: int,
        marks: Mapping[str, Any],
        *,
        copy: bool,
    ) -> None:
        """Stage a few rows, and marks with them; the committer's lock is held."""
        if size:
            stream.staging.add(columns, size, copy=copy)
            self._committer.staged_bytes += size
        self._marks.update(marks)
        if size or marks:
            self._note_staged(stream)

    def _note_staged(self, stream: StreamWriter) -> None:
        if stream.staging.bytes >= STAGED_BYTES_MAX:
            self._seal_for(stream)
        else:
            self._committer.note_rows()
        self._committer.wait_for_room()

    def _append_large(
        self,
        stream: StreamWriter,
        schema: Schema,
        columns: list[Array],
        marks: Mapping[str, Any],
        *,
        copy: bool,
    ) -> None:
        parts = list(cut(columns, schema.number(schema.time)))
        if copy:
            items = [self._encoded(stream.info, schema, part) for part in parts]
        else:
            items = [self._encoding(stream.info, schema, part) for part in parts]
        with self._committer.lock:
            self.check_usable()
            self._seal_all() if marks else self._seal_for(stream)
            self._look_at(stream, columns[schema.number(schema.time)])
            for item in items:
                item.joined = bool(marks)
                self._committer.put(item)
            if marks:
                self._committer.put(Queued(marks=marks))
            self._committer.wait_for_room()

    def flush(self, marks: Mapping[str, Any] | None = None) -> None:
        """Return once all that was appended before, and the marks, are durable."""
        self.check_usable()
        checked = _checked(marks)
        with self._committer.lock:
            self.check_usable()
            self._seal_all()
            if checked:
                self._committer.put(Queued(marks=checked))
            self._committer.wait_until_durable()

    def close(self) -> None:
        """Flush, stop the threads, let the next writer in; raises what the flush raised."""
        if self._closed or self._generation != environment.generation:
            return
        try:
            self.flush()
        finally:
            with self._committer.lock:  # an append is either before, and committed, or refused
                self._closed = True
            self._committer.close()
            self._pool.shutdown()
            self._lock.release()

    def abandon(self) -> None:
        """Close without committing what was appended since the last flush."""
        if self._closed or self._generation != environment.generation:
            return
        with self._committer.lock:
            self._closed = True
            self._marks = {}
            for stream in self._streams.values():
                stream.staging = Staging(stream.info.schema)
            self._committer.forget()
        self._committer.close()
        self._pool.shutdown()
        self._lock.release()

    def check_usable(self) -> None:
        """StoreClosed where the handle was closed, or belongs to the process forked from."""
        if self._closed:
            raise StoreClosed(f"{self._layout.path}: this handle was closed; open the store again")
        if self._generation != environment.generation:
            raise StoreClosed(
                f"{self._layout.path}: opened before this process was forked; open it again here"
            )

    def _seal_for(self, stream: StreamWriter) -> None:
        """Queue a stream's staged rows; all rows and the marks, where marks wait with them."""
        if self._marks:
            self._seal_all()
        else:
            self._seal(stream, joined=False)

    def _seal_all(self) -> None:
        """Queue all staged rows, and what marks came with them, for one transaction."""
        for stream in self._streams.values():
            self._seal(stream, joined=bool(self._marks))
        if self._marks:
            self._committer.put(Queued(marks=self._marks))
            self._marks = {}

    def _seal(self, stream: StreamWriter, *, joined: bool) -> None:
        """Queue a stream's staged rows; the committer's lock is held."""
        if not stream.staging.bytes:
            return
        schema = stream.info.schema
        size = stream.staging.bytes
        columns = stream.staging.take()
        try:
            parts = list(cut(columns, schema.number(schema.time)))
            items = [self._encoding(stream.info, schema, part) for part in parts]
        except BaseException:  # out of memory: the rows stay staged
            stream.staging.add(columns, size, copy=False)
            raise
        self._committer.staged_bytes -= size
        self._look_at(stream, columns[schema.number(schema.time)])
        for item in items:
            item.joined = joined
            self._committer.put(item)

    def _look_at(self, stream: StreamWriter, times: Array) -> None:
        """Record what the times, as they arrived, say of gaps; the committer's lock is held."""
        settings = self._committer.state.settings
        for gap in stream.watch.see(times, _now_s(), settings):
            self._committer.put(Queued(change=gap))

    def _note_silence(self) -> None:
        """Record silences that last too long by now; the committer's lock is held."""
        for stream in self._streams.values():
            settings = self._committer.state.settings
            if gap := stream.watch.overdue(_now_s(), settings):
                self._committer.put(Queued(change=gap))

    def note(self, gap: Gap) -> None:
        """Record a gap; durable with the next commit."""
        self.check_usable()
        with self._committer.lock:
            self._committer.put(Queued(change=gaps.checked(gap)))

    def perform(self, what: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Have one of operations.py done, durably, between two commits."""
        self.check_usable()
        return self._committer.call(lambda active: operations.perform(active, what, arguments))

    def _encoded(self, info: StreamInfo, schema: Schema, columns: list[Array]) -> Queued:
        """A batch whose blocks are made now: the caller may reuse its arrays afterwards."""
        item = _item(info, schema, columns)
        largest = max(range(len(columns)), key=lambda number: columns[number].nbytes)
        others = [number for number in range(len(columns)) if number != largest]
        fields = schema.fields
        begins = _begins(columns, fields)
        rest = self._encode(
            [columns[n] for n in others], [fields[n] for n in others], begins, copy=True
        )
        mine = codec.encode(columns[largest], fields[largest], begins=begins)
        blocks = rest.result()
        item.blocks = [*blocks[:largest], mine, *blocks[largest:]]
        return item

    def _encoding(self, info: StreamInfo, schema: Schema, columns: list[Array]) -> Queued:
        """A batch whose blocks are made on other threads, from memory that nobody changes."""
        item = _item(info, schema, columns)
        begins = _begins(columns, schema.fields)
        item.blocks = self._encode(columns, schema.fields, begins, copy=False)
        return item

    def _encode(
        self, columns: list[Array], fields: Sequence[Field], begins: Sequence[int], *, copy: bool
    ) -> Future[list[codec.Block]]:
        """Blocks made on another thread; on this one where that costs less, or at exit."""
        if sum(column.nbytes for column in columns) > _HAND_OVER_BYTES:
            with suppress(RuntimeError):  # at exit the pool's threads have ended
                return self._pool.submit(_blocks, columns, fields, begins, copy=copy)
        made: Future[list[codec.Block]] = Future()
        made.set_result(_blocks(columns, fields, begins, copy=copy))
        return made


def _now_s() -> float:
    return ticks_ns() / 1e9


def _begins(columns: Sequence[Array], fields: Sequence[Field]) -> list[int]:
    """At which rows the frames of a batch begin, the same for all of its fields."""
    return codec.cuts(len(columns[0]), max(field.row_bytes for field in fields))


def _blocks(
    columns: list[Array], fields: Sequence[Field], begins: Sequence[int], *, copy: bool
) -> list[codec.Block]:
    return [
        codec.encode(column, field, copy=copy, begins=begins)
        for column, field in zip(columns, fields, strict=True)
    ]


def check_options(
    flush_interval_s: float | None, segment_bytes: int | None, settings: Settings | None
) -> None:
    """StoreError where a writer's option is out of bounds; before anything is made."""
    if settings is not None:
        settings.checked()
    if segment_bytes is not None and segment_bytes < SEGMENT_BYTES_MIN:
        raise StoreError(f"segment_bytes={segment_bytes}: use at least {SEGMENT_BYTES_MIN}")
    if flush_interval_s is not None and not 0 <= flush_interval_s <= _FLUSH_INTERVAL_S_MAX:
        raise StoreError(
            f"flush_interval_s={flush_interval_s}: use 0 to {_FLUSH_INTERVAL_S_MAX:.0f} "
            "seconds, or None where only flush() is to commit"
        )


def _item(info: StreamInfo, schema: Schema, columns: list[Array]) -> Queued:
    times = columns[schema.number(schema.time)]
    dtype = schema.time_dtype
    first, last = times[0], times[-1]
    batch = EncodedBatch(
        info.stream_id,
        time_to_ns(first, dtype),
        time_to_ns(last, dtype),
        plain_time(first),
        plain_time(last),
        len(times),
    )
    return Queued(size=size_of(columns), batch=batch)


def _columns(info: StreamInfo, batch: BatchLike) -> tuple[Schema, list[Array]]:
    """The columns, under the stream's schema or an earlier, shorter version of it."""
    schema = info.schema
    if len(batch) in info.versions[:-1]:
        earlier = schema.first(len(batch))
        if batch.keys() == set(earlier.names):
            return earlier, earlier.columns(batch)
    return schema, schema.columns(batch)


def _extended(info: StreamInfo, schema: Schema) -> StreamInfo:
    count = len(info.schema.fields)
    if schema.fields[:count] != info.schema.fields or schema.time != info.schema.time:
        raise SchemaError(
            f"stream {info.name!r} has the fields {', '.join(info.schema.names)} already: a new "
            "schema must begin with them unchanged; fields can only be added at the end "
            "(stream.add_fields). Use another stream for other data"
        )
    return info._replace(schema=schema, versions=(*info.versions, len(schema.fields)))


def _checked(marks: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A deep copy, as they will be read again: the caller may reuse what it passed."""
    checked = {}
    for name, value in (marks or {}).items():
        check_name(name, "mark")
        try:
            packed = codec.packed(value)
            checked[name] = codec.unpacked(packed, name)
        except (TypeError, ValueError, OverflowError) as error:
            raise SchemaError(
                f"mark {name!r}: {error}: use plain numbers, text or lists"
            ) from error
        if len(packed) > _MARK_BYTES_MAX:
            raise SchemaError(
                f"mark {name!r}: {len(packed)} bytes; a mark has at most {_MARK_BYTES_MAX}"
            )
    return checked
