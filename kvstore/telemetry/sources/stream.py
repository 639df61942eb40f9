"""A gateway's store as a source: its readings, in the order in which they were committed.

Store and forward: what a gateway took in while its link was down is sent on once the link is back,
exactly once, because the receiving sink keeps the position. An offset is the sequence of a
reading's batch times 2^24, and its row in it: ascending, not dense. A reading is sent as the event
that it was made of would be written, and is validated again.

Only what is durable is sent. What retention dropped before its turn is a SourceError, unless loss
was accepted: then it is reported, and reading goes on behind it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Self

import msgspec
import numpy as np

from kvstore.errors import CursorError, DamageError, GapError, SourceError
from kvstore.events import Event, Report
from kvstore.follow import POLL_S, Cursor, Followed, Follower
from kvstore.schema import Array, Batch
from kvstore.store import Store, open_store
from kvstore.telemetry.contract import TIMESTAMP
from kvstore.telemetry.records import Chunk, Place, Position
from kvstore.telemetry.sinks.identities import EXTRAS
from kvstore.telemetry.source import OnAssigned, OnRevoked

READINGS: Final = "readings"
_ROW_BITS: Final = 24  # a batch has at most 4 MB, and a reading more than 50 bytes
_EXACT_MAX: Final = float(2**53)


class StreamSource:
    """The readings of a store; ends at what is committed by then, or follows."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        follow: bool = False,
        accept_loss: bool = False,
        report: Report = lambda _: None,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self._path = os.fspath(path)
        self._follow = follow
        self._accept_loss = accept_loss
        self._report = report
        self._sleep = sleep
        self._until_s = 0.0
        self._is_idle = False  # all that is committed was read
        self._waiting: list[tuple[int, Batch]] = []  # offset of the first row, and the rows
        self._store: Store
        self._place: Place
        self._follower: Follower
        self._batches: Iterator[Followed] = iter(())

    def __enter__(self) -> Self:
        self._store = open_store(self._path)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._store.close()

    def start(self, on_assigned: OnAssigned, on_revoked: OnRevoked) -> None:  # noqa: ARG002
        """See Source; a store is never taken away."""
        if READINGS not in self._store:
            raise SourceError(
                f"{self._path}: has no stream {READINGS!r}; expected a store that "
                "`kvstore telemetry ingest --store` made"
            )
        store_id = self._store.info().store_id
        self._place = Place(f"kvstore:{store_id}/{READINGS}", 0)
        (position,) = on_assigned([self._place])
        first = max(position.next, 0)
        cursor = Cursor(store_id, READINGS, first >> _ROW_BITS)
        self._skip = first & ((1 << _ROW_BITS) - 1)
        stream = self._store[READINGS]
        try:
            self._follower = stream.follow(
                "start" if position.next == -1 else cursor,
                stop=self._should_stop,
                sleep=self._wait,
                on_damage=self._lost,
                on_gap=self._lost,
            )
        except CursorError as error:
            raise SourceError(f"{self._path}: is behind what was read of it: {error}") from error

    def poll(self, *, events_max: int, bytes_max: int, wait_s: float) -> list[Chunk] | None:
        """See Source. A reading is taken for 128 bytes."""
        self._until_s = time.monotonic() + wait_s
        rows_max = max(min(events_max, bytes_max // 128), 1)
        if not self._waiting:
            self._is_idle = False
            followed = self._next()
            if followed is None:
                return [] if self._follow else None
            self._waiting.append(self._numbered(followed))
        offset, batch = self._waiting.pop()
        rows = len(batch[TIMESTAMP])
        if rows > rows_max:
            rest = {name: column[rows_max:] for name, column in batch.items()}
            self._waiting.append((offset + rows_max, rest))
            batch = {name: column[:rows_max] for name, column in batch.items()}
        return [self._chunk(offset, batch)]

    def committed(self, positions: Sequence[Position]) -> None:
        """See Source; there is nobody to tell."""

    def ends(self) -> dict[Place, int]:
        """See Source: offsets are not dense, so that this counts no rows."""
        return {}

    def _next(self) -> Followed | None:
        """The next batch, or None where none comes in time."""
        for _ in range(2):  # an iterator that has ended is made anew
            for followed in self._batches:
                return followed
            self._batches = iter(self._follower)
        return None

    def _should_stop(self) -> bool:
        return self._is_idle and (not self._follow or time.monotonic() >= self._until_s)

    def _wait(self, _: float) -> None:
        self._is_idle = True
        if self._follow:
            self._sleep(min(POLL_S, max(self._until_s - time.monotonic(), 0.0)))

    def _numbered(self, followed: Followed) -> tuple[int, Batch]:
        skip, self._skip = self._skip, 0
        offset = ((followed.cursor.sequence - 1) << _ROW_BITS) + skip
        return offset, {name: column[skip:] for name, column in followed.batch.items()}

    def _chunk(self, offset: int, batch: Batch) -> Chunk:
        rows = len(batch[TIMESTAMP])
        is_last = not self._waiting
        following = ((offset >> _ROW_BITS) + 1) << _ROW_BITS if is_last else offset + rows
        return Chunk(
            self._place,
            np.arange(offset, offset + rows),
            events_of(batch),
            Position(self._place, following),
            appended_us=batch["_ingested"].view(np.int64),
        )

    def _lost(self, error: DamageError | GapError) -> None:
        if not self._accept_loss:
            raise SourceError(
                f"{self._path}: readings were lost before they were sent on: {error}. To go on "
                "behind them: --accept-loss"
            ) from error
        self._skip = 0
        self._report(Event("warning", "lost", f"{self._path}: not sent on: {error}", {}))


def events_of(batch: Batch) -> list[bytes]:
    """Each reading as JSON: its values that are not null, and its extras beside them."""
    names = [name for name in batch if not name.startswith("_") and name != TIMESTAMP]
    stamps = np.datetime_as_string(batch[TIMESTAMP], unit="us").tolist()
    columns = [_plain(batch[name]) for name in names]
    encode = msgspec.json.Encoder().encode
    events = []
    for stamp, extras, *values in zip(stamps, batch[EXTRAS].tolist(), *columns, strict=True):
        event = {n: value for n, value in zip(names, values, strict=True) if value is not None}
        event[TIMESTAMP] = f"{stamp}Z"
        encoded = encode(event)
        if extras is not None:  # spliced, not decoded: its numbers stay as they are written
            encoded = encoded[:-1] + b"," + extras.encode()[1:]
        events.append(encoded)
    return events


def _plain(column: Array) -> list[Any]:
    """Values as Python's own; whole numbers as integers, null as None."""
    if column.dtype == object:
        found: list[Any] = column.tolist()
        return found
    whole = (column == np.floor(column)) & (np.abs(column) < _EXACT_MAX)
    null = np.isnan(column)
    return [
        None if is_null else int(value) if is_whole else value
        for value, is_whole, is_null in zip(
            column.tolist(), whole.tolist(), null.tolist(), strict=True
        )
    ]
