"""The manifest: what an output was made of, a record a day, in ``.dayfiles/`` beside the trees.

    .dayfiles/days/2024-07-29.json   inputs (path, size, content hash, hours fed), files, counts
    .dayfiles/lock                   held by whoever converts into this output

A record is written, durably, once all files of its day are on the disk; before files that it
describes are changed, it is marked incomplete. So a complete record is never wrong, wherever a
run was killed, and what has none is simply made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvstore.dayfiles.day import DayReport, Fed, day_text
from kvstore.dayfiles.exports import Export, Skipped
from kvstore.dayfiles.grid import Settings
from kvstore.dayfiles.tally import SeriesTally
from kvstore.errors import DayfilesError
from kvstore.layout import sync_folder, write_durably

FOLDER: Final = ".dayfiles"
_VERSION: Final = 1  # of records, and of what is made from the same input
SHARD_WAIT_S: Final = 120  # another shard's run may be bringing the columns of a month in line
_POLL_S: Final = 0.1


class Record(NamedTuple):
    """A day of the output. fingerprint: of all that decides over its files but the columns."""

    fingerprint: str
    complete: bool
    source: str
    settings: Settings
    sizes: dict[str, int]
    report: DayReport


def fingerprint(exports: Sequence[Export], settings: Settings) -> str:
    """The same for the same contents, wherever they lie and whatever they are called."""
    told = [_VERSION, list(settings), sorted({export.digest for export in exports})]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class Manifest:
    """The records of an output folder."""

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER / "days"

    def records(self) -> dict[int, Record]:
        """All days, in their order; a record that cannot be read is as good as none."""
        found = {}
        for path in sorted(self._folder.glob("*.json")):
            record = _loaded(path)
            if record is not None:
                found[record.report.day] = record
        return dict(sorted(found.items()))

    def write(self, record: Record) -> None:
        """Make a day's record durable."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(record.report.day)
        told = {
            "version": _VERSION,
            "date": day_text(record.report.day),
            **record._asdict(),
            "settings": record.settings._asdict(),
            "report": _told(record.report),
        }
        write_durably(path, json.dumps(told, ensure_ascii=False).encode())

    def doubt(self, record: Record) -> None:
        """Mark a day incomplete, before its files are changed."""
        if record.complete:
            self.write(record._replace(complete=False))

    def forget(self, day: int) -> None:
        """Remove a day's record."""
        self._path(day).unlink(missing_ok=True)
        sync_folder(self._folder)

    def _path(self, day: int) -> Path:
        return self._folder / f"{day_text(day)}.json"


def _told(report: DayReport) -> dict[str, Any]:
    told = report._asdict()
    told["inputs"] = [fed._asdict() for fed in report.inputs]
    told["skipped"] = [skipped._asdict() for skipped in report.skipped]
    return told


def _loaded(path: Path) -> Record | None:
    try:
        found = json.loads(path.read_bytes())
        if found.pop("version") != _VERSION:
            return None
        found.pop("date")
        report = found.pop("report")
        return Record(
            **found | {"settings": Settings(**found["settings"]), "report": _report(report)}
        )
    except (ValueError, TypeError, KeyError):
        return None


def _report(found: Mapping[str, Any]) -> DayReport:
    parts = {
        "inputs": [Fed(**fed) for fed in found["inputs"]],
        "skipped": [Skipped(**skipped) for skipped in found["skipped"]],
        "series": {key: SeriesTally(*tally) for key, tally in found["series"].items()},
    }
    return DayReport(**{**found, **parts})


# ---- who may write ----


@contextmanager
def held(root: Path, *, alone: bool) -> Iterator[None]:
    """Hold the output's lock: alone, or beside others that each have days of their own."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as file:
        if alone and not _locked(file, fcntl.LOCK_EX):
            raise DayfilesError(
                f"{root} is being written by another run: wait until it has ended; runs that share "
                "the work each need their --shard"
            )
        if not alone and not _locked_in_time(file):
            raise DayfilesError(
                f"{root} is being written by a run without --shard, or by one that brings columns "
                f"in line, and was for {SHARD_WAIT_S} s: run this shard again once that has ended"
            )
        yield


def _locked_in_time(file: Any) -> bool:
    """Whether a shard's lock came to be held within the time that it waits."""
    deadline = time.monotonic() + SHARD_WAIT_S
    while not _locked(file, fcntl.LOCK_SH):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


@contextmanager
def last_one(root: Path) -> Iterator[bool]:
    """Whether no other run is at work on the output; if so, none will be while this lasts."""
    with (root / FOLDER / "lock").open("ab") as file:
        yield _locked(file, fcntl.LOCK_EX)


def _locked(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
