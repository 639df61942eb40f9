"""A field's array <-> a block of bytes. Pure; safe to call from many threads at once.

Numbers go through Blosc-LZ4 at level 5 in frames of about a megabyte, or are stored as they are
where a probe finds them incompressible; text is msgpack through LZ4. A frame's integers are
first narrowed to the bytes that its values need: a detector's counts fill two of an int32's
four. What is narrowed stays in the second-level cache. The fields of a batch have their frames
at the same rows, a short one first, so that a range begins soon.

Every block carries the xxh3-64 of its stored bytes and, where there are several, of each frame:
what needs some of the rows checks and decompresses only the frames that hold them. Checking
comes first, so that no decompressor sees damaged input; decoding always yields new memory.

Only this module imports numcodecs, lz4 and xxhash. It turns off numcodecs' own thread pool
for the whole process (``numcodecs.blosc.use_threads = False``): the pool serves one caller at
a time, and measured slower than one plain call on each of our threads (NOTES.md, "Codec").
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, Final, NamedTuple

import lz4.block
import msgpack
import numpy as np
import xxhash

from kvstore import libc
from kvstore.errors import DamageError
from kvstore.schema import Array, Field

Bytes = bytes | memoryview

RAW: Final = 0
BLOSC: Final = 1
TEXT: Final = 2
FRAMES: Final = 3

LEVEL: Final = 5
FRAME_BYTES: Final = 3 << 19  # of rows before narrowing, at least one row
FIRST_FRAME_BYTES: Final = 1 << 19  # decompressed in 0.1 ms
_FIELD_FRAME_BYTES_MIN: Final = 1 << 16  # narrow fields have fewer frames than the widest
FRAME_BYTES_MIN: Final = 1 << 12  # but for the last of a block: what bounds the time for a block
_BYTES: Final = 1  # shuffled by bytes
_BITS: Final = 2  # or by bits: smaller where values fill few of them
_BITS_WIDTH_MAX: Final = 2
_BITS_COUNT: Final = 8  # other than whole bytes of each bit Blosc leaves unshuffled
_BITS_RATIO: Final = 1.2  # what they have to save: they decompress at half the speed
PROBE_MIN_BYTES: Final = 1 << 16  # below this, compressing costs less than probing saves
PROBE_BYTES: Final = 1 << 14  # of each probed piece: enough for LZ4's window to find repeats
PROBE_PIECES: Final = 3  # start, middle, end: a batch may be half empty
RAW_RATIO: Final = 1.03  # a saving below 3 % is not worth decompressing for
POPULATE_BYTES_MIN: Final = 256 << 10  # smaller arrays come from malloc's own stock
POPULATE_BYTES_MAX: Final = 64 << 20  # of more, only what is really written takes memory
SMALL_BYTES: Final = 64  # Blosc's own header and bookkeeping take 16 of them
_NARROWED: Final = "iumM"  # kinds of numpy: integers, durations, times
_BLOSC_HEADER: Final = struct.Struct("<3xB3I")  # of a Blosc buffer: width, raw, block, stored bytes

_of_thread = threading.local()


@functools.cache
def _blosc() -> Any:
    """Blosc, imported at first use: numcodecs takes a third of what `import kvstore` would."""
    import numcodecs.blosc  # noqa: PLC0415

    numcodecs.blosc.use_threads = False
    return numcodecs.blosc


class Frame(NamedTuple):
    """Some rows of a block, in how many bytes. checksum: xxh3-64 of these."""

    rows: int
    stored_bytes: int
    checksum: int


class Block(NamedTuple):
    """One field of one batch as stored. checksum: xxh3-64 of data. frames: none, or several."""

    codec: int
    raw_bytes: int
    checksum: int
    data: Bytes
    frames: Sequence[Frame] = ()


def cuts(rows: int, row_bytes: int) -> list[int]:
    """At which rows a batch's frames begin. row_bytes: of its widest field."""
    if rows * row_bytes <= 2 * FIRST_FRAME_BYTES:
        return [0]
    first, step = (_eights(size // row_bytes) for size in (FIRST_FRAME_BYTES, FRAME_BYTES))
    return [0, *range(first, rows, step)]


def _eights(rows: int) -> int:
    """One row at least; of more, whole eights, whose bits Blosc can shuffle."""
    return rows - rows % _BITS_COUNT if rows > _BITS_COUNT else max(rows, 1)


def encode(
    array: Array, field: Field, *, copy: bool = True, begins: Sequence[int] | None = None
) -> Block:
    """Compress a field's rows. With copy=False the block may refer to the array's memory.

    begins: the ``cuts`` of its batch; by default those of this field alone.
    """
    if field.is_text:
        return _encode_text(array)
    words = _words(np.ascontiguousarray(array), field)
    parts = _parts(words, cuts(len(words), field.row_bytes) if begins is None else begins)
    narrow = field.np_dtype.kind in _NARROWED
    shuffle = _shuffle(words, narrow=narrow) if words.nbytes > SMALL_BYTES else None
    if shuffle is not None:
        with suppress(MemoryError):  # stored as they are, the rows need no more memory
            packed = [_framed(part, shuffle, narrow=narrow) for part in parts]
            if sum(map(len, packed)) < words.nbytes:
                data: Bytes = b"".join(packed)
                return Block(FRAMES, words.nbytes, checksum(data), data, _frames(parts, packed))
    data = words.tobytes() if copy else words.reshape(-1).view(np.uint8).data
    stored = [part.reshape(-1).view(np.uint8).data for part in parts] if len(parts) > 1 else ()
    return Block(RAW, words.nbytes, checksum(data), data, _frames(parts, stored))


def decode(
    data: memoryview,
    codec: int,
    raw_bytes: int,
    expected: int,
    field: Field,
    *,
    rows: int,
    part: slice = slice(None),
    frames: Sequence[Frame] = (),
    verify: bool = True,
) -> Array:
    """Bring back ``rows`` rows, or part of them, in new memory.

    expected, frames: the checksums that the index holds; DamageError where the bytes are not the
    ones stored. verify=False skips it. frames: of these, only those that hold the part count.
    """
    start, stop, _ = part.indices(rows)
    first, last = 0, rows
    if frames and stop - start < rows:
        data, first, last = _holding(data, frames, start, stop, rows, verify=verify)
    else:
        _check(data, expected, verify=verify)
    if codec == TEXT:
        return _decode_text(data, raw_bytes, (rows, *field.shape))[part]
    row_bytes = field.row_bytes
    if rows * row_bytes != raw_bytes or codec not in (RAW, BLOSC, FRAMES):
        raise DamageError(
            f"index entry says codec {codec}, {raw_bytes} bytes for {rows} rows of {row_bytes}"
        )
    if codec == RAW and len(data) != (last - first) * row_bytes:
        raise DamageError(f"{len(data)} bytes for {last - first} rows of {row_bytes}")
    out = np.empty((max(stop - start, 0), *field.shape), field.np_dtype)
    if POPULATE_BYTES_MIN <= out.nbytes <= POPULATE_BYTES_MAX:
        libc.populate(out.ctypes.data, out.nbytes)
    if codec != RAW:
        _decode_frames(data, _words(out, field), start - first, last - first)
    else:
        offset = (start - first) * row_bytes
        wanted = data[offset : offset + out.nbytes]
        np.copyto(out.reshape(-1).view(np.uint8), np.frombuffer(wanted, np.uint8))
    return out


def checksum(data: Bytes) -> int:
    """xxh3-64, as an unsigned 64-bit number."""
    return xxhash.xxh3_64_intdigest(data)


def running_checksum() -> Any:
    """The same of bytes that come in pieces: ``update`` it with each, then ``intdigest``."""
    return xxhash.xxh3_64()


def _words(rows: Array, field: Field) -> Array:
    """The memory of rows as integers, (rows, words of a row): Blosc takes its width from them."""
    kind = "i" if field.np_dtype.kind in "imM" else "u"
    width = min(field.np_dtype.itemsize, 8)
    return rows.reshape(-1).view(f"{kind}{width}").reshape(len(rows), field.row_bytes // width)


def _compress(words: Array, shuffle: int) -> bytes:
    packed: bytes = _blosc().compress(words.reshape(-1), b"lz4", LEVEL, shuffle, 0)
    return packed


def _parts(words: Array, begins: Sequence[int]) -> list[Array]:
    """The rows of each frame; those that would be too short for this field go with the next."""
    row_bytes = words.shape[1] * words.itemsize
    kept = [0]
    for row in begins:
        if (row - kept[-1]) * row_bytes >= _FIELD_FRAME_BYTES_MIN:
            kept.append(row)
    return [words[start:stop] for start, stop in pairwise([*kept, len(words)])]


def _frames(parts: Sequence[Array], stored: Sequence[Bytes]) -> Sequence[Frame]:
    """What the index holds of several frames; of a single one the block's checksum says it."""
    if len(parts) == 1:
        return ()
    return [
        Frame(len(part), len(data), checksum(data))
        for part, data in zip(parts, stored, strict=True)
    ]


def _framed(words: Array, shuffle: int, *, narrow: bool) -> bytes:
    if narrow:
        words = _narrowed(words)
    by_bits = words.itemsize <= _BITS_WIDTH_MAX and words.size % _BITS_COUNT == 0
    return _compress(words, shuffle if by_bits else _BYTES)


def _narrowed(words: Array) -> Array:
    """The same values in the fewest bytes, 1, 2, 4 or 8, that hold all of them."""
    low, high = words.min(), words.max()
    for width in (1, 2, 4):
        if width >= words.itemsize:
            break
        info = np.iinfo(f"{words.dtype.kind}{width}")
        if info.min <= low and high <= info.max:
            return words.astype(info.dtype)
    return words


def _shuffle(words: Array, *, narrow: bool) -> int | None:
    """How to shuffle these before compression; None where that gains nothing."""
    if words.nbytes < PROBE_MIN_BYTES:
        return _BYTES
    flat = words.reshape(-1)
    width = PROBE_BYTES // flat.itemsize
    starts = np.linspace(0, flat.size - width, PROBE_PIECES, dtype=int)
    sample = np.concatenate([flat[start : start + width] for start in starts])
    raw_bytes = sample.nbytes
    sample = _narrowed(sample) if narrow else sample
    by_bytes = len(_compress(sample, _BYTES))
    if by_bytes * RAW_RATIO > raw_bytes:
        return None
    if not narrow or sample.itemsize > _BITS_WIDTH_MAX:
        return _BYTES
    return _BITS if len(_compress(sample, _BITS)) * _BITS_RATIO < by_bytes else _BYTES


def _check(data: memoryview, expected: int, *, verify: bool) -> None:
    if verify and checksum(data) != expected:
        raise DamageError(f"checksum is {checksum(data):016x}, stored was {expected:016x}")


def _holding(
    data: memoryview,
    frames: Sequence[Frame],
    start: int,
    stop: int,
    rows: int,
    *,
    verify: bool,
) -> tuple[memoryview, int, int]:
    """The bytes of the frames that hold these rows, checked; their first row and their last."""
    row = offset = first = last = begin = end = 0
    for count, size, expected in frames:
        if row < stop and row + count > start:
            _check(data[offset : offset + size], expected, verify=verify)
            first, begin = (first, begin) if end else (row, offset)
            last, end = row + count, offset + size
        row, offset = row + count, offset + size
    if (row, offset) != (rows, len(data)):
        raise DamageError(f"index entry says frames of {row} rows, {offset} bytes")
    return data[begin:end], first, last


def check_frames(data: Bytes, frames: Sequence[Frame]) -> None:
    """DamageError where a frame is not what the index says, though the block may be."""
    offset, whole = 0, memoryview(data)
    for _, size, expected in frames:
        _check(whole[offset : offset + size], expected, verify=True)
        offset += size


def _decode_frames(data: memoryview, out: Array, first: int, total: int) -> None:
    """Fill ``out`` with the rows from ``first`` on, of the ``total`` that the frames hold."""
    offset = begin = 0
    while begin < total and out.shape[1]:
        width, rows, size = _header(data[offset:], out)
        end = begin + rows
        is_small = rows * out.shape[1] * out.itemsize < FRAME_BYTES_MIN
        if end > total or (is_small and end < total):
            break
        low, high = max(begin, first), min(end, first + len(out))
        if low < high:
            target, frame = out[low - first : high - first], data[offset : offset + size]
            if width < out.itemsize or high - low < rows:
                whole = _scratch(rows * out.shape[1] * width)
                _decompress(frame, whole)
                whole = whole.view(f"{out.dtype.kind}{width}").reshape(rows, -1)
                np.copyto(target, whole[low - begin : high - begin])
            else:
                _decompress(frame, target)
        offset, begin = offset + size, end
    if begin != total or offset != len(data):
        raise DamageError(f"{len(data)} bytes are no frames of {total} rows")


def _scratch(size: int) -> Array:
    """Memory for a moment; each thread keeps its own, which stays in the caches."""
    if size > FRAME_BYTES:
        return np.empty(size, np.uint8)
    if len(getattr(_of_thread, "scratch", ())) < size:
        _of_thread.scratch = np.empty(FRAME_BYTES, np.uint8)
    found: Array = _of_thread.scratch[:size]
    return found


def _header(data: memoryview, out: Array) -> tuple[int, int, int]:
    """Element width, rows and size of the frame that data begins with."""
    if len(data) >= _BLOSC_HEADER.size:
        width, raw_bytes, _, size = _BLOSC_HEADER.unpack_from(data)
        row_bytes = width * out.shape[1]
        fits = (
            width in (1, 2, 4, 8)
            and width <= out.itemsize
            and _BLOSC_HEADER.size <= size <= len(data)
        )
        if fits and raw_bytes % row_bytes == 0:
            return width, raw_bytes // row_bytes, size
    raise DamageError(f"{len(data)} bytes begin with no Blosc frame")


def _decompress(data: memoryview, out: Array) -> None:
    try:
        _blosc().decompress(data, out.reshape(-1))
    except (RuntimeError, ValueError) as error:
        raise DamageError(f"Blosc cannot decompress the block: {error}") from error


def _encode_text(array: Array) -> Block:
    plain = msgpack.packb(array.reshape(-1).tolist(), unicode_errors="surrogatepass")
    data = lz4.block.compress(plain, store_size=False)
    return Block(TEXT, len(plain), checksum(data), data)


def _decode_text(data: memoryview, raw_bytes: int, shape: tuple[int, ...]) -> Array:
    out = np.empty(shape, object)
    try:
        plain = lz4.block.decompress(data, uncompressed_size=raw_bytes)
        out.reshape(-1)[:] = msgpack.unpackb(plain, unicode_errors="surrogatepass")
    except (lz4.block.LZ4BlockError, ValueError, msgpack.UnpackException) as error:
        raise DamageError(f"text block of {len(data)} bytes cannot be read: {error}") from error
    return out


def packed(record: Any) -> bytes:
    """A small index or meta record with its own checksum in front, 4 bytes big-endian."""
    body: bytes = msgpack.packb(record)
    return (checksum(body) & 0xFFFFFFFF).to_bytes(4, "big") + body


def unpacked(data: Bytes, what: str) -> Any:
    """The inverse of ``packed``; DamageError names what it was."""
    body = memoryview(data)[4:]
    if xxhash.xxh3_64_digest(body)[4:] != data[:4]:  # a digest is big-endian, too
        raise DamageError(f"{what}: the record fails its checksum")
    return msgpack.unpackb(body, strict_map_key=False)
