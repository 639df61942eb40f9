"""``python -m bench soak``: everything at once, for a long time, and then the books are checked.

A writer at full speed under a limit of size; a follower that keeps up and one that retention
overtakes; verify at a capped rate, over and over; ranges pinned and unpinned. Every row has a
running number. What must hold: no row lost that no gap accounts for, none twice, no damage, every
pinned row kept, the size limit never exceeded, no process that grows. Reported besides: latency,
stalls, and for how much of the time each process held the space of a dropped segment. Exit codes:
0 all of that holds, 1 it does not or a process failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from bench.figure import BenchError
from bench.host import describe
from bench.measure import scratch
from bench.process import ROOT, anon_bytes
from bench.soak_roles import ROLES, Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_S: Final = 0.25
SERIES_MAX: Final = 120  # samples that are kept of each series
OVERTIME_S: Final = 120.0  # for followers to catch up once the writer has ended
TINY: Final = Plan(
    seconds=3,
    max_bytes=16 << 20,
    segment_bytes=1 << 20,
    batch_rows=50,
    writer_mb_s=20,
    paced_mb_s=3,
    verify_mb_s=20,
    pinned_for_s=1,
    seed=1,
)
SETTLED_SHARE: Final = 0.2  # of the time, before memory is expected to stand still
GROWTH_BYTES_MAX: Final = 64 << 20  # a queue fuller than before is no leak


def main(arguments: Sequence[str]) -> int:
    """Run a soak, print and save what came out, return the exit code."""
    options = _parser().parse_args(arguments)
    plan = TINY if options.tiny else _plan(options)
    with tempfile.TemporaryDirectory(prefix=".soak-", dir=options.dir) as folder:
        record = soak(Path(folder), plan)
    print(json.dumps({key: record[key] for key in ("figures", "broken")}, indent=1))
    if options.json or not options.tiny:
        path = options.json or ROOT / "bench" / "results" / f"soak-{_stamp(record)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}", file=sys.stderr)
    for broken in record["broken"]:
        print(f"BROKEN: {broken}", file=sys.stderr)
    return 1 if record["broken"] else 0


def soak(folder: Path, plan: Plan) -> dict[str, Any]:
    """Run all processes to their end in a folder; what they said, and whether it holds."""
    started = dt.datetime.now(dt.UTC)
    host = describe(folder)
    with scratch(folder, bytes_needed=2 * plan.max_bytes) as place:
        store = place / "run.kv"
        told, samples = _run_all(store, plan)
        figures = _figures(store, plan, told, samples)
    return {
        "started": started.isoformat(timespec="seconds"),
        "host": host._asdict(),
        "plan": plan._asdict(),
        "figures": figures,
        "broken": _broken(plan, figures),
        "told": told,
        "series": _thinned(samples),
    }


# ---- running ----


class Samples(threading.Thread):
    """Looks four times a second at the processes' memory and at what is on the disk."""

    def __init__(self, store: Path, pids: dict[str, int]):
        super().__init__(daemon=True)
        self._store = store
        self._pids = pids
        self._done = threading.Event()
        self.series: dict[str, list[float]] = {
            "seconds": [],
            "disk_bytes": [],
            "held_bytes": [],
            **{f"{name}_{what}": [] for name in pids for what in ("anon_bytes", "held_bytes")},
        }

    def run(self) -> None:
        """Sample until ``end``."""
        begun_s = time.monotonic()
        while not self._done.wait(SAMPLE_S):
            self._add("seconds", round(time.monotonic() - begun_s, 2))
            self._add("disk_bytes", _used_bytes(self._store))
            all_held: dict[int, int] = {}
            for name, pid in self._pids.items():
                all_held |= (held := _held(pid))
                self._add(f"{name}_held_bytes", sum(held.values()))
                self._add(f"{name}_anon_bytes", anon_bytes(pid) or 0)
            self._add("held_bytes", sum(all_held.values()))

    def end(self) -> dict[str, list[float]]:
        """Stop, and give what was seen."""
        self._done.set()
        self.join()
        return self.series

    def _add(self, name: str, value: float) -> None:
        self.series[name].append(value)


def _run_all(store: Path, plan: Plan) -> tuple[dict[str, Any], dict[str, list[float]]]:
    with contextlib.ExitStack() as stack:
        children = {role: _started(role, store, plan, stack) for role in ROLES}
        samples = Samples(store, {role: child.pid for role, (child, _) in children.items()})
        samples.start()
        due_s = time.monotonic() + plan.seconds + OVERTIME_S
        told = {}
        try:
            for role, (child, out) in children.items():
                told[role] = _told(role, child, out, due_s)
        finally:
            series = samples.end()
    return told, series


def _started(
    role: str, store: Path, plan: Plan, stack: contextlib.ExitStack
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    out = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
    command = [sys.executable, "-m", "bench.soak_roles", role, str(store)]
    child = subprocess.Popen([*command, json.dumps(plan._asdict())], cwd=ROOT, stdout=out)
    stack.callback(child.wait)
    stack.callback(child.kill)
    return child, out


def _told(role: str, child: subprocess.Popen[bytes], out: IO[bytes], due_s: float) -> Any:
    try:
        code = child.wait(max(0.0, due_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise BenchError(f"the {role} did not come to its end in time") from None
    if code:
        raise BenchError(f"the {role} ended with {code}; what it said stands above")
    out.seek(0)
    return json.loads(out.read())


def _used_bytes(store: Path) -> int:
    """What ``du`` would say of the store."""
    used = 0
    for folder, _, names in os.walk(store):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                used += (Path(folder) / name).stat().st_blocks * 512
    return used


def _held(pid: int) -> dict[int, int]:
    """Dropped segments that a process has open, by inode: bytes that are not free yet."""
    held: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).endswith(".mdb (deleted)"):
                    found = link.stat()
                    held[found.st_ino] = found.st_blocks * 512
    return held


# ---- the books ----


def _figures(
    store: Path, plan: Plan, told: dict[str, Any], samples: dict[str, list[float]]
) -> dict[str, Any]:
    writer = np.load(store.with_suffix(".writer.npz"))
    commits = writer["commits"].reshape(-1, 3)
    stalls = _stalls(commits[commits[:, 2] >= 0], writer["unlinks"].reshape(-1, 2))
    followers = {
        name: _follower(told[name], told["writer"]["rows"], store, commits, name)
        for name in ("fast", "paced")
    }
    return {
        "written_gb_s": told["writer"]["rows"] * 6168 / 1e9 / told["writer"]["seconds"],
        "rows": told["writer"]["rows"],
        "longest_append_ms": told["writer"]["longest_append_ms"],
        **followers,
        "commit": stalls,
        "verify": told["verify"],
        "pins": told["pins"],
        "disk": {
            "max_bytes": plan.max_bytes,
            "used_bytes_max": max(samples["disk_bytes"]),
            "held_bytes_max": max(samples["held_bytes"]),
            "held_share": {role: _held_share(samples, role) for role in ROLES},
        },
        "anon_mb": {role: _memory(samples, role) for role in ROLES},
    }


def _follower(
    told: dict[str, Any], written: int, store: Path, commits: NDArray[np.int64], name: str
) -> dict[str, Any]:
    moments = np.load(store.with_suffix(f".{name}.npy")).reshape(-1, 4)
    rows = commits[commits[:, 2] >= 0]
    # A batch's commit is the first whose last sequence is not less: sequences only grow.
    done_ns = rows[np.searchsorted(rows[:, 2], moments[:, 0]), 1]
    accounted = told["rows"] + told["rows_in_gaps"] + told["rows_before_the_first"]
    return {
        "rows": told["rows"],
        "gaps": told["gaps"],
        "rows_in_gaps": told["rows_in_gaps"],
        "lost_rows": told["lost_rows"] + abs(written - accounted - told["lost_rows"]),
        "doubled_rows": told["doubled_rows"],
        "damages": told["damages"],
        "append_to_delivery_ms": _percentiles(moments[:, 1] - moments[:, 2]),
        "commit_to_delivery_ms": _percentiles(moments[:, 1] - done_ns),
    }


def _stalls(commits: NDArray[np.int64], unlinks: NDArray[np.int64]) -> dict[str, Any]:
    """How long commits took, those apart during which segments were being removed."""
    during = np.zeros(len(commits), bool)
    for begun, done in unlinks:
        during |= (commits[:, 0] < done) & (commits[:, 1] > begun)
    lasted = commits[:, 1] - commits[:, 0]
    return {
        "ms": _percentiles(lasted[~during]),
        "ms_while_unlinking": _percentiles(lasted[during]),
        "unlinks": len(unlinks),
        "unlink_ms": _percentiles(unlinks[:, 1] - unlinks[:, 0]),
    }


def _percentiles(spans_ns: NDArray[np.int64]) -> dict[str, float]:
    if not len(spans_ns):
        return {"count": 0}
    spans_ms = spans_ns / 1e6
    p50, p99 = np.percentile(spans_ms, [50, 99])
    named = {"p50": p50, "p99": p99, "max": spans_ms.max()}
    return {"count": len(spans_ms), **{key: round(float(x), 3) for key, x in named.items()}}


def _memory(samples: dict[str, list[float]], role: str) -> dict[str, float]:
    """Most of it in the first and in the second half, once the process has settled."""
    seen = [value for value in samples[f"{role}_anon_bytes"] if value]
    seen = seen[int(len(seen) * SETTLED_SHARE) :]
    half = max(1, len(seen) // 2)
    return {
        "first_half_max": max(seen[:half], default=0) / 1e6,
        "second_half_max": max(seen[half:], default=0) / 1e6,
    }


def _held_share(samples: dict[str, list[float]], role: str) -> float:
    """Of all looks at a process, those at which it held the space of a dropped segment."""
    return round(float(np.mean(np.array(samples[f"{role}_held_bytes"]) > 0)), 3)


def _broken(plan: Plan, figures: dict[str, Any]) -> list[str]:
    """What was promised and does not hold."""
    found = [
        f"{name}: {figures[name][what]} {what}"
        for name in ("fast", "paced")
        for what in ("lost_rows", "doubled_rows", "damages")
        if figures[name][what]
    ]
    if figures["verify"]["damages"]:
        found.append(f"verify found damage: {figures['verify']['damages'][:3]}")
    if figures["pins"]["lost_rows"]:
        found.append(f"{figures['pins']['lost_rows']} rows of pinned ranges were dropped")
    if figures["disk"]["used_bytes_max"] > plan.max_bytes:
        found.append(f"{figures['disk']['used_bytes_max']} bytes used, limit {plan.max_bytes}")
    for role, memory in figures["anon_mb"].items():
        grown = memory["second_half_max"] - memory["first_half_max"]
        if grown > GROWTH_BYTES_MAX / 1e6:
            found.append(f"{role} grew by {grown:.0f} MB")
    return found


def _thinned(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    step = max(1, len(samples["seconds"]) // SERIES_MAX)
    return {name: values[::step] for name, values in samples.items()}


# ---- options ----


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        seconds=options.minutes * 60,
        max_bytes=options.max_bytes,
        segment_bytes=0,
        batch_rows=500,
        writer_mb_s=options.writer_mb_s,
        paced_mb_s=options.paced_mb_s,
        verify_mb_s=options.verify_mb_s,
        pinned_for_s=options.pinned_for,
        seed=1,
    )


def _stamp(record: dict[str, Any]) -> str:
    return str(record["started"]).replace(":", "").replace("+0000", "")


def _parser() -> argparse.ArgumentParser:
    from bench.__main__ import size_bytes  # noqa: PLC0415  # which imports this module

    parser = argparse.ArgumentParser(prog="python -m bench soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--max-bytes", type=size_bytes, default=size_bytes("4GB"))
    parser.add_argument("--writer-mb-s", type=float, default=0.0, help="0: as fast as it goes")
    parser.add_argument("--paced-mb-s", type=float, default=50.0, help="of the slow follower")
    parser.add_argument("--verify-mb-s", type=float, default=100.0)
    parser.add_argument("--pinned-for", type=float, default=30.0, help="seconds")
    parser.add_argument("--tiny", action="store_true", help="3 seconds: does it work at all")
    parser.add_argument("--json", type=Path, help="default: bench/results/, nothing with --tiny")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk to test")
    return parser
