"""One run of a program, as a log of what it did to the files below one folder.

Owns the shim (compiling and preloading it) and the log's format. A recording is refused unless
replaying it gives exactly the folder that the program left, so nothing can be missed silently
(a store through mmap, copy_file_range, sendfile, stdio). Never judges what was recorded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

SHIM_SOURCE = Path(__file__).with_name("shim.c")
MARK_PREFIX = "/powercut-mark/"  # as in shim.c
HEAD = struct.Struct("<BBHHxxQQQQ")  # struct record of shim.c
RUN_S_MAX = 120


class Op(IntEnum):
    """What happened; the numbers are the shim's."""

    CREATE = 1
    MKDIR = 2
    TRUNCATE = 3
    WRITE = 4
    ALLOCATE = 5
    SYNC_BEGIN = 6  # offset: the sync's number, as in its end
    SYNC_END = 7
    DURABLE = 8  # an O_DSYNC write of this range has returned
    RENAME = 9
    UNLINK = 10
    LINK = 11
    MARK = 12


NAME_OPS = frozenset({Op.CREATE, Op.MKDIR, Op.RENAME, Op.UNLINK, Op.LINK})


class Event(NamedTuple):
    """One record. Paths are relative to the recorded folder; "" where they do not apply."""

    op: Op
    inode: int = 0
    offset: int = 0
    length: int = 0
    mode: int = 0
    path: str = ""
    other: str = ""
    data: bytes = b""


class RecordingError(Exception):
    """The program failed, or did something to the folder that the shim does not see."""


def mark(text: str) -> None:
    """Called by the recorded program: put a mark into the log. Does nothing when not recorded."""
    with contextlib.suppress(FileNotFoundError):
        os.close(os.open(MARK_PREFIX + text, os.O_RDONLY))


def compile_shim(folder: Path) -> Path | None:
    """The shim's shared library in that folder, or None where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "powercut_shim.so"
    flags = ["-O1", "-Wall", "-Wextra", "-fPIC", "-shared", "-o", str(library)]
    subprocess.run([compiler, *flags, str(SHIM_SOURCE), "-lpthread"], check=True)
    return library


def record(
    arguments: Sequence[str | Path],
    root: Path,
    *,
    shim: Path,
    log_path: Path,
    lying: bool = False,
) -> Path:
    """Run this Python with these arguments, recorded below root, an empty folder.

    lying: fsync, fdatasync and O_DSYNC succeed but make nothing durable.
    Returns log_path. Raises RecordingError if the program fails or escapes the shim.
    """
    log_path.unlink(missing_ok=True)
    if any(root.iterdir()):
        raise RecordingError(f"{root} is not empty: the log would not explain what is in it")
    paths = [str(Path(__file__).parents[1]), *(entry for entry in sys.path if entry)]
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "KVSTORE_POWERCUT_ROOT": str(root),
        "KVSTORE_POWERCUT_LOG": str(log_path),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if lying:
        environment["KVSTORE_POWERCUT_LYING"] = "1"
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(
        command, env=environment, timeout=RUN_S_MAX, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RecordingError(f"{command} ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    _require_complete(log_path, root)
    return log_path


def load(log_path: Path) -> list[Event]:
    """The events of a log, in order."""
    raw = log_path.read_bytes()
    events, at = [], 0
    while at < len(raw):
        code, mode, path_len, other_len, inode, offset, length, data_len = HEAD.unpack_from(raw, at)
        path_at = at + HEAD.size
        other_at = path_at + path_len
        data_at = other_at + other_len
        at = data_at + data_len
        path, other = os.fsdecode(raw[path_at:other_at]), os.fsdecode(raw[other_at:data_at])
        data = raw[data_at:at]
        events.append(Event(Op(code), inode, offset, length, mode, path, other, data))
    return events


def _require_complete(log_path: Path, root: Path) -> None:
    from powercut import disk  # noqa: PLC0415 - disk builds on this module's events

    replayed = disk.final_state(load(log_path))
    found = {str(path.relative_to(root)): path for path in root.rglob("*")}
    files = {name for name, path in found.items() if path.is_file() and not disk.is_lock(name)}
    explained = {name for name in replayed.files if not disk.is_lock(name)}
    if differing := sorted(files ^ explained):
        raise RecordingError(f"the log and {root} differ in the files {differing}")
    for name in sorted(files):
        if found[name].read_bytes() != replayed.files[name]:
            raise RecordingError(f"{name} was changed in a way that the shim does not record")
