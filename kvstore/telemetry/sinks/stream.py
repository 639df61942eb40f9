"""The embedded sink: a store whose streams hold readings, dead letters and counts. No server.

    readings         the typed columns of the contract, and what stream_tables.py adds to them
    dead_letters     rejected events, raw; letter_changes: what became of them since
    counts           figures of quality, added up when they are read
    devices, origins numbers for what would otherwise be text in every row
    marks            telemetry/place/…: position, token and epoch; telemetry/commits: outcomes

All that a commit brings, its marks included, is one transaction of the store: it is opened with
``flush_interval_s=None``, and what could not be finished is given up by ``abandon``, never
committed by closing. The store's writer lock lets one process write; the epochs fence workers in
it from each other, and a process from its own past.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

import numpy as np

from kvstore.errors import CommitUnknown, Fenced, KvstoreError, SinkError, StoreError
from kvstore.settings import Settings
from kvstore.store import Store, open_store
from kvstore.telemetry import counts as quality
from kvstore.telemetry.contract import Contract
from kvstore.telemetry.counts import HOUR_US, named, summed
from kvstore.telemetry.records import (
    Claim,
    Count,
    DeadLetter,
    Fate,
    LetterChange,
    Outcome,
    Place,
    Position,
    Readings,
    Reason,
    Rejection,
    State,
    Work,
)
from kvstore.telemetry.sinks import stream_letters as letters
from kvstore.telemetry.sinks import stream_tables as tables
from kvstore.telemetry.sinks.identities import Identities, New, Stored, digests_of
from kvstore.telemetry.sinks.stream_places import Held, mark, mark_name, places_in, unknown

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMMITS_KEPT: Final = 16  # one process settles its last commit before the next: one would do
_COMMITS: Final = "telemetry/commits"
T = TypeVar("T")
_READ_ROWS_MAX: Final = 100_000  # given out at once, where a stretch of late data is merged


class StreamSink:
    """A store as a sink. ``mode="r"``: look only, beside whoever writes."""

    def __init__(self, path: str | os.PathLike[str], contract: Contract, mode: Literal["r", "w"]):
        self._path = os.fspath(path)
        self._contract = contract
        self._mode: Literal["r", "w"] = mode
        self._store: Store | None = None
        self._pending = False  # something was appended and is not committed
        self._places: dict[Place, Held] = {}
        self._commits: list[list[Any]] = []  # commit id and outcome of the last ones
        self._devices: dict[str, int] = {}
        self._origins: dict[tables.Origin, int] = {}
        self._tables_in = -1  # the segment that has all devices and origins
        self._identities = Identities(self._load)
        self._new: list[New] = []  # identities of the commit at hand
        self._reopen()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], contract: Contract, *, mode: Literal["r", "w"] = "w"
    ) -> Self:
        """Open the store in that folder; made where there is none and mode is "w"."""
        return cls(path, contract, mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the store; what was not committed is given up."""
        store, self._store = self._store, None
        if store is not None:
            store.abandon() if self._pending else store.close()

    @property
    def store(self) -> Store:
        """The open store; opened again where a failure closed it."""
        if self._store is None:
            self._reopen()
        assert self._store is not None
        return self._store

    # ---- positions ----

    def positions(self, source: str | None = None) -> list[Position]:
        """See Sink."""
        held = (each.position for each in self._read_places().values())
        return [p for p in held if p.next != -1 and source in (None, p.place.source)]

    def claim(self, places: Sequence[Place]) -> list[Claim]:
        """See Sink."""
        store, held = self.store, dict(self._places)
        for place in places:
            before = held.get(place, unknown(place))
            held[place] = before._replace(epoch=before.epoch + 1)
        self._alone(lambda: store.flush({mark_name(p): mark(held[p]) for p in places}))
        self._places = held
        return [Claim(held[place].position, held[place].epoch) for place in places]

    # ---- the commit ----

    def commit(self, work: Work) -> Outcome:
        """See Sink."""
        store = self.store
        self._check_fence(work)
        try:
            outcome, places = self._append(store, work)
            commits = [*self._commits, [work.commit_id, *outcome]][-COMMITS_KEPT:]
            marks = {mark_name(place): mark(held) for place, held in places.items()}
        except BaseException as error:
            self._give_up()
            if isinstance(error, KvstoreError) and not isinstance(error, SinkError):
                raise SinkError(f"{self._path}: nothing of the commit was kept: {error}") from error
            raise
        try:
            store.flush({**marks, _COMMITS: commits})
        except StoreError as error:
            raise CommitUnknown(f"{self._path}: {error}") from error
        self._pending = False
        self._places |= places
        self._commits = commits
        self._identities.add(self._new)
        return outcome

    def settle(self, work: Work) -> Outcome | None:
        """See Sink."""
        if self._pending:
            self._give_up()
        commits = self.store.marks.get(_COMMITS, [])
        found = [
            Outcome(*outcome) for commit_id, *outcome in commits if commit_id == work.commit_id
        ]
        return found[0] if found else None

    def _check_fence(self, work: Work) -> None:
        for position, epoch in work.claims:
            held = self._places.get(position.place)
            if held is None or held.epoch != epoch or held.position != position:
                found = "never claimed" if held is None else f"at {held.position.next}"
                raise Fenced(
                    f"{self._path}: {position.place.source} {position.place.partition} was read "
                    f"from {position.next} under claim {epoch}, and is {found} under claim "
                    f"{held.epoch if held else 0} by now: another worker has it"
                )

    def _append(self, store: Store, work: Work) -> tuple[Outcome, dict[Place, Held]]:
        """Everything but the marks; nothing of it is durable or visible before the flush."""
        readings = work.readings
        self._pending = True
        device, origin = self._numbered(store, work)
        digests = digests_of(readings.values, readings.extras)
        fates, self._new = self._identities.decide(device, readings.ts_us, digests)
        stored = np.flatnonzero(fates == Fate.STORED)
        if len(stored):
            rows = slice(None) if len(stored) == len(fates) else stored
            store.stream(tables.READINGS).append(
                tables.reading_columns(
                    store.stream(tables.READINGS).schema,
                    readings,
                    rows,
                    device=device,
                    digest=digests,
                    origin=origin,
                ),
                copy=False,
            )
        conflicting = np.flatnonzero(fates == Fate.CONFLICT).tolist()
        conflicts = [_conflict(work, row) for row in conflicting]
        places = self._append_letters(store, work, [*work.rejections, *conflicts])
        letters.append_changes(store, work.changes, {(c.place, c.offset) for c in conflicts})
        tables.append_counts(store, summed([*work.seen, *_decided(readings, device, fates)]))
        duplicates = len(fates) - len(stored) - len(conflicts)
        rejected = len(work.rejections) + len(conflicts)
        return Outcome(len(stored), duplicates, rejected, len(conflicts)), places

    def _append_letters(
        self, store: Store, work: Work, rejections: Sequence[Rejection]
    ) -> dict[Place, Held]:
        """Append the dead letters that are new; the places as this commit leaves them."""
        places = {}
        for claim, position in zip(work.claims, work.after, strict=True):
            held = self._places[claim.position.place]
            places[position.place] = held._replace(position=position)
        fresh = self._fresh(store, rejections)
        for each in fresh:
            held = places.get(each.place, self._places.get(each.place, unknown(each.place)))
            end = max(held.letters_end, each.offset + 1)
            places[each.place] = held._replace(letters_end=end)
        if fresh:
            origins = [
                self._origins[*each.place, work.run, work.contract_version] for each in fresh
            ]
            letters.append(store, fresh, origins, work)
        return places

    def _fresh(self, store: Store, rejections: Sequence[Rejection]) -> list[Rejection]:
        """Those that are no dead letters yet: by position, the first of each."""
        unique = {(each.place, each.offset): each for each in reversed(rejections)}
        doubtful = {
            key
            for key in unique
            if key[0] in self._places and key[1] < self._places[key[0]].letters_end
        }
        there = letters.among(store, self._origins, doubtful) if doubtful else set()
        return [unique[key] for key in sorted(unique.keys() - there)]

    # ---- numbers of devices and origins ----

    def _numbered(self, store: Store, work: Work) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Numbers of each reading's device and origin; new ones are appended."""
        number = store.state().number
        if number != self._tables_in:
            # Retention drops whole segments: each has all that its own rows refer to.
            tables.append_devices(store, self._devices)
            tables.append_origins(store, self._origins)
            self._tables_in = number
        readings = work.readings
        tables.append_devices(store, _number_new(self._devices, readings.device_id))
        origins = _origins_of(readings)
        places = {Place(origin[0], origin[1]) for origin in origins}
        places |= {each.place for each in work.rejections}
        of_letters = [(*place, work.run, work.contract_version) for place in sorted(places)]
        tables.append_origins(store, _number_new(self._origins, [*origins, *of_letters]))
        device = map(self._devices.__getitem__, readings.device_id)
        if len(origins) == 1:
            origin = np.full(len(readings), self._origins[origins[0]], np.int32)
        else:
            origin = np.fromiter(map(self._origins.__getitem__, origins), np.int32, len(readings))
        return np.fromiter(device, np.int64, len(readings)), origin

    # ---- the contract ----

    def evolve(self, contract: Contract) -> None:
        """See Sink."""
        store = self.store

        def change() -> None:
            tables.evolve(store, contract)
            store.flush()

        self._alone(change)
        self._contract = contract

    # ---- reading ----

    def read(
        self,
        start_us: int | None = None,
        stop_us: int | None = None,
        *,
        device_id: str | None = None,
    ) -> Iterator[Readings]:
        """See Sink."""
        store = self.store
        if tables.READINGS not in store:
            return
        origins = tables.load_origins(store)
        names = {number: key for key, number in origins.items()}
        stream = store[tables.READINGS]
        device = None
        if device_id is not None:
            device = tables.load_devices(store).get(device_id, -1)
        ends = tables.time_of(start_us), tables.time_of(stop_us)
        for batch in stream.read(*ends, inclusive="left", ordered=True):
            mine = batch if device is None else tables.of_device(batch, device)
            rows = len(mine[tables.TIME])
            for first in range(0, rows, _READ_ROWS_MAX):
                part = {
                    name: column[first : first + _READ_ROWS_MAX] for name, column in mine.items()
                }
                yield tables.readings_of(part, names)

    def dead_letters(
        self,
        *,
        state: State | None = None,
        reason: str | None = None,
        place: Place | None = None,
        offset: int | None = None,
    ) -> Iterator[DeadLetter]:
        """See Sink."""
        store = self.store
        for each in letters.read(store, tables.load_origins(store), place=place, offset=offset):
            codes = {found.code for found in each.rejection.reasons}
            if state in (None, each.state) and (reason is None or reason in codes):
                yield each

    def change_letters(self, changes: Sequence[LetterChange]) -> None:
        """See Sink."""
        store = self.store

        def change() -> None:
            letters.append_changes(store, changes, set())
            store.flush()

        self._alone(change)

    def counts(self, start_us: int | None = None, stop_us: int | None = None) -> Iterator[Count]:
        """See Sink."""
        yield from summed(tables.read_counts(self.store, start_us, stop_us))

    # ---- opening, and opening again ----

    def _alone(self, change: Callable[[], None]) -> None:
        """A small transaction of its own, kept whole or given up."""
        try:
            self._pending = True
            change()
        except BaseException:
            self._give_up()
            raise
        self._pending = False

    def _give_up(self) -> None:
        """Close without committing; the next use opens anew and loads what is there."""
        store, self._store = self._store, None
        self._pending = False
        if store is not None:
            store.abandon()

    def _reopen(self) -> None:
        store = _opened(self._path, self._mode)
        try:
            self._places = places_in(store.marks)
            self._commits = list(store.marks.get(_COMMITS, []))
            self._devices = tables.load_devices(store) if self._mode == "w" else {}
            self._origins = tables.load_origins(store) if self._mode == "w" else {}
            if self._mode == "w":
                tables.evolve(store, self._contract)
                store.flush()
        except BaseException:
            store.abandon()
            raise
        self._identities = Identities(self._load)
        self._tables_in = -1
        self._store = store

    def _load(self, start_us: int, stop_us: int) -> Iterable[Stored]:
        return tables.read_identities(self.store, start_us, stop_us)

    def _read_places(self) -> dict[Place, Held]:
        return places_in(self.store.marks) if self._mode == "r" else self._places


def _opened(path: str, mode: Literal["r", "w"]) -> Store:
    if mode == "r":
        return open_store(path)
    is_new = not os.path.exists(os.path.join(path, "store.msgpack"))  # noqa: PTH110, PTH118
    # Of a store of many devices, one clock's steps say nothing.
    settings = Settings(clock_step_s=None) if is_new else None
    return open_store(path, "w", flush_interval_s=None, settings=settings)


def _decided(
    readings: Readings, device: NDArray[np.int64], fates: NDArray[np.uint8]
) -> list[Count]:
    """What counts.decided says, from the devices' numbers: a tenth of the time."""
    if not len(fates):
        return []
    hours, hour = np.unique(readings.ts_us // HOUR_US, return_inverse=True)
    codes = (device * len(hours) + hour) * len(Fate) + fates
    groups, first, values = np.unique(codes, return_index=True, return_counts=True)
    names = [readings.device_id[row] for row in first.tolist()]
    begins = (hours[groups // len(Fate) % len(hours)] * HOUR_US).tolist()
    keys = zip(names, begins, (groups % len(Fate)).tolist(), strict=True)
    return named(zip(keys, values.tolist(), strict=True))


def _conflict(work: Work, row: int) -> Rejection:
    readings = work.readings
    lineage = readings.lineage
    return Rejection(
        Place(lineage.source[row], int(lineage.partition[row])),
        int(lineage.offset[row]),
        work.raw[row],
        (Reason(quality.CONFLICT),),
        device_id=readings.device_id[row],
        ts_us=int(readings.ts_us[row]),
    )


def _origins_of(readings: Readings) -> list[tables.Origin]:
    """The origin of each reading, or one for all of them."""
    lineage, count = readings.lineage, len(readings)
    partitions, versions = lineage.partition, lineage.contract_version
    if count and bool((partitions == partitions[0]).all() and (versions == versions[0]).all()):
        source, run = lineage.source[0], lineage.run[0]
        if lineage.source.count(source) == lineage.run.count(run) == count:
            return [(source, int(partitions[0]), run, int(versions[0]))]
    columns = lineage.source, partitions.tolist(), lineage.run, versions.tolist()
    return list(zip(*columns, strict=True))


def _number_new(known: dict[T, int], keys: Iterable[T]) -> dict[T, int]:
    """Give what is not known the next numbers; those that are new."""
    new = dict.fromkeys(key for key in keys if key not in known)
    if not new:
        return {}
    first = max(known.values(), default=-1) + 1
    numbers = {key: first + n for n, key in enumerate(new)}
    known.update(numbers)
    return numbers
