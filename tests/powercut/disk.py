"""A model of a disk under a file system: replay a log, and draw what a power cut may leave.

Owns the rules of the package's docstring. `Disk` replays events; `Disk.draw` gives one `State`.
Pure: reads no file, and its only randomness is the generator it is given.

Each file has a durable image and a list of pending changes since. Drawing decides for each sector
of each pending change whether it arrived; a sector then holds the file's content as of the latest
change of it that arrived, so a torn write mixes old and new sectors and never bytes within one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from powercut.recorder import NAME_OPS, Event, Op

if TYPE_CHECKING:
    from numpy.typing import NDArray

SECTOR_BYTES = 512
SETTLING_OPS = frozenset({Op.SYNC_END, Op.DURABLE, Op.MARK})
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # of fallocate(2)
LOCK_BYTES = 8192
NEAR_EVENTS = 2
SAME_HOW_SHARE = 0.5
MISSES_MAX = 6  # draws in a row that gave nothing new, before a point is left

# How the pending changes of one state arrived. The extremes matter most: "none" right after a
# promise finds a missing sync, "latest" finds a header that was not held back for its data.
HOWS = ("none", "all", "prefix", "latest", "sectors", "changes", "all but one", "holes")


@dataclass(frozen=True)
class State:
    """What a disk may hold after a power cut behind `point` events of the log."""

    point: int
    how: str
    promised: tuple[str, ...]  # the marks before the cut
    folders: tuple[str, ...]  # parents before children
    files: dict[str, bytes]

    def digest(self) -> int:
        """Equal for states that hold the same and were promised the same, lock files aside."""
        held = (
            f"{name}:{xxhash.xxh3_64_hexdigest(data)}"
            for name, data in sorted(self.files.items())
            if not is_lock(name)
        )
        text = "\n".join((str(len(self.promised)), *sorted(self.folders), *held))
        return xxhash.xxh3_64_intdigest(text.encode())


@dataclass
class _Change:
    """One pending change of a file: bytes, or zeros where data is None, in [start, stop)."""

    number: int
    start: int
    stop: int
    data: bytes | None
    size_after: int
    firm: bool = False  # an O_DSYNC write that returned

    def sectors(self) -> slice:
        return slice(self.start // SECTOR_BYTES, -(-self.stop // SECTOR_BYTES))

    def apply(self, image: bytearray, first: int, last: int) -> None:
        """Write the part of it that lies in these sectors."""
        start = max(self.start, first * SECTOR_BYTES)
        stop = min(self.stop, last * SECTOR_BYTES, len(image))
        if start >= stop:
            return
        if self.data is None:
            image[start:stop] = bytes(stop - start)
        else:
            image[start:stop] = self.data[start - self.start : stop - self.start]


@dataclass(eq=False)
class _Node:
    """A file, or a folder (whose `entries` are the live ones)."""

    entries: dict[str, _Node] | None = None
    durable: bytearray = field(default_factory=bytearray)
    pending: list[_Change] = field(default_factory=list)
    size: int = 0
    settled: bytes | None = None  # the durable image, kept while nothing is pending

    def change(self, change: _Change) -> None:
        self.size = change.size_after
        self.pending.append(change)
        self.settled = None

    def sync(self, before: int) -> None:
        """Everything that came before that event is durable."""
        done = [change for change in self.pending if change.number < before]
        self.pending = self.pending[len(done) :]
        for change in done:
            grown = max(change.size_after, change.stop) - len(self.durable)
            self.durable += bytes(max(0, grown))
            change.apply(self.durable, 0, change.sectors().stop)
            del self.durable[change.size_after :]
        self.settled = None

    def held(self, arrival: _Arrival) -> bytes:
        """The file's bytes, given what arrived."""
        if not self.pending:
            if self.settled is None:
                self.settled = bytes(self.durable)
            return self.settled
        return _drawn_image(self, arrival)


@dataclass
class _NameChange:
    """One pending change of names: each entry of `entries` now leads to a node, or nowhere."""

    number: int
    entries: list[tuple[_Node, str, _Node | None]]
    unsynced: list[_Node]  # the folders whose sync is still missing


class _Arrival:
    """Decides what arrived, for one state (`how` is one of HOWS)."""

    def __init__(self, how: str, rng: np.random.Generator, numbers: Sequence[int]) -> None:
        self.how, self.rng = how, rng
        self.cut = int(rng.choice(numbers)) if numbers else 0
        self.share = float(rng.choice([0.02, 0.2, 0.5, 0.8, 0.98]))

    def sectors(self, change: _Change, count: int) -> NDArray[np.bool_]:
        """Which of the change's sectors arrived."""
        if change.firm:
            return np.ones(count, dtype=bool)
        if self.how == "sectors":
            return self.rng.random(count) < self.share
        arrived = np.full(count, self.how != "holes" and self.whole(change.number))
        if change.number == self.cut and self.how in ("prefix", "all but one"):
            torn = int(self.rng.integers(count + 1))
            arrived[:] = True
            arrived[torn : None if self.how == "prefix" else torn + 1] = False
        return arrived

    def whole(self, number: int) -> bool:
        """Whether a change that cannot be torn arrived."""
        match self.how:
            case "none":
                return False
            case "all" | "holes":
                return True
            case "prefix":
                return number < self.cut + int(self.rng.integers(2))
            case "latest":
                return number >= self.cut
            case "all but one":
                return number != self.cut
            case _:
                return bool(self.rng.random() < self.share)


def _drawn_image(node: _Node, arrival: _Arrival) -> bytes:
    room = max(len(node.durable), *(max(c.size_after, c.stop) for c in node.pending))
    image = bytearray(room)
    image[: len(node.durable)] = node.durable
    size = len(node.durable)
    latest = np.full(-(-room // SECTOR_BYTES), -1)
    for index, change in enumerate(node.pending):
        span = latest[change.sectors()]
        span[arrival.sectors(change, len(span))] = index
        if change.firm:
            size = max(size, change.stop)
        if arrival.whole(change.number):
            size = change.size_after
    for index, change in enumerate(node.pending):
        first = change.sectors().start
        for start, stop in _runs(latest[change.sectors()] >= index):
            change.apply(image, first + start, first + stop)
    return bytes(image[:size])


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


class Disk:
    """The recorded folder on a disk; `apply` each event in order, `draw` states in between."""

    def __init__(self) -> None:
        self._root = _Node(entries={})
        self._nodes: dict[int, _Node] = {}  # by inode; the newest, as numbers are used again
        self._names: list[_NameChange] = []
        self._syncs: dict[int, int] = {}  # sync number -> event number of its begin
        self._promised: tuple[str, ...] = ()
        self._count = 0

    def apply(self, event: Event) -> None:
        """What one event changes."""
        if event.op in NAME_OPS:
            self._rename(event)
        elif event.op is Op.MARK:
            self._promised += (event.data.decode(),)
        elif event.op is Op.SYNC_BEGIN:
            self._syncs[event.offset] = self._count
        elif event.op is Op.SYNC_END:
            self._sync(self._node(event), self._syncs.pop(event.offset))
        elif event.op is Op.DURABLE:
            self._node(event).pending[-1].firm = True  # the shim writes both under one mutex
        elif change := self._change(self._node(event), event):
            self._node(event).change(change)
        self._count += 1

    def draw(self, how: str, names_how: str, rng: np.random.Generator) -> State:
        """What the disk may hold, were the power cut now.

        how: which of the pending data arrived; names_how: which of the pending changes of names.
        """
        numbers = [change.number for change in self._names if change.unsynced]
        for node in self._nodes.values():
            numbers += [change.number for change in node.pending if not change.firm]
        arrival = _Arrival(how, rng, numbers)
        # One arrival for both where they are to agree: a disk that stops at one moment.
        names = arrival if names_how == how else _Arrival(names_how, rng, numbers)
        folders: list[str] = []
        files: dict[str, bytes] = {}
        for path, node in _reachable(self._root, self._entries(names)):
            if node.entries is not None:
                folders.append(path)
            elif not is_lock(path):
                files[path] = node.held(arrival)
            elif (kind := int(rng.integers(3))) > 0:
                files[path] = rng.bytes(LOCK_BYTES * (kind - 1))
        shown = f"data: {how}, names: {names_how}"
        return State(self._count, shown, self._promised, tuple(folders), files)

    def _node(self, event: Event) -> _Node:
        return self._nodes.setdefault(event.inode, self._root)  # the root is never created

    def _change(self, node: _Node, event: Event) -> _Change | None:
        number, stop = self._count, event.offset + event.length
        if event.op is Op.WRITE:
            return _Change(number, event.offset, stop, event.data, max(node.size, stop))
        if event.op is Op.TRUNCATE:
            cut = min(event.length, node.size)
            return _Change(number, cut, max(cut, node.size), None, event.length)
        grown = node.size if event.mode & KEEP_SIZE else max(node.size, stop)
        if event.mode & (PUNCH_HOLE | ZERO_RANGE):
            return _Change(number, event.offset, min(stop, grown), None, grown)
        if event.mode & ~KEEP_SIZE:
            raise ValueError(f"fallocate mode {event.mode:#x} is not modelled")
        return _Change(number, grown, grown, None, grown)

    def _rename(self, event: Event) -> None:
        folder, name = self._parent(event.path)
        entries: list[tuple[_Node, str, _Node | None]] = []
        if event.op in (Op.CREATE, Op.MKDIR):
            node = _Node(entries={} if event.op is Op.MKDIR else None)
            self._nodes[event.inode] = node
            entries = [(folder, name, node)]
        elif event.op is Op.LINK:
            entries = [(folder, name, self._nodes[event.inode])]
        else:
            entries = [(folder, name, None)]
        if event.op is Op.RENAME:
            entries.append((*self._parent(event.other), self._nodes[event.inode]))
        for parent, entry, target in entries:
            _set(_live(parent), entry, target)
        self._names.append(_NameChange(self._count, entries, [parent for parent, _, _ in entries]))

    def _parent(self, path: str) -> tuple[_Node, str]:
        if not path:
            raise ValueError("a rename into or out of the recorded folder is not modelled")
        *parents, name = path.split("/")
        folder = self._root
        for part in parents:
            folder = _live(folder)[part]
        return folder, name

    def _sync(self, node: _Node, before: int) -> None:
        if node.entries is None:
            node.sync(before)
            return
        for change in self._names:
            if change.number < before:
                change.unsynced = [folder for folder in change.unsynced if folder is not node]

    def _entries(self, arrival: _Arrival) -> dict[_Node, dict[str, _Node]]:
        """The entries of each folder, given which changes of names arrived."""
        held: dict[_Node, dict[str, _Node]] = {}
        for change in self._names:
            if change.unsynced and not arrival.whole(change.number):
                continue
            for folder, name, target in change.entries:
                _set(held.setdefault(folder, {}), name, target)
        return held


def _reachable(
    folder: _Node, entries: dict[_Node, dict[str, _Node]], prefix: str = ""
) -> Iterator[tuple[str, _Node]]:
    """Everything below a folder, parents before children."""
    for name, node in entries.get(folder, {}).items():
        yield prefix + name, node
        if node.entries is not None:
            yield from _reachable(node, entries, f"{prefix}{name}/")


def _live(folder: _Node) -> dict[str, _Node]:
    if folder.entries is None:
        raise ValueError("a file where the log needs a folder")
    return folder.entries


def _set(entries: dict[str, _Node], name: str, target: _Node | None) -> None:
    if target is None:
        entries.pop(name, None)
    else:
        entries[name] = target


def is_lock(name: str) -> bool:
    """LMDB's lock file: shared memory, no part of what a disk keeps."""
    return name.endswith("-lock")


def final_state(events: Sequence[Event]) -> State:
    """What the program left: everything arrived."""
    disk = Disk()
    for event in events:
        disk.apply(event)
    return disk.draw("all", "all", np.random.default_rng(0))


def crash_points(events: Sequence[Event], rng: np.random.Generator, count: int) -> list[int]:
    """Where to cut the power: `count` numbers of events that came before it, sorted.

    First every position near a change of names (creation, roll, drop), then up to half of what is
    left right behind marks, where promises begin, each once; the rest are drawn from the positions
    with something in flight, as the others have a single state each.
    """
    kinds = [event.op for event in events]
    changed = [index for index, op in enumerate(kinds) if op in NAME_OPS]
    around = {p + d for p in changed for d in range(1 - NEAR_EVENTS, NEAR_EVENTS + 2)}
    near = [point for point in sorted(around) if 0 <= point <= len(events)]
    marks = [index + 1 for index, op in enumerate(kinds) if op is Op.MARK]
    dirty = [index + 1 for index, op in enumerate(kinds) if op not in SETTLING_OPS]
    points = _some(near, count, rng)
    points += _some(marks, (count - len(points)) // 2, rng)
    points += [int(point) for point in rng.choice(dirty, count - len(points))]
    return sorted(points)


def _some(points: list[int], count: int, rng: np.random.Generator) -> list[int]:
    if len(points) <= count:
        return points
    return [int(point) for point in rng.choice(points, count, replace=False)]


def crash_states(
    events: Sequence[Event], points: Sequence[int], rng: np.random.Generator
) -> Iterator[State]:
    """Different states at the sorted points, one for each.

    Where several attempts find only states that were there already, a later point gives more.
    """
    disk, seen, done, due = Disk(), set[int](), 0, 0
    for point in points:
        for event in events[done:point]:
            disk.apply(event)
        done = point
        due += 1
        misses = 0
        while due and misses < MISSES_MAX:
            how, other = rng.choice(HOWS, 2)
            state = disk.draw(how, how if rng.random() < SAME_HOW_SHARE else other, rng)
            if (digest := state.digest()) in seen:
                misses += 1
                continue
            seen.add(digest)
            due, misses = due - 1, 0
            yield state
