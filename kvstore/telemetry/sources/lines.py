"""Lines of a growing byte stream, with their numbers and byte offsets. No policy, no paths.

A line is an event once its newline is there. Reading is bounded: a line beyond LINE_BYTES_MAX is
given out cut, with one byte more than is allowed, so that validation refuses it by its length; the
rest of it is read past, never held.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LINE_BYTES_MAX: Final = 1 << 20  # as Kafka's own default, and validate's EVENT_BYTES_MAX
BLOCK_BYTES: Final = 8 << 20  # read at once: a commit of 50,000 events as one chunk
BLOCK_BYTES_MIN: Final = 1 << 12
_BOM: Final = b"\xef\xbb\xbf"


class Lines(NamedTuple):
    """Lines that are not empty: their numbers, from 1, and their bytes without newline."""

    numbers: NDArray[np.int64]
    payloads: list[bytes]


NOTHING: Final = Lines(np.empty(0, np.int64), [])


class LineReader:
    """Reads a file descriptor from where it stands.

    number: of the next line, from 1. offset: of its first byte. has_more: whether a read would
    not wait; so that what trickles out of a pipe is gathered.
    """

    def __init__(
        self,
        fd: int,
        *,
        number: int = 1,
        offset: int = 0,
        has_more: Callable[[], bool] = lambda: False,
    ):
        self.number = number
        self.offset = offset
        self._fd = fd
        self._has_more = has_more
        self._lines: list[bytes] = []  # complete, not given out yet
        self._rest = b""  # the begin of a line
        self._passed = 0  # bytes of that line read past, beyond LINE_BYTES_MAX
        self._begun = offset > 0

    @property
    def unfinished(self) -> bytes:
        """The line whose newline has not come yet; cut where it is too long."""
        return self._rest

    def read(self, events_max: int, bytes_max: int) -> Lines | None:
        """Some lines; none where what came was no whole line, or empty ones; None at the end.

        At the end ``unfinished`` may hold a line; more may come later, where the file grows.
        """
        if not self._lines:
            data = self._read(min(BLOCK_BYTES, max(bytes_max, BLOCK_BYTES_MIN)))
            if not data:
                return None
            if len(self._rest) > LINE_BYTES_MAX:
                return self._pass_over(data)
            self._split(data)
        return self._taken(events_max, bytes_max)

    def take_unfinished(self) -> Lines:
        """The last line, as one that is complete without a newline."""
        size = len(self._rest) + self._passed
        line, self._rest, self._passed = self._rest, b"", 0
        return self._given([line[: LINE_BYTES_MAX + 1]], size)

    def _read(self, size: int) -> bytes:
        data = os.read(self._fd, size)
        if not data or not self._has_more():
            return data
        pieces, count = [data], len(data)
        while count < size and self._has_more():
            pieces.append(os.read(self._fd, size - count))
            count += len(pieces[-1])
            if not pieces[-1]:
                break  # the end, which the next read sees again
        return b"".join(pieces)

    def _split(self, data: bytes) -> None:
        if not self._begun and data.startswith(_BOM):
            data = data[len(_BOM) :]
            self.offset += len(_BOM)
        self._begun = True
        self._lines = (self._rest + data).split(b"\n")
        self._rest = self._lines.pop()

    def _taken(self, events_max: int, bytes_max: int) -> Lines:
        taken = self._lines[:events_max]
        size = sum(map(len, taken)) + len(taken)
        while len(taken) > 1 and size > bytes_max:
            size -= len(taken.pop()) + 1
        self._lines = self._lines[len(taken) :]
        return self._given(taken, size)

    def _given(self, taken: list[bytes], size: int) -> Lines:
        numbers = np.arange(self.number, self.number + len(taken))
        self.number += len(taken)
        self.offset += size
        if b"" in taken or b"\r" in taken:
            there = [line not in (b"", b"\r") for line in taken]
            numbers = numbers[there]
            taken = [line for line, is_there in zip(taken, there, strict=True) if is_there]
        return Lines(numbers, taken)

    def _pass_over(self, data: bytes) -> Lines:
        """Read on in a line that is too long; it comes once its end is there."""
        end = data.find(b"\n")
        if end < 0:
            self._passed += len(data)
            return NOTHING
        self._passed += end + 1
        given = self.take_unfinished()
        self._split(data[end + 1 :])
        return given
