"""Following a stream: every committed batch once, in commit order, as it is committed.

    state of the store -> segment that holds the next sequence -> its order table -> batches

A follower holds a sequence, nothing else: no transaction and no file stays open while it waits
or while its caller works, so it pins no space however slow it is. It looks for news every few
milliseconds, which costs a stat and a glance at LMDB's last commit. What it should have
delivered and cannot is reported, as damage or as a gap, never passed over in silence. What it
delivers is durable: a power cut takes no batch back, and so gives no sequence to another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from kvstore import reading
from kvstore.entries import Entry
from kvstore.environment import translated
from kvstore.errors import CursorError, DamageError, GapError, NoFillError, StoreFormatError
from kvstore.layout import write_durably
from kvstore.schema import Batch, Schema
from kvstore.segment import OnDamage, Segment
from kvstore.state import State, Totals

POLL_S: Final = 0.01
COPIED_BYTES_MAX: Final = 8 << 20  # taken out at once: opening a sealed segment has its price
_DIGITS_MAX: Final = 20  # of 2**64
SAVE_INTERVAL_S: Final = 0.1  # a sync for each batch would be most of the work on a busy disk
OnGap: TypeAlias = Callable[[GapError], None]


class Cursor(NamedTuple):
    """A place in a stream: ``sequence`` is that of the next batch to deliver."""

    store_id: str
    stream: str
    sequence: int

    def __str__(self) -> str:
        """The cursor as text, for files and marks; ``parse`` reads it."""
        return f"{self.store_id}:{self.sequence}:{self.stream}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The inverse of str(cursor); CursorError for what is none."""
        store_id, _, rest = text.strip().partition(":")
        sequence, _, stream = rest.partition(":")
        if not (store_id and stream and sequence.isdecimal() and len(sequence) <= _DIGITS_MAX):
            raise CursorError(
                f"cursor {text[:100]!r} cannot be read: expected store id:sequence:stream; give "
                "the text of a cursor, or begin anew at 'start' or 'end'"
            )
        return cls(store_id, stream, int(sequence))


class Followed(NamedTuple):
    """A batch, and the place behind it: whoever has the batch goes on from ``cursor``."""

    cursor: Cursor
    batch: Batch


From: TypeAlias = Cursor | Literal["start", "end"]


class Source(NamedTuple):
    """The stream of an open store that is followed.

    state: the store as of the last commit. open_segment: a handle for the caller to close.
    """

    stream: str
    state: Callable[[], State]
    open_segment: Callable[[int], Segment]


class Follower:
    """Iterates over Followed; ends when ``stop()`` is true, else never.

    stop: asked before each batch and after each wait. sleep: waits that many seconds.
    on_damage, on_gap: told what cannot be delivered; if they return, the next batch follows.
    """

    def __init__(
        self,
        source: Source,
        from_: From,
        *,
        fields: Sequence[str] | None,
        poll_s: float,
        stop: Callable[[], bool],
        verify: bool,
        on_damage: OnDamage,
        on_gap: OnGap,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self._source = source
        self._fields = fields
        self._poll_s = poll_s
        self._stop = stop
        self._verify = verify
        self._on_damage = on_damage
        self._on_gap = on_gap
        self._sleep = sleep
        self.cursor = _begin(source, from_)

    def __iter__(self) -> Iterator[Followed]:
        while not self._stop():
            state = self._source.state()
            end = _next_sequence(state, self.cursor.stream)
            if self.cursor.sequence < end:
                yield from self._page(state)
            elif self.cursor.sequence == end:
                self._sleep(self._poll_s)
            else:
                raise _ahead(self.cursor, end)  # an older copy was put in the store's place

    def _page(self, state: State) -> Iterator[Followed]:
        """The next batches of one segment; what is wrong with it as a whole is a gap."""
        end, number = _holder(state, self.cursor)
        try:
            copied = self._looked_at(state, number, end)
        except (DamageError, StoreFormatError) as error:
            # Dropped since the state was read? Then the state says so by now.
            now = self._source.state()
            if number == now.number or number in now.sealed:
                self._skip_to(end, f"{error}")
            return
        for sequence, batch in copied:
            if self._stop():
                return
            self._skip_to(sequence)
            self.cursor = self.cursor._replace(sequence=sequence + 1)
            if isinstance(batch, DamageError):
                self._on_damage(batch)
            else:
                yield Followed(self.cursor, batch)
        if not copied:
            self._skip_to(end)

    def _looked_at(
        self, state: State, number: int, end: int
    ) -> list[tuple[int, Batch | DamageError]]:
        """Some of a segment's batches; what seems damaged in the active one is looked at twice.

        Read without a lock file while a writer began, what that wrote over looks damaged; and
        what a follower passes over is lost to it for good.
        """
        if number == state.number:
            with suppress(DamageError, StoreFormatError):
                copied = self._copied(state, number, end)
                if not any(isinstance(batch, DamageError) for _, batch in copied):
                    return copied
        return self._copied(state, number, end)

    def _copied(self, state: State, number: int, end: int) -> list[tuple[int, Batch | DamageError]]:
        """Some of a segment's batches from the cursor on; the segment is closed again."""
        info = state.streams[self.cursor.stream]
        copied: list[tuple[int, Batch | DamageError]] = []
        size = 0
        segment = self._source.open_segment(number)
        try:
            if number == state.number:
                # Else a power cut could take back a batch that was delivered, and its sequence,
                # given to another one, would be passed over by the receiver's cursor.
                segment.environment.wait_until_durable(state.commit)
            for sequence, found in segment.arrivals(info.stream_id, self.cursor.sequence, end):
                copied.append((sequence, self._batch(state, segment, found)))
                size += found.raw_bytes if isinstance(found, Entry) else 0
                if size >= COPIED_BYTES_MAX:
                    break
        finally:
            segment.close()
        return copied

    def _batch(
        self, state: State, segment: Segment, found: Entry | DamageError
    ) -> Batch | DamageError:
        schema = state.streams[self.cursor.stream].schema
        if isinstance(found, DamageError):
            return DamageError(f"stream {self.cursor.stream!r}, {found}")
        names = schema.names if self._fields is None else self._fields
        try:
            return self._filled(schema, segment, found, names)
        except NoFillError:
            if self._fields is not None:
                raise
            # Asked for all fields: those that it has. Else none could pass a batch of a device
            # that does not send a newer field.
            return self._filled(schema, segment, found, names[: len(found.blocks)])

    def _filled(
        self, schema: Schema, segment: Segment, found: Entry, names: Sequence[str]
    ) -> Batch | DamageError:
        numbers = [schema.number(name) for name in names]
        try:
            columns = reading.filled(schema, segment, found, numbers, verify=self._verify)
        except (DamageError, StoreFormatError) as error:
            return reading.damage(self.cursor.stream, schema, found, error)
        return dict(zip(names, columns, strict=True))

    def _skip_to(self, sequence: int, why: str = "dropped, or cut out of a damaged store") -> None:
        first = self.cursor.sequence
        if sequence <= first:
            return
        self.cursor = self.cursor._replace(sequence=sequence)
        self._on_gap(
            GapError(
                f"stream {self.cursor.stream!r}: {sequence - first} batches, {first} to "
                f"{sequence - 1} by sequence, are not in the store any more: {why}",
                first=first,
                stop=sequence,
            )
        )


class CursorFile:
    """A cursor kept in a file, which is replaced as a whole: at-least-once delivery.

    Save a cursor only once its batch is handed over. ``note`` does so at most every 100 ms, for
    each takes a sync; ``save`` does it at once, before a wait and at the end.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._path = path
        self._clock = clock
        self._due_s = clock() + SAVE_INTERVAL_S
        self._saved = self._noted = self._load()

    @property
    def cursor(self) -> Cursor | None:
        """The cursor last noted, at first the one in the file; None where there is none."""
        return self._noted

    def _load(self) -> Cursor | None:
        with translated(self._path):
            try:
                text = self._path.read_text()
            except FileNotFoundError:
                return None
            except UnicodeDecodeError as error:
                text = repr(error.object)
        try:
            return Cursor.parse(text)
        except CursorError as error:
            raise CursorError(f"{self._path}: {error}") from error

    def note(self, cursor: Cursor) -> None:
        """Everything before the cursor is handed over."""
        self._noted = cursor
        if self._clock() >= self._due_s:
            self.save()

    def save(self) -> None:
        """Make what was noted durable."""
        if self._noted is not None and self._noted != self._saved:
            write_durably(self._path, f"{self._noted}\n".encode())
            self._saved = self._noted
            self._due_s = self._clock() + SAVE_INTERVAL_S


def _begin(source: Source, from_: From) -> Cursor:
    """The cursor to begin at; CursorError for one that does not belong here."""
    state = source.state()
    end = _next_sequence(state, source.stream)
    here = Cursor(state.store_id.hex(), source.stream, end)
    if from_ == "end":
        return here
    if from_ == "start":
        return here._replace(sequence=min((begin for begin in _begins(state, here)), default=end))
    if not isinstance(from_, Cursor):
        raise CursorError(f"from_={from_!r}: use 'start', 'end' or a Cursor")
    if from_[:2] != here[:2]:
        raise CursorError(
            f"cursor {from_} belongs to another stream: this one is {here.stream!r} of the store "
            f"{here.store_id}; use its own cursor, or begin anew at 'start' or 'end'"
        )
    if from_.sequence > end:
        raise _ahead(from_, end)
    return from_


def _ahead(cursor: Cursor, end: int) -> CursorError:
    return CursorError(
        f"cursor {cursor} is ahead of the store, whose next batch is {end}: was the store "
        "restored from an older copy? Begin anew at 'start' or 'end'"
    )


def _totals(state: State, stream: str) -> Iterator[tuple[int, Totals]]:
    """Number and totals of each segment that may hold rows of the stream."""
    if info := state.streams.get(stream):
        for sealed in state.sealed.values():
            yield sealed.number, sealed.totals.get(info.stream_id, Totals())
        yield state.number, state.totals.get(info.stream_id, Totals())


def _begins(state: State, here: Cursor) -> Iterator[int]:
    for _, totals in _totals(state, here.stream):
        if totals.batches:
            yield totals.next_sequence - totals.batches


def _next_sequence(state: State, stream: str) -> int:
    info = state.streams.get(stream)  # the active segment carries the greatest
    return state.totals.get(info.stream_id, Totals()).next_sequence if info else 0


def _holder(state: State, cursor: Cursor) -> tuple[int, int]:
    """The segment where the cursor's batch is, or the first one after: (its end, its number)."""
    return min(
        (totals.next_sequence, number)
        for number, totals in _totals(state, cursor.stream)
        if totals.next_sequence > cursor.sequence
    )
