"""What commands say on stderr: complaints, talk, progress bars, sizes in words; closed pipes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

FAILED: Final = 1
LOSS: Final = 3
_SHOW_AFTER_S: Final = 1.0
_REFRESH_S: Final = 0.25


def complain(message: str) -> None:
    """One line of trouble."""
    say(f"kvstore: {message}")


def say(message: str) -> None:
    """One line of talk."""
    print(message, file=sys.stderr, flush=True)


def size_text(count: float) -> str:
    """Bytes in words: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:  # noqa: PLR2004
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def open_standard_files() -> None:
    """Put /dev/null where a standard file is closed: else a store's file would take its number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004  # stderr
        pass
    os.close(fd)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


@contextmanager
def quiet_if_closed() -> Iterator[None]:
    """Where the reader of stdout goes away, as `| head` does, end without a word."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Else Python tries once more at exit, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            raise


@contextmanager
def progress_bar(
    describe: Callable[[float], str],
    fraction: Callable[[], float] | None = None,
    *,
    wanted: bool = True,
) -> Iterator[None]:
    """Show ``describe(elapsed seconds)`` on a terminal, from one second on; nothing in a pipe.

    fraction: how much of the work is done, 0 to 1, where that is known: adds bar and time left.
    """
    if not (wanted and sys.stderr.isatty()):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(describe, fraction, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(
    describe: Callable[[float], str], fraction: Callable[[], float] | None, done: threading.Event
) -> None:
    started = time.perf_counter()
    if done.wait(_SHOW_AFTER_S):
        return
    from rich import progress as bars  # noqa: PLC0415  # only where something is shown
    from rich.console import Console  # noqa: PLC0415

    columns: list[bars.ProgressColumn] = [bars.SpinnerColumn(), bars.TimeElapsedColumn()]
    if fraction is not None:
        columns += [bars.BarColumn(), bars.TimeRemainingColumn()]
    columns.append(bars.TextColumn("{task.description}"))
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=1.0 if fraction else None)
        while True:
            description = describe(time.perf_counter() - started)
            completed = fraction() if fraction else 0.0
            shown.update(task, description=description, completed=completed)
            if done.wait(_REFRESH_S):
                return
