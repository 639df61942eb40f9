"""``kvstore generate``: packets made up; and what `kvstore write` shares with it."""

from __future__ import annotations

import math
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Final, Literal

import typer

from kvstore import libc
from kvstore.cli.options import epoch_seconds
from kvstore.cli.terminal import quiet_if_closed, say
from kvstore.generate import generate as generate_packets

_MIB: Final = 1 << 20
PIPE_THEM: Final = "as in: kvstore generate --max-mb 200 | kvstore write run.kv"


def generate(
    *,
    pps: Annotated[
        float,
        typer.Option(min=0, metavar="N", help="Packets per second; 0 for as many as go."),
    ] = 100,
    max_mb: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="N",
            help="Stop once this many MB (1024²) are sent; 0 for never.",
        ),
    ] = 0,
    profile: Annotated[
        Literal["uniform", "counts"],
        typer.Option(
            help="uniform: every int32 equally likely, incompressible; counts: detector-like."
        ),
    ] = "uniform",
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="For the same values on every run.")
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(
            help="Time of the first packet, ISO 8601 or epoch seconds; now if not given.",
            parser=epoch_seconds,
            metavar="TIME",
        ),
    ] = None,
    particles: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Particles in every packet; else 1 to 1000 by chance."
        ),
    ] = None,
) -> None:
    """Send made-up packets to stdout.

    They look as the particle counter's do. Ends without a word once nobody reads them any more.
    """
    if not math.isfinite(pps + max_mb):
        raise typer.BadParameter("--pps and --max-mb are finite numbers; 0 means without limit")
    refuse_terminal(1, f"packets are binary: pipe them, {PIPE_THEM}")
    libc.keep_freed_memory()
    libc.enlarge_pipe(1)
    with stop_signal() as stop, quiet_if_closed():
        generate_packets(
            lambda parts: write_parts(1, parts),
            report=say,
            pps=pps,
            bytes_max=math.ceil(max_mb * _MIB),
            profile=profile,
            seed=seed,
            start=start,
            particles=particles,
            sleep=lambda seconds: _sleep(stop, seconds),
            stopped=lambda: _sleep(stop, 0),
        )


@contextmanager
def stop_signal() -> Iterator[int]:
    """A file descriptor that becomes readable once SIGINT or SIGTERM came."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield ours.fileno()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)


def _sleep(stop: int, seconds: float) -> bool:
    """Wait that long, or until the signal to stop has come: whether it has."""
    return bool(select.select([stop], [], [], seconds)[0])


def write_parts(fd: int, parts: list[memoryview]) -> None:
    """Write all of these buffers, however many calls it takes."""
    waiting = [part for part in parts if len(part)]
    while waiting:
        count = os.writev(fd, waiting[: os.sysconf("SC_IOV_MAX")])
        while waiting and count >= len(waiting[0]):
            count -= len(waiting.pop(0))
        if count:
            waiting[0] = waiting[0][count:]


def refuse_terminal(fd: int, why: str) -> None:
    """Wrong usage where packets would come from, or go to, a person."""
    if os.isatty(fd):
        raise typer.BadParameter(why)
