"""``recover``: everything that can be read out of a damaged store, into a new one.

The source is only read, and never through LMDB (salvage.py). The new store has an id of its own,
as its batches are numbered anew: a cursor or a backup of the old one does not fit it. It is made
under another name and takes its own once complete, so a recovery cut short leaves no store.

A batch is brought back whole, but for lost fields that read honestly as never stored (NaN, NaT,
None or the declared fill). Rows that a killed writer left uncommitted are not brought back, where
the last commit can still be told.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvstore.check import Damage, ranges_text
from kvstore.environment import translated
from kvstore.errors import KvstoreError, StoreError, StoreFormatError, StoreLocked, StoreNotFound
from kvstore.layout import Layout, sync_folder
from kvstore.salvage import Lost, Salvaged, SegmentFile
from kvstore.segment import Entry, Sealed, State, StreamInfo, Totals
from kvstore.store import Store, open_store
from kvstore.timestamps import format_time, typed_time

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all
_DAMAGED: Final = "its structure is damaged; what follows was found page by page"

_UNDEFINED: Final = (
    "found, but the stream's definition is lost: name a sound store with the same streams, such "
    "as a backup, with like= (--like)"
)


class RecoverReport(NamedTuple):
    """What came out. losses: what did not. notes: what should be known beside."""

    path: str
    target: str
    rows: int
    batches: int
    losses: tuple[Damage, ...]
    notes: tuple[str, ...]


def recover(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RecoverReport:
    """Bring what a store still holds into a new one at ``target``, which must not exist.

    The source may lack ``store.msgpack`` and any of its segments.
    like: a sound store with the same streams, a backup for instance. Where all definitions of
    a stream are lost, as at the end of a segment cut short that was the only one, its are taken:
    without any, blocks are bytes without names and types.

    Raises StoreNotFound,
    StoreLocked while a writer has it, DiskFull, and StoreError where nothing can be read.
    """
    layout, final = Layout(source), Path(target).absolute()
    _check_paths(layout, final)
    fresh = final.with_name(f".{final.name}.recovering")
    with translated(fresh):
        shutil.rmtree(fresh, ignore_errors=True)  # of a recovery that was cut short
        try:
            report = _Recovery(layout, _definitions(like), on_progress).run(fresh, str(target))
            fresh.rename(final)
            sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return report


def _definitions(like: str | os.PathLike[str] | None) -> dict[int, StreamInfo]:
    if like is None:
        return {}
    with open_store(like) as store:
        return {info.stream_id: info for info in store.state().streams.values()}


def _check_paths(layout: Layout, final: Path) -> None:
    if not layout.segments.is_dir():
        raise StoreNotFound(f"{layout.path}: no store here, not even a damaged one: no segments")
    if final.exists():
        raise StoreError(f"{final}: there already: name a path where nothing is")
    if not final.parent.is_dir():
        raise StoreError(f"{final.parent}: no such folder to make the new store in")
    if layout.has_writer():
        raise StoreLocked(
            f"{layout.path}: a process is writing to this store: stop it first, or make a copy "
            "with kvstore backup"
        )


class _Recovery:
    """One run."""

    def __init__(self, layout: Layout, like: dict[int, StreamInfo], on_progress: OnProgress | None):
        self._layout = layout
        self._like = like
        self._on_progress = on_progress
        self._losses: list[Damage] = []
        self._notes: list[str] = []
        self._store_id = b""
        self._infos: dict[int, StreamInfo] = {}
        self._sealed: dict[int, Sealed] = {}
        self._files: dict[int, Path] = {}  # by the number that the segment itself says
        self._newest: State | None = None
        self._rows = self._batches = 0

    def run(self, fresh: Path, target: str) -> RecoverReport:
        self._survey()
        self._infos = {**self._like, **self._infos}
        with open_store(fresh, "w") as store:
            for info in sorted(self._infos.values()):
                for count in info.versions:
                    store.stream(info.name, info.schema.first(count))
            total = max(sum(file.stat().st_size for file in self._files.values()), 1)
            done = 0
            for number in sorted({*self._files, *self._sealed}):
                self._segment(store, number)
                if number in self._files:
                    done += self._files[number].stat().st_size
                if self._on_progress:
                    self._on_progress(done, total)
            store.flush(marks=self._newest.marks if self._newest else {})
        return RecoverReport(
            str(self._layout.path),
            target,
            self._rows,
            self._batches,
            tuple(self._losses),
            tuple(self._notes),
        )

    # ---- what there is ----

    def _survey(self) -> None:
        """Read each segment's meta table: ids, streams, marks, summaries."""
        states = {}
        for number in self._layout.numbers():
            path = self._layout.segment_path(number)
            try:
                with SegmentFile(path, number) as file:
                    states[number] = (file.state, file.is_stated)
            except KvstoreError as error:
                self._losses.append(Damage(number, str(error)))
        self._store_id = self._find_store_id([state for state, _ in states.values()])
        for number, (state, is_stated) in states.items():
            if self._is_ours(number, state, states.keys()):
                self._files[state.number] = self._layout.segment_path(number)
                self._learn(state, is_stated=is_stated)
        if self._newest is None or self._newest.number != max(self._files, default=0):
            self._notes.append(
                "the newest segment's meta table is damaged: how much it held, and the marks of "
                "the last commit, are not known"
            )
            newest = max(self._files, default=0)
            self._losses.append(Damage(newest, "rows at its end may be lost without a trace"))

    def _find_store_id(self, states: list[State]) -> bytes:
        with suppress(StoreNotFound, StoreFormatError):
            return self._layout.store_id()
        self._notes.append(f"{self._layout.path}: store.msgpack is missing or damaged")
        return next((state.store_id for state in reversed(states) if state.store_id), b"")

    def _is_ours(self, number: int, state: State, others: Collection[int]) -> bool:
        if state.store_id and self._store_id and state.store_id != self._store_id:
            what = f"the file is of the store {state.store_id.hex()}: left out"
        elif state.number != number and state.number in others:
            what = f"the file holds segment {state.number}, which is there: left out"
        else:
            return True
        self._losses.append(Damage(number, what))
        return False

    def _learn(self, state: State, *, is_stated: bool) -> None:
        for info in state.streams.values():
            known = self._infos.get(info.stream_id)
            if known is None or known.versions[-1] <= info.versions[-1]:
                self._infos[info.stream_id] = info
        if is_stated and (self._newest is None or state.number > self._newest.number):
            self._newest, self._sealed = state, state.sealed

    # ---- one segment ----

    def _segment(self, store: Store, number: int) -> None:
        summary = self._sealed.get(number)
        if number not in self._files:
            totals = summary.totals if summary else {}
            self._lose_all(number, totals, "the segment is missing")
            return
        if summary is None and self._newest is not None and number < self._newest.number:
            return  # dropped, but for the unlink
        with SegmentFile(self._files[number], number) as file:
            expected = summary.totals if summary else file.state.totals
            file.load(expected, is_exact=summary is not None or file.is_stated)
            if file.problems:
                self._notes.append(f"segment {number}: {_DAMAGED} ({file.problems[0]})")
            seen = self._bring(store, number, file)
        for stream_id, per_stream in expected.items():
            self._find_holes(number, stream_id, per_stream, seen.get(stream_id, {}))

    def _bring(self, store: Store, number: int, file: SegmentFile) -> dict[int, dict[int, Entry]]:
        """Append what can be read; all entries seen, by stream and sequence."""
        seen: dict[int, dict[int, Entry]] = {}
        for stream_id, entries in file.unknown(self._infos).items():
            rows = sum(entry.rows for entry in entries)
            self._lose(number, stream_id, _UNDEFINED, ("", ""), rows)
            seen[stream_id] = {entry.sequence: entry for entry in entries}
        for info, result in file.batches(self._infos):
            seen.setdefault(info.stream_id, {})[result.entry.sequence] = result.entry
            if isinstance(result, Lost):
                self._lose_entry(number, info, result.entry, result.field, result.why)
                continue
            store.stream(info.name).append(result.batch, copy=False)
            self._rows += result.entry.rows
            self._batches += 1
            self._note_filled(number, info, result)
        return seen

    def _note_filled(self, number: int, info: StreamInfo, result: Salvaged) -> None:
        for field, why in result.filled.items():
            self._lose_entry(number, info, result.entry, field, f"{why}; reads as never stored")

    # ---- what is lost ----

    def _find_holes(
        self, number: int, stream_id: int, totals: Totals, seen: dict[int, Entry]
    ) -> None:
        wanted = range(totals.next_sequence - totals.batches, totals.next_sequence)
        missing = [sequence for sequence in wanted if sequence not in seen]
        if not missing:
            return
        rows = max(totals.rows - sum(entry.rows for entry in seen.values()), 0)
        if not seen:
            self._lose_all(number, {stream_id: totals}, "nothing of it can be read")
            return
        before = [seen[s] for s in seen if s < missing[0]]
        after = [seen[s] for s in seen if s > missing[-1]]
        start = max((each.last for each in before), default=totals.first)
        stop = min((each.first for each in after), default=totals.last)
        what = f"batches {ranges_text(missing)}, which arrived between rows of these times"
        self._lose(number, stream_id, what, (start, stop), rows)

    def _lose_all(self, number: int, per_stream: dict[int, Totals], what: str) -> None:
        for stream_id, totals in per_stream.items():
            if totals.rows:
                self._lose(number, stream_id, what, (totals.first, totals.last), totals.rows)

    def _lose(
        self, number: int, stream_id: int, what: str, span: tuple[Any, Any], rows: int
    ) -> None:
        info = self._infos.get(stream_id)
        name, ends = f"number {stream_id}", ("", "")
        if info is not None:
            name, ends = info.name, _texts(info, span)
        self._losses.append(Damage(number, what, name, "", *ends, rows))

    def _lose_entry(
        self, number: int, info: StreamInfo, entry: Entry, field: str, why: str
    ) -> None:
        ends = _texts(info, (entry.first, entry.last))
        self._losses.append(Damage(number, why, info.name, field, *ends, entry.rows))


def _texts(info: StreamInfo, span: tuple[Any, Any]) -> tuple[str, str]:
    dtype = info.schema.time_dtype
    start, stop = sorted(span)
    return _text(start, dtype), _text(stop, dtype)


def _text(plain: Any, dtype: Any) -> str:
    return format_time(typed_time(plain, dtype), dtype)
