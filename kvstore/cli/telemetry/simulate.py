"""``kvstore telemetry simulate``: a made-up fleet's events as lines of JSON on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Annotated, Final

import typer

from kvstore.cli.options import duration_s, epoch_seconds
from kvstore.cli.terminal import quiet_if_closed, say

_LINES_AT_ONCE: Final = 1000
_REACHES_NOW: Final = "so that the last event is from now"


def share(text: str | float) -> float:
    """A share such as 1% or 0.01; a default is a number already."""
    if isinstance(text, float):
        return text
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise typer.BadParameter(f"share {text!r}: expected 0% to 100%, such as 1% or 0.01")
    return found


def _share(name: str, text: str) -> object:
    return typer.Option(name, metavar="SHARE", parser=share, help=text)


def simulate(
    *,
    devices: Annotated[int, typer.Option(min=1, help="How many devices.")] = 50,
    events: Annotated[int, typer.Option(min=0, help="How many lines, all kinds.")] = 100_000,
    evolve_after: Annotated[
        float, _share("--evolve-after", "Of the run, before pressure comes up.")
    ] = 0.5,
    bad: Annotated[float, _share("--bad", "Rejects, of every kind in turns.")] = 0.01,
    duplicates: Annotated[float, _share("--duplicates", "Events sent again.")] = 0.01,
    conflicts: Annotated[
        float, _share("--conflicts", "Same device and time, other values.")
    ] = 0.001,
    late: Annotated[float, _share("--late", "Events held back for 60 intervals.")] = 0.001,
    extras: Annotated[float, _share("--extras", "With a field that no contract knows.")] = 0.001,
    interval: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=duration_s,
            help="How often a device measures; 5s if not given, or what --rate makes of it.",
        ),
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(
            metavar="TIME",
            parser=epoch_seconds,
            help=f"Time of the first event; if not given {_REACHES_NOW}.",
        ),
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0, help="Events per second; 0 for as fast as it goes.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="The same seed and --start give the same bytes.")] = 1,
) -> None:
    """Make up a fleet's events, good and bad, as lines of JSON.

    From ten devices on three are sick: sensor-001 falls silent, sensor-002 is stuck, sensor-003
    has a hole and jumps. What was made of each kind is told on stderr.
    """
    from kvstore.telemetry.simulate import INTERVAL_S, Fleet, Simulation  # noqa: PLC0415

    every_s = interval or (devices / rate if rate else INTERVAL_S)
    span_s = 0 if rate else events / devices * every_s
    start_s = time.time() // 1 - span_s if start is None else start
    simulation = Simulation(
        Fleet(
            devices=devices,
            events=events,
            start_us=round(start_s * 1e6),
            interval_s=every_s,
            evolve_after=evolve_after,
            bad=bad,
            duplicates=duplicates,
            conflicts=conflicts,
            late=late,
            extras=extras,
            seed=seed,
        )
    )
    with quiet_if_closed():
        _write(simulation, rate)
        made = ", ".join(f"{count:,} {kind}" for kind, count in sorted(simulation.made.items()))
        say(f"{events:,} events: {made or 'none'}")


def _write(payloads: Iterable[bytes], rate: float) -> None:
    begin = time.monotonic()
    lines: list[bytes] = []
    at_once = max(1, min(_LINES_AT_ONCE, int(rate / 20))) if rate else _LINES_AT_ONCE
    for sent, payload in enumerate(payloads, 1):
        lines += (payload, b"\n")
        if sent % at_once == 0:
            if rate:
                time.sleep(max(0.0, begin + sent / rate - time.monotonic()))
            sys.stdout.buffer.write(b"".join(lines))
            sys.stdout.buffer.flush()
            lines.clear()
    sys.stdout.buffer.write(b"".join(lines))
