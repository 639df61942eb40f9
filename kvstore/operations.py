"""What can be asked of a store that is being written: set, pin, unpin, drop, note.

Carried out on the commit thread, between two commits; durable on return. Each does no more when
it is repeated than when it is done once. Results are plain values, for requests travel as files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from kvstore import requests, retention
from kvstore.active import Active
from kvstore.changes import Unpin
from kvstore.errors import StoreError
from kvstore.gaps import Gap, checked
from kvstore.settings import LABEL_CHARS_MAX, PINS_MAX, Pin, storable
from kvstore.state import Sealed, State, Totals
from kvstore.timestamps import MAX_NS, MIN_NS


def perform(active: Active, what: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Do one thing; StoreError where it cannot be done."""
    if what not in _OPERATIONS:
        raise StoreError(f"{what!r} cannot be asked for: there are {', '.join(_OPERATIONS)}")
    try:
        return _OPERATIONS[what](active, **arguments)
    except TypeError as error:
        raise StoreError(f"{what}: {error}; is the other side of another release?") from error


def answer(active: Active) -> None:
    """Carry out what other processes ask for."""
    for request in requests.pending(active.layout):
        try:
            result = _performed(active, request)
        except Exception as error:  # noqa: BLE001  # anybody's input
            requests.answer(request, str(error) or repr(error), is_error=True)
        else:
            requests.answer(request, result, is_error=False)


def _performed(active: Active, request: requests.Request) -> dict[str, Any]:
    if request.problem:
        raise StoreError(f"request {request.name} {request.problem}")
    named = {"request": request.name} if request.what == "pin" else {}
    return perform(active, request.what, request.arguments | named)


def set_(active: Active, **changes: Any) -> dict[str, Any]:
    """Change these settings, leave the others; all of them as they are now."""
    settings = active.state.settings.changed(changes)
    if settings != active.state.settings:
        active.change(settings)
        active.keep_limits()
    return settings._asdict()


def pin(
    active: Active, *, start_ns: int, stop_ns: int, label: str = "", request: str = ""
) -> dict[str, Any]:
    """Keep the segments of a time range; its number, and how many there are by now."""
    state = active.state
    _check_times(start_ns, stop_ns)
    if start_ns > stop_ns:
        raise StoreError("a pin that ends before it begins: give --start and --stop in order")
    known = next((p for p in state.pins.values() if request and p.request == request), None)
    if known is None:
        if len(state.pins) >= PINS_MAX:
            raise StoreError(f"{len(state.pins)} pins already, no more than {PINS_MAX}: unpin some")
        number = max(state.pins, default=0) + 1
        label = storable(label)[:LABEL_CHARS_MAX]
        known = Pin(number, start_ns, stop_ns, label, time.time_ns(), request)
        active.change(known)
    held = [s for s in active.state.sealed.values() if retention.pinned_by(active.state, s)]
    return {"pin_id": known.pin_id, "pinned_segments": len(held)}


def unpin(active: Active, *, pin_id: int) -> dict[str, Any]:
    """Let go of a pinned range."""
    if not isinstance(pin_id, int) or pin_id not in active.state.pins:
        there = ", ".join(map(str, sorted(active.state.pins))) or "none"
        raise StoreError(f"no pin {pin_id}: there are {there}")
    active.change(Unpin(pin_id))
    return {"pin_id": pin_id}


def drop(active: Active, *, before_ns: int) -> dict[str, Any]:
    """Drop the segments whose rows are all before a time; what went, and what was kept and why."""
    _check_times(before_ns)
    own = active.state.totals
    if _rows(own) and _ends_before(active.state, own, before_ns):
        active.seal()  # so that it can go, too
    state = active.state
    kept = list(_kept(state, before_ns))
    old = [s for s in state.sealed.values() if _ends_before(state, s.totals, before_ns)]
    gone = [s for s in old if not retention.pinned_by(state, s)]
    active.drop([sealed.number for sealed in gone])
    return {
        "segments": len(gone),
        "rows": sum(_rows(sealed.totals) for sealed in gone),
        "bytes": sum(sealed.file_bytes for sealed in gone),
        "kept": kept,
    }


def _check_times(*times_ns: int) -> None:
    for time_ns in times_ns:
        if not isinstance(time_ns, int) or not MIN_NS <= time_ns <= MAX_NS:
            raise StoreError(f"{time_ns!r} is no time in ns since 1970")


def note(active: Active, *, gaps: list[list[Any]]) -> dict[str, Any]:
    """Record these gaps, but for those that one of their kind and stream covers; how many."""
    known = list(active.state.gaps.values())
    fresh = []
    for gap in [checked(Gap(*each)) for each in gaps]:
        if not any(_covers(each, gap) for each in known):
            known.append(gap)
            fresh.append(gap)
    if fresh:
        active.change(*fresh)
    return {"new": len(fresh)}


def _covers(old: Gap, new: Gap) -> bool:
    is_within = old.start_ns <= new.start_ns and new.stop_ns <= old.stop_ns
    return is_within and (old.kind, old.stream) == (new.kind, new.stream)


def _kept(state: State, before_ns: int) -> Iterator[dict[str, Any]]:
    """Segments that hold rows from before that time and stay all the same."""
    for sealed in sorted(state.sealed.values()):
        why = _why_kept(state, sealed, before_ns)
        if why and _begins(state, sealed.totals, before_ns):
            yield {"segment": sealed.number, "rows": _rows(sealed.totals), "why": why}
    if _rows(state.totals) and _begins(state, state.totals, before_ns):
        why = "it takes the writes, and holds later rows"
        yield {"segment": state.number, "rows": _rows(state.totals), "why": why}


def _why_kept(state: State, sealed: Sealed, before_ns: int) -> str:
    if label := retention.pinned_by(state, sealed):
        return f"pinned: {label}"
    return "" if _ends_before(state, sealed.totals, before_ns) else "it holds later rows"


def _begins(state: State, totals: dict[int, Totals], before_ns: int) -> bool:
    return any(first < before_ns for first, _ in retention.spans_ns(state, totals))


def _ends_before(state: State, totals: dict[int, Totals], before_ns: int) -> bool:
    return all(last < before_ns for _, last in retention.spans_ns(state, totals))


def _rows(totals: dict[int, Totals]) -> int:
    return sum(each.rows for each in totals.values())


_OPERATIONS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "set": set_, "pin": pin, "unpin": unpin, "drop": drop, "note": note,
}  # fmt: skip
