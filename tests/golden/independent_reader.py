"""A reader of stores written from docs/format.md alone: it shares no line with kvstore.

Slow and strict: every checksum, name, key and total that the document promises is checked.
Values come as plain Python: times as stored, datetime64 as counts, complex as [real, imag].
The section of docs/format.md that each function follows is named in its docstring.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import lmdb
import lz4.block
import msgpack
import xxhash

# py-lmdb 3 can also open LMDB 1.0 files and asks which engine to use; 2.x knows only 0.9.
ENGINE: dict[str, Any] = {"lib_version": 0} if hasattr(lmdb.Environment, "lib_version") else {}
UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
CODES = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I"}
VERSIONS = (1, 2)
CODECS = {1: (0, 1, 2), 2: (0, 2, 3)}  # of each version's segments
CODES |= {"u8": "Q", "f2": "e", "f4": "f", "f8": "d", "c8": "ff", "c16": "dd"}

BYTES = {tuple(f"{value:08b}"): value for value in range(256)}


def record(data: bytes) -> Any:
    """Section 5, records."""
    checksum, body = data[:4], data[4:]
    assert struct.unpack(">I", checksum)[0] == xxhash.xxh3_64_intdigest(body) & 0xFFFFFFFF
    return msgpack.unpackb(body, strict_map_key=False)


def read_tables(path: Path) -> dict[str, dict[bytes, bytes]]:
    """Section 4, the four tables of a segment file."""
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_dbs=4, **ENGINE) as env,
        env.begin() as txn,
    ):
        names = ("index", "blocks", "order", "meta")
        tables = {name: env.open_db(name.encode(), txn=txn, create=False) for name in names}
        return {name: dict(txn.cursor(table)) for name, table in tables.items()}


def read_store(path: Path) -> dict[str, Any]:
    """Sections 2, 8 and 9: marks, and for each stream its fields and rows by time, then arrival."""
    version, store_id, _ = record((path / "store.msgpack").read_bytes())
    assert version in VERSIONS
    files = listed(sorted((path / "segments").glob("*.mdb")))
    metas: list[dict[bytes, Any]] = []
    rows: dict[bytes, list[Any]] = {}
    for file in files:
        tables = read_tables(file)
        metas.append({key: record(value) for key, value in tables["meta"].items()})
        own_version, *identity = metas[-1][b"identity"][:3]
        assert identity == [store_id, int(file.stem)]
        assert version <= own_version in VERSIONS  # one that was continued: section 17
        version = own_version
        streams = {key[7:]: value for key, value in metas[-1].items() if key[:7] == b"stream:"}
        for batch in read_batches(tables, streams, version):
            rows.setdefault(batch[0], []).append(batch[1:])
    newest = metas[-1]
    check_totals(metas, rows)
    marks = {key[5:].decode(): value for key, value in newest.items() if key[:5] == b"mark:"}
    found = {}
    for stream_id, (name, time, _, fields) in streams.items():
        columns = gathered(fields, rows.get(stream_id, []))
        found[name] = {"time": time, "fields": fields, "rows": columns}
    return {"segments": len(files), "marks": marks, "streams": found}


def listed(files: list[Path]) -> list[Path]:
    """Section 2: the active segment, and those that it lists as sealed."""
    meta = read_tables(files[-1])["meta"]
    sealed = {struct.unpack(">Q", key[7:])[0] for key in meta if key[:7] == b"sealed:"}
    return [file for file in files[:-1] if int(file.stem) in sealed] + files[-1:]


def read_batches(
    tables: dict[str, dict[bytes, bytes]], streams: dict[bytes, Any], version: int
) -> Iterator[tuple[Any, ...]]:
    """Sections 6.2 and 6.3: of each batch: stream id, sort key, times, columns, totals."""
    assert len(tables["order"]) == len(tables["index"])
    used = set()
    for key, value in tables["index"].items():
        own_key, count, first, last, blocks, *framed = record(value)
        stream_id, (span, biased_ns, sequence) = key[:4], struct.unpack(">BQQ", key[4:])
        assert own_key == key == stream_id + tables["order"][stream_id + key[-8:]]
        _, time, versions, fields = streams[stream_id]
        assert len(blocks) in versions
        columns, sizes = [], [0, 0]
        for number, (field, (codec, raw_bytes, stored_bytes, checksum, *inline)) in enumerate(
            zip(fields, blocks, strict=False)
        ):
            block_key = key + struct.pack(">H", number)
            data = inline[0] if inline else tables["blocks"][block_key]
            used |= set() if inline else {block_key}
            assert len(data) == stored_bytes
            assert bool(inline) == (stored_bytes < 256)
            assert xxhash.xxh3_64_intdigest(data) == checksum
            assert codec in CODECS[version]
            columns.append(decode(data, codec, raw_bytes, field, count))
            if framed:
                assert version > 1
                check_frames(data, codec, framed[0][number], count)
            sizes = [sizes[0] + raw_bytes, sizes[1] + stored_bytes]
        number = [field[0] for field in fields].index(time)
        times, dtype = columns[number], fields[number][1]
        assert times == sorted(times)
        assert (first, last) == (times[0], times[-1])
        assert to_ns(first, dtype) + 2**63 == biased_ns
        assert span == (to_ns(last, dtype) - to_ns(first, dtype)).bit_length()
        totals = [count, 1, *sizes, first, last, sequence + 1]
        yield stream_id, key[5:], times, columns, totals
    assert used == set(tables["blocks"])


def check_frames(data: bytes, codec: int, frames: list[Any], count: int) -> None:
    """Section 6.3, the frames that an index record lists: none, or all of two and more."""
    assert len(frames) != 1
    position = rows = 0
    for row_count, stored_bytes, checksum in frames:
        part = data[position : position + stored_bytes]
        assert xxhash.xxh3_64_intdigest(part) == checksum
        if codec == 3:
            assert struct.unpack_from("<I", part, 12)[0] == stored_bytes == len(part)
        else:
            assert (codec, stored_bytes * count) == (0, row_count * len(data))
        position, rows = position + stored_bytes, rows + row_count
    assert not frames or (position, rows) == (len(data), count)


def to_ns(time: float, dtype: str) -> int:
    """Section 6.1, times."""
    if dtype == "<f8":
        return int((Decimal(repr(time)) * 10**9).to_integral_value("ROUND_HALF_EVEN"))
    return int(time) * (1 if dtype == "<i8" else UNITS[dtype[4:-1]])


def decode(data: bytes, codec: int, raw_bytes: int, field: list[Any], count: int) -> list[Any]:
    """Section 7, blocks: one value per row, nested as the field's shape says."""
    _, dtype, shape, *_ = field
    if codec == 2:
        flat = msgpack.unpackb(
            lz4.block.decompress(data, uncompressed_size=raw_bytes),
            unicode_errors="surrogatepass",
        )
    else:
        raw = frames(data, codec, dtype, math.prod(shape)) if codec else data
        assert len(raw) == raw_bytes
        kind = "i8" if dtype[1] in "mM" else dtype[1:]
        unpacked = struct.iter_unpack("<" + CODES[kind], raw)
        flat = [list(value) if len(value) > 1 else value[0] for value in unpacked]
    assert len(flat) == count * math.prod(shape)
    return nested(flat, shape, count)


def nested(flat: list[Any], shape: list[int], count: int) -> list[Any]:
    if not shape:
        return flat
    width = len(flat) // count
    rows = [flat[row * width : (row + 1) * width] for row in range(count)]
    return [nested(row, shape[1:], shape[0]) if shape[0] else [] for row in rows]


def frames(data: bytes, codec: int, dtype: str, row_values: int) -> bytes:
    """Sections 7.1 and 7.2: the raw bytes of one frame (codec 1) or of several (codec 3)."""
    item_bytes = int(dtype[2:].partition("[")[0])
    own_width = min(item_bytes, 8)
    row_words = row_values * item_bytes // own_width
    out, position = bytearray(), 0
    while position < len(data):
        width, raw_bytes, _, stored_bytes = struct.unpack_from("<3xB3I", data, position)
        assert width in (1, 2, 4, 8)
        assert raw_bytes > 0 == raw_bytes % (width * row_words)
        frame = blosc(data[position : position + stored_bytes])
        if width != own_width:
            assert codec == 3
            assert dtype[1] in "iumM"
            frame = widened(frame, width, own_width, signed=dtype[1] != "u")
        out += frame
        position += stored_bytes
        assert len(frame) >= 4096 or position == len(data)
        assert codec == 3 or (position == len(data) and not data[2] & 0b110)
    return bytes(out)


def widened(data: bytes, width: int, own_width: int, *, signed: bool) -> bytes:
    """Section 7.1: the same integers in their own number of bytes."""
    assert width < own_width
    code = {1: "b", 2: "h", 4: "i", 8: "q"}
    kinds = [code[each] if signed else code[each].upper() for each in (width, own_width)]
    count = len(data) // width
    return struct.pack(f"<{count}{kinds[1]}", *struct.unpack(f"<{count}{kinds[0]}", data))


def blosc(data: bytes) -> bytes:
    """Section 7.2, a Blosc buffer, by LZ4's own block decompressor."""
    _, _, flags, width, raw_bytes, block_bytes, stored_bytes = struct.unpack_from("<4B3I", data)
    assert (stored_bytes, flags >> 5) == (len(data), 1)
    if flags & 2:
        assert stored_bytes == 16 + raw_bytes
        return data[16:]
    out = bytearray()
    for number in range(-(-raw_bytes // block_bytes)):
        (position,) = struct.unpack_from("<I", data, 16 + 4 * number)
        size = min(block_bytes, raw_bytes - number * block_bytes)
        split = not flags & 0x10 and size == block_bytes and size // width >= 128
        parts = b""
        for _ in range(width if split else 1):
            part_bytes = size // width if split else size
            (packed_bytes,) = struct.unpack_from("<I", data, position)
            part = data[position + 4 : position + 4 + packed_bytes]
            position += 4 + packed_bytes
            if packed_bytes != part_bytes:
                part = lz4.block.decompress(part, uncompressed_size=part_bytes)
            parts += part
        if flags & 4:
            parts = bits_unshuffled(parts, width)
        elif flags & 1:
            parts = unshuffled(parts, width)
        out += parts
    return bytes(out)


def unshuffled(data: bytes, width: int) -> bytes:
    count = len(data) // width
    planes = [data[n * count : (n + 1) * count] for n in range(width)]
    return b"".join(map(bytes, zip(*planes, strict=True))) + data[width * count :]


def bits_unshuffled(data: bytes, width: int) -> bytes:
    count = len(data) // width
    if count % 8:
        return data
    planes = [data[n * count // 8 : (n + 1) * count // 8] for n in range(8 * width)]
    bits = [f"{int.from_bytes(plane, 'little'):0{count}b}"[::-1] for plane in planes]
    of_bytes = [zip(*reversed(bits[8 * n : 8 * n + 8]), strict=True) for n in range(width)]
    joined = b"".join(bytes(BYTES[each] for each in one) for one in of_bytes)
    return unshuffled(joined, width) + data[width * count :]


def gathered(fields: list[Any], batches: list[Any]) -> dict[str, list[Any]]:
    """Sections 6.4 and 8: rows by time, equal times by arrival; fills for fields added later."""
    rows: list[tuple[Any, tuple[Any, ...]]] = []
    for key, times, columns, _ in batches:
        count = len(times)
        missing = [[fill(field)] * count for field in fields[len(columns) :]]
        for row, values in enumerate(zip(*columns, *missing, strict=True)):
            rows.append(((times[row], key[8:], row), values))
    rows.sort(key=lambda each: each[0])
    return {field[0]: [values[n] for _, values in rows] for n, field in enumerate(fields)}


def fill(field: list[Any]) -> Any:
    _, dtype, shape, _, _, *declared = field
    defaults = {"f": math.nan, "c": [math.nan, 0.0], "m": -(2**63), "M": -(2**63), "e": None}
    value = declared[0] if declared else defaults[dtype[1]]
    for length in reversed(shape):
        value = [value] * length
    return value


def check_totals(metas: list[dict[bytes, Any]], rows: dict[bytes, list[Any]]) -> None:
    """Sections 9 and 13: sealed summaries and totals count every batch; sequences have no gap."""
    newest = metas[-1]
    sealed = [value for key, value in newest.items() if key[:7] == b"sealed:"]
    dropped = {key[8:]: value for key, value in newest.items() if key[:8] == b"dropped:"}
    assert [each[0] for each in sealed] == [meta[b"identity"][2] for meta in metas[:-1]]
    assert [each[2] for each in sealed] == [meta[b"commit"] for meta in metas[:-1]]
    for each, meta in zip(sealed, metas, strict=False):
        assert each[4:] in ([], [meta.get(b"clock", 0)])
    for stream_id, batches in rows.items():
        sequences = sorted(key[8:] for key, *_ in batches)
        gone = dropped[stream_id][0][1] if stream_id in dropped else 0
        numbers = [struct.unpack(">Q", each)[0] for each in sequences]
        assert len(set(numbers)) == len(numbers) == max(numbers) + 1 - gone
        assert gone or numbers == list(range(len(batches)))
        parts = [each[3].get(struct.unpack(">I", stream_id)[0]) for each in sealed]
        parts.append(newest.get(b"total:" + stream_id))
        held = functools.reduce(plus, (part for part in parts if part))
        assert held == functools.reduce(plus, (batch[3] for batch in batches))


def plus(one: list[Any], other: list[Any]) -> list[Any]:
    firsts = [each[4] for each in (one, other) if each[0]]
    lasts = [each[5] for each in (one, other) if each[0]]
    sums = [one[n] + other[n] for n in range(4)]
    return [*sums, min(firsts), max(lasts), max(one[6], other[6])]
