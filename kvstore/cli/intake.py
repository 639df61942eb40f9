"""What ``kvstore write`` does with its inputs: one after the other, or all at once as a service."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvstore import libc, metrics
from kvstore import store as stores
from kvstore.cli.log import Log
from kvstore.cli.options import STDIN
from kvstore.cli.terminal import FAILED, LOSS, size_text
from kvstore.errors import KvstoreError, PacketError
from kvstore.every import every
from kvstore.ingest import PARTICLES, Intake, OnError, Progress, Source, Target, ingest
from kvstore.notify import Notifier
from kvstore.packets import PacketDecoder
from kvstore.serve import Server
from kvstore.sockets import Listener, listening
from kvstore.timestamps import format_time

_STATUS_S: Final = 5.0  # for people, where no watchdog asks for more


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where packets come from, and what is taken of them.

    files: read one after the other; or, where ``serves``, FIFOs that are read for ever.
    """

    files: Sequence[Path]
    stream: str
    time_field: str
    packet_bytes_max: int
    skip: bool
    serves: bool
    socket: Path | None
    socket_mode: int
    connections_max: int


@dataclass(slots=True)
class Capture:
    """One run of `kvstore write`: its store, its counts, and where its talk goes."""

    store: stores.Store
    inputs: Inputs
    log: Log
    notifier: Notifier
    progress: Progress = field(default_factory=Progress)
    started_s: float = field(default_factory=time.perf_counter)

    def take(self, stop: int) -> int:
        """Take in everything until the inputs end or ``stop`` is readable: the exit code."""
        inputs = self.inputs
        with ExitStack() as stack:
            listener = stack.enter_context(
                listening(inputs.socket, mode=inputs.socket_mode)
                if inputs.socket
                else nullcontext()
            )
            self.notifier.send("READY=1")
            try:
                return self._serve(listener, stop) if inputs.serves else self._take_files(stop)
            finally:
                self.notifier.send("STOPPING=1")

    # ---- as a service ----

    def _serve(self, listener: Listener | None, stop: int) -> int:
        inputs = self.inputs
        if listener is not None:
            text = f"Listening on {listener.path} ({listener.rights})."
            self.log.say("listening", text, path=str(listener.path), rights=listener.rights)
        target = Target(
            self.store, self.progress, stream=inputs.stream, time_field=inputs.time_field
        )

        def make_intake(passed_over: OnError) -> Intake:
            decoder = PacketDecoder(frame_bytes_max=inputs.packet_bytes_max)
            return Intake(target, decoder, passed_over if inputs.skip else None)

        server = Server(
            make_intake,
            self.progress,
            listener=listener,
            fifos=inputs.files,
            connections_max=inputs.connections_max,
            report=self.log,
            tick=target.rejections.tell_due,
        )
        try:
            server.run(stop)
        finally:
            server.close()
            target.flush()
        self._say_stopped()
        return self._loss()

    # ---- one input after the other ----

    def _take_files(self, stop: int) -> int:
        """Everything that came before an error is committed."""
        prefix = ""  # says which file, where there are several
        try:
            for path in self.inputs.files:
                prefix = f"{path}: " if len(self.inputs.files) > 1 else ""
                if not self._take(path, stop, prefix):
                    return self._stopped(path)
        except PacketError as error:
            text = f"{prefix}{error}. What came before it is stored."
            self.log.complain("malformed", text, "error")
            return LOSS if self.progress.ended else FAILED
        return self._loss()

    def _take(self, path: Path, stop: int, prefix: str) -> bool:
        def skip(error: PacketError) -> None:
            self.log.complain("skipped", f"{prefix}{error}. Skipped.")

        with _opened(path) as fd:
            libc.enlarge_pipe(fd)
            return ingest(
                self.store,
                Source(fd, stop).readinto,
                PacketDecoder(frame_bytes_max=self.inputs.packet_bytes_max),
                stream=self.inputs.stream,
                time_field=self.inputs.time_field,
                on_error=skip if self.inputs.skip else None,
                progress=self.progress,
            )

    def _stopped(self, path: Path) -> int:
        self._say_stopped()
        if path != STDIN:
            self.log.complain("not_finished", f"{path}: not read to its end")
        elif count := self.progress.unfinished_bytes:
            text = f"{count} bytes of an unfinished packet were lost"
            self.log.complain("unfinished", text, bytes=count)
        else:
            return LOSS if self.progress.skipped else 0
        return LOSS

    # ---- what is said ----

    def _say_stopped(self) -> None:
        text = "Stopped by a signal; all whole packets received are stored."
        self.log.say("stopped", text)

    def _loss(self) -> int:
        """Says what of the input was not taken; the exit code."""
        progress = self.progress
        for count, name, what in (
            (progress.skipped, "skipped_all", "malformed packets were skipped"),
            (progress.rejected - progress.skipped, "cut_off_all", "producers were cut off"),
            (progress.interrupted, "interrupted_all", "producers went away inside a packet"),
        ):
            if count:
                self.log.complain(name, f"{count} {what}", count=count)
        return LOSS if progress.rejected or progress.interrupted else 0

    def describe(self, elapsed_s: float) -> str:
        """The state of things, for a progress bar."""
        progress = self.progress
        return (
            f"{progress.rows:,} {_noun(self.inputs.stream)}  "
            f"{progress.rows / elapsed_s / 1000:.1f} k/s  "
            f"{size_text(progress.bytes)}  {size_text(progress.bytes / elapsed_s)}/s  "
            f"disk left {size_text(shutil.disk_usage(self.store.path).free)}"
        )

    def rows_ever(self) -> int:
        """Rows committed to the stream so far, those dropped meanwhile included."""
        state = self.store.state()
        info = state.streams.get(self.inputs.stream)
        if info is None:
            return 0
        dropped = state.dropped.get(info.stream_id)
        kept = state.stream_totals(info.stream_id).rows
        return kept + (dropped.totals.rows if dropped else 0)

    def say_kept(self, rows_before: int) -> None:
        """What of it was stored, where the store failed."""
        received, stored = self.progress.rows, self.rows_ever() - rows_before
        text = f"Of {received} {_noun(self.inputs.stream)} received {stored} are stored."
        self.log.say("kept", text, received=received, stored=stored)

    def summarise(self) -> None:
        """What came in, and how fast."""
        progress, stream = self.progress, self.inputs.stream
        elapsed_s, noun = time.perf_counter() - self.started_s, _noun(stream)
        count = f"{progress.packets} packets ({progress.rows} {noun}, {progress.bytes} bytes)"
        rate = f"{progress.rows / elapsed_s / 1000:.2f} k{noun.capitalize()}/s"
        lines = [f"Wrote to storage {count}.", f"Write bandwidth: {rate}"]
        first = last = None
        if progress.first is not None:
            dtype = self.store[stream].schema.time_dtype
            first, last = (format_time(t, dtype) for t in (progress.first, progress.last))
            lines = [f"First Data timestamps {first}", *lines, f"Last Data timestamp {last}"]
        self.log.say(
            "summary",
            "\n".join(lines),
            packets=progress.packets,
            rows=progress.rows,
            bytes=progress.bytes,
            rejected=progress.rejected,
            seconds=round(elapsed_s, 3),
            first=first,
            last=last,
        )

    # ---- what others are told, on threads of their own ----

    @contextmanager
    def metrics_in(self, path: Path | None) -> Iterator[None]:
        """Keep a file of figures up to date; KvstoreError where it can't be made at the start."""
        if path is None:
            yield
            return
        try:
            self._write_metrics(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # capturing may make room
                reason = error.strerror or error
                raise KvstoreError(f"{path}: metrics cannot be written: {reason}") from error
            self._complain_of_metrics(path, error)
        with every(metrics.INTERVAL_S, lambda: self._try_metrics(path)):
            yield

    def _try_metrics(self, path: Path) -> None:
        try:
            self._write_metrics(path)
        except (KvstoreError, OSError) as error:  # a report is no reason to stop capturing
            self._complain_of_metrics(path, error)

    def _complain_of_metrics(self, path: Path, error: Exception) -> None:
        self.log.complain("metrics_failed", f"{path}: metrics not written: {error}")

    def _write_metrics(self, path: Path) -> None:
        found = metrics.families_of(self.store, self.progress)
        labels = {"store": os.path.realpath(self.store.path)}
        metrics.replace_file(path, metrics.render(found, labels))

    @contextmanager
    def told_to_systemd(self) -> Iterator[None]:
        """Tell systemd how things are; that all is well only while commits make progress."""
        limit_s = self.notifier.watchdog_s
        with every(min(_STATUS_S, limit_s / 3 if limit_s else _STATUS_S), self._tell_systemd):
            yield

    def _tell_systemd(self) -> None:
        progress, committer = self.progress, self.store.writer().committer
        overdue_s = committer.overdue_s()
        limit_s = self.notifier.watchdog_s
        text = (
            f"STATUS={progress.rows:,} {_noun(self.inputs.stream)} taken in, "
            f"{size_text(committer.held_bytes())} queued, {progress.connected} producers"
        )
        if overdue_s > _STATUS_S:
            text += f", a commit is {overdue_s:.0f} s overdue"
        alive = limit_s is not None and overdue_s < limit_s / 2
        self.notifier.send(*(["WATCHDOG=1"] if alive else []), text)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    if path == STDIN:
        yield 0
        return
    # Without waiting for a FIFO's writer: Source waits for its bytes, and for the signal to stop.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def _noun(stream: str) -> str:
    return "particles" if stream == PARTICLES else "rows"
