"""Records and blocks that may be anything: read, or refused with a DamageError.

The reading path trusts what passes its checksum. Here a right checksum proves nothing: each value
is held against its type and its limits before it is used, so that no content makes ``verify``,
``recover`` or ``backup`` raise anything else, loop, or ask for more memory than a real one would.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from kvstore import codec
from kvstore.entries import Entry, read_entry
from kvstore.errors import DamageError, KvstoreError
from kvstore.gaps import KINDS, Gap
from kvstore.schema import FIELDS_MAX, ROW_BYTES_MAX, Array, Field
from kvstore.state import FORMATS, State, StreamInfo, Totals, read_meta_record
from kvstore.timestamps import format_time, typed_time

BATCH_KEY_BYTES: Final = 21
BLOCK_KEY_BYTES: Final = 23
RECORD_BYTES_MAX: Final = 1 << 20  # 1,000 blocks inside a record are a quarter of that
META_BYTES_MAX: Final = 16 << 20  # 1,000 fields with the longest units and descriptions: 9 MB
_RAW_BYTES_MAX: Final = 2 * ROW_BYTES_MAX
_TEXT_RATIO_MAX: Final = 256  # LZ4 cannot do better: what says so would only fill the memory
_STORE_ID_BYTES: Final = 16
_COUNT_MAX: Final = 2**63 - 1
PLACED: Final = 4  # values that describe a block which stands in the table of blocks
_META_KINDS: Final = frozenset(
    (b"identity", b"commit", b"clock", b"session", b"settings", b"stream", b"total", b"mark",
     b"sealed", b"dropped", b"pin", b"gap")
)  # fmt: skip
_NONSENSE: Final = (
    AttributeError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class Damage(NamedTuple):
    """One thing that is wrong. segment: 0 for the store as a whole; times as text, "" if unknown.

    rows: how many cannot be read because of it; 0 where that is not known.
    """

    segment: int
    what: str
    stream: str = ""
    field: str = ""
    start: str = ""
    stop: str = ""
    rows: int = 0


def entry_of(key: bytes, value: bytes) -> Entry:
    """An index record."""
    if len(value) > RECORD_BYTES_MAX:
        raise DamageError(f"its index record has {len(value)} bytes, at most {RECORD_BYTES_MAX}")
    try:
        entry = read_entry(key, value)
        is_sound = _is_entry(entry)
    except DamageError:
        raise
    except _NONSENSE as error:
        raise DamageError(f"its index record is none: {error!r}") from error
    if not is_sound:
        raise DamageError("its index record is none: values that no batch has")
    return entry


def own_key_of(value: bytes) -> bytes:
    """The key that an index record says it stands under; b"" if it is none."""
    try:
        key = codec.unpacked(value, "index record")[0]
    except (DamageError, *_NONSENSE):
        return b""
    return key if isinstance(key, bytes) else b""


def _is_entry(entry: Entry) -> bool:
    return (
        len(entry.key) == BATCH_KEY_BYTES
        and _is_count(entry.rows)
        and entry.rows > 0
        and _is_time(entry.first)
        and _is_time(entry.last)
        and entry.first <= entry.last
        and len(entry.blocks) <= FIELDS_MAX
        and all(_is_block(*block) for block in entry.blocks)
        and len(entry.frames) in (0, len(entry.blocks))
        and all(
            _are_frames(frames, entry.rows, block[2])
            for frames, block in zip(entry.frames, entry.blocks, strict=False)
        )
    )


def _are_frames(frames: Any, rows: int, stored_bytes: int) -> bool:
    """None, or several that are together what the block is."""
    if not frames:
        return True
    counts, sizes, checksums = zip(*frames, strict=True)
    return (
        all(_is_count(each) and each for each in (*counts, *sizes))
        and all(type(each) is int and 0 <= each < 2**64 for each in checksums)
        and (sum(counts), sum(sizes)) == (rows, stored_bytes)
    )


def _is_block(kind: Any, raw_bytes: Any, stored_bytes: Any, checksum: Any, *inline: Any) -> bool:
    sizes = all(_is_count(each) for each in (kind, raw_bytes, stored_bytes))
    inside = len(inline) < PLACED and all(isinstance(each, bytes) for each in inline)
    return sizes and type(checksum) is int and 0 <= checksum < 2**64 and inside


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _COUNT_MAX


def _is_time(value: Any) -> bool:
    in_range = type(value) is int and -(2**63) <= value < 2**63
    return in_range or (type(value) is float and math.isfinite(value))


def read_state(
    items: Iterable[tuple[bytes, bytes]], number: int, lose: Callable[[str], None]
) -> State:
    """The meta table; ``lose`` is called for each record that cannot be read."""
    state = State(b"", number, 0)
    for key, value in items:
        try:
            take_meta(state, key, value)
        except DamageError as error:
            lose(str(error))
    if not state.store_id:
        lose("no identity in the meta table")
    return state


def take_meta(state: State, key: bytes, value: bytes) -> None:
    """Put one record of the meta table into the state, if it is one."""
    what = f"meta record {key!r}"
    if key.partition(b":")[0] not in _META_KINDS:
        raise DamageError(f"{what}: of no kind that this kvstore knows: its key is damaged, or new")
    if len(value) > META_BYTES_MAX:
        raise DamageError(f"{what}: {len(value)} bytes, at most {META_BYTES_MAX}")
    try:
        record = codec.unpacked(value, what)
        if key == b"identity":
            _take_identity(state, *record)
            return
        alone = State(b"", state.number, 0)
        read_meta_record(alone, key, record)
        is_sound = _is_state(alone)
        if is_sound:
            read_meta_record(state, key, record)
    except DamageError:
        raise
    except (KvstoreError, *_NONSENSE) as error:
        raise DamageError(f"{what}: {error!r}") from error
    if not is_sound:
        raise DamageError(f"{what}: values that no store has")


def _take_identity(state: State, version: Any, store_id: Any, number: Any, created: Any) -> None:
    if version not in FORMATS:
        known = max(FORMATS)
        raise DamageError(f"its identity says format version {version}, expected up to {known}")
    fits = isinstance(store_id, bytes) and len(store_id) == _STORE_ID_BYTES
    if not (fits and _is_count(number) and _is_count(created)):
        raise DamageError("its identity has values that no segment has")
    state.store_id, state.number, state.created_ns = store_id, number, created


def _is_state(state: State) -> bool:
    totals = [*state.totals.items(), *((key, each.totals) for key, each in state.dropped.items())]
    for sealed in state.sealed.values():
        totals += sealed.totals.items()
    counts = [state.last_commit_ns, state.clock_ns, *state.session[:2]]
    counts += [n for each in state.sealed.values() for n in (*each[:3], each.clock_ns)]
    counts += [n for each in state.dropped.values() for n in each[1:]]
    state.settings.checked()
    return (
        all(_is_count(each) for each in counts)
        and all(_is_stream(info) for info in state.streams.values())
        and all(_is_count(stream_id) and _is_totals(each) for stream_id, each in totals)
        and all(_is_span(*pin[1:3]) and isinstance(pin.label, str) for pin in state.pins.values())
        and all(_is_gap(gap) for gap in state.gaps.values())
    )


def _is_span(start_ns: Any, stop_ns: Any) -> bool:
    return (
        type(start_ns) is int and type(stop_ns) is int and _is_time(start_ns) and _is_time(stop_ns)
    )


def _is_gap(gap: Gap) -> bool:
    has_texts = all(isinstance(each, str) for each in (gap.kind, gap.stream, gap.detail))
    has_counts = all(_is_count(each) for each in (gap.rows, gap.occurrences, gap.recorded_ns))
    return has_texts and has_counts and _is_span(*gap[1:3]) and gap.kind in KINDS


def _is_stream(info: StreamInfo) -> bool:
    counts = range(1, len(info.schema.fields) + 1)
    rising = sorted(set(info.versions)) == list(info.versions)
    return rising and bool(info.versions) and all(n in counts for n in info.versions)


def _is_totals(totals: Totals) -> bool:
    counts = (*totals[:4], totals.next_sequence)
    ends = [end for end in (totals.first, totals.last) if end is not None]
    return (
        all(_is_count(each) for each in counts)
        and totals.batches <= min(totals.next_sequence, totals.rows)
        and len(ends) == (2 if totals.rows else 0)
        and all(_is_time(end) for end in ends)
    )


def decode_block(
    block: Sequence[Any],
    data: bytes | None,
    field: Field,
    rows: int,
    frames: Sequence[codec.Frame] = (),
) -> Array:
    """One block of an index record, decoded; DamageError where it is not what was stored.

    data: what the table of blocks holds for it; None where it is missing or in the record.
    frames: those that the record lists, to be checked as well.
    """
    kind, raw_bytes, stored_bytes, expected, *inline = block
    data = inline[0] if inline else data
    values = rows * math.prod(field.shape)
    if data is None:
        raise DamageError("its block is missing")
    if len(data) != stored_bytes:
        raise DamageError(f"its block has {len(data)} bytes, expected {stored_bytes}")
    if field.is_text:
        fits = values <= raw_bytes <= _TEXT_RATIO_MAX * (stored_bytes + 1)
    else:
        fits = raw_bytes == values * field.np_dtype.itemsize <= _RAW_BYTES_MAX
    if not fits:
        raise DamageError(f"its index record says {raw_bytes} bytes for {values} values")
    try:
        codec.check_frames(data, frames)
        return codec.decode(memoryview(data), kind, raw_bytes, expected, field, rows=rows)
    except _NONSENSE as error:
        raise DamageError(f"its block cannot be decoded: {error!r}") from error


# ---- in words ----


def span_texts(info: StreamInfo | None, span: Sequence[Any]) -> tuple[str, str]:
    """First and last time of a batch or of totals, as text; "" where the type is not known."""
    if info is None or None in span:
        return "", ""
    start, stop = (_time_text(time, info.schema.time_dtype) for time in sorted(span))
    return start, stop


def _time_text(plain: Any, dtype: np.dtype[Any]) -> str:
    try:
        return format_time(typed_time(plain, dtype), dtype)
    except (KvstoreError, *_NONSENSE):
        return str(plain)


def missing_ranges(begin: int, stop: int, present: Array) -> list[tuple[int, int]]:
    """What ``present``, ascending, lacks of [begin, stop): first and last of each stretch."""
    inside = present[(present >= begin) & (present < stop)].astype(np.int64)
    edges = np.concatenate([[begin - 1], inside, [stop]]).astype(np.int64)
    at = np.flatnonzero(np.diff(edges) > 1)
    return [(int(edges[k]) + 1, int(edges[k + 1]) - 1) for k in at]


def stretches(numbers: Array) -> list[tuple[int, int]]:
    """First and last of each stretch of ascending numbers without a hole."""
    breaks = np.flatnonzero(np.diff(numbers) > 1)
    begins, ends = [0, *(breaks + 1)], [*breaks, len(numbers) - 1]
    return [(int(numbers[a]), int(numbers[b])) for a, b in zip(begins, ends, strict=True)]


def ranges_text(ranges: Sequence[tuple[int, int]]) -> str:
    """1-3, 7: at most ten ranges."""
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:10]]
    return ", ".join([*shown, *["…"][: len(ranges) > 10]])  # noqa: PLR2004
