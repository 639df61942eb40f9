"""What a pipeline has read and not committed yet, and how it becomes the work of one commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvstore.telemetry.records import Chunk, Column, Lineage, Place, Readings
from kvstore.telemetry.validate import Validated

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class Gathered:
    """What waits for the next commit: chunks in order of arrival, and what became of them."""

    chunks: list[Chunk] = field(default_factory=list)
    validated: list[Validated] = field(default_factory=list)
    events: int = 0
    bytes: int = 0
    since_s: float = 0.0  # monotonic
    now_us: int = 0
    oldest_us: int | None = None  # when the source took its first event, or we did

    def places(self) -> list[Place]:
        """In order of their first chunk."""
        return list(dict.fromkeys(chunk.place for chunk in self.chunks))

    def without(self, places: Sequence[Place]) -> Gathered:
        """The part of the other places."""
        pairs = zip(self.chunks, self.validated, strict=True)
        kept = [(chunk, found) for chunk, found in pairs if chunk.place not in places]
        chunks = [chunk for chunk, _ in kept]
        return Gathered(
            chunks,
            [found for _, found in kept],
            sum(len(chunk.payloads) for chunk in chunks),
            sum(map(bytes_of, chunks)),
            self.since_s,
            self.now_us,
            self.oldest_us,
        )


def joined(parts: Sequence[Readings]) -> Readings:
    """Readings behind each other; all of one contract."""
    if len(parts) == 1:
        return parts[0]
    lineages = [part.lineage for part in parts]
    return Readings(
        _lists([part.device_id for part in parts]),
        np.concatenate([part.ts_us for part in parts]),
        {name: _columns([part.values[name] for part in parts]) for name in parts[0].values},
        _lists([part.extras for part in parts]),
        Lineage(
            _lists([each.source for each in lineages]),
            np.concatenate([each.partition for each in lineages]),
            np.concatenate([each.offset for each in lineages]),
            np.concatenate([each.ingested_us for each in lineages]),
            np.concatenate([each.contract_version for each in lineages]),
            _lists([each.run for each in lineages]),
        ),
    )


def _columns(parts: Sequence[Column]) -> Column:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(cast("list[NDArray[np.float64]]", parts))
    return _lists(parts)


def _lists(parts: Sequence[Any]) -> list[Any]:
    return list(chain.from_iterable(parts))


def bytes_of(chunk: Chunk) -> int:
    """Bytes of the raw events."""
    return sum(map(len, filter(None, chunk.payloads)))
