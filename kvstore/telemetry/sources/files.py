"""Files of JSON lines, and stdin, as a source. An event's offset is the number of its line.

A file is known by its path and by what it holds: the token of a position has the byte offset and
two fingerprints, of the file's begin and of what stands before the offset. Where they match,
reading goes on behind the position, however much the file has grown. Where they do not, there is
another file under that path by now, rotated or written anew: it is read from its begin, under the
next *partition* of the source, so that no two events ever share a place. Reading a file twice
under two names, or edited, is harmless: its events are duplicates.

A last line without newline is an event where it is whole JSON by itself; else it is left for
later, and said so. stdin and pipes can be read once: each run is a source of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from kvstore import libc
from kvstore.errors import SourceError
from kvstore.events import Event, Report
from kvstore.telemetry.records import Chunk, Place, Position
from kvstore.telemetry.source import OnAssigned, OnRevoked
from kvstore.telemetry.sources.lines import NOTHING, LineReader, Lines

STDIN: Final = "-"  # as in opening.py
GENERATIONS_MAX: Final = 10_000  # files that ever stood under one path: daily for 27 years
LOOK_S: Final = 0.1  # between looks at files that are followed
_STDIN_FD: Final = 0
_HEAD_BYTES_MAX: Final = 4096
_TAIL_BYTES_MAX: Final = 256


class FilesSource:
    """Files one after the other; with ``follow`` all at once, for ever.

    run: names stdin and pipes, which have no other identity.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        run: str,
        follow: bool = False,
        report: Report = lambda _: None,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self._paths = [os.fspath(path) for path in paths]
        self._run = run
        self._follow = follow
        self._report = report
        self._sleep = sleep
        self._waiting: list[str] = []
        self._open: list[_Tail] = []
        self._assign: OnAssigned

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for each in self._open:
            each.close()
        self._open = []

    def start(self, on_assigned: OnAssigned, on_revoked: OnRevoked) -> None:  # noqa: ARG002
        """See Source; files are never taken away."""
        self._assign = on_assigned
        self._waiting = list(self._paths)
        self._open_due()

    def poll(self, *, events_max: int, bytes_max: int, wait_s: float) -> list[Chunk] | None:
        """See Source."""
        until_s = time.monotonic() + wait_s
        while True:
            self._open_due()
            if not self._open:
                return None
            chunks = list(self._read(events_max, bytes_max, until_s))
            if chunks or time.monotonic() >= until_s:
                return chunks
            if self._follow:
                self._sleep(min(LOOK_S, max(until_s - time.monotonic(), 0.0)))

    def committed(self, positions: Sequence[Position]) -> None:
        """See Source; there is nobody to tell."""

    def ends(self) -> dict[Place, int]:
        """See Source; how many lines a file has is not known before they are read."""
        return {}

    def _open_due(self) -> None:
        while self._waiting and (self._follow or not self._open):
            self._open.append(_opened(self._waiting.pop(0), self._run, self._assign))

    def _read(self, events_max: int, bytes_max: int, until_s: float) -> Iterator[Chunk]:
        share = max(events_max // len(self._open), 1), max(bytes_max // len(self._open), 1)
        for each in self._open:
            lines = each.read(*share, until_s)
            if lines is None:
                lines = self._at_end(each)
            if len(lines.payloads):
                yield each.chunk(lines)
            if each.is_done:
                each.close()
        self._open = [each for each in self._open if not each.is_done]

    def _at_end(self, tail: _Tail) -> Lines:
        """What comes of a file that has no more for now: its last line, where that is over."""
        replaced = self._follow and tail.was_replaced()
        if self._follow and not tail.is_pipe and not replaced:
            return NOTHING
        tail.is_done = True
        if replaced:
            self._waiting.append(tail.path)
        rest = tail.unfinished
        if not rest or tail.is_pipe or replaced or _is_json(rest):
            return tail.take_unfinished() if rest else NOTHING
        self._report(
            Event(
                "warning",
                "unfinished_line",
                f"{tail.path}: the last line, {tail.next_line}, has no end yet and is no JSON so "
                "far: left for the next run",
                {"path": tail.path, "line": tail.next_line, "bytes": len(rest)},
            )
        )
        return NOTHING


class _Tail:
    """One open file or pipe, and how far it was read."""

    def __init__(self, path: str, fd: int, place: Place, reader: LineReader, *, is_pipe: bool):
        self.path = path
        self.is_pipe = is_pipe
        self.is_done = False
        self._fd = fd
        self._place = place
        self._reader = reader

    @property
    def unfinished(self) -> bytes:
        return self._reader.unfinished

    @property
    def next_line(self) -> int:
        return self._reader.number

    def read(self, events_max: int, bytes_max: int, until_s: float) -> Lines | None:
        """See LineReader.read; of a pipe, nothing where nothing comes in time."""
        if self.is_pipe:
            wait_s = max(until_s - time.monotonic(), 0.0)
            if not select.select([self._fd], [], [], wait_s)[0]:
                return NOTHING
        try:
            return self._reader.read(events_max, bytes_max)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error.strerror}") from error

    def take_unfinished(self) -> Lines:
        return self._reader.take_unfinished()

    def chunk(self, lines: Lines) -> Chunk:
        token = "" if self.is_pipe else str(_Token.at(self._fd, self._reader.offset))
        after = Position(self._place, self._reader.number, token)
        return Chunk(self._place, lines.numbers, lines.payloads, after)

    def was_replaced(self) -> bool:
        """Whether another file has the name by now, or this one was cut."""
        if self.is_pipe:
            return False
        mine = os.fstat(self._fd)
        try:
            there = os.stat(self.path)  # noqa: PTH116  # beside fstat
        except OSError:
            return False  # renamed, and the new one is not there yet
        return not os.path.samestat(mine, there) or mine.st_size < self._reader.offset

    def close(self) -> None:
        if self._fd != _STDIN_FD:
            os.close(self._fd)


class _Token(NamedTuple):
    """Where a position lies in a file, and what the file has to look like for that."""

    offset: int
    head: str
    tail: str

    def __str__(self) -> str:
        return f"{self.offset}:{self.head}:{self.tail}"

    @classmethod
    def at(cls, fd: int, offset: int) -> Self:
        """The token of a position in an open file."""
        head = os.pread(fd, min(offset, _HEAD_BYTES_MAX), 0)
        tail = os.pread(fd, min(offset, _TAIL_BYTES_MAX), max(offset - _TAIL_BYTES_MAX, 0))
        return cls(offset, _digest(head), _digest(tail))

    @classmethod
    def found_in(cls, fd: int, text: str) -> int | None:
        """The byte offset of a position, where the file is still the one that it was."""
        offset = text.partition(":")[0]
        if not offset.isdecimal() or os.fstat(fd).st_size < int(offset):
            return None
        return int(offset) if str(cls.at(fd, int(offset))) == text else None


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _opened(path: str, run: str, assign: OnAssigned) -> _Tail:
    fd = _STDIN_FD if path == STDIN else _open_fd(path)
    try:
        if path != STDIN and stat.S_ISREG(os.fstat(fd).st_mode):
            return _resumed(path, fd, assign)
        place = Place(f"stdin:{run}" if path == STDIN else f"pipe:{_printable(path)}:{run}", 0)
        assign([place])
        libc.enlarge_pipe(fd)
        reader = LineReader(fd, has_more=lambda: bool(select.select([fd], [], [], 0)[0]))
        return _Tail(path, fd, place, reader, is_pipe=True)
    except BaseException:
        if fd != _STDIN_FD:
            os.close(fd)
        raise


def located(fd: int, path: Path, positions: Sequence[Position]) -> Position | None:
    """How far this very file was read, among a sink's positions; None where it was not."""
    source = _source_of(os.fspath(path))
    for position in positions:
        mine = position.place.source == source
        if mine and _Token.found_in(fd, position.token) is not None:
            return position
    return None


def _source_of(path: str) -> str:
    return f"file:{_printable(os.path.realpath(path))}"


def _open_fd(path: str) -> int:
    if os.path.isdir(path):  # noqa: PTH112  # os.open does not mind
        raise SourceError(f"{path}: is a folder; name its files, such as {path}/*.jsonl")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; expected a file of JSON lines") from error


def _resumed(path: str, fd: int, assign: OnAssigned) -> _Tail:
    """The file from where the sink has it, under the partition that is this very file's."""
    source = _source_of(path)
    for partition in range(GENERATIONS_MAX):
        place = Place(source, partition)
        (position,) = assign([place])
        if position.next == -1:
            return _Tail(path, fd, place, LineReader(fd), is_pipe=False)
        offset = _Token.found_in(fd, position.token)
        if offset is not None:
            offset = _behind_newline(fd, offset)
            os.lseek(fd, offset, os.SEEK_SET)
            reader = LineReader(fd, number=position.next, offset=offset)
            return _Tail(path, fd, place, reader, is_pipe=False)
    raise SourceError(
        f"{path}: more than {GENERATIONS_MAX} files have stood under this name; give the next "
        "ones names of their own"
    )


def _behind_newline(fd: int, offset: int) -> int:
    """A last line that was taken without its newline has one by now: it is no empty line."""
    if offset == 0 or os.pread(fd, 1, offset - 1) == b"\n":
        return offset
    following = os.pread(fd, 2, offset)
    for newline in (b"\n", b"\r\n"):
        if following.startswith(newline):
            return offset + len(newline)
    return offset


def _printable(path: str) -> str:
    """A path as text that every sink can keep: bytes that are no UTF-8 are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
