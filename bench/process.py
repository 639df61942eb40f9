"""Commands as a user would pipe them, with what they cost: wall time, CPU, anonymous memory.

Every pipe is made here, 1 MiB wide, so that both sides of a pair get the same one. A command
that fails fails the measurement. Nothing here outlives the call that started it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from bench.figure import BenchError

PIPE_BYTES = 1 << 20

# Where `python -m kvstore` finds the package that is being measured.
ROOT = Path(__file__).resolve().parent.parent

# Between two looks at a process's anonymous memory: short against the 15 ms that the store
# takes to fill one 32 MB group at 2 GB/s, and under 2 % of a core.
_SAMPLE_INTERVAL_S = 0.002


class Ended(NamedTuple):
    """One finished command: CPU seconds of all its threads, its stderr, its memory's peak.

    anon_bytes_max is 0 unless the command was watched.
    """

    cpu_s: float
    stderr: str
    anon_bytes_max: int


class Pipeline(NamedTuple):
    """A finished pipeline: wall seconds from the first start to the last end."""

    wall_s: float
    ended: list[Ended]


def kvstore(*arguments: str | Path) -> list[str]:
    """Spell `kvstore ARGUMENTS` for this interpreter and this checkout."""
    return [sys.executable, "-m", "kvstore", *map(str, arguments)]


def run(*commands: Sequence[str], watched: int | None = None) -> Pipeline:
    """Run `first | second | …` to its end; the last one's stdout is dropped.

    watched: number of the command whose anonymous memory is sampled.
    """
    started = time.perf_counter_ns()
    with contextlib.ExitStack() as stack:
        children = _start(commands, stack)
        watch = None if watched is None else Watch(children[watched].process.pid)
        ended = [child.wait() for child in children]
        wall_s = (time.perf_counter_ns() - started) / 1e9
        # From the end: a command that dies takes those that write to it along.
        for child, end in zip(reversed(children), reversed(ended), strict=True):
            child.check(end)
    if watch and watched is not None:
        ended[watched] = ended[watched]._replace(anon_bytes_max=watch.stop())
    return Pipeline(wall_s, ended)


@contextlib.contextmanager
def feeding(command: Sequence[str]) -> Iterator[tuple[int, Child]]:
    """Start one command and yield the write end of its stdin with it; the caller waits for it.

    The descriptor is the caller's to close: that is the command's end of input.
    """
    with contextlib.ExitStack() as stack:
        reader, writer = _pipe()
        try:
            child = stack.enter_context(Child.started(command, reader, subprocess.DEVNULL))
        finally:
            os.close(reader)
        yield writer, child


class Child:
    """A started command whose stderr goes to a file, so that it never blocks on us."""

    def __init__(
        self, command: Sequence[str], process: subprocess.Popen[bytes], log: IO[bytes]
    ) -> None:
        self.command = command
        self.process = process
        self._log = log

    @classmethod
    @contextlib.contextmanager
    def started(cls, command: Sequence[str], stdin: int, stdout: int) -> Iterator[Child]:
        """Start the command; kill it on the way out if it is still running."""
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=stdout, stderr=log, cwd=ROOT, env=_environment()
            )
            try:
                yield cls(command, process, log)
            finally:
                if process.returncode is None:
                    process.kill()
                    process.wait()

    def wait(self) -> Ended:
        """Wait for the end, whatever the exit code."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self._log.seek(0)
        stderr = self._log.read().decode(errors="replace")
        return Ended(usage.ru_utime + usage.ru_stime, stderr, 0)

    def check(self, ended: Ended) -> None:
        """Raise BenchError on any exit code but 0."""
        if self.process.returncode != 0:
            said = ended.stderr.strip().splitlines() or ["nothing on stderr"]
            raise BenchError(
                f"{' '.join(self.command)} ended with {self.process.returncode}: {said[-1]}"
            )


class Watch:
    """Samples a process's anonymous resident memory until it ends, and keeps the peak."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._bytes_max = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Return the peak in bytes; the process must have ended."""
        self._thread.join()
        if not self._bytes_max:
            raise BenchError(f"process {self._pid} ended before its memory could be looked at")
        return self._bytes_max

    def _sample(self) -> None:
        while (found := anon_bytes(self._pid)) is not None:
            self._bytes_max = max(self._bytes_max, found)
            time.sleep(_SAMPLE_INTERVAL_S)


def _environment() -> dict[str, str]:
    """Ours, less what slows every interpreter start and every print down for no user."""
    unusual = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")
    return {name: value for name, value in os.environ.items() if name not in unusual}


def anon_bytes(pid: int) -> int | None:
    """RssAnon, which leaves out the mapped store; None once the process has ended."""
    try:
        with Path(f"/proc/{pid}/status").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


def _start(commands: Sequence[Sequence[str]], stack: contextlib.ExitStack) -> list[Child]:
    children: list[Child] = []
    stdin = subprocess.DEVNULL
    for number, command in enumerate(commands):
        last = number == len(commands) - 1
        reader, stdout = (subprocess.DEVNULL, subprocess.DEVNULL) if last else _pipe()
        try:
            children.append(stack.enter_context(Child.started(command, stdin, stdout)))
        finally:
            _close(stdin, stdout)
        stdin = reader
    return children


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor != subprocess.DEVNULL:
            os.close(descriptor)
