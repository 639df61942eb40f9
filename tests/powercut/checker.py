"""Hold crash states against what was promised: one folder and one forked child for each state.

Owns the worker processes, the folders and the children's fate. Workers are spawned, not forked,
so that no thread or open store of the test session comes along; each forks a child per state, so
that a SIGBUS, an abort or a hang is that state's failure and the next one starts clean. Knows
nothing about stores: the check is the caller's, a top-level function

    check(folder: Path, state: State) -> str

that raises if the folder does not hold what state.promised says, and else returns in a word or
two what it met ("no store", "rows"), which the report counts.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from powercut import disk, recorder
from powercut.disk import State

Check = Callable[[Path, State], str]

CHECK_S_MAX = 30  # longer is a hang: one state takes milliseconds
WORKERS = 2  # the machine that CI runs on has two cores
CHUNKS_PER_WORKER = 4
SEEDS = 6
ANSWER_BYTES_MAX = 16384
FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Failure:
    """A state that broke the promise. The same seed and count draw the same state again."""

    point: int
    how: str
    event: str  # the last event before the cut
    message: str


@dataclass(repr=False)
class Report:
    """What became of the states."""

    met: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def count(self) -> int:
        """How many different states were checked."""
        return self.met.total()

    def __repr__(self) -> str:
        head = f"{self.count} states in {self.elapsed_s:.1f} s, {len(self.failures)} failed: "
        shown = (
            f"behind event {f.point}, {f.event} ({f.how}):\n{f.message}"
            for f in self.failures[:FAILURES_SHOWN]
        )
        return "\n".join((head + str(dict(self.met)), *shown))


def fast_folder() -> Path:
    """A new folder in memory where there is such a place; the caller removes it."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="powercut-", dir=place))


def materialise(state: State, folder: Path) -> None:
    """Lay the state out in that folder, which must be empty or absent."""
    folder.mkdir(exist_ok=True)
    for name in state.folders:
        (folder / name).mkdir()
    for name, data in state.files.items():
        (folder / name).write_bytes(data)


def check_log(
    log_path: Path,
    check: Check,
    *,
    count: int,
    seed: int,
    warm_up: Callable[[], object] = int,
) -> Report:
    """Check up to `count` different crash states of a recording; the report says how many.

    warm_up: called once in each worker, for what every child would otherwise set up anew.
    """
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    points = disk.crash_points(recorder.load(log_path), rng, count)
    # Neighbours stay together, so that no two chunks meet the same states.
    chunks = np.array_split(points, WORKERS * CHUNKS_PER_WORKER)
    spawned = multiprocessing.get_context("spawn")
    total = Report()
    with ProcessPoolExecutor(WORKERS, mp_context=spawned, initializer=warm_up) as pool:
        parts = [pool.submit(_check_share, log_path, check, c.tolist(), seed) for c in chunks]
        for part in (future.result() for future in parts):
            total.met += part.met
            total.failures += part.failures
    total.elapsed_s = time.perf_counter() - start
    return total


def is_caught(
    log_path: Path, check: Check, *, count: int, warm_up: Callable[[], object] = int
) -> bool:
    """Whether any state fails, of up to SEEDS times `count`: no recording is like another."""
    return any(
        check_log(log_path, check, count=count, seed=seed, warm_up=warm_up).failures
        for seed in range(1, SEEDS + 1)
    )


def _check_share(log_path: Path, check: Check, points: Sequence[int], seed: int) -> Report:
    events, report = recorder.load(log_path), Report()
    place = fast_folder()
    gc.freeze()  # or each child copies what its first collection touches
    try:
        for state in disk.crash_states(events, points, np.random.default_rng([seed, *points[:1]])):
            materialise(state, place / "disk")
            fine, answer = _in_child(check, place / "disk", state)
            shutil.rmtree(place / "disk")
            report.met[answer if fine else "failed"] += 1
            if not fine:
                event = events[state.point - 1]._replace(data=b"") if state.point else None
                report.failures.append(Failure(state.point, state.how, str(event), answer))
    finally:
        shutil.rmtree(place)
    return report


def _in_child(check: Check, folder: Path, state: State) -> tuple[bool, str]:
    """Whether the check passed, and its answer or how it died."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _answer(check, folder, state, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        return False, f"killed by {signal.Signals(-code).name}"
    return code == 0, answer


def _answer(check: Check, folder: Path, state: State, writing: int) -> None:
    """In the child: never returns."""
    signal.alarm(CHECK_S_MAX)
    code = 1
    try:
        text = check(folder, state)
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, it is this state's failure
        text = traceback.format_exc()
    os.write(writing, text.encode()[-ANSWER_BYTES_MAX:])
    os._exit(code)
