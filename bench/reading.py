"""Reading whole stores, beside bare decompression, bare reads and bare pipes.

Everything is warm: the store was just written, and each side runs once before it counts. Each
batch is dropped before the next is asked for, so that a reader can reuse its memory as the
bare sides reuse theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numcodecs.blosc
import numpy as np

import kvstore
from bench import process
from bench.capture import STREAM, check_rows, compressed, write_store
from bench.figure import BenchError, Figure, Measurement, Rule, Setting
from bench.measure import interleaved, scratch
from bench.pipes import packet_file
from bench.workload import PARTICLE_BYTES, Workload, batches_of


class Block(NamedTuple):
    """One field of one stored batch, compressed, and its length before that."""

    data: bytes
    raw_bytes: int


def read_counts(setting: Setting) -> list[Figure]:
    """Read compressible data on one thread against bare Blosc decompression of its blocks."""
    with scratch(setting.folder, bytes_needed=setting.size_bytes) as folder:
        store = folder / "run.kv"
        write_store(store, batches_of("counts", setting.size_bytes, setting.seed))
        blocks = _blocks(store)
        rows = sum(block.raw_bytes for block in blocks) // PARTICLE_BYTES
        ours, bare = _warm_pairs(
            setting.pairs,
            lambda: rows / read_seconds(store, rows),
            lambda: rows / _decompress_seconds(blocks),
        )
    return [
        Figure(
            name="read-counts",
            unit="particles/s",
            limit_name="bare Blosc decompression",
            values=ours,
            limits=bare,
            rules=(Rule("ratio", ">=", 0.8), Rule("value", ">=", 1_000_000)),
        )
    ]


def read_uniform(setting: Setting) -> list[Figure]:
    """Read incompressible data, checksums on, against readinto of the same bytes."""
    with scratch(setting.folder, bytes_needed=2 * setting.size_bytes) as folder:
        store, raw = folder / "run.kv", folder / "raw"
        work = Workload.of("uniform", setting.size_bytes, setting.seed)
        write_store(store, work.batches)
        raw.write_bytes(work.raw)
        rows, pieces = work.rows, [sum(a.nbytes for a in b.values()) for b in work.batches]
        del work  # leaves its memory to the page cache
        ours, bare = _warm_pairs(
            setting.pairs,
            lambda: rows / read_seconds(store, rows),
            lambda: rows / _readinto_seconds(raw, pieces),
        )
    return [
        Figure(
            name="read-uniform",
            unit="particles/s",
            limit_name="readinto from the page cache",
            values=ours,
            limits=bare,
            rules=(Rule("ratio", ">=", 0.6),),
        )
    ]


def read_pipe(setting: Setting) -> list[Figure]:
    """`kvstore read | cat > /dev/null` against `cat packets | cat > /dev/null`."""
    with scratch(setting.folder, bytes_needed=2 * setting.size_bytes) as folder:
        store = folder / "run.kv"
        write_store(store, batches_of("uniform", setting.size_bytes, setting.seed))
        packets = packet_file(folder / "packets", setting.size_bytes, setting.seed)
        check_rows(store, packets.rows)
        ours, bare = _warm_pairs(
            setting.pairs,
            lambda: packets.rows / process.run(process.kvstore("read", store), ["cat"]).wall_s,
            lambda: packets.rows / process.run(["cat", str(packets.path)], ["cat"]).wall_s,
        )
    return [
        Figure(
            name="read-pipe",
            unit="particles/s",
            limit_name="cat packets | cat > /dev/null",
            values=ours,
            limits=bare,
            rules=(Rule("value", ">=", 250_000),),
        )
    ]


def read_seconds(path: Path, rows: int) -> float:
    """Time a read of everything, the open store's and its generator's work included."""
    found = 0
    with kvstore.open(path) as store:
        started = time.perf_counter_ns()
        for batch in store[STREAM].read():
            found += len(batch["timestamps"])
            del batch
        taken_s = (time.perf_counter_ns() - started) / 1e9
    if found != rows:
        raise BenchError(f"{path}: read {found} rows, {rows} were written")
    return taken_s


def _warm_pairs(
    rounds: int, ours: Callable[[], float], bare: Callable[[], float]
) -> list[list[float]]:
    ours()
    bare()
    return interleaved(rounds, ours, bare)


def _blocks(path: Path) -> list[Block]:
    """Compress what the store yields again: the same arrays, level and filter."""
    with kvstore.open(path) as store:
        return [
            Block(compressed(array), array.nbytes)
            for batch in store[STREAM].read()
            for array in batch.values()
        ]


def _decompress_seconds(blocks: Sequence[Block]) -> float:
    """Time the decompression of every block into one and the same memory."""
    memory = np.empty(max(block.raw_bytes for block in blocks), np.uint8)
    started = time.perf_counter_ns()
    for block in blocks:
        numcodecs.blosc.decompress(block.data, memory[: block.raw_bytes])
    return (time.perf_counter_ns() - started) / 1e9


def _readinto_seconds(raw: Path, pieces: Sequence[int]) -> float:
    """Time readinto of a file, a batch's bytes at a time, into one and the same memory."""
    memory = memoryview(bytearray(max(pieces)))
    with raw.open("rb", buffering=0) as file:
        started = time.perf_counter_ns()
        read_bytes = sum(file.readinto(memory[:piece]) or 0 for piece in pieces)
        taken_s = (time.perf_counter_ns() - started) / 1e9
    if read_bytes != sum(pieces):
        raise BenchError(f"{raw}: read {read_bytes} bytes of {sum(pieces)}")
    return taken_s


MEASUREMENTS = (
    Measurement("read-counts", "read everything, counts, one thread", read_counts),
    Measurement("read-uniform", "read everything, uniform, checksums on", read_uniform),
    Measurement("read-pipe", "kvstore read | cat > /dev/null", read_pipe),
)
