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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvstore import retention
from kvstore.copies import locked_folder
from kvstore.damaged import damage_gaps, note
from kvstore.entries import Entry
from kvstore.environment import translated
from kvstore.errors import KvstoreError, StoreError, StoreFormatError, StoreLocked, StoreNotFound
from kvstore.layout import Layout, sync_folder
from kvstore.salvage import Lost, Salvaged, SegmentFile
from kvstore.settings import Settings
from kvstore.state import Sealed, State, StreamInfo, Totals
from kvstore.store import Store, open_store
from kvstore.untrusted import Damage, ranges_text, span_texts

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
    with translated(fresh), locked_folder(fresh):
        try:
            _empty(fresh)  # of a recovery that was cut short
            report = _Recovery(layout, _definitions(like), on_progress).run(fresh, str(target))
            fresh.rename(final)
            sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return report


def _empty(folder: Path) -> None:
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


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
    if final.resolve().is_relative_to(layout.path.resolve()):
        raise StoreError(f"{final}: inside of the damaged store, which is not written to")
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
        self._rows = self._batches = self._done_bytes = self._total_bytes = 0

    def run(self, fresh: Path, target: str) -> RecoverReport:
        seen_writer = self._layout.writer()
        self._survey()
        self._define()
        limits = self._newest.settings if self._newest else Settings()
        size = retention.segment_bytes(limits, None, Layout(fresh.parent).disk_bytes())
        # Without limits until all is there; and as it arrives now, time steps anywhere.
        unlimited = Settings(clock_step_s=None)
        with open_store(fresh, "w", segment_bytes=size, settings=unlimited) as store:
            for info in sorted(self._infos.values()):
                for count in info.versions:
                    store.stream(info.name, info.schema.first(count))
            self._bring_all(store)
            self._carry_over(store)
        if self._layout.writer() != seen_writer:
            self._losses.append(Damage(0, "a process began to write to the store meanwhile"))
        return RecoverReport(
            str(self._layout.path),
            target,
            self._rows,
            self._batches,
            tuple(self._losses),
            tuple(self._notes),
        )

    def _define(self) -> None:
        """Complete the definitions from those of the like store; never two of one name."""
        names: dict[str, int] = {}
        infos = sorted(self._infos.items()) + sorted(self._like.items())
        self._infos = {}
        for stream_id, info in infos:
            if names.setdefault(info.name, stream_id) == stream_id:
                self._infos.setdefault(stream_id, info)

    def _carry_over(self, store: Store) -> None:
        """Marks, pins, gaps and settings; what was lost becomes gaps, too."""
        state = self._newest or State(b"", 0, 0)
        store.flush(marks=state.marks)
        for _, pin in sorted(state.pins.items()):
            store.pin(pin.start_ns, pin.stop_ns, pin.label, unit="ns")
        state = replace(state, streams={info.name: info for info in self._infos.values()})
        gaps = [*retention.dropped_gaps(state), *state.gaps.values()]
        note(store, [*gaps, *damage_gaps(state, self._losses)])
        store.set(**state.settings._asdict())

    def _bring_all(self, store: Store) -> None:
        sizes = {number: file.stat().st_size for number, file in self._files.items()}
        self._total_bytes = max(sum(sizes.values()), 1)
        done_bytes = 0
        for number in sorted({*self._files, *self._sealed}):
            self._segment(store, number)
            done_bytes += sizes.get(number, 0)
            self._progress(max(done_bytes - self._done_bytes, 0))

    def _progress(self, size: int) -> None:
        self._done_bytes = min(self._done_bytes + size, self._total_bytes)
        if self._on_progress:
            self._on_progress(self._done_bytes, self._total_bytes)

    # ---- what there is ----

    def _survey(self) -> None:
        """Read each segment's meta table: ids, streams, and of the newest marks and summaries."""
        states: dict[int, State] = {}
        stated = set()
        for number in self._layout.numbers():
            try:
                with SegmentFile(self._layout.segment_path(number), number) as file:
                    states[number] = file.state
                    file.state.sealed = {}  # of all segments together they would fill the memory
                    stated |= {file.state.number} if file.is_stated else set()
            except KvstoreError as error:
                if isinstance(error.__cause__, PermissionError):
                    raise  # that can be had
                self._losses.append(Damage(number, str(error)))
        self._store_id = self._find_store_id(list(states.values()))
        for number, state in states.items():
            if self._is_ours(number, states):
                self._files[state.number] = self._layout.segment_path(number)
                self._learn(state)
        self._read_newest(max(stated & self._files.keys(), default=0))

    def _read_newest(self, number: int) -> None:
        if number:
            with SegmentFile(self._files[number], number) as file:
                self._newest, self._sealed = file.state, file.state.sealed
        if number != max(self._files, default=0) or not number:
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

    def _is_ours(self, number: int, states: dict[int, State]) -> bool:
        """Whether to take a file; renamed ones go by what they say, unless another is it."""
        state = states[number]
        same = [each for each, other in states.items() if other.number == state.number]
        if state.store_id and self._store_id and state.store_id != self._store_id:
            what = f"the file is of the store {state.store_id.hex()}: left out"
        elif number != (state.number if state.number in same else same[0]):
            what = f"the file holds segment {state.number}, which is there: left out"
        else:
            return True
        self._losses.append(Damage(number, what))
        return False

    def _learn(self, state: State) -> None:
        for info in state.streams.values():
            known = self._infos.get(info.stream_id)
            if known is None or known.versions[-1] <= info.versions[-1]:
                self._infos[info.stream_id] = info

    # ---- one segment ----

    def _segment(self, store: Store, number: int) -> None:
        summary = self._sealed.get(number)
        if number not in self._files:
            totals = summary.totals if summary else {}
            self._lose_all(number, totals, "the segment is missing")
            return
        if summary is None and self._newest is not None and number < self._newest.number:
            what = "left out: the newest segment says that it was dropped, only its file is left"
            self._notes.append(f"segment {number}: {what}")
            return
        with SegmentFile(self._files[number], number) as file:
            expected = summary.totals if summary else file.state.totals
            file.load(expected, is_exact=summary is not None or file.is_stated)
            if file.problems:
                self._notes.append(f"segment {number}: {_DAMAGED} ({file.problems[0]})")
            for stream_id in sorted({*expected, *file.streams()}):
                self._bring(store, file, stream_id, expected.get(stream_id, Totals()))

    def _bring(self, store: Store, file: SegmentFile, stream_id: int, totals: Totals) -> None:
        """Append what can be read of a stream, and say what is missing."""
        tally = _Tally(totals)
        info = self._infos.get(stream_id)
        if info is None:
            for entry in file.entries(stream_id):
                tally.add(entry)
            self._lose(file.number, stream_id, _UNDEFINED, ("", ""), tally.rows)
        else:
            for result in file.batches(info):
                tally.add(result.entry)
                self._append(store, file.number, info, result)
                self._progress(sum(block[2] for block in result.entry.blocks))
        missing = tally.missing()
        if not tally.rows:
            self._lose_all(file.number, {stream_id: totals}, "nothing of it can be read")
        elif missing:
            what = f"batches {ranges_text(missing)}, which arrived between rows of these times"
            rows = max(totals.rows - tally.rows, 0)
            self._lose(file.number, stream_id, what, tally.around(), rows)

    def _append(self, store: Store, number: int, info: StreamInfo, result: Salvaged | Lost) -> None:
        if isinstance(result, Lost):
            self._lose_field(number, info, result.entry, result.field, result.why)
            return
        store.stream(info.name).append(result.batch, copy=False)
        self._rows += result.entry.rows
        self._batches += 1
        for field, why in result.filled.items():
            what = f"{why}; reads as never stored"
            self._lose_field(number, info, result.entry, field, what)

    # ---- what is lost ----

    def _lose_all(self, number: int, per_stream: dict[int, Totals], what: str) -> None:
        for stream_id, totals in per_stream.items():
            if totals.rows:
                self._lose(number, stream_id, what, (totals.first, totals.last), totals.rows)

    def _lose(
        self, number: int, stream_id: int, what: str, span: tuple[Any, Any], rows: int
    ) -> None:
        info = self._infos.get(stream_id)
        name = info.name if info else f"number {stream_id}"
        self._losses.append(Damage(number, what, name, "", *span_texts(info, span), rows))

    def _lose_field(
        self, number: int, info: StreamInfo, entry: Entry, field: str, what: str
    ) -> None:
        ends = span_texts(info, (entry.first, entry.last))
        self._losses.append(Damage(number, what, info.name, field, *ends, entry.rows))


class _Tally:
    """Batches of a stream as they come, in order of arrival: how many rows, and what is missing."""

    def __init__(self, totals: Totals):
        self.rows = 0
        self._totals = totals
        self._next = totals.next_sequence - totals.batches
        self._missing: list[tuple[int, int]] = []
        self._before = self._after = None  # latest time before what is missing, earliest after it

    def add(self, entry: Entry) -> None:
        self.rows += entry.rows
        if entry.sequence > self._next and self._next < self._totals.next_sequence:
            self._skip(entry.sequence)
        self._next = max(self._next, entry.sequence + 1)
        if not self._missing:
            self._before = entry.last if self._before is None else max(self._before, entry.last)
        else:
            self._after = entry.first if self._after is None else min(self._after, entry.first)

    def _skip(self, to: int) -> None:
        self._missing.append((self._next, to - 1))
        self._after = None

    def missing(self) -> list[tuple[int, int]]:
        """First and last number of each stretch; after the last batch."""
        if self._next < self._totals.next_sequence:
            self._skip(self._totals.next_sequence)
        return self._missing

    def around(self) -> tuple[Any, Any]:
        """Times between which all that arrived."""
        before = self._totals.first if self._before is None else self._before
        return before, self._totals.last if self._after is None else self._after
