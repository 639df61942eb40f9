"""A field's array <-> a block of bytes. Pure; safe to call from many threads at once.

Numbers go through Blosc-LZ4 with byte shuffle at level 5, or are stored as they are where a
probe finds them incompressible; text is msgpack through LZ4. Every block carries the xxh3-64
of its stored bytes. Decoding checks it first, so that no decompressor sees damaged input,
and always yields new memory.

Only this module imports numcodecs, lz4 and xxhash. It turns off numcodecs' own thread pool
for the whole process (``numcodecs.blosc.use_threads = False``): the pool serves one caller at
a time, and measured slower than one plain call on each of our threads (NOTES.md, "Codec").
"""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any, Final, NamedTuple

import lz4.block
import msgpack
import numpy as np
import xxhash

from kvstore.errors import DamageError
from kvstore.schema import Array, Field

Bytes = bytes | memoryview

RAW: Final = 0
BLOSC: Final = 1
TEXT: Final = 2

LEVEL: Final = 5
_SHUFFLE: Final = 1  # by bytes
PROBE_MIN_BYTES: Final = 1 << 16  # below this, compressing costs less than probing saves
PROBE_BYTES: Final = 1 << 14  # of each probed piece: enough for LZ4's window to find repeats
PROBE_PIECES: Final = 3  # start, middle, end: a batch may be half empty
RAW_RATIO: Final = 1.03  # a saving below 3 % is not worth decompressing for
SMALL_BYTES: Final = 64  # Blosc's own header and bookkeeping take 16 of them


@functools.cache
def _blosc() -> Any:
    """Blosc, imported at first use: numcodecs takes a third of what `import kvstore` would."""
    import numcodecs.blosc  # noqa: PLC0415

    numcodecs.blosc.use_threads = False
    return numcodecs.blosc


class Block(NamedTuple):
    """One field of one batch as stored. checksum: xxh3-64 of data."""

    codec: int
    raw_bytes: int
    checksum: int
    data: Bytes


def encode(array: Array, field: Field, *, copy: bool = True) -> Block:
    """Compress a field's rows. With copy=False the block may refer to the array's memory."""
    if field.is_text:
        return _encode_text(array)
    flat = _as_words(array)
    if flat.nbytes > SMALL_BYTES and not _is_incompressible(flat):
        with suppress(MemoryError):  # stored as they are, the rows need no more memory
            data: Bytes = _compress(flat)
            if len(data) < flat.nbytes:
                return Block(BLOSC, flat.nbytes, checksum(data), data)
    data = flat.tobytes() if copy else flat.view(np.uint8).data
    return Block(RAW, flat.nbytes, checksum(data), data)


def decode(
    data: memoryview,
    codec: int,
    raw_bytes: int,
    expected: int,
    field: Field,
    *,
    rows: int,
    verify: bool = True,
) -> Array:
    """Bring back ``rows`` rows in new memory; DamageError where the bytes are not the ones stored.

    expected: the checksum that the index holds. verify=False skips it.
    """
    shape = (rows, *field.shape)
    if codec == TEXT:
        _check(data, expected, verify=verify)
        return _decode_text(data, raw_bytes, shape)
    out = np.empty(shape, field.np_dtype)
    if out.nbytes != raw_bytes or codec not in (RAW, BLOSC):
        raise DamageError(f"index entry says codec {codec}, {raw_bytes} bytes for shape {shape}")
    if codec == RAW:
        _copy_checked(data, out, expected, verify=verify)
    else:
        _check(data, expected, verify=verify)
        _decompress(data, out)
    return out


def checksum(data: Bytes) -> int:
    """xxh3-64, as an unsigned 64-bit number."""
    return xxhash.xxh3_64_intdigest(data)


def running_checksum() -> Any:
    """The same of bytes that come in pieces: ``update`` it with each, then ``intdigest``."""
    return xxhash.xxh3_64()


def _as_words(array: Array) -> Array:
    """The array's memory as flat unsigned words: Blosc takes its shuffle width from them."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{min(flat.dtype.itemsize, 8)}")


def _compress(flat: Array) -> bytes:
    packed: bytes = _blosc().compress(flat, b"lz4", LEVEL, _SHUFFLE, 0)
    return packed


def _is_incompressible(flat: Array) -> bool:
    if flat.nbytes < PROBE_MIN_BYTES:
        return False
    width = PROBE_BYTES // flat.itemsize
    starts = np.linspace(0, flat.size - width, PROBE_PIECES, dtype=int)
    sample = np.concatenate([flat[start : start + width] for start in starts])
    return len(_compress(sample)) * RAW_RATIO > sample.nbytes


def _check(data: memoryview, expected: int, *, verify: bool) -> None:
    if verify and checksum(data) != expected:
        raise DamageError(f"checksum is {checksum(data):016x}, stored was {expected:016x}")


def _copy_checked(data: memoryview, out: Array, expected: int, *, verify: bool) -> None:
    if len(data) != out.nbytes:
        raise DamageError(f"block has {len(data)} bytes, expected {out.nbytes}")
    _check(data, expected, verify=verify)
    np.copyto(out.reshape(-1).view(np.uint8), np.frombuffer(data, np.uint8))


def _decompress(data: memoryview, out: Array) -> None:
    header = np.frombuffer(data[4:16], "<u4") if len(data) >= 16 else None  # noqa: PLR2004
    if header is None or header[0] != out.nbytes or header[2] != len(data):
        raise DamageError(f"{len(data)} bytes are no Blosc block of {out.nbytes} bytes")
    try:
        _blosc().decompress(data, _as_words(out))
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
    view = memoryview(data)
    if (checksum(view[4:]) & 0xFFFFFFFF).to_bytes(4, "big") != view[:4]:
        raise DamageError(f"{what}: the record fails its checksum")
    return msgpack.unpackb(view[4:], strict_map_key=False)
