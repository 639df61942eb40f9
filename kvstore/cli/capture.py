"""``kvstore generate`` and ``kvstore write``: packets made up, packets taken in."""

from __future__ import annotations

import math
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.options import STDIN, duration_s, epoch_seconds, input_file, size_bytes
from kvstore.cli.terminal import (
    FAILED,
    LOSS,
    complain,
    progress_bar,
    quiet_if_closed,
    say,
    size_text,
)
from kvstore.errors import PacketError, StoreError
from kvstore.generate import generate as generate_packets
from kvstore.ingest import PARTICLES, OnError, Progress, Source, ingest
from kvstore.packets import FRAME_BYTES_MAX, PacketDecoder
from kvstore.timestamps import format_time
from kvstore.writer import FLUSH_INTERVAL_S

_MIB: Final = 1 << 20
_SKIPS_SHOWN: Final = 10  # a broken sender would fill the screen
_PIPE_THEM: Final = "as in: kvstore generate --max-mb 200 | kvstore write run.kv"


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
    _refuse_terminal(1, f"packets are binary: pipe them, {_PIPE_THEM}")
    libc.keep_freed_memory()
    libc.enlarge_pipe(1)
    with _stop_signal() as stop, quiet_if_closed():
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


def write(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The store; made if not there.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Files of packets, - for stdin; stdin if none is given.",
            parser=input_file,
        ),
    ] = None,
    *,
    stream: Annotated[str, typer.Option(metavar="NAME", help="Stream to append to.")] = PARTICLES,
    time_field: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Time field of a new stream; if not given timestamps, timestamp or time.",
            show_default=False,
        ),
    ] = "",
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="At a malformed packet: stop, or count it and go on to the next."),
    ] = "stop",
    flush_interval: Annotated[
        float,
        typer.Option(
            help="Longest time until received rows are durable; 100ms if not given.",
            show_default=False,
            parser=duration_s,
            metavar="DURATION",
        ),
    ] = FLUSH_INTERVAL_S,
    segment_bytes: Annotated[
        int | None,
        typer.Option(
            help="Size at which a new segment is begun; 2GiB if not given, or a sixteenth of "
            "the store's max-bytes.",
            show_default=False,
            parser=size_bytes,
            metavar="SIZE",
        ),
    ] = None,
    max_packet_bytes: Annotated[
        int,
        typer.Option(
            help="Refuse packets above this size; 256MiB if not given.",
            show_default=False,
            parser=size_bytes,
            metavar="SIZE",
        ),
    ] = FRAME_BYTES_MAX,
) -> None:
    """Take in packets and store them by time.

    SIGINT, SIGTERM and the end of the input commit everything received; what came before an
    error is kept. Exit codes: 0 all is stored; 1 stopped at a malformed packet or a full disk;
    3 stored, but for packets that were skipped or an input that was cut off.
    """
    inputs = files or [STDIN]
    if STDIN in inputs:
        _refuse_terminal(0, f"no packets on stdin: pipe them in, {_PIPE_THEM}")
    libc.keep_freed_memory()
    progress, started = Progress(), time.perf_counter()
    intake = _Intake(stream, time_field, max_packet_bytes, on_error == "skip", progress)
    with (
        _stop_signal() as stop,
        stores.open_store(
            path, "w", flush_interval_s=flush_interval, segment_bytes=segment_bytes
        ) as store,
    ):
        before = len(store[stream]) if stream in store else 0
        try:
            with progress_bar(lambda elapsed: _describe(progress, elapsed, path, stream)):
                code = intake.take_all(store, inputs, stop)
        except StoreError:
            stored = len(store[stream]) - before if stream in store else 0
            say(f"Of {progress.rows} {_noun(stream)} received {stored} are stored.")
            raise
        _summarise(progress, time.perf_counter() - started, store, stream)
    if code:
        raise typer.Exit(code)


class _Intake:
    """Inputs one after the other into a stream, and what became of them."""

    def __init__(
        self, stream: str, time_field: str, packet_bytes_max: int, skip: bool, progress: Progress
    ):
        self._stream = stream
        self._time_field = time_field
        self._packet_bytes_max = packet_bytes_max
        self._on_error: OnError | None = self._skip if skip else None
        self._progress = progress
        self._prefix = ""  # says which file, where there are several

    def take_all(self, store: stores.Store, inputs: list[Path], stop: int) -> int:
        """Returns the exit code; everything that came before an error is committed."""
        try:
            for path in inputs:
                self._prefix = f"{path}: " if len(inputs) > 1 else ""
                if not self._take(store, path, stop):
                    return self._stopped(path)
        except PacketError as error:
            complain(f"{self._prefix}{error}. What came before it is stored.")
            return LOSS if self._progress.ended else FAILED
        if self._progress.skipped:
            complain(f"{self._progress.skipped} malformed packets were skipped")
            return LOSS
        return 0

    def _take(self, store: stores.Store, path: Path, stop: int) -> bool:
        with _opened(path) as fd:
            libc.enlarge_pipe(fd)
            return ingest(
                store,
                Source(fd, stop).readinto,
                PacketDecoder(frame_bytes_max=self._packet_bytes_max),
                stream=self._stream,
                time_field=self._time_field,
                on_error=self._on_error,
                progress=self._progress,
            )

    def _stopped(self, path: Path) -> int:
        say("Stopped by a signal; all whole packets received are stored.")
        if path != STDIN:
            complain(f"{path}: not read to its end")
        elif self._progress.unfinished_bytes:
            complain(f"{self._progress.unfinished_bytes} bytes of an unfinished packet were lost")
        else:
            return LOSS if self._progress.skipped else 0
        return LOSS

    def _skip(self, error: PacketError) -> None:
        if self._progress.skipped <= _SKIPS_SHOWN:
            complain(f"{self._prefix}{error}. Skipped.")
        if self._progress.skipped == _SKIPS_SHOWN:
            complain("further malformed packets are only counted")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    if path == STDIN:
        yield 0
        return
    with path.open("rb", buffering=0) as file:
        yield file.fileno()


@contextmanager
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


def _sleep(stop: int, seconds: float) -> bool:
    """Wait that long, or until the signal to stop has come: whether it has."""
    return bool(select.select([stop], [], [], seconds)[0])


def _describe(progress: Progress, elapsed: float, path: Path, stream: str) -> str:
    return (
        f"{progress.rows:,} {_noun(stream)}  {progress.rows / elapsed / 1000:.1f} k/s  "
        f"{size_text(progress.bytes)}  {size_text(progress.bytes / elapsed)}/s  "
        f"disk left {size_text(shutil.disk_usage(path).free)}"
    )


def _summarise(progress: Progress, elapsed: float, store: stores.Store, stream: str) -> None:
    noun = _noun(stream)
    if progress.first is not None:
        dtype = store[stream].schema.time_dtype
        say(f"First Data timestamps {format_time(progress.first, dtype)}")
    say(
        f"Wrote to storage {progress.packets} packets ({progress.rows} {noun}, "
        f"{progress.bytes} bytes)."
    )
    say(f"Write bandwidth: {progress.rows / elapsed / 1000:.2f} k{noun.capitalize()}/s")
    if progress.last is not None:
        say(f"Last Data timestamp {format_time(progress.last, dtype)}")


def _noun(stream: str) -> str:
    return "particles" if stream == PARTICLES else "rows"


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
