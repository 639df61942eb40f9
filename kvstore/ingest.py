"""A byte stream of packets -> a stream of the store, at the pace of the pipe.

    read ── decode ── append (copy=False) ──> encode threads ──> commit thread

The reading thread is the caller's. Packets are views into the buffers that the bytes were
read into, and go to the store uncopied. Back-pressure is the store's: ``append`` waits while
64 MB are queued, and the pipe fills up. Stopping is cooperative: ``readinto`` says when, and
whatever packets were complete by then are committed.

What a packet must look like is said in one place, the stream's schema; what does not fit it
becomes a PacketError here. A malformed packet ends the run after everything before it is
committed, unless ``on_error`` is given and the packet's frame is whole: then it is passed over.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kvstore import libc
from kvstore.errors import PacketError, SchemaError, TimeError
from kvstore.packets import PARTICLE_FIELDS, PARTICLE_TIME, Packet, PacketDecoder
from kvstore.schema import Field, Schema
from kvstore.store import Store
from kvstore.stream import Stream

PARTICLES: Final = "particles"
PARTICLE_SCHEMA: Final = Schema(
    tuple(Field(name, dtype, shape) for name, (dtype, shape) in PARTICLE_FIELDS.items()),
    PARTICLE_TIME,
)
_DRAINED_BYTES_MAX: Final = libc.PIPE_BYTES  # what a producer can have sent and we not seen

OnError = Callable[[PacketError], None]


@dataclass(slots=True)
class Progress:
    """What has been taken in so far; read by whoever shows it, written by ``ingest``."""

    packets: int = 0
    rows: int = 0
    bytes: int = 0
    skipped: int = 0
    first: Any = None  # time of the first row to arrive, in the stream's own dtype
    last: Any = None  # and of the last
    unfinished_bytes: int = 0  # of a packet that was begun when reading was stopped
    ended: bool = False  # the (last) input was read to its end, whatever came of it


class Source:
    """A file descriptor to read from, that a signal can interrupt between two packets.

    wakeup_fd: becomes readable when reading should stop, or None. What waits in the pipe by
    then is still read, up to a pipe's size: its sender believes it delivered.
    """

    def __init__(self, fd: int, wakeup_fd: int | None = None):
        self._fd = fd
        self._wakeup_fd = wakeup_fd
        self._drained = 0

    def readinto(self, buffer: memoryview) -> int | None:
        """Bytes read, 0 at the end of the input, None where reading should stop."""
        if self._wakeup_fd is None:
            return os.readv(self._fd, [buffer])
        ready, _, _ = select.select([self._fd, self._wakeup_fd], [], [])
        if self._wakeup_fd in ready:
            return self._drain(buffer) if self._fd in ready else None
        count = os.readv(self._fd, [buffer])
        # The same Ctrl-C may have ended the sender, and its end have overtaken our signal.
        if not count and select.select([self._wakeup_fd], [], [], 0)[0]:
            return None
        return count

    def _drain(self, buffer: memoryview) -> int | None:
        count = os.readv(self._fd, [buffer[: _DRAINED_BYTES_MAX - self._drained]])
        self._drained += count
        return count or None


def ingest(
    store: Store,
    readinto: Callable[[memoryview], int | None],
    decoder: PacketDecoder,
    *,
    stream: str = PARTICLES,
    time_field: str = "",
    on_error: OnError | None = None,
    progress: Progress,
) -> bool:
    """Append packets until the input ends (True) or reading should stop (False).

    time_field: name of the time field where the stream is new and its name is not one of
    schema.TIME_NAMES. on_error: called with the error of each malformed packet whose frame is
    whole, which is then passed over; without it that error is raised.

    Everything appended is committed before this returns or raises. Raises PacketError for
    malformed input, and what the store raises.
    """
    progress.ended = False
    try:
        target = _target(store, stream, time_field)
        exact = stream == PARTICLES and stream in store and target.schema == PARTICLE_SCHEMA
        while count := readinto(decoder.buffer()):
            decoder.received(count)
            progress.bytes += count
            _take(decoder, target, on_error, progress, exact=exact)
        if count == 0:
            progress.ended = True
            decoder.close()
        progress.unfinished_bytes = decoder.unfinished_bytes
        return progress.ended
    finally:
        store.flush()


def _target(store: Store, name: str, time_field: str) -> Stream:
    """The stream to append to; for particles its schema is known before the first packet."""
    if name not in store:
        particles = name == PARTICLES and not time_field
        return store.stream(name, PARTICLE_SCHEMA if particles else None, time=time_field)
    stream = store[name]
    if time_field not in ("", stream.time):
        raise SchemaError(
            f"{store.path}: the time field of stream {name!r} is {stream.time!r}, not "
            f"{time_field!r}; choose another --stream, or leave out --time-field"
        )
    return stream


def _take(
    decoder: PacketDecoder,
    target: Stream,
    on_error: OnError | None,
    progress: Progress,
    *,
    exact: bool,
) -> None:
    """Append all packets that are complete by now."""
    while True:
        try:
            for packet in decoder.packets():
                _append(target, packet, exact=exact)
                _count(target, packet, progress)
        except PacketError as error:
            if on_error is None or not error.whole:
                raise
            progress.skipped += 1
            on_error(error)
        else:
            return


def _append(target: Stream, packet: Packet, *, exact: bool) -> None:
    if exact:
        _check_particles(packet)
    try:
        target.append(packet.arrays, copy=False)
    except (SchemaError, TimeError) as error:
        raise packet.error(str(error)) from error


def _check_particles(packet: Packet) -> None:
    """Particles keep their dtypes to the letter: float32 stamps, say, would be 128 s apart."""
    for name, (dtype, _) in PARTICLE_FIELDS.items():
        array = packet.arrays.get(name)
        if array is not None and array.dtype != dtype:
            raise packet.error(
                f"field {name!r} has dtype {array.dtype}, expected {dtype}; other packets go to a "
                "stream of their own (--stream NAME)"
            )


def _count(target: Stream, packet: Packet, progress: Progress) -> None:
    progress.packets += 1
    times = packet.arrays[target.time]
    if len(times):
        progress.rows += len(times)
        progress.last = times[-1]
        if progress.first is None:
            progress.first = times[0]
