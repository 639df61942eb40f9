"""What ``kvstore read --follow`` does, and what all commands that send in time share."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import stat
import sys
import termios
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Literal, cast

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.capture import write_parts
from kvstore.cli.terminal import complain, say
from kvstore.errors import KvstoreError, PacketError
from kvstore.every import every
from kvstore.follow import POLL_S, Cursor, CursorFile
from kvstore.packets import encode
from kvstore.schema import Batch, Field
from kvstore.stream import Stream

Send = Callable[[Iterator[Batch], list[Field], BinaryIO], object]
Begin = Literal["start", "end"]
_STDOUT: Final = 1
_LOOK_S: Final = 1.0
_LAST_S_MAX: Final = 5.0  # for the reader to take the rest at the end


class Following:
    """A stream followed to stdout; the cursor file runs behind what was taken out of the pipe.

    stream_name: of the stream to follow, in the store as it is then; a cursor knows its own.
    """

    def __init__(
        self,
        path: Path,
        stream_name: Callable[[stores.Store, str | None], str],
        fields: list[str] | None,
        cursor_file: Path | None,
        begin: Begin,
    ):
        self._path = path
        self._stream_name = stream_name
        self._fields = fields
        self._kept = CursorFile(cursor_file) if cursor_file else None
        self._begin = begin
        self._out = _Out()
        self._handed: deque[tuple[int, Cursor]] = deque()  # what the reader has yet to take out
        self.losses = 0

    def send(self, send: Send) -> None:
        """Hand over batch after batch with ``send`` until a signal comes or the reader goes."""
        with stores.open_store(self._path) as store, stop_signals() as stopped, letting_go(store):
            stop = stop_or_closed(stopped)
            stream = self._awaited(store, stop)
            if stream is None:
                return
            schema = stream.schema
            selected = [schema.fields[schema.number(n)] for n in self._fields or schema.names]
            if send is not send_packets:  # lines have the same columns from first to last
                self._fields = [field.name for field in selected]
            try:
                send(self._batches(stream, stop), selected, cast("BinaryIO", self._out))
                self._out.wait_until_taken(stop)
            finally:
                self._save()

    def _awaited(self, store: stores.Store, stop: Callable[[], bool]) -> Stream | None:
        """The stream, once it is there: a follower may be started before the first writer."""
        told = False
        cursor = self._kept.cursor if self._kept else None
        while not stop():
            name = self._stream_name(store, cursor and cursor.stream)
            if name in store or cursor:  # a cursor's stream was there: else it is another store
                return store[name]
            if not told:
                say(f"Waiting for stream {name!r}.")
            told = True
            self._begin = "start"  # all that comes now came after we began
            time.sleep(POLL_S)
        return None

    def _batches(self, stream: Stream, stop: Callable[[], bool]) -> Iterator[Batch]:
        follower = stream.follow(
            (self._kept and self._kept.cursor) or self._begin,
            fields=self._fields,
            stop=stop,
            on_damage=self._report,
            on_gap=self._report,
            sleep=lambda seconds: self._wait(follower.cursor, seconds),
        )
        self._note(follower.cursor)  # begun at the end, it goes on from there next time
        for cursor, batch in follower:
            yield batch
            self._out.flush()
            self._note(cursor)

    def _wait(self, cursor: Cursor, seconds: float) -> None:
        self._note(cursor)  # behind what was passed over, too: a gap is told once
        self._save()
        time.sleep(seconds)

    def _note(self, cursor: Cursor) -> None:
        """All before the cursor was written; keep how far it was taken out of the pipe."""
        if self._kept and (not self._handed or self._handed[-1][1] != cursor):
            self._handed.append((self._out.sent, cursor))
            self._note_taken(self._kept)

    def _note_taken(self, kept: CursorFile) -> None:
        taken = self._out.taken()
        while self._handed and self._handed[0][0] <= taken:
            kept.note(self._handed.popleft()[1])

    def _save(self) -> None:
        if self._kept:
            self._note_taken(self._kept)
            self._kept.save()

    def _report(self, error: KvstoreError) -> None:
        self.losses += 1
        complain(str(error))


class _Out:
    """stdout, and how much of what went into it has left the pipe again.

    What a reader that dies has not taken out, nobody has: it is not handed over.
    """

    def __init__(self) -> None:
        self._is_pipe = stat.S_ISFIFO(os.fstat(_STDOUT).st_mode)
        self.sent = 0

    def fileno(self) -> int:
        return _STDOUT

    def write(self, data: bytes) -> int:
        self.sent += len(data)
        return sys.stdout.buffer.write(data)

    def writelines(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        sys.stdout.buffer.flush()

    def taken(self) -> int:
        """Bytes that the reader has, or is to look after."""
        waiting = bytearray(4)
        if self._is_pipe:
            fcntl.ioctl(_STDOUT, termios.FIONREAD, waiting)
        return self.sent - int.from_bytes(waiting, sys.byteorder)

    def wait_until_taken(self, check_reader: Callable[[], object]) -> None:
        """Else what is in the pipe at an orderly end would come twice; not for ever."""
        due_s = time.monotonic() + _LAST_S_MAX
        while self.taken() < self.sent and time.monotonic() < due_s:
            check_reader()
            time.sleep(POLL_S)


def send_packets(batches: Iterator[Batch], _: list[Field], file: BinaryIO) -> None:
    """Write each batch as a packet, at once."""
    fd = file.fileno()
    libc.enlarge_pipe(fd)
    for batch in batches:
        try:
            parts = encode(batch)
        except PacketError as error:  # its packet number and offset are those of an input
            raise KvstoreError(error.reason) from error
        write_parts(fd, parts)
        if isinstance(file, _Out):
            file.sent += sum(map(len, parts))


def letting_go(store: stores.Store) -> AbstractContextManager[None]:
    """Close dropped segments within a second, however long the reader of stdout keeps us.

    Their space is free only once nobody has them open.
    """
    return every(_LOOK_S, store.let_go)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came. A second one interrupts even a write that hangs."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in before:
        signal.signal(each, note)
    try:
        yield lambda: bool(came)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def stop_or_closed(stopped: Callable[[], bool]) -> Callable[[], bool]:
    """The wish to stop; raises BrokenPipeError once the reader of stdout is gone.

    Else a follower without news would outlive its reader until the next batch.
    """
    reader = select.poll()
    reader.register(_STDOUT, 0)

    def stop() -> bool:
        if any(event & select.POLLERR for _, event in reader.poll(0)):
            raise BrokenPipeError(os.strerror(errno.EPIPE))
        return stopped()

    return stop
