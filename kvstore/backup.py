"""``backup``: a copy of a store, made while it is written, brought up to date by the next run.

    DEST/backup.msgpack            there first: whose backup, complete since when, checksums
    DEST/segments/N.mdb.copying    being copied
    DEST/segments/N.mdb.copied     whole, synced, read back; not yet part of the backup
    DEST/segments/N.mdb            part of the backup
    DEST/segments/N.mdb.kept       an earlier copy of a segment that was damaged since; no part
    DEST/store.msgpack             there last: from then on DEST is a store, for any reader

Sealed segments never change, so each is copied once; of the active one LMDB copies the last
commit. Only when all are there do they take their names, in ascending order. After each name the
folder is synced, so a reader finds the earlier backup, the new one, or between them the store as
it was when one of its segments was sealed: never one with holes.

What had DEST open across a run should open it again: its active segment was replaced.

Sound data in an earlier backup are never given up for something damaged: where the source's
copy has more rows but fails its check, the earlier one stays beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from kvstore import codec
from kvstore.check import SegmentCheck
from kvstore.copies import checksum_of, copy_file, locked_folder, sync_file
from kvstore.environment import open_environment, translated
from kvstore.errors import DamageError, StoreError, StoreFormatError
from kvstore.layout import Layout, sync_folder, write_durably
from kvstore.pages import PageFile
from kvstore.state import State
from kvstore.untrusted import Damage

_MANIFEST: Final = "backup.msgpack"
_IDENTITY: Final = "store.msgpack"
_SEGMENTS: Final = "segments"
_WRITER_LOCK: Final = "writer.lock"
_VERSION: Final = 1
_PARTS: Final = 2  # a segment is copied, and checked as it is read back
_KEPT: Final = ".mdb.kept"
_TRIES_MAX: Final = 20  # rounds in which retention may drop what is about to be copied
OnProgress = Callable[[int, int], None]  # bytes done, bytes in all


class BackupReport(NamedTuple):
    """What was done. kept: segments that were there already. damages: of the source."""

    path: str
    dest: str
    copied: int
    copied_bytes: int
    kept: int
    last_commit_ns: int
    damages: tuple[Damage, ...]


class _Manifest(NamedTuple):
    """backup.msgpack. complete_ns: 0 before the first is. sealed: number -> size, xxh3-64."""

    version: int
    store_id: bytes
    complete_ns: int = 0
    sealed: dict[int, tuple[int, int]] = {}  # noqa: RUF012  # never changed in place


def backup(
    path: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    on_progress: OnProgress | None = None,
) -> BackupReport:
    """Bring the backup at ``dest`` up to the store's last commit; make it if it is not there.

    Complete, synced and read back on return. Cut short, the earlier backup stands, and the next
    run goes on with what was copied. Raises StoreNotFound, DiskFull, StoreError where ``dest``
    holds something else, DamageError where the active segment is damaged.
    """
    layout, target = Layout(path), Layout(dest)
    store_id = layout.store_id()
    _check_paths(layout.path.resolve(), target.path.resolve())
    with translated(target.path), locked_folder(target.path):
        manifest = _prepare(target, store_id)
        return _Backup(layout, target, manifest, on_progress).run()


def _check_paths(source: Path, dest: Path) -> None:
    if dest == source or source in dest.parents or dest in source.parents:
        raise StoreError(f"{dest}: a backup goes outside of its store, best to another disk")


def _prepare(target: Layout, store_id: bytes) -> _Manifest:
    """The manifest that is there, or a first one in an empty folder."""
    path = target.path / _MANIFEST
    if path.exists():
        manifest = _read_manifest(path)
        if manifest.store_id != store_id:
            raise StoreError(
                f"{target.path}: a backup of the store {manifest.store_id.hex()}, not of "
                f"{store_id.hex()}: name another folder"
            )
        if (target.path / _WRITER_LOCK).exists():
            raise StoreError(
                f"{target.path}: this backup was opened for writing since, and is a store of its "
                "own now: name another folder"
            )
    else:
        if found := set(os.listdir(target.path)) - {_MANIFEST + ".tmp"}:
            raise StoreError(
                f"{target.path}: a folder with other files ({min(found)}, …), not a backup; "
                "name a new or an empty one"
            )
        manifest = _Manifest(_VERSION, store_id)
        write_durably(path, codec.packed(manifest))
    target.segments.mkdir(exist_ok=True)
    sync_folder(target.path)
    return manifest


def _read_manifest(path: Path) -> _Manifest:
    try:
        version, store_id, complete_ns, sealed = codec.unpacked(path.read_bytes(), _MANIFEST)
    except (DamageError, ValueError, TypeError, AttributeError) as error:
        raise StoreFormatError(
            f"{path}: damaged: {error}; name another folder for a new backup"
        ) from error
    if version != _VERSION:
        raise StoreFormatError(f"{path}: version {version}, this kvstore knows {_VERSION}")
    return _Manifest(version, store_id, complete_ns, {n: tuple(s) for n, s in sealed.items()})


class _Backup:
    """One run."""

    def __init__(
        self, layout: Layout, target: Layout, manifest: _Manifest, on_progress: OnProgress | None
    ):
        self._layout = layout
        self._target = target
        self._manifest = manifest
        self._on_progress = on_progress
        self._held: dict[int, tuple[int, int]] = {}  # sealed, here and whole: size, checksum
        self._damages: list[Damage] = []
        self._copied = self._copied_bytes = self._kept = 0
        self._done_bytes = self._total_bytes = 0

    def run(self) -> BackupReport:
        self._clear_unfinished()
        state = self._collect()
        for number, summary in state.sealed.items():
            size = self._held[number][0] if number in self._held else summary.file_bytes
            if size != summary.file_bytes:
                what = f"the file has {size} bytes, expected {summary.file_bytes}"
                self._damages.append(Damage(number, what))
        self._complete(state)
        return BackupReport(
            str(self._layout.path),
            str(self._target.path),
            self._copied,
            self._copied_bytes,
            self._kept,
            state.last_commit_ns,
            tuple(self._damages),
        )

    def _clear_unfinished(self) -> None:
        for file in self._target.segments.glob("*.mdb.copying"):
            file.unlink()

    # ---- copying ----

    def _collect(self) -> State:
        """Copy all that one commit of the active segment knows, and that commit."""
        for _ in range(_TRIES_MAX):
            active = self._layout.active()
            sealed = [number for number in self._layout.numbers() if number < active]
            self._total_bytes = sum(self._size(number) for number in (*sealed, active))
            self._done_bytes = 0
            for number in sealed:
                self._hold(number)
            there = set(self._layout.numbers())
            try:
                state = self._snapshot(active)
            except (FileNotFoundError, StoreError):
                if self._layout.segment_path(active).exists():
                    raise
                continue  # sealed and dropped meanwhile
            missing = state.sealed.keys() - self._held.keys()
            if missing and self._layout.active() != active:
                continue  # sealed meanwhile: what was dropped since, it does not know
            if not missing & there:  # a drop is recorded before the file goes
                for number in sorted(missing):
                    self._miss(number)
                return state
        raise StoreError(
            f"{self._layout.path}: its oldest segments are dropped faster than they can be copied "
            f"to {self._target.path}: give it a faster disk, or the store more room"
        )

    def _miss(self, number: int) -> None:
        """Say that the store has lost a segment; keep what an earlier backup has of it."""
        what = "the segment is missing in the store"
        if number in self._manifest.sealed and self._target.segment_path(number).exists():
            self._held[number] = self._manifest.sealed[number]
            self._kept += 1
            what += "; its backup is kept"
        self._damages.append(Damage(number, what))

    def _size(self, number: int) -> int:
        with suppress(FileNotFoundError):
            return self._layout.segment_path(number).stat().st_size
        return 0

    def _hold(self, number: int) -> None:
        """Have a sealed segment in the backup's folder, whole and checked."""
        size = self._size(number)
        if number not in self._held:
            with suppress(FileNotFoundError):  # dropped meanwhile: the next commit says so
                self._held[number] = self._known(number, size) or self._copy(number)
        self._advance(size)

    def _known(self, number: int, size: int) -> tuple[int, int] | None:
        """A copy from an earlier run, also one that was cut short."""
        final, copied = self._target.segment_path(number), self._copied_path(number)
        if number in self._manifest.sealed and final.exists():
            held = self._manifest.sealed[number]
            if held[0] != size:
                what = f"the file has {size} bytes, its backup {held[0]}: that one is kept"
                self._damages.append(Damage(number, what))
            copied.unlink(missing_ok=True)
            self._kept += 1
            return held
        for file in (copied, final):
            if file.exists() and file.stat().st_size == size:
                checksum = checksum_of(file)
                if checksum == checksum_of(self._layout.segment_path(number)):
                    self._kept += 1
                    return size, checksum
            copied.unlink(missing_ok=True)  # of another time: it must not take the place
        return None

    def _copy(self, number: int) -> tuple[int, int]:
        copying = self._copying_path(number)
        checksum = copy_file(self._layout.segment_path(number), copying, self._part(number, 0))
        _, found = self._check(number, copying)
        if found and checksum_of(copying) != checksum:
            raise StoreError(
                f"{copying}: what was read back is not what was written: is that disk failing? "
                "Back up to another"
            )
        self._accept(number, found)
        return self._finish(number), checksum

    def _accept(self, number: int, found: list[Damage]) -> None:
        """Report damage in what was copied; an earlier, sounder copy of it stays beside it."""
        self._damages += found
        final = self._target.segment_path(number)
        kept = final.with_suffix(_KEPT)
        if not found or not final.exists():
            return
        if not kept.exists():
            keeping = final.with_name(f"earlier-{number:08d}.mdb.copying")
            copy_file(final, keeping)
            sync_file(keeping)
            keeping.rename(kept)
            sync_folder(self._target.segments)
        self._damages.append(Damage(number, f"its earlier copy is kept as {kept.name}"))

    def _snapshot(self, number: int) -> State:
        """A copy of the active segment as of its last commit, checked in full."""
        copying = self._copying_path(number)
        for _ in range(_TRIES_MAX):
            copying.unlink(missing_ok=True)
            seen_writer = self._layout.writer()
            if self._layout.is_shared(number):
                self._copy_live(number)
                break
            copy_file(self._layout.segment_path(number), copying, self._part(number, 0))
            if self._layout.writer() == seen_writer:
                break  # else a writer began, which may have written over what was being copied
        state, found = self._check(number, copying)
        if any(not each.stream for each in found):  # more than batches: nothing can rest on it
            raise self._refusal(found)
        self._accept(number, found)
        self._finish(number)
        self._advance(self._size(number))
        return state

    def _copy_live(self, number: int) -> None:
        """Through LMDB, which holds the pages of one commit meanwhile."""
        environment = open_environment(self._layout.segment_path(number), "shared")
        try:
            environment.copy_to(self._copying_path(number))
        finally:
            environment.close()

    def _check(self, number: int, file: Path) -> tuple[State, list[Damage]]:
        """Check a copy as it stands on the disk."""
        sync_file(file)
        found: list[Damage] = []

        def structure(what: str) -> None:
            found.append(Damage(number, what))

        with PageFile(file, structure) as pages:
            check = SegmentCheck(number, pages, found.append, _summed(self._part(number, 1)))
            check.run()
        owner = self._manifest.store_id
        if not found and (check.state.number, check.state.store_id) != (number, owner):
            structure(f"the file holds segment {check.state.number} of another store, or renamed")
        return check.state, found

    def _refusal(self, found: list[Damage]) -> DamageError:
        return DamageError(
            f"{self._layout.segment_path(found[0].segment)}: damaged: {found[0].what}; the backup "
            "is left as it was: see kvstore verify, and kvstore recover for what can be saved"
        )

    def _finish(self, number: int) -> int:
        """Call a copy copied; its size."""
        self._copying_path(number).rename(self._copied_path(number))
        sync_folder(self._target.segments)
        size = self._copied_path(number).stat().st_size
        self._copied += 1
        self._copied_bytes += size
        return size

    def _copying_path(self, number: int) -> Path:
        return self._target.segment_path(number).with_suffix(".mdb.copying")

    def _copied_path(self, number: int) -> Path:
        return self._target.segment_path(number).with_suffix(".mdb.copied")

    # ---- making it the backup ----

    def _complete(self, state: State) -> None:
        for number in sorted({*self._held, state.number}):
            copied = self._copied_path(number)
            if copied.exists():
                copied.rename(self._target.segment_path(number))
                sync_folder(self._target.segments)
        sealed = {number: each for number, each in self._held.items() if number in state.sealed}
        manifest = self._manifest._replace(complete_ns=time.time_ns(), sealed=sealed)
        write_durably(self._target.path / _MANIFEST, codec.packed(manifest))
        if not self._target.exists():
            identity = (self._layout.path / _IDENTITY).read_bytes()
            write_durably(self._target.path / _IDENTITY, identity)
        self._drop(state)

    def _drop(self, state: State) -> None:
        """Remove what the store has dropped since the last backup."""
        for file in self._target.segments.glob("*.mdb.copied"):
            file.unlink()
        for number in self._target.numbers():
            if number not in state.sealed and number != state.number:
                self._target.segment_path(number).unlink()
                self._target.segment_path(number).with_suffix(_KEPT).unlink(missing_ok=True)
        sync_folder(self._target.segments)

    def _advance(self, size: int) -> None:
        self._done_bytes += size
        self._report(0)

    def _part(self, number: int, part: int) -> Callable[[int], None]:
        """Tells of a segment's copying, 0, or checking, 1: bytes done of it."""
        whole = self._size(number)
        return lambda size: self._report((part * whole + min(size, whole)) // _PARTS)

    def _report(self, size: int) -> None:
        if self._on_progress:
            done = min(self._done_bytes + size, self._total_bytes)
            self._on_progress(done, self._total_bytes)


def _summed(tell: Callable[[int], None]) -> Callable[[int], None]:
    """Takes sizes one by one, tells their sum."""
    total = 0

    def add(size: int) -> None:
        nonlocal total
        total += size
        tell(total)

    return add
