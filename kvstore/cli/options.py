"""What the text of an option means: times, durations, sizes. What cannot be read is wrong usage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from kvstore.errors import TimeError
from kvstore.timestamps import parse_duration, plain_time, to_time

STDIN: Final = Path("-")
_FLOAT64: Final[np.dtype[Any]] = np.dtype("<f8")
_SIZE: Final = re.compile(r"([0-9]+\.?[0-9]*(?:e[0-9]{1,2})?) ?([kmgt]i?)?b?", re.IGNORECASE)
_PREFIXES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
                    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def input_file(text: str) -> Path:
    """A file that can be read, or - for stdin; seen to before a store is made for it."""
    path = Path(text)
    try:
        if path != STDIN and not path.is_fifo():  # opening one would wait for its writer
            path.open("rb").close()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
    return path


def socket_path(text: str) -> Path:
    """The path in unix:/run/in.sock; the file's rights are what keeps strangers out."""
    scheme, _, path = text.partition(":")
    if scheme != "unix" or not path or path.startswith("@"):
        raise typer.BadParameter(
            f"{text!r}: expected unix: and the path of a socket, such as unix:/run/kvstore/in.sock"
        )
    return Path(path)


def file_mode(text: str | int) -> int:
    """A file's rights in octal, such as 0660; a default is a number already."""
    if isinstance(text, int):
        return text
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise typer.BadParameter(f"mode {text!r}: expected three octal digits, such as 0660")
    return int(text, 8)


def time_text(text: str) -> str:
    """A time as it was given, once it is known that it can be read."""
    epoch_seconds(text)
    return text


def epoch_seconds(text: str) -> float:
    """A time as float seconds since 1970."""
    try:
        return float(plain_time(to_time(text, _FLOAT64, side="start")))
    except TimeError as error:
        raise typer.BadParameter(str(error)) from error


def duration_ns(text: str) -> int:
    """A duration such as 10s, 250ms or 1.5h."""
    try:
        return parse_duration(text)
    except TimeError as error:
        raise typer.BadParameter(str(error)) from error


def duration_s(text: str | float) -> float:
    """The same in seconds; a default is a number already."""
    return duration_ns(text) / 1e9 if isinstance(text, str) else text


def size_bytes(text: str | int) -> int:
    """Bytes of a size such as 800GB, 64MiB or 1e9; a default is a number already."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"size {text!r} cannot be read: expected a number of bytes, not negative, such as "
            "800GB, 64MiB or 1000000"
        )
    return int(float(match[1]) * _PREFIXES[(match[2] or "").lower()])


# ---- what commands share ----

StorePath = Annotated[Path, typer.Argument(metavar="PATH", help="The store.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Start = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        parser=time_text,
        help="First time, included: ISO 8601 (UTC if it names no offset) or epoch seconds.",
    ),
]
Stop = Annotated[
    str | None, typer.Option(metavar="TIME", parser=time_text, help="Last time, included.")
]
Last = Annotated[
    int | None,
    typer.Option(
        metavar="DURATION",
        parser=duration_ns,
        help="The stretch before the last row instead, such as 10s, 250ms, 5m or 2h.",
    ),
]
StreamName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The stream; if not given particles, or the only one."),
]
FieldNames = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="Fields, separated by commas; all if not given."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="At most this many rows.")]
Ordered = Annotated[
    bool, typer.Option("--ordered", help="Merge rows that arrived late strictly by time.")
]


def field_names(text: str | None) -> list[str] | None:
    """The fields that were named; None for all."""
    return None if text is None else [name.strip() for name in text.split(",")]
