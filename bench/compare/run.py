"""``python -m bench compare``: start the children in turns, print a table, write JSON.

Every run of a peer stands right beside a run of this store, in an order that flips each round; a
ratio is the median of such pairs. A peer whose package is missing, or that fails, has a row
that says so. Exit codes as the bench's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import cli, process
from bench.compare import packets, picture, table
from bench.compare.child import DONE, READY
from bench.compare.peer import ALL, LIMIT, OURS, PEERS, files, missing, peer, size_bytes, versions
from bench.compare.table import Row
from bench.figure import BenchError
from bench.host import describe
from bench.measure import GB, scratch, settle, warm
from bench.workload import PARTICLE_BYTES, Workload
from kvstore.generate import Profile

TINY_BYTES = 8_000_000
PROFILES: tuple[Profile, ...] = ("uniform", "counts")
_READY_S_MAX = 60.0

Values = dict[str, float]


def main(arguments: Sequence[str]) -> int:
    """Compare, and return the exit code."""
    options = _parser().parse_args(arguments)
    size = TINY_BYTES if options.tiny else int(options.gb * GB)
    rounds = 1 if options.tiny else options.rounds
    started = dt.datetime.now(dt.UTC)
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.dir) as folder:
        host = describe(Path(folder))
        for profile in options.profiles:
            with scratch(Path(folder), bytes_needed=4 * size) as place:
                rows = _compared(place, profile, size, rounds, options)
            found[profile] = rows
            print(table.markdown(profile, rows) + "\n", flush=True)
    record = {
        "started": started.isoformat(timespec="seconds"),
        "host": host._asdict(),
        "peers": {name: versions(peer(name)) for name in options.peers},
        "size_bytes": size,
        "rounds": rounds,
        "seed": options.seed,
        "profiles": {name: list(map(table.as_record, rows)) for name, rows in found.items()},
    }
    if options.json or not options.tiny:
        path = options.json or cli.results_path("compare", started, host)
        _save(record, path)
        picture.draw(found, path.with_suffix(".svg"))
    return int(any(row.failed for rows in found.values() for row in rows))


def _save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)


def _compared(
    folder: Path, profile: Profile, size: int, rounds: int, options: argparse.Namespace
) -> list[Row]:
    source = folder / "packets"
    packets.save(source, Workload.of(profile, size, options.seed))
    rows = {name: _row(name) for name in (LIMIT, *options.peers)}
    ours = _row(OURS)
    for number in range(rounds):
        _add(rows[LIMIT].values, _memcpy(source))
        for name, row in rows.items():
            if row.reason:
                continue
            pair = [(row, name), (ours, OURS)]
            try:
                seen = {at: measured(at, source) for _, at in pair[:: -1 if number % 2 else 1]}
            except (BenchError, OSError) as error:
                row.reason, row.failed = f"{type(error).__name__}: {error}", True
                print(f"NOT MEASURED {row.name}: {error}", file=sys.stderr)
                continue
            _add(row.values, seen[name])
            _add(row.ours, seen[OURS])
            _add(ours.values, seen[OURS])
            print(f"{profile} {number + 1}/{rounds} {table.line(row)}", file=sys.stderr)
    return [rows.pop(LIMIT), ours, *rows.values()]


def measured(name: str, source: Path) -> Values:
    """Everything about one store, once: written, read in every way, removed."""
    size = source.stat().st_size
    store = source.with_name("store")
    with _removed(store):
        settle(size)
        found, found["write_mb"] = _child("write", name, store, source)
        stored = size_bytes(store)
        for file in files(store):
            warm(file)
        read, found["read_mb"] = _child("read", name, store, source)
        found |= read | _child("keep", name, store, source)[0]
        if _dropped(store):
            found |= _child("cold", name, store, source)[0]
    if peer(name).LIVE:
        with _removed(store):
            found |= _live(name, store, source)
    return _rates(found, size, stored)


def _rates(found: Values, size: int, stored: int) -> Values:
    """Turn seconds into what the table shows."""
    rates = {"size": size / stored}
    for act in ("write", "full", "kept", "cold", "live_write"):
        if f"{act}_s" in found:
            rates[act] = size / GB / found[f"{act}_s"]
    rates["spectral"] = size / PARTICLE_BYTES / 1e6 / found["spectral_s"]
    rates["range"], rates["first"] = found["range_s"] * 1e3, found["first_s"] * 1e3
    rates |= {at: found[at] for at in ("write_mb", "read_mb")}
    rates |= {f"{act}_cpu": found[f"{act}_cpu_s"] * GB / size for act in ("write", "full", "kept")}
    rates |= {f"{act}_cpu": found[f"{act}_cpu_s"] * 1e3 for act in ("range", "first")}
    if "live_rows_s" in found:
        rates["live"] = found["live_rows_s"] * PARTICLE_BYTES / GB
    return rates


def _child(act: str, name: str, store: Path, source: Path) -> tuple[Values, float]:
    """Run one act; what it found, and its peak of anonymous memory in MB."""
    ended = process.run(_command(act, name, store, source), watched=0).ended[0]
    return _said(ended.stderr), ended.anon_bytes_max / 1e6


def _command(act: str, name: str, store: Path, source: Path) -> list[str]:
    return [sys.executable, "-m", "bench.compare.child", act, name, str(store), str(source)]


def _said(stderr: str) -> Values:
    lines = [line for line in stderr.splitlines() if line.startswith("{")]
    found: Values = json.loads(lines[-1])
    return found


def _memcpy(source: Path) -> Values:
    found = _child("memcpy", LIMIT, source, source)[0]
    return {"memcpy": source.stat().st_size / GB / found["memcpy_s"]}


def _live(name: str, store: Path, source: Path) -> Values:
    """Write with a reader beside it."""
    ready, done = (store.with_name(store.name + end) for end in (READY, DONE))
    settle(source.stat().st_size)
    command = _command("live", name, store, source)
    with process.Child.started(command, subprocess.DEVNULL, subprocess.DEVNULL) as reader:
        due_s = time.monotonic() + _READY_S_MAX
        while not ready.exists():
            if time.monotonic() > due_s:
                raise BenchError(f"{name}: the reader was not ready after {_READY_S_MAX:.0f} s")
            time.sleep(0.01)
        try:
            written, _ = _child("write", name, store, source)
        finally:
            done.touch()
        ended = reader.wait()
        reader.check(ended)
    return {"live_write_s": written["write_s"], **_said(ended.stderr)}


def _dropped(store: Path) -> bool:
    """Ask the kernel to forget a store's pages, which have to be clean for that."""
    try:
        for file in files(store):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _removed(store: Path) -> Iterator[None]:
    """Remove the store and all that lies beside it under its name."""
    try:
        yield
    finally:
        for path in store.parent.glob(store.name + "*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _row(name: str) -> Row:
    store = peer(name)
    lacks = missing(store)
    reason = f"not installed: {', '.join(lacks)}" if lacks else ""
    return Row(store.NAME, store.COMPRESSES, store.DURABILITY, reason)


def _add(values: dict[str, list[float]], more: Values) -> None:
    for name, value in more.items():
        values.setdefault(name, []).append(value)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("compare", __doc__, tiny="8 MB, one round")
    known = [name for name in ALL if name not in (OURS, LIMIT)]
    parser.add_argument("--gb", type=float, default=1.0, help="GB of packets in a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each peer")
    parser.add_argument("--peers", nargs="+", choices=known, default=list(PEERS), metavar="PEER")
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    return parser
