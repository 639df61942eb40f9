"""A byte stream of packets -> a stream of the store, at the pace of the pipe.

    read ── decode ── append (copy=False) ──> encode threads ──> commit thread

The reading thread is the caller's. Packets are views into the buffers that the bytes were
read into, and go to the store uncopied. Back-pressure is the store's: ``append`` waits while
64 MB are queued, and the pipe fills up. Stopping is cooperative: ``readinto`` says when, and
whatever packets were complete by then are committed. ``ingest`` takes one input to its end;
who serves several at once (serve.py) gives each an ``Intake`` of its own.

What a packet must look like is said in one place, the stream's schema; what does not fit it
becomes a PacketError here. A malformed packet ends the run after everything before it is
committed, unless ``on_error`` is given and the packet's frame is whole: then it is passed over.
"""

from __future__ import annotations

import math
import os
import select
import time
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
_TELL_S: Final = 1.0  # between two gaps of rejected packets: no sender fills the store with them

OnError = Callable[[PacketError], None]


@dataclass(slots=True)
class Progress:
    """What has been taken in so far; read by whoever shows it, written by ``ingest``."""

    packets: int = 0
    rows: int = 0
    bytes: int = 0
    rejected: int = 0  # malformed packets, whether passed over or the end of their input
    skipped: int = 0  # those that were passed over
    interrupted: int = 0  # inputs that ended inside a packet
    connected: int = 0  # producers, at this moment
    connections: int = 0  # there ever were
    refused: int = 0  # connections for which there was no place
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


class Rejections:
    """Packets that were refused, as gaps of the store: each second as one, however many.

    The first is told at once. clock: of the gaps' times, in ns.
    """

    def __init__(self, store: Store, stream: str, clock: Callable[[], int] = time.time_ns):
        self._store = store
        self._stream = stream
        self._clock = clock
        self._count = 0
        self._span_ns = (0, 0)
        self._why = ""  # of the first
        self._told_s = -math.inf

    def add(self, why: str) -> None:
        """One more."""
        now_ns = self._clock()
        if not self._count:
            self._span_ns, self._why = (now_ns, now_ns), why
        self._count += 1
        self._span_ns = (self._span_ns[0], now_ns)
        self.tell_due()

    def tell_due(self) -> None:
        """Tell of those there were, unless that was done a moment ago."""
        if self._count and time.monotonic() >= self._told_s + _TELL_S:
            self.tell()

    def tell(self) -> None:
        """Tell of those there were since the last time."""
        if self._count:
            start_ns, stop_ns = self._span_ns
            self._store.note_gap(
                "rejected",
                self._stream,
                start_ns=start_ns,
                stop_ns=stop_ns,
                occurrences=self._count,
                detail=self._why,
            )
            self._count, self._told_s = 0, time.monotonic()


class Target:
    """The stream that packets go to, and the count of what went.

    time_field: name of the time field where the stream is new and its name is not one of
    schema.TIME_NAMES.
    """

    def __init__(
        self, store: Store, progress: Progress, *, stream: str = PARTICLES, time_field: str = ""
    ):
        self.progress = progress
        self.rejections = Rejections(store, stream)
        self._store = store
        self._stream = _stream_for(store, stream, time_field)
        self._exact = (
            stream == PARTICLES and stream in store and self._stream.schema == PARTICLE_SCHEMA
        )

    def append(self, packet: Packet) -> None:
        """Raises PacketError where the packet does not fit the stream."""
        if self._exact:
            _check_particles(packet)
        try:
            self._stream.append(packet.arrays, copy=False)
        except (SchemaError, TimeError) as error:
            raise packet.error(str(error)) from error
        self._count(packet)

    def reject(self, error: PacketError) -> None:
        """Count a malformed packet, and record it as a gap."""
        self.progress.rejected += 1
        self.rejections.add(str(error))

    def miss(self, error: PacketError) -> None:
        """Count a packet whose end did not come, and record it as a gap."""
        self.progress.interrupted += 1
        self.rejections.add(str(error))

    def flush(self) -> None:
        """Make all of it durable, gaps included."""
        self.rejections.tell()
        self._store.flush()

    def _count(self, packet: Packet) -> None:
        progress = self.progress
        progress.packets += 1
        times = packet.arrays[self._stream.time]
        if len(times):
            progress.rows += len(times)
            progress.last = times[-1]
            if progress.first is None:
                progress.first = times[0]


class Intake:
    """One input on its way into a stream: its bytes, cut into packets, appended.

    on_error: called with the error of each malformed packet whose frame is whole, which is then
    passed over; without it that error is raised.
    """

    def __init__(self, target: Target, decoder: PacketDecoder, on_error: OnError | None = None):
        self.packets = 0
        self._target = target
        self._decoder = decoder
        self._on_error = on_error

    def buffer(self) -> memoryview:
        """Where the next bytes belong; to be asked for once ``append`` returned True."""
        return self._decoder.buffer()

    def received(self, count: int) -> None:
        """That many bytes were put at the start of ``buffer()``."""
        self._decoder.received(count)
        self._target.progress.bytes += count
        self._target.rejections.tell_due()

    def append(self, until_s: float = math.inf) -> bool:
        """Append the packets that are complete by now; False where it is ``until_s`` before.

        until_s: of ``time.monotonic``. At least one packet is appended.
        """
        while True:
            try:
                for packet in self._decoder.packets():
                    self._target.append(packet)
                    self.packets += 1
                    if time.monotonic() > until_s:
                        return False
            except PacketError as error:
                self._target.reject(error)
                if self._on_error is None or not error.whole:
                    raise
                self._target.progress.skipped += 1
                self._on_error(error)
                if time.monotonic() > until_s:
                    return False
            else:
                return True

    def close(self) -> None:
        """The input has ended; PacketError if it did so inside a packet."""
        try:
            self._decoder.close()
        except PacketError as error:
            if self._decoder.unfinished_bytes:
                self._target.miss(error)
            raise

    @property
    def unfinished_bytes(self) -> int:
        """Bytes that came of a packet whose end did not."""
        return self._decoder.unfinished_bytes


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

    stream, time_field: see Target. on_error: see Intake.

    Everything appended is committed before this returns or raises. Raises PacketError for
    malformed input, and what the store raises.
    """
    progress.ended = False
    target = Target(store, progress, stream=stream, time_field=time_field)
    intake = Intake(target, decoder, on_error)
    try:
        while count := readinto(intake.buffer()):
            intake.received(count)
            intake.append()
        if count == 0:
            progress.ended = True
            intake.close()
        progress.unfinished_bytes = intake.unfinished_bytes
        return progress.ended
    finally:
        target.flush()


def _stream_for(store: Store, name: str, time_field: str) -> Stream:
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


def _check_particles(packet: Packet) -> None:
    """Particles keep their dtypes to the letter: float32 stamps, say, would be 128 s apart."""
    for name, (dtype, _) in PARTICLE_FIELDS.items():
        array = packet.arrays.get(name)
        if array is not None and array.dtype != dtype:
            raise packet.error(
                f"field {name!r} has dtype {array.dtype}, expected {dtype}; other packets go to a "
                "stream of their own (--stream NAME)"
            )
