"""Packets on a byte stream: bytes in, dicts of arrays out; dicts of arrays in, bytes out.

A packet is a frame of a 4-byte big-endian length and a pickled dict of arrays. Owns the framing;
what a pickle means is ``unpickle``'s business, and which fields a packet must have the schema's
that it is appended under. Sans IO: no file is read or written here, the caller moves the bytes::

    decoder = PacketDecoder()
    while count := os.readv(fd, [decoder.buffer()]):
        decoder.received(count)
        for packet in decoder.packets():
            ...
    decoder.close()

Memory: frames under 64 KiB are views of shared chunks of 1 MiB, so a packet that is kept keeps
its chunk. A larger frame gets a buffer of its own that the rest of it is read straight into, and
never one over the limit. Arrays are read-only views and need not be aligned.

Every error is a PacketError with the packet's number and the offset of its frame. After one with
``whole=True`` the decoder goes on with the next packet.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from kvstore.errors import PacketError
from kvstore.unpickle import Unpickler

if TYPE_CHECKING:
    from kvstore.schema import Array

FRAME_BYTES_MAX: Final = 256 << 20  # of one packet, unless told otherwise: 43,000 particles
HEADER_BYTES: Final = 4
FRAME_BYTES_LIMIT: Final = 2**32 - 1  # what the header can say

_CHUNK_BYTES: Final = 1 << 20  # one read of a 1 MiB pipe
_SMALL_BYTES: Final = 64 << 10  # copying up to this into the next chunk costs less than a buffer
_SHARED_MAX: Final = 4  # times the packet's size
_TEXT_BYTES_MAX: Final = 16 << 20  # as Python strings it takes ten times that
_CODE_POINT_MAX: Final = 0x10FFFF
_SURROGATES: Final = (0xD800, 0xDFFF)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

PARTICLE_TIME: Final = "timestamps"
PARTICLE_FIELDS: Final[dict[str, tuple[np.dtype[Any], tuple[int, ...]]]] = {
    PARTICLE_TIME: (np.dtype("<f8"), ()),
    "scattering": (np.dtype("<i4"), (64, 16)),
    "spectral": (np.dtype("<i4"), (32, 16)),
}
"""The brief's packets: dtype and per-row shape of each field."""


class Packet(NamedTuple):
    """One decoded packet. number counts from 0; offset is that of its frame's first byte."""

    number: int
    offset: int
    frame_bytes: int  # header included
    arrays: dict[str, Array]

    def error(self, reason: str) -> PacketError:
        """What is wrong with this packet; the next one can still be read."""
        return PacketError(reason, packet=self.number, offset=self.offset, whole=True)


class PacketDecoder:
    """Cuts a byte stream into packets, however the bytes arrive."""

    def __init__(self, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._unpickler = Unpickler()
        self._number = 0
        self._offset = 0  # of the frame that begins at _start
        self._start = self._stop = 0  # what of the chunk is filled and not yet decoded
        self._new_chunk()
        self._large: memoryview | None = None  # the buffer of a frame of its own
        self._large_filled = 0
        self._expects_large = False
        self._broken: PacketError | None = None

    def buffer(self) -> memoryview:
        """Where the next bytes belong, to be asked for anew once ``packets()`` is exhausted."""
        if self._large is not None:
            return self._large[self._large_filled :]
        if len(self._chunk) - self._start < _SMALL_BYTES:
            self._renew_chunk()
        # Large packets come in rows: read only the next header, then the rest without a copy.
        stop = self._start + HEADER_BYTES if self._expects_large else len(self._chunk)
        assert stop > self._stop, "buffer() was called before packets() was exhausted"
        return self._chunk[self._stop : stop]

    def received(self, count: int) -> None:
        """That many bytes were put at the start of ``buffer()``."""
        if self._large is not None:
            self._large_filled += count
        else:
            self._stop += count

    def packets(self) -> Iterator[Packet]:
        """The packets complete by now, each once.

        After a PacketError with ``whole=True`` call it again: it goes on behind the bad packet.
        After any other it raises the same error for ever.
        """
        while (frame := self._next_frame()) is not None:
            number, offset, frame_bytes = self._number, self._offset, HEADER_BYTES + len(frame)
            self._number += 1
            self._offset += frame_bytes
            try:
                arrays = self._unpickler.loads(frame)
                _check_arrays(arrays, len(frame))
            except PacketError as error:
                raise PacketError(
                    error.reason, packet=number, offset=offset, whole=True
                ) from error.__cause__
            yield Packet(number, offset, frame_bytes, arrays)

    @property
    def unfinished_bytes(self) -> int:
        """Bytes that came of a packet whose end did not."""
        large = 0 if self._large is None else HEADER_BYTES + self._large_filled
        return large or self._stop - self._start

    def close(self) -> None:
        """The input has ended; PacketError if it did so inside a frame."""
        if self._broken is not None:
            raise self._broken
        if self._large is not None:
            seen, wanted = self._large_filled, str(len(self._large))
        elif self._stop > self._start:
            seen, wanted = self._stop - self._start - HEADER_BYTES, self._announced()
        else:
            return
        if seen < 0:
            raise self._error(f"the input ends {HEADER_BYTES + seen} bytes into a packet's length")
        raise self._error(f"the input ends inside the packet: {seen} of {wanted} bytes came")

    # -- frames ----------------------------------------------------------------------------

    def _next_frame(self) -> memoryview | None:
        if self._broken is not None:
            raise self._broken
        if self._large is not None:
            return self._finished_large()
        start = self._start + HEADER_BYTES
        if self._stop < start:
            return None
        length = int.from_bytes(self._chunk[self._start : start])
        if length > self._frame_bytes_max:
            raise self._over_limit(length)
        stop = start + length
        if self._stop < stop:
            self._await(start, length)
            return None
        self._start = stop
        return self._frozen[start:stop]

    def _over_limit(self, length: int) -> PacketError:
        self._broken = self._error(
            f"a packet of {length} bytes is announced, over the limit of {self._frame_bytes_max};"
            " if the input is a packet stream, raise the limit (--max-packet-bytes)"
        )
        return self._broken

    def _await(self, start: int, length: int) -> None:
        """A frame whose header is here and whose end is not."""
        self._expects_large = length >= _SMALL_BYTES
        if self._expects_large:
            # Untouched memory costs nothing: pages are used as bytes arrive, not as announced.
            self._large = np.empty(length, np.uint8).data
            self._large_filled = self._stop - start
            self._large[: self._large_filled] = self._chunk[start : self._stop]
            self._start = self._stop

    def _finished_large(self) -> memoryview | None:
        if self._large is None or self._large_filled < len(self._large):
            return None
        frame, self._large = self._large.toreadonly(), None
        return frame

    def _announced(self) -> str:
        header = self._chunk[self._start : self._start + HEADER_BYTES]
        return str(int.from_bytes(header))

    def _renew_chunk(self) -> None:
        """A fresh chunk: arrays may still look at the old one. Zeroing it would cost a pass."""
        rest = self._chunk[self._start : self._stop]
        self._new_chunk()
        self._chunk[: len(rest)] = rest
        self._start, self._stop = 0, len(rest)

    def _new_chunk(self) -> None:
        self._chunk = np.empty(_CHUNK_BYTES, np.uint8).data
        self._frozen = self._chunk.toreadonly()

    def _error(self, reason: str) -> PacketError:
        return PacketError(reason, packet=self._number, offset=self._offset)


# -- what a packet may hold ----------------------------------------------------------------


def _check_arrays(arrays: dict[str, Array], frame_bytes: int) -> None:
    """What a schema cannot see. Which fields there must be, and of what kind, is its business."""
    size = sum(array.nbytes for array in arrays.values())
    if size > _SHARED_MAX * frame_bytes:  # one payload may serve many fields
        raise PacketError(f"{size} bytes of arrays out of a packet of {frame_bytes} bytes")
    for name, array in arrays.items():
        if array.ndim == 0:
            raise PacketError(
                f"field {name!r} is a scalar; an array with an axis of rows is expected"
            )
        if array.dtype.kind == "U" and array.nbytes > _TEXT_BYTES_MAX:
            raise PacketError(
                f"field {name!r} has {array.nbytes} bytes of text, at most {_TEXT_BYTES_MAX} fit "
                "into a packet; send smaller packets"
            )
        if array.dtype.kind in "Ub":
            _check_values(name, array)


def _check_values(name: str, array: Array) -> None:
    """Bytes that numpy takes on trust: code points of text, and the 0 and 1 of booleans."""
    contiguous = np.ascontiguousarray(array)
    if array.dtype.kind == "b":
        bad = contiguous.view(np.uint8) > 1
    else:
        points = contiguous.view(array.dtype.byteorder + "u4")
        bad = (points > _CODE_POINT_MAX) | ((points >= _SURROGATES[0]) & (points <= _SURROGATES[1]))
    if bad.any():
        row = int(np.argmax(bad.reshape(len(array), -1).any(axis=1)))
        kind = "boolean" if array.dtype.kind == "b" else "text"
        raise PacketError(f"{name}[{row}] is no valid {kind}")


# -- writing -------------------------------------------------------------------------------


class _Parts:
    """A file that keeps what is written to it, uncopied."""

    def __init__(self) -> None:
        self.parts: list[memoryview] = []

    def write(self, data: bytes | pickle.PickleBuffer) -> None:
        """Large payloads of arrays come as PickleBuffers, everything else as bytes."""
        view = data.raw() if isinstance(data, pickle.PickleBuffer) else memoryview(data)
        self.parts.append(view)


def encode(batch: Mapping[str, Array]) -> list[memoryview]:
    """One packet as the parts of its frame, for ``os.writev``; any reader of the format loads it.

    The arrays' memory is not copied where it is contiguous and not of datetimes: do not change
    them before the parts are written. Text as object arrays of str becomes 'U' arrays; None has
    no counterpart there and is a PacketError, as is a packet over 4 GiB.
    """
    sink = _Parts()
    pickle.dump({name: _plain(name, x) for name, x in batch.items()}, sink, protocol=5)
    length = sum(len(part) for part in sink.parts)
    if length > FRAME_BYTES_LIMIT:
        raise PacketError(f"a packet of {length} bytes; its length field ends at 4 GiB")
    return [memoryview(length.to_bytes(HEADER_BYTES)), *sink.parts]


def _plain(name: str, array: Array) -> Array:
    array = np.asarray(array)  # a subclass such as memmap would be pickled as itself
    if array.dtype == object:
        return _as_text(name, array)
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return array
    return np.ascontiguousarray(array)


def _as_text(name: str, array: Array) -> Array:
    for value in array.flat:
        if type(value) is not str or value.endswith("\0") or _SURROGATE.search(value):
            # numpy drops trailing NULs, and the decoder takes lone surrogates for damage
            odd = "text that ends in NUL or holds half a character"
            found = odd if isinstance(value, str) else type(value).__name__
            raise PacketError(
                f"field {name!r} holds {found}, which a numpy 'U' array cannot;"
                " leave the field or those rows out, or use another format"
            )
    return array.astype(str)
