"""One row at a time: packets of one particle from a pipe, and millions of appends.

Nothing is repeated of pipes.py and capture.py but the question: here beside what the rows
cost before any store, and with the bytes that each takes on the disk.
"""

from __future__ import annotations

import pickle
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

import kvstore
from bench import process
from bench.capture import STREAM, check_rows
from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import interleaved, removed, scratch, settle, warm
from bench.pipes import PacketFile, packet_file
from bench.scale.rows import file_bytes, part_bytes
from bench.scale.scalars import columns, rows_at
from bench.workload import PARTICLE_BYTES, batches_of
from kvstore.packets import PacketDecoder

APPEND_SHARE_BYTES: Final = 100_000  # one append per so many bytes of the size: 10 million of 1 TB
CHUNK_ROWS: Final = 100_000  # rows that exist at once as Python objects: 30 MB
PIECE_BYTES: Final = 1 << 20  # of a pipe

Row = dict[str, Any]


def one_particle_packets(setting: Setting) -> list[Figure]:
    """`cat packets | kvstore write`, one particle each, beside decoding the same packets."""
    size = part_bytes(setting)
    stored: list[float] = []
    with scratch(setting.folder, bytes_needed=3 * size) as folder:
        one = packet_file(folder / "one", PARTICLE_BYTES, setting.seed)
        start_s = min(_write_seconds(one, folder / "one.kv", [], lambda _: None) for _ in range(2))
        packets = packet_file(folder / "packets", size, setting.seed, particles=1)
        check = partial(_check_packets, size_bytes=size, seed=setting.seed)
        content = packets.path.read_bytes()
        ours, decoded, pickled = interleaved(
            setting.pairs,
            lambda: packets.rows / _write_seconds(packets, folder / "run.kv", stored, check),
            lambda: packets.rows / _decode_seconds(content, packets.rows),
            lambda: packets.rows / _unpickle_seconds(content, packets.rows),
        )
    value = float(np.median(ours))
    details = {
        "stored_bytes_per_row": stored[-1],
        "raw_bytes_per_row": PARTICLE_BYTES,
        "packets": packets.rows,
        "one_packet_run_s": start_s,
        "without_that_packets_s": packets.rows / max(1e-3, packets.rows / value - start_s),
        "pickle_loads_packets_s": float(np.median(pickled)),
    }
    return [
        Figure(
            name="small-packets",
            unit="packets/s",
            limit_name="kvstore's decoder alone",
            values=ours,
            limits=decoded,
            rules=(Rule("value", ">=", 50_000),),
            details=details,
        )
    ]


def one_row_appends(setting: Setting) -> list[Figure]:
    """Append millions of rows of three numbers, one by one, beside packing them into bytes."""
    count = max(CHUNK_ROWS // 5, setting.size_bytes // APPEND_SHARE_BYTES)
    stored: list[float] = []
    wall_us: list[float] = []
    with scratch(setting.folder, bytes_needed=100 * count) as folder:
        ours, packed = interleaved(
            setting.pairs,
            lambda: _append_us(folder / "rows.kv", count, stored, wall_us),
            lambda: _pack_us(count),
        )
    return [
        Figure(
            name="small-appends",
            unit="us/row",
            limit_name="struct.pack into a bytearray",
            values=ours,
            limits=packed,
            rules=(Rule("value", "<", 1.0),),
            details={
                "rows": count,
                "with_making_rows_us": float(np.median(wall_us)),
                "stored_bytes_per_row": stored[-1],
                "raw_bytes_per_row": 24,
            },
        )
    ]


def _write_seconds(
    packets: PacketFile, store: Path, stored: list[float], check: Callable[[Path], None]
) -> float:
    warm(packets.path)
    settle(packets.path.stat().st_size)
    with removed(store):
        done = process.run(["cat", str(packets.path)], process.kvstore("write", store))
        check_rows(store, packets.rows)
        check(store)
        stored.append(file_bytes(store) / packets.rows)
    return done.wall_s


def _check_packets(store: Path, size_bytes: int, seed: int) -> None:
    """Check every value of what the packets were made of, by making them again."""
    made = batches_of("uniform", size_bytes, seed, particles=1)
    with kvstore.open(store) as opened:
        for batch in opened[STREAM].read():
            sent = list(islice(made, len(batch["timestamps"])))
            for name, column in batch.items():
                if not np.array_equal(column, np.concatenate([each[name] for each in sent])):
                    raise BenchError(f"{store}: {name} is not what was sent")


def _decode_seconds(content: bytes, packets: int) -> float:
    """Time our own decoder over the packets, fed as from a pipe."""
    decoder, rows, view = PacketDecoder(), 0, memoryview(content)
    started = time.perf_counter_ns()
    while view:
        room = decoder.buffer()
        taken = min(len(room), len(view), PIECE_BYTES)
        room[:taken] = view[:taken]
        decoder.received(taken)
        view = view[taken:]
        for packet in decoder.packets():
            rows += len(packet.arrays["timestamps"])
    taken_s = (time.perf_counter_ns() - started) / 1e9
    if rows != packets:
        raise BenchError(f"{rows} rows were decoded, {packets} were sent")
    return taken_s


def _unpickle_seconds(content: bytes, packets: int) -> float:
    """Time pickle.loads over them: what no one should do with a pipe, for comparison."""
    view, at, rows = memoryview(content), 0, 0
    started = time.perf_counter_ns()
    while at < len(view):
        (size,) = struct.unpack_from(">I", view, at)
        batch = pickle.loads(view[at + 4 : at + 4 + size])  # noqa: S301  # made by ourselves
        rows += len(batch["timestamps"])
        at += 4 + size
    taken_s = (time.perf_counter_ns() - started) / 1e9
    if rows != packets:
        raise BenchError(f"{rows} rows were unpickled, {packets} were sent")
    return taken_s


def _append_us(path: Path, count: int, stored: list[float], wall_us: list[float]) -> float:
    """Time appends and flush, without making the rows: the store goes on committing meanwhile.

    wall_us: the same with that.
    """
    taken_ns, begun = 0, time.perf_counter_ns()
    with removed(path):
        with kvstore.open(path, mode="w") as store:
            append = store.stream(STREAM).append
            for rows in _chunks(count):
                started = time.perf_counter_ns()
                for row in rows:
                    append(row)
                taken_ns += time.perf_counter_ns() - started
            started = time.perf_counter_ns()
            store.flush()
            taken_ns += time.perf_counter_ns() - started
            wall_us.append((time.perf_counter_ns() - begun) / 1e3 / count)
        _check(path, count)
        stored.append(file_bytes(path) / count)
    return taken_ns / 1e3 / count


def _pack_us(count: int) -> float:
    """Time the least that turns such a row into bytes: struct.pack, and keeping them."""
    pack, taken_ns = struct.Struct("<ddq").pack, 0
    for rows in _chunks(count):
        kept = bytearray()
        started = time.perf_counter_ns()
        for row in rows:
            kept += pack(row["timestamps"], row["level"], row["number"])
        taken_ns += time.perf_counter_ns() - started
    return taken_ns / 1e3 / count


def _chunks(count: int) -> Iterator[list[Row]]:
    """Make rows of plain Python numbers, as a driver hands them over."""
    for first in range(0, count, CHUNK_ROWS):
        made = rows_at(np.arange(first, min(count, first + CHUNK_ROWS)))
        lists = zip(*(column.tolist() for column in made.values()), strict=True)
        yield [dict(zip(made, values, strict=True)) for values in lists]


def _check(path: Path, count: int) -> None:
    with kvstore.open(path) as store:
        found = list(store[STREAM].read())
    for name, column in columns(count).items():
        if not np.array_equal(np.concatenate([batch[name] for batch in found]), column):
            raise BenchError(f"{path}: {name} is not what was appended")


MEASUREMENTS: Final = (
    Measurement("small-packets", "packets of one particle from a pipe", one_particle_packets),
    Measurement("small-appends", "millions of rows appended one by one", one_row_appends),
)
