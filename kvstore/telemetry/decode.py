r"""The fast way: payloads -> columns, for events of which nothing is wrong. Only here is msgspec.

What it accepts is exactly what examine.py would accept, with the same values; whatever it is not
sure of it leaves to that. It is fast since it looks at each event once, in C, and at each column
of a block once, with numpy.

The traps of a fast decoder, and how each is met without another look at every event:

- *A key that stands twice* wins silently with its last value, and *unknown fields* are skipped
  unread. Each known field that was found needs two quotation marks, its value two more where it
  is a text. So a payload with a repeated or an unknown key has more of them than its fields
  account for; one with as many has neither. Quotation marks are counted over a whole block; only
  where the sum is off they are counted for each event.
- *NUL* can only be written as ``\u0000`` (a raw one is no JSON): events with a backslash are
  left to the slow way. That also keeps escaped quotation marks out of the sum above.
- *Invalid UTF-8* raises another error than invalid JSON, and only within texts that are decoded.
  Skipped ones belong to unknown fields, and events with such are decoded again, whole.
- *Timestamps* are rounded by other decoders: they come as text, see stamps.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec
import numpy as np

from kvstore.telemetry import stamps
from kvstore.telemetry.contract import DEVICE, TIMESTAMP, Contract, ContractField
from kvstore.telemetry.devices import Devices
from kvstore.telemetry.examine import EVENT_BYTES_MAX, EXACT_MAX, Limits, canonical

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.telemetry.records import Column

_T = TypeVar("_T")
NOTHING: Final = np.empty(0, np.int64)
# The default of an optional number: told from null (None), and NaN in the column as null is.
TEXTS_MAX: Final = 500  # of a field told apart: versions of firmware, not serial numbers
_ABSENT: Final = float("nan")
_QUOTE: Final = ord('"')
_KEY_QUOTES: Final = 2
_TEXT_QUOTES: Final = 2
_IDENTITY_QUOTES: Final = 2 * (_KEY_QUOTES + _TEXT_QUOTES)
_CANNOT_DECODE: Final = (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError)


@dataclass(slots=True)
class Block:
    """Valid events of a block by column, in the order of ``index``, their places in the block.

    device: its number, see devices.py. unknown: the names of fields that the contract does not
    know, by place, where there are any.
    left: the places of all others, ascending.
    """

    index: NDArray[np.int64]
    device: NDArray[np.int64]
    device_id: list[str]
    ts_us: NDArray[np.int64]
    finer: NDArray[np.bool_]
    values: dict[str, Column]
    extras: list[str | None]
    unknown: dict[int, tuple[str, ...]]
    left: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def shift(self, start: int) -> None:
        """Count places from a block's start on."""
        self.index += start
        self.left += start
        if self.unknown:
            self.unknown = {at + start: names for at, names in self.unknown.items()}

    def take(self, places: NDArray[Any]) -> Block:
        """Those events, in that order; unknown fields are all theirs, nothing is left."""
        order = places.tolist()

        def taken(column: list[_T]) -> list[_T]:
            return [column[at] for at in order]

        return Block(
            self.index[places],
            self.device[places],
            taken(self.device_id),
            self.ts_us[places],
            self.finer[places],
            {
                name: column[places] if isinstance(column, np.ndarray) else taken(column)
                for name, column in self.values.items()
            },
            taken(self.extras),
            self.unknown,
            NOTHING,
        )


class Decoder:
    """Decodes blocks of events of one contract."""

    def __init__(self, contract: Contract, devices: Devices) -> None:
        self._contract = contract
        self._devices = devices
        self._getters = [_Getter(each, f"f{n}") for n, each in enumerate(contract.values)]
        event = msgspec.defstruct(
            "Event",
            [("device", str), ("time", str), *(each.declared() for each in self._getters)],
            rename={"device": DEVICE, "time": TIMESTAMP}
            | {each.attribute: each.field.name for each in self._getters},
            gc=False,  # events have no cycles, and the collector would visit each of them
            kw_only=True,
        )
        names = ("device", "time", *(each.attribute for each in self._getters))
        self._columns = _loop(names, msgspec.json.Decoder(event).decode)
        self._decode_any = msgspec.json.Decoder(dict[str, Any]).decode
        self._known = {DEVICE, TIMESTAMP, *(each.name for each in contract.values)}

    def block(self, payloads: Sequence[bytes | None], limits: Limits) -> Block:
        """Decode what is surely valid."""
        missed: list[int] = []
        ids, times, *columns = self._columns(payloads, missed)
        index = np.delete(np.arange(len(payloads)), missed) if missed else np.arange(len(payloads))
        raw = [payloads[at] for at in index.tolist()] if missed else payloads
        device = self._devices.numbered(ids)
        stamp = stamps.parse_all(times)
        block = Block(
            index,
            device,
            self._devices.named(device),
            stamp.us,
            stamp.finer,
            {
                each.field.name: each.stored(column)
                for each, column in zip(self._getters, columns, strict=True)
            },
            [None] * len(ids),
            {},
            np.array(missed, np.int64),
        )
        sure = stamp.sure & self._in_limits(block, limits)
        self._doubt_bytes(cast("Sequence[bytes]", raw), columns, block, sure)
        if sure.all():
            return block
        chosen = block.take(np.flatnonzero(sure))
        chosen.left = np.union1d(block.left, block.index[~sure])
        return chosen

    def _in_limits(self, block: Block, limits: Limits) -> NDArray[np.bool_]:
        """Which events keep what the contract and the clock demand of their values."""
        sure = block.device >= 0
        if limits.latest_us is not None:
            sure &= block.ts_us <= limits.latest_us
        if limits.earliest_us is not None:
            sure &= block.ts_us >= limits.earliest_us
        for each in self._getters:
            column = block.values[each.field.name]
            if isinstance(column, np.ndarray):
                each.doubt(column, sure)
        return sure

    def _doubt_bytes(
        self,
        raw: Sequence[bytes],
        columns: Sequence[list[Any]],
        block: Block,
        sure: NDArray[np.bool_],
    ) -> None:
        """Clear ``sure`` of what may have NUL or a key twice; note unknown fields."""
        joined = b"\n".join(raw)
        expected = len(raw) * _IDENTITY_QUOTES
        expected += sum(
            each.quotes(column) for each, column in zip(self._getters, columns, strict=True)
        )
        quotes = np.count_nonzero(np.frombuffer(joined, np.uint8) == _QUOTE)
        if b"\\" in joined:
            sure &= [b"\\" not in each for each in raw]
        if len(joined) > EVENT_BYTES_MAX:  # of one event; a block of small ones is below it
            sure &= [len(each) <= EVENT_BYTES_MAX for each in raw]
        if quotes != expected:
            self._doubt_quotes(raw, columns, block, sure)

    def _doubt_quotes(
        self,
        raw: Sequence[bytes],
        columns: Sequence[list[Any]],
        block: Block,
        sure: NDArray[np.bool_],
    ) -> None:
        """Whether each quotation mark belongs to a field of its own; unknown fields are kept."""
        found = np.array([each.count(_QUOTE) for each in raw])
        expected = np.full(len(raw), _IDENTITY_QUOTES)
        for each, column in zip(self._getters, columns, strict=True):
            expected += each.quotes_each(column)
        more = found - expected
        for at in np.flatnonzero((more != 0) & sure).tolist():
            sure[at] = self._keep_unknown(at, raw[at], int(more[at]), block)

    def _keep_unknown(self, at: int, payload: bytes, quotes: int, block: Block) -> bool:
        """Take an event's unknown fields; False where they do not account for the quotes."""
        if self._contract.unknown == "reject":
            return False
        try:
            event = self._decode_any(payload)
        except _CANNOT_DECODE:
            return False
        extras = {name: event[name] for name in event.keys() - self._known}
        texts = 0
        for value in extras.values():
            kind = type(value)
            if kind is str:
                texts += 1
            elif kind is int or kind is float:
                if not -EXACT_MAX <= value <= EXACT_MAX:  # some beyond are no float64
                    return False
            elif value is not None and kind is not bool:
                return False  # nested ones may hide a key that stands twice
        if quotes != len(extras) * _KEY_QUOTES + texts * _TEXT_QUOTES:
            return False
        block.unknown[int(block.index[at])] = tuple(extras)
        if self._contract.unknown == "keep":
            block.extras[at] = canonical(extras)
        return True


_Loop = Callable[[Sequence[bytes | None], list[int]], list[list[Any]]]


def _loop(attributes: Sequence[str], decode: Callable[[Any], Any]) -> _Loop:
    """A function that decodes payloads to a list for each attribute, and adds to the places missed.

    One loop, written out for the contract's fields and compiled: an event is taken apart and
    gone before the next one, so that all of them use the same memory. Decoding to a list of events,
    then a list for each attribute, took a third more. Attributes are our own, f0, f1, …, and
    never the contract's names.
    """
    lines = ["def columns(payloads, missed):"]
    lines += [f"    {name} = []" for name in attributes]
    lines += ["    for at, payload in enumerate(payloads):", "        try:"]
    lines += ["            event = decode(payload)", "        except cannot_decode:"]
    lines += ["            missed.append(at)", "            continue"]
    lines += [f"        {name}.append(event.{name})" for name in attributes]
    lines += [f"    return [{', '.join(attributes)}]"]
    scope: dict[str, Any] = {"decode": decode, "cannot_decode": _CANNOT_DECODE}
    exec("\n".join(lines), scope)  # noqa: S102
    found: _Loop = scope["columns"]
    return found


class _Getter:
    """One field of the contract: how it is declared to msgspec, and its column."""

    def __init__(self, field: ContractField, attribute: str) -> None:
        self.field = field
        self.attribute = attribute
        self._texts: dict[Any, str | None] = {msgspec.UNSET: None}

    def declared(self) -> Any:
        """What msgspec is told of it. An absent one has a default, so that null is another."""
        kind = float if self.field.is_number else str
        if self.field.required:
            return (self.attribute, kind)
        if self.field.is_number:
            return (self.attribute, float | None, _ABSENT)
        return (self.attribute, str | None | msgspec.UnsetType, msgspec.UNSET)

    def quotes(self, column: list[Any]) -> int:
        """How many quotation marks the field takes in the payloads of these events."""
        if self.field.required:
            return len(column) * (_KEY_QUOTES + (0 if self.field.is_number else _TEXT_QUOTES))
        if self.field.is_number:
            return (len(column) - column.count(_ABSENT)) * _KEY_QUOTES  # by identity, first
        present = len(column) - column.count(msgspec.UNSET)
        return present * _KEY_QUOTES + (present - column.count(None)) * _TEXT_QUOTES

    def quotes_each(self, column: list[Any]) -> NDArray[np.int64] | int:
        """The same for each event."""
        if self.field.required:
            return self.quotes([None])
        if self.field.is_number:
            return np.array([0 if each is _ABSENT else _KEY_QUOTES for each in column])
        return np.array([self.quotes([each]) for each in column])

    def stored(self, column: list[Any]) -> Column:
        """The column as readings have it."""
        if self.field.required and self.field.is_number:
            # + 0.0 makes 0.0 of -0.0. fromiter is the faster one, and takes no None.
            return np.fromiter(column, np.float64, len(column)) + 0.0
        if self.field.is_number:
            return np.array(column, np.float64) + 0.0
        try:
            return list(map(self._texts.__getitem__, column))
        except KeyError:
            return self._learnt(column)

    def _learnt(self, column: list[Any]) -> list[str | None]:
        """One text of many equal ones, as devices.py has it; of a few hundred, not of any."""
        texts = self._texts
        for text in dict.fromkeys(column):
            if len(texts) < TEXTS_MAX:
                texts.setdefault(text, None if text is msgspec.UNSET else text)
        return [texts.get(text, text) for text in column]

    def doubt(self, column: NDArray[np.float64], sure: NDArray[np.bool_]) -> None:
        """Clear ``sure`` where a value is out of range; NaN, which is null, never is."""
        if self.field.minimum is not None:
            sure &= ~(column < self.field.minimum)
        if self.field.maximum is not None:
            sure &= ~(column > self.field.maximum)
        if self.field.type == "integer":
            sure &= np.isnan(column) | ((column == np.floor(column)) & (abs(column) <= EXACT_MAX))
