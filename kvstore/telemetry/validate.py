"""Chunks of events -> readings and rejections, with the figures that are known by then.

An event is valid or it is rejected with all of its reasons; nothing is dropped, nothing raised.
decode.py takes those of which nothing is wrong, examine.py the others one by one, and what they
say comes out in the order of arrival. Pure but for the clock that it is given.

*Late* is a reading that is older, by more than a limit, than the newest one of the same device
before it. What was before is kept in memory: after a restart the first ones are not late.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

import numpy as np

from kvstore.telemetry.decode import NOTHING, Block, Decoder
from kvstore.telemetry.devices import Devices
from kvstore.telemetry.examine import CODES, Findings, Limits, examine
from kvstore.telemetry.records import Chunk, Column, Count, Lineage, Readings, Rejection
from kvstore.telemetry.seen import Seen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.telemetry.contract import Contract

_T = TypeVar("_T")

__all__ = ["CODES", "Validated", "Validator"]

FUTURE_LIMIT_S: Final = 300.0  # devices keep time by NTP, or badly
LATE_AFTER_S: Final = 60.0
BLOCK_EVENTS: Final = 4096  # of 130 bytes: half a MB, stays in the second-level cache


class Validated(NamedTuple):
    """What became of a chunk. raw: the payload of each reading; seen: see counts.py."""

    readings: Readings
    rejections: list[Rejection]
    seen: list[Count]
    raw: Sequence[bytes | None]


class Validator:
    """Validates chunks against one contract.

    now_us: the clock, in µs since 1970. future_limit_s: how far an event's time may be ahead of
    it, None for no limit; age_limit_s: how old it may be, None for no limit.
    """

    def __init__(
        self,
        contract: Contract,
        *,
        now_us: Callable[[], int],
        future_limit_s: float | None = FUTURE_LIMIT_S,
        age_limit_s: float | None = None,
        late_after_s: float = LATE_AFTER_S,
    ) -> None:
        self.contract = contract
        self._now_us = now_us
        self._future_us = None if future_limit_s is None else round(future_limit_s * 1e6)
        self._age_us = None if age_limit_s is None else round(age_limit_s * 1e6)
        self._devices = Devices()
        self._decoder = Decoder(contract, self._devices)
        self._seen = Seen(contract, self._devices, late_after_us=round(late_after_s * 1e6))

    def validate(self, chunk: Chunk, *, run: str) -> Validated:
        """Everything about a chunk's events, in the order of their offsets."""
        with _uncollected():
            return self._validate(chunk, run)

    def _validate(self, chunk: Chunk, run: str) -> Validated:
        now_us = self._now_us()
        if self._devices.forget():
            self._seen.forget()
        limits = self._limits(now_us)
        blocks: list[Block] = []
        rejections: list[Rejection] = []
        for start in range(0, len(chunk.payloads), BLOCK_EVENTS):
            block = self._decoder.block(chunk.payloads[start : start + BLOCK_EVENTS], limits)
            block.shift(start)
            blocks.append(self._examined(block, chunk, limits, rejections))
        whole = _joined(blocks, self.contract)
        raw = chunk.payloads if not rejections else [chunk.payloads[i] for i in whole.index]
        readings = self._readings(whole, chunk, now_us, run)
        appended_us = None if chunk.appended_us is None else chunk.appended_us[whole.index]
        seen = self._seen.counts(whole, rejections, appended_us=appended_us, now_us=now_us)
        return Validated(readings, rejections, seen, raw)

    def _limits(self, now_us: int) -> Limits:
        return Limits(
            None if self._future_us is None else now_us + self._future_us,
            None if self._age_us is None else now_us - self._age_us,
        )

    def _examined(
        self, block: Block, chunk: Chunk, limits: Limits, rejections: list[Rejection]
    ) -> Block:
        """The block with those of the rest that turn out to be valid; by place in the chunk."""
        valid: list[tuple[int, Findings]] = []
        for at in block.left.tolist():
            findings = examine(chunk.payloads[at], self.contract, limits)
            if findings.reasons:
                rejections.append(_rejection(chunk, at, findings))
            else:
                valid.append((at, findings))
        return self._merged(block, valid) if valid else block

    def _merged(self, block: Block, valid: list[tuple[int, Findings]]) -> Block:
        """Both in the order of arrival."""
        found = [each for _, each in valid]
        device = self._devices.numbered([each.device_id for each in found])
        slow = Block(
            np.array([at for at, _ in valid], np.int64),
            device,
            self._devices.named(device),
            np.array([each.ts_us for each in found], np.int64),
            np.array([each.finer for each in found], bool),
            {
                field.name: _column(
                    [each.values.get(field.name) for each in found], field.is_number
                )
                for field in self.contract.values
            },
            [each.extras for each in found],
            {at: each.unknown for at, each in valid if each.unknown},
            NOTHING,
        )
        both = _joined([block, slow], self.contract)
        return both.take(np.argsort(both.index))

    def _readings(self, block: Block, chunk: Chunk, now_us: int, run: str) -> Readings:
        count = len(block)
        lineage = Lineage(
            [chunk.place.source] * count,
            np.full(count, chunk.place.partition, np.int32),
            np.asarray(chunk.offsets, np.int64)[block.index],
            np.full(count, now_us, np.int64),
            np.full(count, self.contract.version, np.int16),
            [run] * count,
        )
        return Readings(block.device_id, block.ts_us, block.values, block.extras, lineage)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without collections of garbage: there are no cycles here, and lists of 50,000 to visit.

    They were visited four times a chunk, which took 10 % of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _rejection(chunk: Chunk, at: int, findings: Findings) -> Rejection:
    return Rejection(
        chunk.place,
        int(chunk.offsets[at]),
        chunk.payloads[at],
        tuple(findings.reasons),
        None if chunk.keys is None else chunk.keys[at],
        () if chunk.headers is None else chunk.headers[at],
        findings.device_id,
        findings.ts_us,
    )


def _column(values: list[float | str | None], is_number: bool) -> Column:  # noqa: FBT001
    return np.array(values, np.float64) if is_number else cast("list[str | None]", values)


def _joined(blocks: list[Block], contract: Contract) -> Block:
    """Block behind block."""
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        _arrays([block.index for block in blocks], np.int64),
        _arrays([block.device for block in blocks], np.int64),
        _lists([block.device_id for block in blocks]),
        _arrays([block.ts_us for block in blocks], np.int64),
        _arrays([block.finer for block in blocks], np.bool_),
        {
            field.name: _arrays([block.values[field.name] for block in blocks], np.float64)
            if field.is_number
            else _lists([cast("list[str | None]", block.values[field.name]) for block in blocks])
            for field in contract.values
        },
        _lists([block.extras for block in blocks]),
        {at: names for block in blocks for at, names in block.unknown.items()},
        NOTHING,
    )


def _arrays(parts: Sequence[Any], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _lists(parts: Sequence[list[_T]]) -> list[_T]:
    whole: list[_T] = []
    for part in parts:
        whole += part  # copies at once; chain would go through each
    return whole
