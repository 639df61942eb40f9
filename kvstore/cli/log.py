"""A command's talk on stderr as text for people or JSON for programs, one line each.

JSON lines have ``time``, ``level``, ``event`` and ``message``, then the event's own fields.
Whatever a producer can cause again and again is limited: of each event LINES_MAX lines a minute are
written, the others are counted, and the count is said with the next line of that event.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Literal

from kvstore.cli.terminal import complain, say
from kvstore.events import Event, Level

LogFormat = Literal["text", "json"]
LINES_MAX: Final = 10  # a minute, of one event
_WINDOW_S: Final = 60.0
_MESSAGE_MAX: Final = 2000  # characters of a line


class Log:
    """Prints events. Usable from several threads."""

    def __init__(self, shape: LogFormat, clock: Callable[[], float] = time.monotonic):
        self.shape = shape
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}

    def __call__(self, event: Event) -> None:
        """Print the event, or count it."""
        with self._lock:
            window = self._windows.setdefault(event.name, _Window())
            if (left_out := window.admit(self._clock())) is None:
                return
            if left_out:
                self._print(_left_out(event, left_out))
            self._print(event)
            if window.printed == LINES_MAX:
                self._print(_is_full(event))

    def say(self, name: str, message: str, **fields: object) -> None:
        """Print talk."""
        self(Event("info", name, message, fields))

    def complain(self, name: str, message: str, level: Level = "warning", **fields: object) -> None:
        """Print trouble."""
        self(Event(level, name, message, fields))

    def _print(self, event: Event) -> None:
        if self.shape == "json":
            say(_json_line(event))
        elif event.level == "info":
            say("\n".join(_printable(line) for line in event.message.split("\n")))
        else:
            complain(_printable(event.message))


class _Window:
    """How much of one event was printed within a minute, and how much was not."""

    def __init__(self) -> None:
        self.printed = 0
        self._since_s = 0.0
        self._left_out = 0

    def admit(self, now_s: float) -> int | None:
        """None where there is no room; else how many were left out before this one."""
        if not self.printed or now_s >= self._since_s + _WINDOW_S:
            self.printed, self._since_s = 0, now_s
        if self.printed == LINES_MAX:
            self._left_out += 1
            return None
        self.printed += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


def _left_out(event: Event, count: int) -> Event:
    text = f"{count} more messages like the next one were left out"
    return Event(event.level, "left_out", text, {"of": event.name, "count": count})


def _is_full(event: Event) -> Event:
    text = f"further messages like this one are only counted for {_WINDOW_S:.0f} s"
    return Event(event.level, "limited", text, {"of": event.name})


def _json_line(event: Event) -> str:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": event.level,
        "event": event.name,
        "message": _printable(event.message.replace("\n", " ")),
        **event.fields,
    }
    return json.dumps(line, ensure_ascii=False, default=str)


def _printable(text: str) -> str:
    """Messages quote what producers sent: it must not forge lines, or fill the disk."""
    if len(text) > _MESSAGE_MAX:
        text = text[:_MESSAGE_MAX] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
