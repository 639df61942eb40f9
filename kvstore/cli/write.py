"""``kvstore write``: its options, and what is said where it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvstore import libc
from kvstore import store as stores
from kvstore.cli.capture import PIPE_THEM, refuse_terminal, stop_signal
from kvstore.cli.intake import Capture, Inputs
from kvstore.cli.limits import (
    ClockStep,
    GapAfter,
    MaxAge,
    MaxBytes,
    MinFree,
    WhenFull,
    changes,
)
from kvstore.cli.log import Log
from kvstore.cli.options import (
    STDIN,
    duration_s,
    file_mode,
    input_file,
    size_bytes,
    socket_path,
)
from kvstore.cli.terminal import FAILED, progress_bar
from kvstore.errors import KvstoreError, StoreError
from kvstore.ingest import PARTICLES
from kvstore.notify import Notifier
from kvstore.packets import FRAME_BYTES_MAX
from kvstore.serve import CONNECTIONS_MAX, PACKET_BYTES_MAX
from kvstore.settings import Settings
from kvstore.sockets import SOCKET_MODE
from kvstore.writer import FLUSH_INTERVAL_S


def write(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The store; made if not there.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Files of packets, FIFOs, - for stdin; stdin if none is given.",
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
        typer.Option(
            help="At a malformed packet: stop (a service: cut its producer off), or count it and "
            "go on to the next."
        ),
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
            "what the store may take.",
            show_default=False,
            parser=size_bytes,
            metavar="SIZE",
        ),
    ] = None,
    max_packet_bytes: Annotated[
        int | None,
        typer.Option(
            help="Refuse packets above this size; 256MiB if not given, in a service 16MiB.",
            show_default=False,
            parser=size_bytes,
            metavar="SIZE",
        ),
    ] = None,
    max_bytes: MaxBytes = None,
    max_age: MaxAge = None,
    min_free_space: MinFree = None,
    when_full: WhenFull = None,
    gap_after: GapAfter = None,
    clock_step: ClockStep = None,
    listen: Annotated[
        Path | None,
        typer.Option(
            help="Serve local producers on a Unix socket, unix:/run/x.sock, until SIGTERM.",
            parser=socket_path,
            metavar="unix:PATH",
        ),
    ] = None,
    socket_mode: Annotated[
        int,
        typer.Option(
            help="Rights of that socket, which is given to its folder's group; else 0660.",
            show_default=False,
            parser=file_mode,
            metavar="MODE",
        ),
    ] = SOCKET_MODE,
    max_connections: Annotated[
        int,
        typer.Option(min=1, max=1000, metavar="N", help="Producers at once on that socket."),
    ] = CONNECTIONS_MAX,
    reopen: Annotated[
        bool,
        typer.Option(
            "--reopen",
            help="Serve FIFOs: wait for the next producer when one has gone, until SIGTERM; with "
            "--listen they are served so anyhow.",
        ),
    ] = False,
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Keep figures for Prometheus in this file, named *.prom for node exporter.",
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option(help="Talk on stderr as text, or as one JSON object a line."),
    ] = "text",
) -> None:
    """Take in packets and store them by time.

    From files or a pipe, to their end; or, with --listen or --reopen, as a service for producers
    that come and go. SIGINT, SIGTERM and the end of the input commit everything received; what
    came before an error is kept. Limits that are given stay with the store, as with `kvstore set`.
    Exit codes: 0 all is stored; 1 stopped at a malformed packet or a full disk; 3 stored, but for
    packets that were rejected or an input that was cut off.
    """
    serves = listen is not None or reopen
    inputs = Inputs(
        files=_served(files or [], listen) if serves else _read(files or [STDIN]),
        stream=stream,
        time_field=time_field,
        packet_bytes_max=max_packet_bytes or (PACKET_BYTES_MAX if serves else FRAME_BYTES_MAX),
        skip=on_error == "skip",
        serves=serves,
        socket=listen,
        socket_mode=socket_mode,
        connections_max=max_connections,
    )
    limits = changes(
        max_bytes=max_bytes,
        max_age_s=max_age,
        min_free_bytes=min_free_space,
        when_full=when_full,
        gap_after_s=gap_after,
        clock_step_s=clock_step,
    )
    log = Log(log_format)
    try:
        Settings(**limits).checked()  # before a store is made
        libc.keep_freed_memory()
        with (
            stop_signal() as stop,
            stores.open_store(
                path, "w", flush_interval_s=flush_interval, segment_bytes=segment_bytes
            ) as store,
        ):
            if limits:
                store.set(**limits)
            code = _run(Capture(store, inputs, log, Notifier()), stop, metrics_file)
    except (KvstoreError, OSError) as error:
        if log_format == "text":
            raise  # it is said where all commands' errors are
        log.complain("failed", str(error), "error", kind=type(error).__name__)
        raise typer.Exit(FAILED) from error
    if code:
        raise typer.Exit(code)


def _run(capture: Capture, stop: int, metrics_file: Path | None) -> int:
    before = capture.rows_ever()
    try:
        with (
            capture.metrics_in(metrics_file),
            capture.told_to_systemd(),
            progress_bar(capture.describe, wanted=capture.log.shape == "text"),
        ):
            code = capture.take(stop)
    except StoreError:
        capture.say_kept(before)
        raise
    capture.summarise()
    return code


def _read(files: list[Path]) -> list[Path]:
    if STDIN in files:
        refuse_terminal(0, f"no packets on stdin: pipe them in, {PIPE_THEM}")
    return files


def _served(files: list[Path], listen: Path | None) -> list[Path]:
    if not files and listen is None:
        raise typer.BadParameter("--reopen is for FIFOs: name one or more, as mkfifo makes them")
    for path in files:
        if not path.is_fifo():
            raise typer.BadParameter(
                f"{path}: no FIFO, and only those are served; read files and stdin with another "
                "kvstore write, without --listen and --reopen"
            )
    return files
