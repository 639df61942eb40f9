"""A byte stream of packets -> a stream of the store, at the pace of the pipe.

    read ── decode ── append (copy=False) ──> encode threads ──> commit thread

The reading thread is the caller's. Packets are views into the buffers that the bytes were
read into, and go to the store uncopied. Back-pressure is the store's: ``append`` waits while
64 MB are queued, and the pipe fills up. Stopping is cooperative: ``stop`` is asked before each
read; whatever packets were complete by then are committed.

A malformed packet ends the run after everything before it is committed, unless
``skip_errors`` is set and the packet's frame is whole: then it is counted and passed over.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kvstore.errors import PacketError, SchemaError, TimeError
from kvstore.packets import PARTICLE_FIELDS, PARTICLE_TIME, Packet, PacketDecoder
from kvstore.schema import Array, Field, Schema
from kvstore.store import Store, Stream

PARTICLES: Final = "particles"
PARTICLE_SCHEMA: Final = Schema(
    tuple(Field(name, dtype, shape) for name, (dtype, shape) in PARTICLE_FIELDS.items()),
    PARTICLE_TIME,
)


@dataclass(slots=True)
class Progress:
    """What has been taken in so far; read by whoever shows it, written by ``ingest``."""

    packets: int = 0
    rows: int = 0
    bytes: int = 0
    skipped: int = 0
    first: Any = None  # time of the first row to arrive, in the stream's own dtype
    last: Any = None  # and of the last


class Source:
    """A file descriptor to read from, that a signal can interrupt between two packets.

    wakeup_fd: becomes readable when reading should stop, or None.
    """

    def __init__(self, fd: int, wakeup_fd: int | None = None):
        self._fd = fd
        self._wakeup_fd = wakeup_fd

    def readinto(self, buffer: memoryview) -> int | None:
        """Bytes read, 0 at the end of the input, None where reading should stop."""
        if self._wakeup_fd is not None:
            ready, _, _ = select.select([self._fd, self._wakeup_fd], [], [])
            if self._wakeup_fd in ready:
                return None
        return os.readv(self._fd, [buffer])


def ingest(
    store: Store,
    readinto: Callable[[memoryview], int | None],
    decoder: PacketDecoder,
    *,
    stream: str = PARTICLES,
    time_field: str = "",
    skip_errors: bool = False,
    progress: Progress,
) -> bool:
    """Append packets until the input ends (True) or reading should stop (False).

    Everything appended is committed before this returns or raises. Raises PacketError for
    malformed input, and what the store raises.
    """
    try:
        target = _target(store, stream, time_field)
        while count := readinto(decoder.buffer()):
            decoder.received(count)
            progress.bytes += count
            _take(decoder, target, skip_errors=skip_errors, progress=progress)
        if count == 0:
            decoder.close()
        return count == 0
    finally:
        store.flush()


def _target(store: Store, name: str, time_field: str) -> Stream:
    if name == PARTICLES and name not in store and not time_field:
        return store.stream(name, PARTICLE_SCHEMA)
    return store.stream(name, time=time_field)


def _take(
    decoder: PacketDecoder, target: Stream, *, skip_errors: bool, progress: Progress
) -> None:
    """Append all packets that are complete by now."""
    while True:
        try:
            for packet in decoder.packets():
                _append(target, packet)
                _count(target, packet, progress)
        except PacketError as error:
            if not (skip_errors and error.whole):
                raise
            progress.skipped += 1
        else:
            return


def _append(target: Stream, packet: Packet) -> None:
    try:
        target.append(packet.arrays, copy=False)
    except (SchemaError, TimeError) as error:
        raise packet.error(str(error)) from error


def _count(target: Stream, packet: Packet, progress: Progress) -> None:
    times: Array = packet.arrays[target.time]
    progress.packets += 1
    if len(times):
        progress.rows += len(times)
        progress.last = times[-1]
        if progress.first is None:
            progress.first = times[0]
