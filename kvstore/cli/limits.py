"""``kvstore set``, ``drop``, ``pin``, ``unpin`` and ``gaps``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import numpy as np
import typer

from kvstore import control
from kvstore import store as stores
from kvstore.cli.options import Json, Start, Stop, StorePath, duration_s, size_bytes, time_text
from kvstore.cli.terminal import complain, quiet_if_closed, say, size_text
from kvstore.gaps import Gap
from kvstore.settings import Settings
from kvstore.timestamps import format_time

_NONE: Final = "none"
_KEPT_SHOWN: Final = 10
_NS: Final = np.dtype(np.int64)


def or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser that takes the word none, too: for no limit. It gives the word back."""
    return lambda text: text if text == _NONE else parse(text)


MaxBytes = Annotated[
    Any,
    typer.Option(
        "--max-bytes",
        help="Most that all files of the store may take, such as 800GB.",
        parser=or_none(size_bytes),
        metavar="SIZE",
    ),
]
MaxAge = Annotated[
    Any,
    typer.Option(
        "--max-age",
        help="How long ago a segment's last commit may be before it is dropped, such as 7d.",
        parser=or_none(duration_s),
        metavar="DURATION",
    ),
]
MinFree = Annotated[
    Any,
    typer.Option(
        "--min-free-space",
        help="What is to stay free on the disk, such as 20GB.",
        parser=or_none(size_bytes),
        metavar="SIZE",
    ),
]
WhenFull = Annotated[
    Literal["drop-oldest", "stop"] | None,
    typer.Option(
        "--when-full",
        help="At such a limit, and on a full disk: drop the oldest segments, or stop. "
        "drop-oldest where a limit is set, stop where none is.",
    ),
]
GapAfter = Annotated[
    Any,
    typer.Option(
        "--gap-after",
        help="Silence of a stream that is recorded as a gap, such as 10s.",
        parser=or_none(duration_s),
        metavar="DURATION",
    ),
]
ClockStep = Annotated[
    Any,
    typer.Option(
        "--clock-step",
        help="How far a clock may step before that is recorded as a gap; 60s at first.",
        parser=or_none(duration_s),
        metavar="DURATION",
    ),
]


def changes(**given: Any) -> dict[str, Any]:
    """The settings that were given; the word none stands for no limit."""
    return {
        name: None if value == _NONE else value
        for name, value in given.items()
        if value is not None
    }


def set_(
    path: StorePath,
    *,
    max_bytes: MaxBytes = None,
    max_age: MaxAge = None,
    min_free_space: MinFree = None,
    when_full: WhenFull = None,
    gap_after: GapAfter = None,
    clock_step: ClockStep = None,
    as_json: Json = False,
) -> None:
    """Change or show the limits that a store keeps.

    Also while it is being written. The limits stay with the store, for every later writer. Whole
    sealed segments are dropped, the oldest first, all streams together: what is to live longer goes
    to a store of its own. "none" takes a limit away.
    """
    given = changes(
        max_bytes=max_bytes,
        max_age_s=max_age,
        min_free_bytes=min_free_space,
        when_full=when_full,
        gap_after_s=gap_after,
        clock_step_s=clock_step,
    )
    if given:
        settings = control.configure(path, **given)
    else:
        with stores.open_store(path) as store:
            settings = store.settings
    _show(settings, as_json=as_json)


def _show(settings: Settings, *, as_json: bool) -> None:
    found = settings._asdict()
    found["when_full"] = "drop-oldest" if settings.drops_oldest else "stop"
    with quiet_if_closed():
        if as_json:
            print(json.dumps(found))
        else:
            for name, value in found.items():
                print(f"{name}\t{_NONE if value is None else value}")


def drop(
    path: StorePath,
    *,
    before: Annotated[
        str,
        typer.Option(
            help="Drop segments whose rows are all before this time, ISO 8601 or epoch seconds.",
            parser=time_text,
            metavar="TIME",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Drop old data.

    Also while the store is being written. Goes by the time of the data. Whole segments go, of all
    streams together; those that hold later rows too, or rows of a pinned range, are kept, and it
    says so.
    """
    done = control.drop(path, before)
    if as_json:
        print(json.dumps(done))
        return
    say(f"Dropped {done['segments']} segments, {done['rows']} rows, {size_text(done['bytes'])}.")
    for kept in done["kept"][:_KEPT_SHOWN]:
        say(f"Kept segment {kept['segment']} with {kept['rows']} rows: {kept['why']}.")
    if more := done["kept"][_KEPT_SHOWN:]:
        say(f"Kept {len(more)} more; --json names them.")


def pin(
    path: StorePath,
    *,
    start: Start = None,
    stop: Stop = None,
    label: Annotated[str, typer.Option(metavar="TEXT", help="Why, such as door opened.")] = "",
) -> None:
    """Keep a time range from being dropped.

    Its segments stay as a whole; also while the store is being written. Those that come later and
    hold rows of the range are kept, too. Prints the pin's number.
    """
    if start is None and stop is None:
        raise typer.BadParameter("give --start, --stop or both: what is to be kept?")
    print(control.pin(path, start, stop, label))


def unpin(
    path: StorePath,
    pin_id: Annotated[int, typer.Argument(metavar="PIN", help="Its number: see kvstore info.")],
) -> None:
    """Let a pinned time range be dropped again."""
    control.unpin(path, pin_id)


def gaps(path: StorePath, *, as_json: Json = False) -> None:
    """List what is known to be missing or doubtful.

    Dropped, damaged or rejected rows, silence, clock steps, unclean stops. Lines of start, stop,
    kind, stream, rows, occurrences and detail, separated by tabs. Starts and stops of the kinds
    rejected and unclean_stop are those of this machine's clock, of the others those of the data.
    """
    with stores.open_store(path) as store:
        found = store.gaps()
    with quiet_if_closed():
        if as_json:
            print(json.dumps([plain_gap(gap) for gap in found], indent=2))
        else:
            for gap in found:
                print(*plain_gap(gap).values(), sep="\t")
    if not found:
        complain("no gaps are recorded")


def plain_gap(gap: Gap) -> dict[str, Any]:
    """A gap with its times as text."""
    return {
        "start": format_time(np.int64(gap.start_ns), _NS),
        "stop": format_time(np.int64(gap.stop_ns), _NS),
        "kind": gap.kind,
        "stream": gap.stream,
        "rows": gap.rows,
        "occurrences": gap.occurrences,
        "detail": gap.detail,
        "recorded": format_time(np.int64(gap.recorded_ns), _NS),
    }
