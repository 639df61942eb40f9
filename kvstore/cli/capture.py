"""``kvstore generate`` and ``kvstore write``: packets made up, packets taken in."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.terminal import (
    FAILED,
    LOSS,
    complain,
    parse_size,
    progress_bar,
    quiet_if_closed,
    say,
    size_text,
)
from kvstore.errors import PacketError
from kvstore.generate import generate as generate_packets
from kvstore.ingest import PARTICLES, Progress, Source, ingest
from kvstore.packets import FRAME_BYTES_MAX, PacketDecoder
from kvstore.timestamps import format_time, parse_duration, plain_time, to_time
from kvstore.writer import FLUSH_INTERVAL_S, SEGMENT_BYTES

_MIB = 1 << 20


def _seconds(text: str | float) -> float:
    """A duration in words; a default comes as it is."""
    return parse_duration(text) / 1e9 if isinstance(text, str) else text


def _bytes(text: str | int) -> int:
    return parse_size(text) if isinstance(text, str) else text


def _epoch_seconds(text: str | None) -> float | None:
    if text is None:
        return None
    return float(plain_time(to_time(text, np.dtype("<f8"), side="start")))


def generate(
    *,
    pps: Annotated[float, typer.Option(help="Packets per second; 0 for as many as go.")] = 100.0,
    max_mb: Annotated[
        float, typer.Option(help="Stop after this many MB (1024²) are sent; 0 for never.")
    ] = 0.0,
    profile: Annotated[
        Literal["uniform", "counts"],
        typer.Option(help="uniform: random int32, incompressible. counts: detector-like."),
    ] = "uniform",
    seed: Annotated[int | None, typer.Option(help="The same data on every run.")] = None,
    start: Annotated[
        float | None,
        typer.Option(
            help="Timestamp of the first packet, ISO 8601 or epoch seconds; now if not given.",
            parser=_epoch_seconds,
            metavar="TIME",
        ),
    ] = None,
    particles: Annotated[
        int | None,
        typer.Option(help="Particles in every packet; 1 to 1000 by chance if not given."),
    ] = None,
) -> None:
    """Send made-up packets to stdout, as the particle counter does.

    Example: kvstore generate --pps 100 --max-mb 200 | kvstore write run.kv
    """
    _refuse_terminal(
        sys.stdout.fileno(),
        "packets are binary: pipe them, as in kvstore generate | kvstore write run.kv",
    )
    libc.keep_freed_memory()
    libc.enlarge_pipe(1)
    with quiet_if_closed():
        generate_packets(
            lambda parts: write_parts(1, parts),
            report=say,
            pps=pps,
            bytes_max=int(max_mb * _MIB),
            profile=profile,
            seed=seed,
            start=start,
            particles=particles,
        )


def write(
    path: Annotated[Path, typer.Argument(help="The store; made if it is not there.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Files of packets; stdin if none is given.")
    ] = None,
    *,
    stream: Annotated[str, typer.Option(help="Stream to append to.")] = PARTICLES,
    time_field: Annotated[
        str, typer.Option(help="Name of the time field, for other packets than particles.")
    ] = "",
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="At a malformed packet: stop, or count it and go on (exit code 3)."),
    ] = "stop",
    flush_interval: Annotated[
        float,
        typer.Option(
            help="Longest time until received rows are durable.",
            parser=_seconds,
            metavar="DURATION",
        ),
    ] = FLUSH_INTERVAL_S,
    segment_bytes: Annotated[
        int,
        typer.Option(help="Size at which a new segment is begun.", parser=_bytes, metavar="SIZE"),
    ] = SEGMENT_BYTES,
    max_packet_bytes: Annotated[
        int,
        typer.Option(help="Refuse packets above this size.", parser=_bytes, metavar="SIZE"),
    ] = FRAME_BYTES_MAX,
) -> None:
    """Take in packets from stdin (or files) and store them by time.

    SIGINT, SIGTERM and the end of the input commit everything received. Exit codes: 0 all
    stored, 1 stopped at malformed input or a full disk, 3 stored but for what was skipped
    or cut off; what came before an error is always kept.

    Example: kvstore generate --pps 100 --max-mb 200 | kvstore write run.kv
    """
    if not files:
        _refuse_terminal(
            0, "no packets on stdin: pipe them in, as in kvstore generate | kvstore write run.kv"
        )
    libc.keep_freed_memory()
    progress, started = Progress(), time.perf_counter()
    code = 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_signal())
        store = stack.enter_context(
            stores.open_store(
                path, "w", flush_interval_s=flush_interval, segment_bytes=segment_bytes
            )
        )
        stack.enter_context(progress_bar(lambda elapsed: _describe(progress, elapsed, path)))
        try:
            for fd in _inputs(files):
                libc.enlarge_pipe(fd)
                decoder = PacketDecoder(frame_bytes_max=max_packet_bytes)
                if not ingest(
                    store,
                    Source(fd, stop).readinto,
                    decoder,
                    stream=stream,
                    time_field=time_field,
                    skip_errors=on_error == "skip",
                    progress=progress,
                ):
                    say("Stopped by a signal; everything received is stored.")
                    break
        except PacketError as error:
            complain(f"{error}. What came before it is stored.")
            code = FAILED if error.whole else LOSS
        elapsed = time.perf_counter() - started
        _summarise(progress, elapsed, store, stream)
    if progress.skipped:
        complain(f"{progress.skipped} malformed packets were skipped")
        code = code or LOSS
    if code:
        raise typer.Exit(code)


def _inputs(files: list[Path] | None) -> Iterator[int]:
    if not files:
        yield 0
    for path in files or ():
        with path.open("rb", buffering=0) as file:
            yield file.fileno()


@contextlib.contextmanager
def _stop_signal() -> Iterator[int]:
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


def _describe(progress: Progress, elapsed: float, path: Path) -> str:
    rate = progress.rows / elapsed / 1000
    return (
        f"{progress.rows} rows  {rate:.1f} k/s  {size_text(progress.bytes)}  "
        f"{size_text(progress.bytes / elapsed)}/s  disk left {size_text(shutil.disk_usage(path).free)}"
    )


def _summarise(progress: Progress, elapsed: float, store: stores.Store, stream: str) -> None:
    if progress.first is not None:
        dtype: Any = store[stream].schema.time_dtype
        say(f"First Data timestamps {format_time(progress.first, dtype)}")
    noun = "particles" if stream == PARTICLES else "rows"
    say(
        f"Wrote to storage {progress.packets} packets ({progress.rows} {noun}, "
        f"{progress.bytes} bytes)."
    )
    say(f"Write bandwidth: {progress.rows / elapsed / 1000:.2f} k{noun.capitalize()}/s")
    if progress.last is not None:
        say(f"Last Data timestamp {format_time(progress.last, dtype)}")


def write_parts(fd: int, parts: list[memoryview]) -> None:
    """Write all of these buffers, however many calls it takes."""
    waiting = [part for part in parts if len(part)]
    while waiting:
        count = os.writev(fd, waiting[: os.sysconf("SC_IOV_MAX")])
        while waiting and count >= len(waiting[0]):
            count -= len(waiting.pop(0))
        if count:
            waiting[0] = waiting[0][count:]


def _refuse_terminal(fd: int, why: str) -> None:
    if os.isatty(fd):
        raise typer.BadParameter(why)
