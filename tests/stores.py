"""What the tests of the store share: a full check of a store, and child processes.

`check_store` is to the tests what `verify` is to users: it reads every row of every stream with
its checksums and holds them against what the store says of itself. Not a test module: pytest
finds it beside those that import it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore

ROOT = Path(__file__).resolve().parent.parent

# Thousands of commits: in memory they cost nothing, next to a busy disk minutes. What syncing
# is for, a power cut, has its own tests.
# Examples are drawn alike in every run, so that a change is judged by what it changes. Others:
# KVSTORE_SEED=$RANDOM pytest -m "slow or not slow"
SEED = int(os.environ.get("KVSTORE_SEED", "0"))
MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is some."""
    folder = Path(tempfile.mkdtemp(prefix="kvstore-test-", dir=MEMORY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def check_store(path: Path) -> None:
    """Every row can be read, and the totals, counts, spans and orders agree with the rows."""
    with kvstore.open(path) as store:
        info = store.info()
        assert [stats.name for stats in info.streams] == list(store)
        for stats in info.streams:
            check_stream(store[stats.name], stats)


def check_stream(stream: kvstore.Stream, stats: kvstore.StreamStats) -> None:
    time = stream.schema.time
    batches = [batch[time] for batch in stream.read(fields=[time])]
    assert all((times[1:] >= times[:-1]).all() for times in batches)
    firsts = [times[0] for times in batches]
    assert firsts == sorted(firsts) or sub_ns(firsts)
    assert sum(map(len, batches)) == stats.rows == len(stream) == stream.count()
    assert stats.batches <= len(batches) <= stats.batches + 1  # the first may come in two pieces
    merged = [batch[time] for batch in stream.read(fields=[time], ordered=True)]
    if not batches:
        assert merged == []
        assert stream.span() is stream.first() is stream.last() is None
        return
    every = np.sort(np.concatenate(batches))
    assert np.array_equal(np.concatenate(merged), every)
    assert stream.span() == (stats.first, stats.last) == (every[0], every[-1])
    bare = {each.name for each in stream.schema.fields[1:] if each.np_dtype.kind in "biu"}
    fields = [time, *(name for name in stream.schema.names if name not in {*bare, time})]
    rows = sum(len(batch[time]) for batch in stream.read(fields=fields))
    assert rows == stats.rows
    with suppress(kvstore.NoFillError):  # of fields that were added later
        assert stream.first()[time][0] == every[0]
        assert stream.last()[time][0] == every[-1]


def sub_ns(times: list) -> bool:
    """Batches are keyed by ns: floats closer than that may come in their order of arrival."""
    plain = np.array(times)
    return plain.dtype.kind == "f" and bool((np.diff(plain) > -1.1e-9).all())


class Child(subprocess.Popen):
    """One that a failing test does not wait for: many of them never end by themselves."""

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.kill()
        super().__exit__(*error)


def start(code: str, *args: object, **options: object) -> Child:
    """A Python child that runs the code, which finds its arguments in ``sys.argv[1:]``."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, args)]
    return Child(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", None),
        text=True,
        **options,
    )


def run(code: str, *args: object, **options: object) -> str:
    """What the code prints; fails if the child does."""
    with start(code, *args, **options) as child:
        out, _ = child.communicate(timeout=120)
    assert child.returncode == 0, f"exit {child.returncode}: {out}"
    return out


def quick_first(cases: Iterable[str]) -> list[Any]:
    """Parameters of a test: the first is in the default suite, the others are slow."""
    first, *others = cases
    return [first, *(pytest.param(each, marks=pytest.mark.slow) for each in others)]


# ---- numbered batches: one time each, `v` numbers the rows through ----

BATCH_ROWS = 50


def append_batches(store, numbers):
    for batch in numbers:
        rows = np.arange(batch * BATCH_ROWS, (batch + 1) * BATCH_ROWS)
        noise = np.random.default_rng(batch).integers(0, 2**62, (BATCH_ROWS, 10))
        times = np.full(BATCH_ROWS, float(batch))
        store.stream("s").append({"time": times, "v": rows, "noise": noise})
        store.flush()


def rows_of(stream, **options):
    """All rows' numbers; whole batches, in order, nothing twice."""
    found = [batch["v"] for batch in stream.read(fields=["v"], **options)]
    rows = np.concatenate([np.zeros(0, int), *found])
    assert len(rows) % BATCH_ROWS == 0
    assert np.array_equal(rows, np.arange(len(rows)))
    return len(rows)
