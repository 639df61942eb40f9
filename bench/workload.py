"""Seeded packets as the instrument sends them: 1 to 1,000 particles each, every one distinct.

The particles are the generator's own: "uniform" (both arrays over the whole int32 range;
incompressible, the worst case) and "counts" (detector-like; compressible). The same profile,
size and seed give the same bytes. Repeating a batch is never done: it would measure caches.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.generate import PARTICLES_MAX, Profile, Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.schema import Batch

PARTICLE_BYTES = 8 + 4 * (64 + 32) * 16
PARTICLES_MEAN = PARTICLES_MAX // 2

START_S = 1_771_342_356.080619
"""2026-02-17T15:32:36, the first timestamp in the users' brief."""
PARTICLES_PER_S = 70_000
"""At which the instrument's clock stamps packets, all of one packet's particles alike."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Batches that lie one behind the other in one piece of memory.

    raw: all their bytes, field after field and batch after batch: what a bare write writes.
    """

    raw: memoryview
    batches: list[Batch]
    rows: int

    @classmethod
    def of(cls, profile: Profile, size_bytes: int, seed: int) -> Workload:
        """Build size_bytes of a profile in memory, to within one particle."""
        rows = _rows(size_bytes)
        pool = np.empty(rows * PARTICLE_BYTES, np.uint8)
        batches: list[Batch] = []
        offset = 0
        for batch in batches_of(profile, size_bytes, seed):
            placed: Batch = {}
            for name, array in batch.items():
                piece = pool[offset : offset + array.nbytes]
                placed[name] = piece.view(array.dtype).reshape(array.shape)
                placed[name][...] = array
                offset += array.nbytes
            batches.append(placed)
        return cls(memoryview(pool.data), batches, rows)


def batches_of(
    profile: Profile, size_bytes: int, seed: int, *, particles: int | None = None
) -> Iterator[Batch]:
    """Make size_bytes of a profile, batch by batch, without ever holding it all.

    particles: in every batch; None draws 1 to 1,000 each time, as the generator does.
    """
    source = Source(profile, seed, particles)
    rows, sent = _rows(size_bytes), 0
    while sent < rows:
        batch = source.batch(START_S + sent / PARTICLES_PER_S)
        batch = {name: array[: rows - sent] for name, array in batch.items()}
        sent += len(batch["timestamps"])
        yield batch


def packet(batch: Batch) -> bytes:
    """Frame one batch; by hand, so that the bench trusts no encoder it measures."""
    body = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)
    return struct.pack(">I", len(body)) + body


def _rows(size_bytes: int) -> int:
    return max(1, size_bytes // PARTICLE_BYTES)
